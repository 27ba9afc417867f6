"""The filter of system calls: what it decides, by an interpreter of its own, and what it does, in real processes."""

from __future__ import annotations

import errno
import functools
import os
import re
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from safe_exec.keeper.seccomp import SECCOMP
from safe_exec.sandbox.host import seccomp_policy
from tests.support import ROOT, ordinary_user

ARCHITECTURES = tuple(seccomp_policy.ARCHITECTURES)
REFUSALS: tuple[seccomp_policy.Refusal, ...] = seccomp_policy.REFUSALS
BOTH = [(arch, refusal) for arch in ARCHITECTURES for refusal in REFUSALS]
HEADERS = {
    "x86_64": ("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "/usr/include/asm/unistd_64.h"),
    "aarch64": ("/usr/include/asm-generic/unistd.h",),
}

ALLOW, EPERM, ENOSYS, KILL = 0x7FFF0000, 0x50001, 0x50026, 0x80000000


def refused(refusal: str) -> int:
    return KILL if refusal == "kill" else EPERM


# --- an interpreter ---------------------------------------------------------------------------------------------


def decide(program: bytes, number: int, *arguments: int, arch: int) -> int:
    """What the system would answer; every load is checked as it checks them (kernel/seccomp_policy.c, seccomp_check_filter)."""
    padded = [*arguments, *[0] * (6 - len(arguments))]
    data = struct.pack("<IIQ6Q", number, arch, 0, *padded)
    code = [struct.unpack_from("<HBBI", program, at) for at in range(0, len(program), 8)]
    at, accumulator = 0, 0
    while True:
        operation, yes, no, operand = code[at]
        at += 1
        if operation == 0x20:
            assert operand % 4 == 0 and operand + 4 <= len(data)
            (accumulator,) = struct.unpack_from("<I", data, operand)
        elif operation == 0x15:
            at += yes if accumulator == operand else no
        elif operation == 0x25:
            at += yes if accumulator > operand else no
        elif operation == 0x45:
            at += yes if accumulator & operand else no
        else:
            assert operation == 0x06, hex(operation)
            assert isinstance(operand, int)
            return operand


program = functools.cache(seccomp_policy.program)


def answer(arch: str, refusal: seccomp_policy.Refusal, number: int, *arguments: int) -> int:
    return decide(
        program(arch, refusal), number, *arguments, arch=seccomp_policy.ARCHITECTURES[arch]
    )


def column(arch: str, numbers: seccomp_policy.Numbers) -> dict[str, int]:
    return {
        name: number
        for name, row in numbers.items()
        if (number := row[ARCHITECTURES.index(arch)]) is not None
    }


def judged(arch: str, name: str) -> int:
    return seccomp_policy.JUDGED[name][ARCHITECTURES.index(arch)]


# --- decisions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arch", "refusal"), BOTH)
def test_every_number(arch: str, refusal: seccomp_policy.Refusal) -> None:
    """With arguments that nobody minds."""
    expected = dict.fromkeys(column(arch, seccomp_policy.NEVER).values(), refused(refusal))
    expected |= dict.fromkeys(column(arch, seccomp_policy.PROBED).values(), EPERM) | {435: ENOSYS}
    expected |= dict.fromkeys(range(seccomp_policy.NEWEST + 1, 1024), ENOSYS)
    found = {number: answer(arch, refusal, number) for number in range(1024)}
    assert {number: verdict for number, verdict in found.items() if verdict != ALLOW} == expected


@pytest.mark.parametrize(("arch", "refusal"), BOTH)
@pytest.mark.parametrize(
    ("name", "arguments", "kind"),
    [
        ("clone", (0x1200011,), "allow"),  # fork: SIGCHLD, CLONE_CHILD_SETTID, CLONE_CHILD_CLEARTID
        ("clone", (0x3D0F00,), "allow"),  # a thread
        ("clone", (0x4111,), "allow"),  # vfork
        ("clone", (0x80 | 17,), "allow"),  # CLONE_NEWTIME's bit is the signal's here
        *(
            ("clone", (flag | 17,), "refuse")
            for flag in (
                0x20000,
                0x2000000,
                0x4000000,
                0x8000000,
                0x10000000,
                0x20000000,
                0x40000000,
            )
        ),
        ("clone", (1 << 40 | 0x10000000,), "refuse"),
        ("clone", (17, 0x10000000), "allow"),  # that is the stack
        ("ioctl", (0, 0x5412), "refuse"),
        ("ioctl", (0, 0x541C), "refuse"),
        ("ioctl", (0, 1 << 32 | 0x5412), "refuse"),  # the kernel takes the lower half alone
        ("ioctl", (0, 0xFFFFFFFF_0000541C), "refuse"),
        ("ioctl", (0, 0x5401), "allow"),
        ("ioctl", (0x5412, 0), "allow"),
        ("ioctl", (0, 0x5412 << 32), "allow"),
        *(("socket", (family, 3), "deny") for family in (15, 17, 38, 40, 44)),
        ("socket", (1 << 32 | 17, 3), "deny"),
        *(("socket", (family, 1), "allow") for family in (1, 2, 10, 16)),
        *(
            ("personality", (wish,), "allow")
            for wish in (0, 0xFFFFFFFF, 8, 0x40000, 0x40008, 0x20008)
        ),
        *(
            ("personality", (wish,), "refuse")
            for wish in (0x400000, 0x440000, 0x100000, 6, 0xFFFFFFFE)
        ),
    ],
)
def test_what_hangs_on_arguments(
    arch: str, refusal: seccomp_policy.Refusal, name: str, arguments: tuple[int, ...], kind: str
) -> None:
    verdicts = {"allow": ALLOW, "deny": EPERM, "refuse": refused(refusal)}
    assert answer(arch, refusal, judged(arch, name), *arguments) == verdicts[kind]


words = st.integers(0, 2**32 - 1)
longs = st.integers(0, 2**64 - 1)


@settings(deadline=None)
@given(st.sampled_from(BOTH), words, words, st.lists(longs, max_size=6))
@example(("x86_64", "errno"), 0x40000003, 0, [])  # i386
def test_any_call_of_another_architecture_kills(
    which: tuple[str, seccomp_policy.Refusal], arch: int, number: int, arguments: list[int]
) -> None:
    if arch != seccomp_policy.ARCHITECTURES[which[0]]:
        assert decide(program(*which), number, *arguments, arch=arch) == KILL


@settings(deadline=None)
@given(st.sampled_from(BOTH), st.one_of(st.integers(0, 600), words), st.lists(longs, max_size=6))
def test_any_call_gets_a_verdict(
    which: tuple[str, seccomp_policy.Refusal], number: int, arguments: list[int]
) -> None:
    assert answer(*which, number, *arguments) in {ALLOW, EPERM, ENOSYS, refused(which[1])}


@settings(deadline=None)
@given(
    st.sampled_from(BOTH),
    st.sampled_from(list(seccomp_policy.JUDGED)),
    st.lists(longs, min_size=6, max_size=6),
)
def test_upper_halves_do_not_count(
    which: tuple[str, seccomp_policy.Refusal], name: str, arguments: list[int]
) -> None:
    number = judged(which[0], name)
    assert answer(*which, number, *arguments) == answer(
        *which, number, *(value & 0xFFFFFFFF for value in arguments)
    )


@settings(deadline=None)
@given(st.sampled_from(REFUSALS), words)
def test_x32_is_refused(refusal: seccomp_policy.Refusal, number: int) -> None:
    if number & 0x40000000:
        assert answer("x86_64", refusal, number) == (
            ALLOW if number == 0xFFFFFFFF else refused(refusal)
        )


# --- numbers and files ------------------------------------------------------------------------------------------


def header(arch: str) -> dict[str, int]:
    """The numbers as the C library's headers have them, none where they are not installed."""
    for path in filter(Path.exists, map(Path, HEADERS[arch])):
        found = re.findall(r"^#define __NR(?:3264)?_(\w+)\s+(\d+)$", path.read_text(), re.MULTILINE)
        return {name: int(number) for name, number in found}
    return {}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_numbers_are_those_of_the_headers(arch: str) -> None:
    real = header(arch)
    every = column(arch, seccomp_policy.NEVER | seccomp_policy.PROBED) | {
        name: judged(arch, name) for name in seccomp_policy.JUDGED
    }
    every |= {"clone3": seccomp_policy.CLONE3, "seccomp": SECCOMP[arch]}
    assert len(set(every.values())) == len(every)
    if real:
        newer = max(real.values())
        assert {
            name: number
            for name, number in every.items()
            if real.get(name) != number and number <= newer
        } == {}
        missing = {
            name
            for name, row in seccomp_policy.NEVER.items()
            if row[ARCHITECTURES.index(arch)] is None
        }
        assert missing & set(real) == set()


@pytest.mark.parametrize(("arch", "refusal"), BOTH)
def test_the_shipped_program_is_what_is_generated(
    arch: str, refusal: seccomp_policy.Refusal
) -> None:
    """Else: ``python -m safe_exec.sandbox.host.seccomp_policy``."""
    assert (
        Path(seccomp_policy.FILTERS) / f"{arch}-{refusal}.bpf"
    ).read_bytes() == seccomp_policy.program(arch, refusal)


def test_no_other_program_is_shipped() -> None:
    assert {path.name for path in Path(seccomp_policy.FILTERS).iterdir()} == {
        f"{arch}-{refusal}.bpf" for arch, refusal in BOTH
    }


def test_another_architecture_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere:
        machine = "riscv64"

    monkeypatch.setattr(os, "uname", Elsewhere)
    with pytest.raises(OSError, match=r"^no filter for riscv64$"):
        seccomp_policy.load("errno")
    with pytest.raises(OSError, match=r"^no filter for riscv64$"):
        seccomp_policy.program("riscv64", "kill")


def test_a_32_bit_program_is_told_that_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "maxsize", 2**31 - 1)
    with pytest.raises(OSError, match="no filter for 32-bit programs on"):
        seccomp_policy.load("errno")


