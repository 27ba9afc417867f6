"""Walls by Landlock: which rules are made for which ABI, and what can be done inside, in real processes."""

from __future__ import annotations

import itertools
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safe_exec.keeper import landlock
from tests.support import ROOT, ordinary_user, private_directory

HEADER = Path("/usr/include/linux/landlock.h")
NAMES = (
    "EXECUTE", "WRITE_FILE", "READ_FILE", "READ_DIR", "REMOVE_DIR", "REMOVE_FILE", "MAKE_CHAR", "MAKE_DIR", "MAKE_REG", "MAKE_SOCK",
    "MAKE_FIFO", "MAKE_BLOCK", "MAKE_SYM", "REFER", "TRUNCATE", "IOCTL_DEV",
)  # fmt: skip

# --- which rules ------------------------------------------------------------------------------------------------


def test_bits_are_those_of_the_header() -> None:
    assert [getattr(landlock, name) for name in NAMES] == [1 << bit for bit in range(16)]
    text = HEADER.read_text() if HEADER.exists() else ""
    for name, bit in re.findall(r"define LANDLOCK_ACCESS_FS_(\w+)\s+\(1ULL << (\d+)\)", text):
        assert getattr(landlock, name, 1 << int(bit)) == 1 << int(bit)


# abi: handled_access_fs, handled_access_net with tcp=False, scoped; as the documentation's table of versions has them
HANDLED = {
    1: (0x1FFF, 0, 0), 2: (0x3FFF, 0, 0), 3: (0x7FFF, 0, 0), 4: (0x7FFF, 3, 0), 5: (0xFFFF, 3, 0), 6: (0xFFFF, 3, 3), 7: (0xFFFF, 3, 3),
    99: (0xFFFF, 3, 3),
}  # fmt: skip


@pytest.mark.parametrize("abi", list(HANDLED))
def test_what_is_handled(abi: int) -> None:
    assert landlock.handled(abi, tcp=False) == HANDLED[abi]
    for tcp in (None, True):
        assert landlock.handled(abi, tcp=tcp) == (HANDLED[abi][0], 0, HANDLED[abi][2])


@pytest.mark.parametrize("abi", list(HANDLED))
def test_rules_stay_within_what_is_handled(abi: int) -> None:
    """The system refuses a rule that speaks of anything else."""
    found = landlock.rules(abi, readable=["/a", "/b"], writable=["/b", "/c"])
    assert list(found) == ["/a", "/b", "/c"]
    assert found["/a"] == landlock.EXECUTE | landlock.READ_FILE | landlock.READ_DIR
    assert (
        found["/b"] == found["/c"] == HANDLED[abi][0] & ~(landlock.MAKE_CHAR | landlock.MAKE_BLOCK)
    )


def test_walls_by_abi() -> None:
    assert not any(landlock.describe(0).values())
    assert all(landlock.describe(6).values()) and landlock.describe(6) == landlock.describe(7)
    grown = [{name for name, given in landlock.describe(abi).items() if given} for abi in range(7)]
    new = [sorted(after - before) for before, after in itertools.pairwise(grown)]
    assert new == [
        ["files"],
        [],
        ["truncation"],
        ["tcp"],
        ["devices"],
        ["abstract_sockets", "signals"],
    ]


# --- all but ----------------------------------------------------------------------------------------------------

TREE = {
    "/": ["etc", "home", "usr", "bin", "shut"],
    "/home": ["me", "you"],
    "/home/me": [".ssh", "work", "link", "x y"],
    "/home/me/work": ["a"],
}
LINKS = {"/bin": "/usr/bin", "/home/me/link": "/home/me/.ssh"}


def listdir(path: str) -> list[str]:
    if path == "/shut":
        raise PermissionError(path)
    return TREE.get(path, [])


def all_but(*hidden: str) -> list[str]:
    return landlock.all_but(
        hidden,
        listdir=listdir,
        islink=LINKS.__contains__,
        resolve=lambda path: LINKS.get(path, path),
    )


@pytest.mark.parametrize(
    ("hidden", "expected"),
    [
        ([], ["/"]),
        (["/"], []),
        (["/home"], ["/etc", "/shut", "/usr"]),
        (["/home/me"], ["/etc", "/home/you", "/shut", "/usr"]),
        (
            ["/home/me/.ssh"],
            ["/etc", "/home/me/work", "/home/me/x y", "/home/you", "/shut", "/usr"],
        ),
        (
            ["/home/me/link"],
            ["/etc", "/home/me/work", "/home/me/x y", "/home/you", "/shut", "/usr"],
        ),  # the target is meant
        (["/home/me/.ssh", "/home"], ["/etc", "/shut", "/usr"]),
        (["/home/me", "/home/you"], ["/etc", "/shut", "/usr"]),
        (
            ["/home/me/to/come"],
            [
                "/etc",
                "/home/you",
                "/shut",
                "/usr",
                "/home/me/.ssh",
                "/home/me/work",
                "/home/me/x y",
            ],
        ),
        (["/shut/in"], ["/etc", "/home", "/usr"]),
        (["//home"], ["/etc", "/shut", "/usr"]),
    ],
)
def test_all_but(hidden: list[str], expected: list[str]) -> None:
    assert all_but(*hidden) == sorted(expected)


