"""The other processes of a kernel's sandbox: their blocking calls and pipes.

Everything is read from /proc, so none of it is a claim of the kernel process.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import stat as st
import struct
import termios
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from safe_exec.keeper import procfs
from safe_exec.kernel.blocked import (
    Call,
    awaited_child,
    blocked_call,
    is_private_wait,
    thread_ids,
    waited_descriptors,
)
from safe_exec.model.ending import ExitStatus
from safe_exec.model.observed import EndedChild, ObservedProcess
from safe_exec.model.patterns import lazy_pattern

MOST_PROCESSES = 64
MOST_THREADS = 32
MOST_DESCRIPTORS = 4096
LONGEST_COMMAND = 120
# The same number on every architecture (Linux 5.6).
SYS_PIDFD_GETFD = 438
WRITES = ("write", "writev", "splice", "sendto", "sendmsg")

_SECRET_OPTION = lazy_pattern(
    r"(?i)(?:pass(?:word|wd|phrase)?|token|secret|credentials?|api[-_]?key|private[-_]?key|auth)$"
)
_USER_INFO = lazy_pattern(r"(://[^/\s:@]*:)[^/\s@]+@")
MASK = "***"


class Snapshot(NamedTuple):
    """Processor seconds and blocking calls at one moment, by process id."""

    cpu: dict[int, float]
    calls: dict[int, dict[int, Call | None]]


def members(kernel: int, keeper: int) -> list[int]:
    """Return the pids of a sandbox except the kernel and its ancestors."""
    # The ancestors are bubblewrap and our init.
    builders = {kernel}
    above = kernel
    while (status := procfs.stat(above)) is not None and status.ppid not in (0, keeper):
        above = status.ppid
        builders.add(above)
    return [pid for pid in procfs.descendants(keeper) if pid not in builders][:MOST_PROCESSES]


def snapshot(kernel: int, keeper: int) -> Snapshot:
    """Read the processor time and blocking calls of a sandbox's members (see ``members``)."""
    cpu, calls = {}, {}
    for pid in members(kernel, keeper):
        if (status := procfs.stat(pid)) is not None:
            cpu[pid] = status.cpu
            calls[pid] = {task: blocked_call(pid, task) for task in thread_ids(pid, MOST_THREADS)}
    return Snapshot(cpu, calls)


def inspect(
    kernel: int,
    keeper: int,
    first_snapshot: Snapshot,
    window: float,
    children: Mapping[int, EndedChild],
) -> tuple[ObservedProcess, ...]:
    """Observe the members of a sandbox (see ``members``), compared with an earlier snapshot.

    The snapshot was taken ``window`` seconds ago. ``children`` are the children that were seen
    earlier.
    """
    current = snapshot(kernel, keeper)
    below = set(procfs.descendants(kernel))
    own_command = read_bytes(f"/proc/{kernel}/cmdline")
    observations = (
        _observe(
            pid,
            first_snapshot,
            current,
            window,
            below=pid in below,
            own_command=own_command,
            child=children.get(pid),
        )
        for pid in current.cpu
    )
    return tuple(process for process in observations if process is not None)


def _observe(
    pid: int,
    first_snapshot: Snapshot,
    current: Snapshot,
    window: float,
    *,
    below: bool,
    own_command: bytes,
    child: EndedChild | None,
) -> ObservedProcess | None:
    """Observe one process; ``None`` if it has ended."""
    # A call counts only if its thread was in it before, too: a working process changes its calls.
    stat = procfs.stat(pid)
    if stat is None:
        return None
    cmdline = read_bytes(f"/proc/{pid}/cmdline")
    past = first_snapshot.calls.get(pid, {})
    steady = {
        task: call
        for task, call in current.calls[pid].items()
        if call is not None and (old := past.get(task)) is not None and old.name == call.name
    }
    call = steady.get(pid)
    reads, writes = pipes(pid)
    full = _full_pipe(pid, steady)
    return ObservedProcess(
        pid=pid,
        local_pid=procfs.innermost_pid(pid) or pid,
        parent=stat.ppid,
        command=command_text(cmdline) or (child.command if child else "") or _comm(pid),
        state=stat.state,
        cpu_share=max(0.0, current.cpu[pid] - first_snapshot.cpu[pid]) / window
        if pid in first_snapshot.cpu
        else None,
        age=procfs.age(stat),
        threads=stat.threads,
        syscall=call.name if call else None,
        targets=targets_of(pid, call) if call else None,
        private_wait=is_private_wait(call) if call else False,
        awaited=local_child(pid, call) if call else None,
        reads=reads,
        writes=writes,
        full_pipe=full[0] if full else None,
        pipe_bytes=full[1] if full else None,
        forked=cmdline == own_command if cmdline else child is not None and child.forked,
        adopted=not below,
        exit=ExitStatus(raw)
        if stat.state == "Z" and (raw := procfs.exit_status(pid)) is not None
        else None,
        reads_terminal=_reads_terminal(pid, call),
    )


def _full_pipe(pid: int, calls: Mapping[int, Call]) -> tuple[str, int | None] | None:
    """Return the full pipe that blocks a thread, and the number of bytes in it."""
    for call in calls.values():
        if call.name in WRITES and call.descriptor is not None:
            target = descriptor_target(pid, call.descriptor)
            if target is not None and target.startswith("pipe:"):
                return target, waiting_bytes(pid, call.descriptor)
    return None