# --- in real processes ------------------------------------------------------------------------------------------

USERS = pytest.mark.parametrize(
    "prefix",
    [
        pytest.param([], id="root"),
        pytest.param(ordinary_user(), id="user", marks=pytest.mark.bed("ordinary-user")),
    ],
)

START = """
import ctypes, errno, os, signal, subprocess, sys
sys.path.append(sys.argv[1])
from safe_exec.keeper import seccomp
from safe_exec.sandbox.host import seccomp_policy
if sys.argv[2] != "none":
    seccomp.install(seccomp_policy.load(sys.argv[2]))
libc = ctypes.CDLL(None, use_errno=True)
column = list(seccomp_policy.ARCHITECTURES).index(os.uname().machine)
numbers = {name: row[column] for name, row in {**seccomp_policy.NEVER, **seccomp_policy.PROBED, **seccomp_policy.JUDGED, "clone3": (435, 435)}.items()}

def call(name, *arguments):
    "The number of the error, 0 where it went well."
    wide = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return ctypes.get_errno() if libc.syscall(ctypes.c_long(numbers[name]), *wide) == -1 else 0
"""

# Each is harmless should it come through, and fails otherwise than with EPERM, at least for root, where no filter stands.
PROBES = {
    "ptrace": "call('ptrace', 0, 0, 0, 0)",  # PTRACE_TRACEME
    "unshare": "call('unshare', 0x10000000)",
    "setns": "call('setns', -1, 0)",
    "mount": "call('mount', None, None, None, 0, None)",
    "umount2": "call('umount2', None, 0)",
    "fsopen": "call('fsopen', None, 0)",
    "open_tree": "call('open_tree', -1, None, 0)",
    "bpf": "call('bpf', 0, None, 0)",
    "open_by_handle_at": "call('open_by_handle_at', -1, None, 0)",
    "userfaultfd": "call('userfaultfd', 1)",
    "pidfd_getfd": "call('pidfd_getfd', -1, 0, 0)",
    "finit_module": "call('finit_module', -1, b'', 0)",
    "clone": "call('clone', 0x10000000 | 0x11, 0, 0, 0, 0) if os.getppid() else 0",
    "TIOCSTI": "call('ioctl', os.openpty()[1], 0x5412, b'x')",
    "TIOCSTI with an upper half": "call('ioctl', os.openpty()[1], 1 << 32 | 0x5412, b'x')",
    "TIOCLINUX": "call('ioctl', os.openpty()[1], 0x541C, b'')",
    "personality": "call('personality', 0x400000)",
}
SOFT_PROBES = {
    "keyctl": "call('keyctl', 0, -3, 0)",  # KEYCTL_GET_KEYRING_ID of the session
    "io_uring_setup": "call('io_uring_setup', 1, None)",
    "process_vm_writev": "call('process_vm_writev', os.getpid(), None, 0, None, 0, 0)",
    "move_pages": "call('move_pages', 0, -1, 0, 0, 0, 0)",
    "migrate_pages": "call('migrate_pages', -1, 0, 0, 0)",
    "kcmp": "call('kcmp', os.getpid(), os.getpid(), 0, 0, 1)",
    "adjtimex": "call('adjtimex', None)",
    "AF_PACKET": "call('socket', 17, 99, 0)",
    "AF_ALG": "call('socket', 38, 99, 0)",
    "AF_VSOCK": "call('socket', 40, 99, 0)",
}