names = st.sampled_from(["a", "b", "c"])
paths = st.lists(names, min_size=1, max_size=4).map(lambda parts: "/" + "/".join(parts))


@settings(deadline=None)
@given(st.lists(paths, min_size=1, max_size=4), paths)
def test_what_is_opened_is_all_but_the_hidden_trees_and_what_lies_above(
    hidden: list[str], path: str
) -> None:
    def within(path: str, top: str) -> bool:
        return PurePosixPath(path).is_relative_to(top)

    found = landlock.all_but(
        hidden, listdir=lambda _: ["a", "b", "c"], islink=lambda _: False, resolve=str
    )
    opened = any(within(path, top) for top in found)
    closed = any(within(path, top) for top in hidden)
    above = any(within(top, path) for top in hidden)
    assert opened == (not closed and not above)
    assert not any(within(one, other) for one in found for other in found if one != other)


def test_only_directories_above_hidden_ones_are_listed() -> None:
    asked: list[str] = []

    def watching(path: str) -> list[str]:
        asked.append(path)
        return listdir(path)

    landlock.all_but(["/home/me/.ssh"], listdir=watching, islink=LINKS.__contains__, resolve=str)
    assert sorted(asked) == ["/", "/home", "/home/me"]


# --- in real processes ------------------------------------------------------------------------------------------

USERS = pytest.mark.parametrize(
    "prefix",
    [
        pytest.param([], id="root", marks=pytest.mark.bed("landlock")),
        pytest.param(
            ordinary_user(), id="user", marks=pytest.mark.bed("landlock", "ordinary-user")
        ),
    ],
)

START = """
import ctypes, errno, os, signal, socket, subprocess, sys
from pathlib import Path
sys.path.append(sys.argv[1])
from safe_exec.keeper import landlock
top = Path(sys.argv[2])
hidden, work, other = top / "hidden", top / "work", top / "other"

def tried(function, *arguments):
    "'ok', or the name of the error."
    try:
        function(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno]
    return "ok"

def restrict(tcp=None, writable=(work, "/dev")):
    landlock.restrict(readable=landlock.all_but([str(hidden)]), writable=map(str, writable), tcp=tcp)
"""


@pytest.fixture
def top() -> Iterator[Path]:
    with private_directory() as path:
        for name in ("hidden", "work", "work/in", "other", "hidden/deep"):
            (path / name).mkdir()
            (path / name / "file").write_text(f"in {name}")
            (path / name).chmod(0o777)
            (path / name / "file").chmod(0o666)
        (path / "link").symlink_to(path / "hidden")
        yield path


def inside(code: str, top: Path, prefix: list[str]) -> list[str]:
    argv = [*prefix, sys.executable, "-c", START + code, str(ROOT), str(top)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False, cwd="/")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.split()


READS = """
print(tried(os.listdir, hidden), tried((hidden / "file").read_text), tried((hidden / "deep" / "file").read_text))
print(tried(os.listdir, top / "link"), tried(os.open, hidden, os.O_RDONLY), tried((other / "file").read_text))
"""


@USERS
def test_a_hidden_directory_cannot_be_listed_or_read(top: Path, prefix: list[str]) -> None:
    assert inside(READS, top, prefix) == ["ok"] * 6  # or the next line would show nothing
    assert inside("restrict()" + READS, top, prefix) == ["EACCES"] * 5 + ["ok"]


@USERS
def test_all_else_can(top: Path, prefix: list[str]) -> None:
    code = """
restrict()
print((other / "file").read_text().split()[1], *sorted(os.listdir(other)), tried(os.listdir, "/usr/lib"), tried(Path("/bin/sh").read_bytes))
print(tried(os.listdir, top), tried(os.listdir, "/"), tried(os.stat, hidden / "file"))  # above hidden ones; and what is no reading
"""
    assert inside(code, top, prefix) == ["other", "file", "ok", "ok", "EACCES", "EACCES", "ok"]


