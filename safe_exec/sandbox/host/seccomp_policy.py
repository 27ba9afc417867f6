"""Builds the filter that refuses system calls which no notebook needs: a classic BPF program.

Theory of operation (seccomp(2), bpf(2), prctl(2); kernel documentation userspace-api/seccomp_filter
and userspace-api/no_new_privs). keeper/seccomp.py installs a program in the kernel's process.

All calls are allowed except those listed here, in five groups:

* ``NEVER``: calls that inspect or control other processes, mounts and namespaces, the clock, kernel
  modules, or keys. They fail with EPERM, or end the process with SIGSYS if the refusal is ``kill``.
* ``PROBED``: calls that libraries try and can do without. Always EPERM; each row names the caller.
* ``JUDGED``: refused for some arguments only. A filter sees registers, not memory, and compares 32
  bits. Linux ignores the upper half of these arguments, so the filter has to ignore it too: a
  program could set it to avoid a match.
* Calls newer than the filter (NEWEST): always ENOSYS, as on an older system, so that libraries fall
  back to older calls.
* clone3(2): its flags lie in memory, where no filter can see them. Always ENOSYS; glibc, musl, Go
  and Rust then use clone(2).

A call of another architecture (32-bit programs on a 64-bit machine), where the same numbers mean
other calls, ends the process. A call of the x32 ABI ends it too if the refusal is ``kill``, and
fails with EPERM otherwise. Number -1 is allowed: a tracer sets it to skip a call.

Allowed on purpose: process_madvise(2) (hints; jemalloc purges its own memory with it),
name_to_handle_at(2) (returns a handle and opens nothing; open_by_handle_at(2), which bypasses the
permissions of directories, is refused), pidfd_open(2) (asyncio waits with it), netlink sockets
(getaddrinfo), further restrictions (seccomp(2), landlock(7): browsers have their own),
personality(2) to turn address randomization off (debuggers, sanitizers, Lisp), and clone(2) without
a new namespace: threads and fork.

The package contains the compiled filters, in the format that ``bwrap --seccomp`` accepts too;
``python -m safe_exec.sandbox.host.seccomp_policy`` compiles them again. Since Linux 5.11 the system
remembers which numbers are always allowed, and runs no filter for them.
"""

from __future__ import annotations

import errno
import os
import struct
import sys
from collections.abc import Iterator
from typing import Literal

Refusal = Literal["errno", "kill"]
REFUSALS: tuple[Refusal, ...] = ("errno", "kill")

# A call's number on x86_64 (asm/unistd_64.h) and on aarch64 (asm-generic/unistd.h); ``None`` where
# it does not exist.
Numbers = dict[str, tuple[int, int | None]]

FILTERS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "filters")
# AUDIT_ARCH_* by what uname(2) calls the machine (linux/audit.h).
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

# Numbers from 424 on are the same everywhere.
NEVER: Numbers = {
    # other processes: their memory, descriptors, namespaces
    "ptrace": (101, 117),
    "pidfd_getfd": (438, 438),
    "setns": (308, 268),
    "unshare": (272, 97),
    "userfaultfd": (
        323,
        282,
    ),  # holds up the system's own copies at will: what exploits of its races are made of
    # the file system from outside: mounts, roots, swap, quotas, files by handle, all events of a
    # mount
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "open_tree_attr": (467, 467),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "nfsservctl": (180, 42),
    "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262),
    "acct": (163, 89),
    # the machine: its code, names, clock, terminals, ports, log
    "bpf": (321, 280),
    "reboot": (169, 142),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "syslog": (103, 116),
    "vhangup": (153, 58),
    "lookup_dcookie": (212, 18),
    "iopl": (172, None),
    "ioperm": (173, None),
    # 16-bit segments: Wine and DOS emulators.
    "modify_ldt": (154, None),
}
PROBED: Numbers = {
    # What it carries out passes no filter. libuv and databases try it; EPERM is what sysctl
    # kernel.io_uring_disabled gives them, too.
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    # UCX, which carries MPI, writes to its own process by it at start, to learn whether it works.
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    # Kerberos may keep its tickets in keyrings; database drivers look for them when they connect.
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    # Mesa asks whether two descriptors are one device.
    "kcmp": (312, 272),
    # MPI and hwloc ask by it on which processor's memory their pages lie.
    "move_pages": (279, 239),
    "migrate_pages": (256, 238),
    # Libraries that count events (PAPI and the like); sysctl kernel.perf_event_paranoid forbids it
    # on most machines.
    "perf_event_open": (298, 241),
    # They read the clock's state, too, which anybody may; the wish lies in memory.
    "adjtimex": (159, 171),
    "clock_adjtime": (305, 266),
}
JUDGED: dict[str, tuple[int, int]] = {
    "clone": (56, 220),
    "ioctl": (16, 29),
    "socket": (41, 198),
    "personality": (135, 92),
}
CLONE3 = 435
# file_setattr(2), the last one of Linux 6.18. A later one may do what is refused here, by another
# name.
NEWEST = 469

# CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET. CLONE_NEWTIME is for clone3 and
# unshare: here it is part of the signal.
NAMESPACES = (
    0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000
)
# TIOCSTI types into the terminal as if the user did; TIOCLINUX pastes into a console.
TERMINAL_INPUT = (0x5412, 0x541C)
# AF_KEY, AF_PACKET, AF_ALG, AF_VSOCK (the host of a virtual machine), AF_XDP. EPERM is what most of
# them give to ordinary users anyway.
FAMILIES = (15, 17, 38, 40, 44)
# PER_LINUX32, UNAME26, ADDR_NO_RANDOMIZE. All else makes memory executable, maps page zero, or
# changes what calls mean.
PERSONALITIES = 0x0008 | 0x0020000 | 0x0040000
QUERY = 0xFFFFFFFF