def inside(
    refusal: str, code: str, prefix: list[str], *, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    argv = [*prefix, sys.executable, "-c", START + code, str(ROOT), refusal]
    return subprocess.run(
        argv, capture_output=True, text=True, timeout=timeout, check=False, cwd="/"
    )


def succeeds(refusal: str, code: str, prefix: list[str]) -> None:
    done = inside(refusal, code + "\nprint('to the end')", prefix)
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["to the end"]), done.stderr


@USERS
def test_refused_calls_give_eperm(prefix: list[str]) -> None:
    every = PROBES | SOFT_PROBES
    done = inside("errno", "".join(f"print({probe})\n" for probe in every.values()), prefix)
    assert dict(zip(every, map(int, done.stdout.split()), strict=True)) == dict.fromkeys(
        every, errno.EPERM
    ), done.stderr


@pytest.mark.bed("root")  # anybody else is refused most of them in any case
def test_without_the_filter_they_do_not() -> None:
    """Or the tests above would show nothing."""
    for name, probe in (PROBES | SOFT_PROBES).items():
        done = inside("none", f"found = {probe}\nprint(found, flush=True)\nos._exit(0)", [])
        assert str(errno.EPERM) not in done.stdout.split() and done.stdout.split(), (
            name,
            done.stdout,
            done.stderr,
        )