def waiting_bytes(pid: int, descriptor: int) -> int | None:
    """Return the bytes in another process's pipe, ``None`` if they cannot be read."""
    # Copy the descriptor (pidfd_getfd(2), Linux 5.6). Opening its link in /proc would open the pipe
    # anew, and the descriptor may lead to something else by then.
    libc = ctypes.CDLL(None, use_errno=True)
    with contextlib.suppress(OSError, AttributeError):
        process = os.pidfd_open(pid)
        try:
            copy = libc.syscall(SYS_PIDFD_GETFD, process, descriptor, 0)
        finally:
            os.close(process)
        if copy < 0:
            return None
        try:
            if st.S_ISFIFO(os.fstat(copy).st_mode):
                (size,) = struct.unpack("i", fcntl.ioctl(copy, termios.FIONREAD, bytes(4)))
                return int(size)
        finally:
            os.close(copy)
    return None


def local_child(pid: int, call: Call) -> int | None:
    """Return the child that a process waits for, by its process id in that process's namespace."""
    awaited = awaited_child(call)
    if awaited is None or awaited[0] == "pid":
        return awaited[1] if awaited else None
    # A pidfd: its fdinfo shows the process id in our namespace, so translate it.
    try:
        with open(f"/proc/{pid}/fdinfo/{awaited[1]}", "rb") as file:
            ours = next(int(line.split()[1]) for line in file if line.startswith(b"Pid:"))
    except (OSError, ValueError, StopIteration):
        return None
    return procfs.innermost_pid(ours)


def pipes(pid: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the pipes that a process reads from, and those that it writes to."""
    reads, writes = set(), set()
    for number in descriptors(pid):
        target = descriptor_target(pid, number)
        if target is not None and target.startswith("pipe:"):
            mode = _access_mode(pid, number)
            if mode in (os.O_RDONLY, os.O_RDWR):
                reads.add(target)
            if mode in (os.O_WRONLY, os.O_RDWR):
                writes.add(target)
    return tuple(sorted(reads)), tuple(sorted(writes))


def descriptors(pid: int) -> list[int]:
    """Return the numbers of a process's descriptors, at most MOST_DESCRIPTORS."""
    try:
        return [int(name) for name in os.listdir(f"/proc/{pid}/fd")[:MOST_DESCRIPTORS]]
    except OSError:
        return []


def targets_of(pid: int, call: Call) -> tuple[str, ...] | None:
    """Return the targets of the descriptors that a call waits for."""
    numbers = waited_descriptors(pid, call)
    return (
        None
        if numbers is None
        else tuple(descriptor_target(pid, number) or "?" for number in numbers)
    )


def descriptor_target(pid: int, number: int) -> str | None:
    """Return a descriptor's target: a path, ``pipe:[...]``, ``socket:[...]``."""
    try:
        return os.readlink(f"/proc/{pid}/fd/{number}")
    except OSError:
        return None


def _access_mode(pid: int, number: int) -> int | None:
    try:
        with open(f"/proc/{pid}/fdinfo/{number}", "rb") as file:
            return next(
                int(line.split()[1], 8) & os.O_ACCMODE
                for line in file
                if line.startswith(b"flags:")
            )
    except (OSError, ValueError, StopIteration):
        return None


def _reads_terminal(pid: int, call: Call | None) -> bool:
    """Whether a process waits for input from a terminal, that is, from a person."""
    if call is None or call.name not in ("read", "pselect6", "select", "poll", "ppoll"):
        return False
    number = call.descriptor if call.name == "read" else 0
    target = descriptor_target(pid, number if number is not None else 0)
    return target is not None and target.startswith(("/dev/pts/", "/dev/tty"))


# --- commands -------------------------------------------------------------------------------------


def command_text(cmdline: bytes) -> str:
    """Format a command line on one line, shortened, without secrets."""
    # The text goes into verdicts and reports, which people share.
    arguments = (
        [word.decode("utf-8", "replace") for word in cmdline.rstrip(b"\0").split(b"\0")]
        if cmdline
        else []
    )
    text = " ".join(_quoted(word) for word in _without_secrets(arguments))
    return text if len(text) <= LONGEST_COMMAND else text[: LONGEST_COMMAND - 3] + "..."


def _without_secrets(arguments: Iterable[str]) -> Iterable[str]:
    hidden = False
    for number, word in enumerate(arguments):
        name, equals, _ = word.partition("=")
        if number == 0:
            yield word.rpartition("/")[2] or word
        elif hidden and not word.startswith("-"):
            yield MASK
        elif equals and _SECRET_OPTION.search(name):
            yield f"{name}={MASK}"
        else:
            yield _USER_INFO.sub(rf"\1{MASK}@", word)
        hidden = not equals and word.startswith("-") and _SECRET_OPTION.search(word) is not None


def _quoted(word: str) -> str:
    line = " ".join(word.split())
    return line if line and " " not in line else f"'{line}'"


def _comm(pid: int) -> str:
    return read_bytes(f"/proc/{pid}/comm").decode("utf-8", "replace").strip() or "?"


def read_bytes(path: str) -> bytes:
    """Read the first 64 KiB of a file in /proc; empty if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(1 << 16)
    except OSError:
        return b""