X32_BIT = 0x40000000
NO_CALL = 0xFFFFFFFF


def load(refusal: Refusal) -> bytes:
    """Return the shipped filter for the running machine. Raises OSError without one."""
    machine = (
        os.uname().machine if sys.maxsize > 1 << 32 else f"32-bit programs on {os.uname().machine}"
    )
    _known(machine)
    with open(os.path.join(FILTERS, f"{machine}-{refusal}.bpf"), "rb") as file:
        return file.read()


def _known(arch: str) -> str:
    if arch not in ARCHITECTURES:
        raise OSError(f"no filter for {arch}")
    return arch


# --- the program ----------------------------------------------------------------------------------


LOAD, EQUAL, ANY_BIT, GREATER, RETURN = 0x20, 0x15, 0x45, 0x25, 0x06
# BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_JMP|JSET|K, BPF_JMP|JGT|K, BPF_RET|K
NUMBER_AT, ARCH_AT, ARGUMENTS_AT = (
    0,
    4,
    16,
)  # struct seccomp_data; both machines have the lower half of an argument first
ALLOW, ERRNO, KILL = 0x7FFF0000, 0x00050000, 0x80000000
_INSTRUCTION = struct.Struct("<HBBI")  # struct sock_filter


class _Line:
    """An instruction.

    The targets of a jump, ``yes`` and ``no``, are names of labels further down; empty for the next
    instruction.
    """

    def __init__(self, code: int, operand: int, yes: str = "", no: str = "") -> None:
        self.code, self.operand, self.yes, self.no = code, operand, yes, no


def program(arch: str, refusal: Refusal) -> bytes:
    """Return the system call filter as an array of struct sock_filter (seccomp(2)).

    Raises OSError for an architecture that we have no numbers of.
    """
    column = list(ARCHITECTURES).index(_known(arch))
    refused = KILL if refusal == "kill" else ERRNO | errno.EPERM
    return _assemble(
        [
            _Line(LOAD, ARCH_AT),
            _Line(EQUAL, ARCHITECTURES[arch], no="kill"),
            _Line(LOAD, NUMBER_AT),
            _Line(EQUAL, NO_CALL, "allow"),
            *([_Line(ANY_BIT, X32_BIT, "refuse")] if arch == "x86_64" else []),
            _Line(GREATER, NEWEST, "absent"),
            # Those with arguments first: the system cannot remember an answer for them.
            *(_Line(EQUAL, numbers[column], name) for name, numbers in JUDGED.items()),
            _Line(EQUAL, CLONE3, "absent"),
            *_each(PROBED, column, "deny"),
            *_each(NEVER, column, "refuse"),
            "allow",
            _Line(RETURN, ALLOW),
            *_judgements(),
            "absent",
            _Line(RETURN, ERRNO | errno.ENOSYS),
            "deny",
            _Line(RETURN, ERRNO | errno.EPERM),
            "refuse",
            _Line(RETURN, refused),
            "kill",
            _Line(RETURN, KILL),
        ]
    )


def _each(numbers: Numbers, column: int, place: str) -> Iterator[_Line]:
    return (
        _Line(EQUAL, number, place)
        for row in numbers.values()
        if (number := row[column]) is not None
    )


def _judgements() -> list[_Line | str]:
    """Return the instructions for calls that depend on an argument.

    The code of one call never runs on into that of the next: it ends in a return.
    """
    allow = _Line(RETURN, ALLOW)
    return [
        "clone",
        _argument(0),
        _Line(ANY_BIT, NAMESPACES, "refuse"),
        allow,
        "ioctl",
        _argument(1),
        *(_Line(EQUAL, request, "refuse") for request in TERMINAL_INPUT),
        allow,
        "socket",
        _argument(0),
        *(_Line(EQUAL, family, "deny") for family in FAMILIES),
        allow,
        "personality",
        _argument(0),
        _Line(EQUAL, QUERY, "query"),
        _Line(ANY_BIT, QUERY ^ PERSONALITIES, "refuse"),
        "query",
        allow,
    ]


def _argument(index: int) -> _Line:
    return _Line(LOAD, ARGUMENTS_AT + 8 * index)


def _assemble(lines: list[_Line | str]) -> bytes:
    """Encode the lines.

    A jump's label becomes a distance from the next instruction, in one byte.
    """
    places: dict[str, int] = {}
    code: list[_Line] = []
    for line in lines:
        if isinstance(line, str):
            places[line] = len(code)
        else:
            code.append(line)

    def distance(place: str, index: int) -> int:
        return places[place] - index - 1 if place else 0

    return b"".join(
        _INSTRUCTION.pack(
            line.code, distance(line.yes, index), distance(line.no, index), line.operand
        )
        for index, line in enumerate(code)
    )


def write_filters() -> None:
    """Write the filter programs that ship with the package."""
    for arch in ARCHITECTURES:
        for refusal in REFUSALS:
            with open(os.path.join(FILTERS, f"{arch}-{refusal}.bpf"), "wb") as file:
                file.write(program(arch, refusal))


if __name__ == "__main__":
    write_filters()