@pytest.mark.bed("ordinary-user")
def test_without_the_filter_an_ordinary_user_may_be_traced() -> None:
    assert inside(
        "none", f"print({PROBES['ptrace']}, flush=True)\nos._exit(0)", ordinary_user()
    ).stdout.split() == ["0"]


@USERS
@pytest.mark.parametrize("name", list(PROBES))
def test_refused_calls_end_the_process(prefix: list[str], name: str) -> None:
    done = inside("kill", f"print('before', flush=True)\n{PROBES[name]}\nprint('after')", prefix)
    assert (done.returncode, done.stdout.split()) == (-signal.SIGSYS, ["before"]), done.stderr


@USERS
def test_what_libraries_probe_does_not_end_it(prefix: list[str]) -> None:
    done = inside("kill", "".join(f"print({probe})\n" for probe in SOFT_PROBES.values()), prefix)
    assert done.stdout.split() == ["1"] * len(SOFT_PROBES), done.stderr


@pytest.mark.parametrize("refusal", REFUSALS)
def test_clone3_is_not_there(refusal: str) -> None:
    done = inside(refusal, "print(call('clone3', None, 0))", [])
    assert done.stdout.split() == [str(errno.ENOSYS)]


@pytest.mark.parametrize("refusal", REFUSALS)
def test_what_comes_from_it_is_under_the_filter_too(refusal: str) -> None:
    code = "sys.exit(subprocess.run(['/usr/bin/unshare', '--user', 'true'], stderr=subprocess.DEVNULL).returncode)"
    done = inside(refusal, code, [])
    assert done.returncode == (1 if refusal == "errno" else 256 - signal.SIGSYS)


def test_a_32_bit_call_ends_the_process() -> None:
    """``int 0x80`` with the number of getpid on i386, which on x86_64 is writev's."""
    if os.uname().machine == "x86_64":
        code = """
import mmap
page = mmap.mmap(-1, 4096, prot=7)
page.write(bytes.fromhex("b814000000cd80c3"))  # mov eax, 20; int 0x80; ret
ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
"""
        assert inside("errno", code, []).returncode == -signal.SIGSYS
        assert inside("none", code, []).returncode in (0, -signal.SIGSEGV)


@pytest.mark.parametrize("refusal", REFUSALS)
def test_x32_calls_are_refused(refusal: str) -> None:
    if os.uname().machine == "x86_64":
        code = "libc.syscall(ctypes.c_long(0x40000000 | 39))\nprint(ctypes.get_errno())"  # getpid
        done = inside(refusal, code, [])
        expected = (0, ["1"]) if refusal == "errno" else (-signal.SIGSYS, [])
        assert (done.returncode, done.stdout.split()) == expected


def test_what_cannot_be_installed_is_named() -> None:
    code = "try:\n    seccomp.install(bytes(8))\nexcept OSError as error:\n    print(error)"
    done = inside("none", code, [])
    assert (
        done.stdout.strip()
        == "[Errno 22] cannot install the filter of system calls: Invalid argument"
    ), done.stderr