WRITES = """
old = other / "file"
print(tried(old.write_text, "x"), tried((other / "new").write_text, "x"), tried(os.mkdir, other / "dir"), tried(os.truncate, old, 1))
print(tried(os.symlink, "x", other / "link"), tried(os.mkfifo, other / "fifo"), tried(os.unlink, old), tried(os.rmdir, other / "dir"))
"""


@USERS
def test_nothing_is_written_outside_the_writable_trees(top: Path, prefix: list[str]) -> None:
    assert inside("restrict()" + WRITES, top, prefix) == ["EACCES"] * 7 + ["ENOENT"]
    assert (top / "other/file").read_text() == "in other" and [
        path.name for path in (top / "other").iterdir()
    ] == ["file"]
    assert inside(WRITES, top, prefix) == ["ok"] * 8


@USERS
def test_within_them_it_is(top: Path, prefix: list[str]) -> None:
    assert inside("restrict()\nother = work" + WRITES, top, prefix) == ["ok"] * 8


@USERS
def test_files_move_between_writable_trees_only(top: Path, prefix: list[str]) -> None:
    code = """
restrict()
print(tried(os.rename, work / "file", work / "in" / "moved"), tried(os.link, work / "in" / "moved", work / "again"))
print(tried(os.rename, work / "again", other / "again"), tried(os.rename, other / "file", work / "taken"))
"""
    assert inside(code, top, prefix) == ["ok", "ok", "EACCES", "EACCES"]


@USERS
def test_a_writable_tree_may_lie_in_a_hidden_one(top: Path, prefix: list[str]) -> None:
    code = """
restrict(writable=[hidden / "deep"])
print(tried((hidden / "deep" / "file").read_text), tried((hidden / "deep" / "new").write_text, "x"), tried((hidden / "file").read_text))
"""
    assert inside(code, top, prefix) == ["ok", "ok", "EACCES"]


@USERS
def test_a_single_file_may_be_writable(top: Path, prefix: list[str]) -> None:
    code = 'restrict(writable=[other / "file"])\nprint(tried((other / "file").write_text, "x"), tried((other / "new").write_text, "x"))'
    assert inside(code, top, prefix) == ["ok", "EACCES"]


@USERS
def test_what_is_missing_is_left_out(top: Path, prefix: list[str]) -> None:
    code = 'restrict(writable=[top / "none", other / "file" / "x", work])\nprint(tried((work / "file").write_text, "x"))'
    assert inside(code, top, prefix) == ["ok"]


@pytest.mark.bed("root", "landlock")
def test_no_device_of_the_disk_is_made(top: Path) -> None:
    code = (
        "import stat; print(tried(os.mknod, work / 'disk', stat.S_IFBLK | 0o600, os.makedev(8, 0)))"
    )
    assert inside("restrict()\n" + code, top, []) == ["EACCES"]
    assert inside(code, top, []) == ["ok"]


CONNECT = """
ours = socket.socket()
print(tried(socket.create_connection, ("127.0.0.1", {port})), tried(ours.bind, ("127.0.0.1", 0)))
print(tried(socket.socket(type=socket.SOCK_DGRAM).bind, ("127.0.0.1", 0)))
"""


@USERS
@pytest.mark.parametrize(("tcp", "expected"), [(False, "EACCES"), (True, "ok"), (None, "ok")])
def test_tcp(top: Path, prefix: list[str], tcp: bool | None, expected: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = f"restrict(tcp={tcp})\n" + CONNECT.format(port=server.getsockname()[1])
        assert inside(code, top, prefix) == [expected, expected, "ok"]


@USERS
def test_unix_sockets_with_a_path_work(top: Path, prefix: list[str]) -> None:
    code = """
restrict(tcp=False)
server = socket.socket(socket.AF_UNIX)
print(tried(server.bind, str(work / "socket")), tried(server.listen), tried(socket.socket(socket.AF_UNIX).connect, str(work / "socket")))
print(tried(socket.socket(socket.AF_UNIX).bind, str(other / "socket")), tried(socket.socketpair))
"""
    assert inside(code, top, prefix) == ["ok", "ok", "ok", "EACCES", "ok"]


@USERS
def test_abstract_unix_sockets_outside_do_not(top: Path, prefix: list[str]) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"\0{top}")
        server.listen()
        code = 'print(tried(socket.socket(socket.AF_UNIX).connect, f"\\0{top}"))'
        assert inside(code, top, prefix) == ["ok"]
        assert inside("restrict()\n" + code, top, prefix) == ["EPERM"]


# It ends with us, at the end of its input.
OUTSIDE = """
outside = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
proc = Path(f"/proc/{outside.pid}")
"""


