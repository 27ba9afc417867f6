"""The system call in which a thread is blocked, from /proc/PID/task/TID/syscall.

Standard library and procfs only.
"""

from __future__ import annotations

import errno
import os
import platform
import struct
import sys
from typing import NamedTuple

# Reading it needs permission to trace the process (proc(5)): the same user, or root. With Yama's
# ptrace_scope 1 only ancestors can trace. The runner is an ancestor of every process in its
# sandboxes.

# System calls in which a process can wait (asm/unistd_64.h; asm-generic/unistd.h for aarch64).
_X86_64 = {
    -1: "a page of memory", 0: "read", 1: "write", 7: "poll", 17: "pread64", 18: "pwrite64",
    19: "readv", 20: "writev", 65: "semop", 74: "fsync", 75: "fdatasync", 162: "sync",
    220: "semtimedop", 306: "syncfs", 23: "select", 34: "pause", 35: "nanosleep", 42: "connect",
    43: "accept", 44: "sendto", 45: "recvfrom", 46: "sendmsg", 47: "recvmsg", 61: "wait4",
    72: "fcntl", 73: "flock", 128: "rt_sigtimedwait", 130: "rt_sigsuspend", 202: "futex",
    230: "clock_nanosleep", 232: "epoll_wait", 247: "waitid", 257: "openat", 270: "pselect6",
    271: "ppoll", 275: "splice", 281: "epoll_pwait", 288: "accept4", 426: "io_uring_enter",
    441: "epoll_pwait2", 449: "futex_waitv",
}  # fmt: skip
_AARCH64 = {
    22: "epoll_pwait", 25: "fcntl", 32: "flock", 56: "openat", 63: "read", 64: "write",
    66: "writev", 72: "pselect6", 73: "ppoll", 76: "splice", 95: "waitid", 98: "futex",
    101: "nanosleep", 115: "clock_nanosleep", 133: "rt_sigsuspend", 137: "rt_sigtimedwait",
    202: "accept", 203: "connect", 206: "sendto", 207: "recvfrom", 211: "sendmsg", 212: "recvmsg",
    242: "accept4", 260: "wait4", 426: "io_uring_enter", 441: "epoll_pwait2", 449: "futex_waitv",
}  # fmt: skip
_NAMES = {"x86_64": _X86_64, "aarch64": _AARCH64}.get(platform.machine(), {})

P_PID, P_PIDFD = 1, 3
FUTEX_PRIVATE_FLAG = 128
_FUTEX_ARGUMENTS = 4
_INT = 1 << 32
_POLLFD = struct.Struct("=ihh")
MOST_WAITED = 1024


class Call(NamedTuple):
    """A system call, by its name (or number, if it is not in the table), and six arguments."""

    name: str
    arguments: tuple[int, ...]

    @property
    def descriptor(self) -> int | None:
        """The first argument, if it is a descriptor in calls of this name."""
        return (
            _signed(self.arguments[0]) if self.arguments and self.name in _ON_DESCRIPTORS else None
        )


_ON_DESCRIPTORS = frozenset(
    {
        "read", "readv", "pread64", "write", "writev", "pwrite64", "splice", "fsync", "fdatasync",
        "flock", "fcntl", "accept", "accept4", "connect", "sendto", "sendmsg", "recvfrom",
        "recvmsg",
    }
)  # fmt: skip


def waited_descriptors(pid: int, call: Call) -> tuple[int, ...] | None:
    """Return the descriptors that a call waits for; empty if it only waits for time to pass.

    ``None`` for calls without descriptors, or if they cannot be read.
    """
    # The sets of poll(2) and select(2) are in the memory of the process, those of epoll(7) in its
    # fdinfo.
    if call.descriptor is not None:
        return (call.descriptor,)
    try:
        if call.name in ("poll", "ppoll"):
            address, count = call.arguments[:2]
            entries = _memory(pid, address, min(count, MOST_WAITED) * _POLLFD.size)
            return tuple(number for number, _, _ in _POLLFD.iter_unpack(entries) if number >= 0)
        if call.name in ("select", "pselect6"):
            count, *sets = call.arguments[:3]
            size = (min(count, MOST_WAITED) + 63) // 64 * 8
            bits = [
                int.from_bytes(_memory(pid, address, size), sys.byteorder)
                for address in sets
                if address
            ]
            return tuple(
                number
                for number in range(min(count, MOST_WAITED))
                if any(word >> number & 1 for word in bits)
            )
        if call.name in ("epoll_wait", "epoll_pwait", "epoll_pwait2"):
            with open(f"/proc/{pid}/fdinfo/{_signed(call.arguments[0])}", "rb") as file:
                return tuple(int(line.split()[1]) for line in file if line.startswith(b"tfd:"))
    except (OSError, ValueError, IndexError, struct.error, OverflowError):
        return None
    return None


def _memory(pid: int, address: int, size: int) -> bytes:
    if not size:
        return b""
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as file:
        data = os.pread(file.fileno(), size, address)
    if len(data) != size:
        raise OSError(errno.EFAULT, "the memory of a process ends there")
    return data


def blocked_call(pid: int, task: int | None = None) -> Call | None:
    """Return the call in which a thread (by default the main one) is blocked.

    ``None`` if the thread runs, or if we have no permission to see it.
    """
    try:
        with open(f"/proc/{pid}/task/{pid if task is None else task}/syscall", "rb") as file:
            fields = file.read().split()
        if fields[0] == b"running":
            return None
        number = int(fields[0])
        # Outside of any call the number is -1, and only stack pointer and program counter follow.
        arguments = tuple(int(field, 16) for field in fields[1:7]) if number >= 0 else ()
    except (OSError, ValueError, IndexError):
        return None
    return Call(_NAMES.get(number, str(number)), arguments)


def awaited_child(call: Call) -> tuple[str, int] | None:
    """Return the child that wait4 or waitid waits for, ``None`` for any child."""
    # A process id is relative to the pid namespace of the waiting process.
    if call.name == "wait4" and call.arguments and (child := _signed(call.arguments[0])) > 0:
        return "pid", child
    if call.name == "waitid" and len(call.arguments) > 1:
        kind, number = call.arguments[0], _signed(call.arguments[1])
        if kind == P_PID:
            return "pid", number
        if kind == P_PIDFD:
            return "descriptor", number
    return None


def is_private_wait(call: Call) -> bool:
    """Whether a call waits without a timeout for another thread of the process (futex(2))."""
    if call.name != "futex" or len(call.arguments) < _FUTEX_ARGUMENTS:
        return False
    _, operation, _, timeout = call.arguments[:_FUTEX_ARGUMENTS]
    return bool(operation & FUTEX_PRIVATE_FLAG) and timeout == 0


def thread_ids(pid: int, most: int) -> list[int]:
    """Return the ids of at most ``most`` threads of a process."""
    try:
        return sorted(int(name) for name in os.listdir(f"/proc/{pid}/task"))[:most]
    except OSError:
        return []


def _signed(value: int) -> int:
    """Convert a register to a C int, which occupies only its lower half."""
    low = value % _INT
    return low - _INT if low >= _INT // 2 else low