# --- what must go on working ------------------------------------------------------------------------------------

WORKS = {
    "fork": "pid = os.fork()\nif not pid: os._exit(7)\nassert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7",
    "threads": """
import threading
seen = []
threads = [threading.Thread(target=seen.append, args=(n,)) for n in range(20)]
[t.start() for t in threads]; [t.join() for t in threads]
assert sorted(seen) == list(range(20))
""",
    "subprocess": """
assert subprocess.run(['/bin/sh', '-c', 'ls / | wc -l'], capture_output=True).returncode == 0
pid = os.posix_spawn('/bin/true', ['true'], {})
assert os.waitpid(pid, 0)[1] == 0
""",
    "multiprocessing": """
import multiprocessing
with multiprocessing.get_context('fork').Pool(3) as pool:
    assert pool.map(abs, range(-9, 0)) == list(range(9, 0, -1))
from concurrent.futures import ProcessPoolExecutor
with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context('forkserver')) as pool:
    assert list(pool.map(abs, [-1, -2])) == [1, 2]
""",
    "asyncio": """
import asyncio
async def main():
    child = await asyncio.create_subprocess_exec('/bin/echo', 'x', stdout=subprocess.PIPE)
    assert (await child.communicate())[0] == b'x\\n'
    await asyncio.to_thread(sum, [1])
    server = await asyncio.start_server(lambda r, w: w.close(), '127.0.0.1', 0)
    r, w = await asyncio.open_connection(*server.sockets[0].getsockname())
    assert await r.read() == b''
    w.close()
asyncio.run(main())
""",
    "sockets": """
import socket
assert socket.getaddrinfo('localhost', 80)
for family in (socket.AF_INET, socket.AF_UNIX, socket.AF_NETLINK):
    socket.socket(family, socket.SOCK_DGRAM).close()
a, b = socket.socketpair()
a.send(b'x'); assert b.recv(1) == b'x'
assert socket.if_nameindex()
""",
    "terminals": """
import pty, termios
leader, follower = os.openpty()
termios.tcgetattr(follower); assert os.isatty(follower)
assert os.get_terminal_size(follower) is not None
pid, fd = pty.fork()
if not pid: os._exit(0)
os.waitpid(pid, 0)
""",
    "personality": "assert not call('personality', 0xFFFFFFFF) and not call('personality', 0x40000)",
    "descriptors": "import signal; fd = os.pidfd_open(os.getpid()); os.memfd_create('x'); signal.pidfd_send_signal(fd, 0)",
    "numpy": """
import numpy as np
a = np.random.default_rng(1).random((400, 400))
assert np.allclose(np.linalg.inv(a) @ a, np.eye(400))
""",
    "numba": """
import numba, numpy as np
@numba.njit(parallel=True)
def total(a):
    s = 0.0
    for i in numba.prange(a.size):
        s += a[i]
    return s
assert total(np.ones(1000)) == 1000
""",
    "pandas": "import pandas as pd; assert pd.DataFrame({'a': [1, 2]}).groupby('a').size().sum() == 2",
    "a notebook": """
import nbformat, tempfile
from nbclient import NotebookClient
os.environ['HOME'] = os.environ['IPYTHONDIR'] = os.environ['JUPYTER_RUNTIME_DIR'] = tempfile.mkdtemp()
cells = [nbformat.v4.new_code_cell(source) for source in ('!echo from a shell', 'import threading, numpy; 6 * 7')]
node = NotebookClient(nbformat.v4.new_notebook(cells=cells), kernel_name='python3').execute()
assert 'from a shell' in node.cells[0].outputs[0].text
assert node.cells[1].outputs[0].data['text/plain'] == '42'
""",
}


def cases() -> Iterator[tuple[str, list[str], str]]:
    """Root under both refusals, an ordinary user under the harsher one, which allows nothing that the other does not."""
    for name in WORKS:
        yield from ((name, [], refusal) for refusal in REFUSALS)
        yield name, ordinary_user(), "kill"


@pytest.mark.parametrize(
    ("name", "prefix", "refusal"),
    [
        pytest.param(
            *c,
            id=f"{c[0]}-{c[2]}-{'user' if c[1] else 'root'}",
            marks=[pytest.mark.bed("ordinary-user")] if c[1] else [],
        )
        for c in cases()
    ],
)
def test_what_notebooks_do_works(name: str, prefix: list[str], refusal: str) -> None:
    succeeds(refusal, WORKS[name], prefix)