@USERS
def test_no_signal_goes_outside(top: Path, prefix: list[str]) -> None:
    code = (
        OUTSIDE
        + """
restrict()
child = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
print(tried(os.kill, child.pid, signal.SIGTERM), -child.wait(), tried(os.kill, outside.pid, 0), tried(os.kill, os.getpid(), 0))
"""
    )
    assert inside(code, top, prefix) == ["ok", "15", "EPERM", "ok"]


@USERS
def test_processes_outside_cannot_be_looked_into(top: Path, prefix: list[str]) -> None:
    look = """
print(tried(open, proc / "mem"), tried(os.listdir, proc / "root"), tried(os.listdir, proc / "cwd"))
print(tried((proc / "environ").read_bytes))
"""
    assert inside(OUTSIDE + look, top, prefix) == ["ok"] * 4
    # CAP_PERFMON is enough for the environment, since Linux 6.16 or so.
    found = inside(OUTSIDE + "restrict()" + look, top, prefix)
    assert found[:3] == ["EACCES"] * 3
    assert found[3] in (["EACCES"] if prefix else ["EACCES", "ok"])


@USERS
def test_devices(top: Path, prefix: list[str]) -> None:
    code = """
restrict()
leader, follower = os.openpty()
print(os.isatty(follower), tried(open, "/dev/null", "w"), tried(os.urandom, 1), tried(Path("/dev/shm/x-%d" % os.getpid()).touch))
import pty
pid, fd = pty.fork()
if not pid: os._exit(0)
print(os.waitpid(pid, 0)[1])
os.unlink("/dev/shm/x-%d" % os.getpid())
"""
    assert inside(code, top, prefix) == ["True", "ok", "ok", "ok", "0"]


@USERS
def test_python_still_starts_and_carries_the_walls_along(top: Path, prefix: list[str]) -> None:
    code = """
restrict(tcp=False)
import multiprocessing, numpy
with multiprocessing.get_context("fork").Pool(2) as pool:
    print(sum(pool.map(abs, [-1, -2])))
done = subprocess.run([sys.executable, "-c", "import json, os, sys; os.listdir(sys.argv[1])", hidden], capture_output=True, text=True)
print(done.returncode, "PermissionError" in done.stderr, flush=True)  # execv drops what is buffered
os.execv("/bin/sh", ["sh", "-c", f"cat {other}/file; cat {hidden}/file 2>/dev/null || echo; echo refused"])
"""
    assert inside(code, top, prefix) == ["3", "1", "True", "in", "other", "refused"]


@USERS
def test_walls_within_walls_only_add(top: Path, prefix: list[str]) -> None:
    code = """
restrict()
landlock.restrict(readable=["/"], writable=[str(other)], tcp=None)
print(tried((hidden / "file").read_text), tried((other / "file").write_text, "x"), tried((work / "file").write_text, "x"))
"""
    assert inside(code, top, prefix) == ["EACCES"] * 3


@pytest.mark.bed("landlock")
def test_no_descriptor_is_left_open(top: Path) -> None:
    code = """
os.listdir("/proc/self/fd")
before = len(os.listdir("/proc/self/fd"))
restrict()
print(len(os.listdir("/proc/self/fd")) - before)
"""
    assert inside(code, top, []) == ["0"]


# --- where it fails ---------------------------------------------------------------------------------------------


@pytest.mark.bed("landlock")
def test_a_rule_that_cannot_be_made_for_want_of_descriptors_is_an_error(top: Path) -> None:
    code = """
import resource
spare = os.open("/", os.O_PATH)
os.close(spare)
resource.setrlimit(resource.RLIMIT_NOFILE, (spare + 1, spare + 1))
try:
    landlock.restrict(readable=["/usr"], writable=[], tcp=None)
except OSError as error:
    print(error)
"""
    assert inside(code, top, []) == [
        "[Errno",
        "24]",
        "cannot",
        "open",
        "/usr:",
        "Too",
        "many",
        "open",
        "files",
    ]


def test_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object, **__: object) -> int:
        raise OSError(95, "no")

    monkeypatch.setattr(landlock, "_call", refuses)
    assert landlock.abi() == 0
    with pytest.raises(OSError, match="the system has no Landlock"):
        landlock.restrict(readable=["/"], writable=[], tcp=None)


@USERS
@pytest.mark.parametrize("abi", range(1, 8))
def test_the_rules_of_every_abi_hold_here(top: Path, prefix: list[str], abi: int) -> None:
    """A newer system takes what an older one would be told."""
    code = (
        f"landlock.abi = lambda: {abi}\nrestrict()\n"
        + READS
        + 'print(tried((other / "new").touch), tried((work / "new").touch))'
    )
    assert inside(code, top, prefix) == ["EACCES"] * 5 + ["ok", "EACCES", "ok"]
