"""What a kernel is doing, seen from outside over a short window; used once, when its time is up.

May import model, page, procfs. The system's view (state, processor time, system call) is fact; stacks are the kernel's word.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import signal
from collections.abc import Callable
from pathlib import Path

from safe_exec.keeper import procfs
from safe_exec.kernel.shared_page import Page
from safe_exec.model.evidence import Frame, Looked
from safe_exec.records import dataclass

WINDOW_SECONDS = 0.4
LOOKS = 20
STARVED_SECONDS = 0.25

# The calls in which a kernel may wait (asm/unistd_64.h; asm-generic/unistd.h for aarch64).
_X86_64 = {
    -1: "a page of memory", 0: "read", 1: "write", 7: "poll", 17: "pread64", 18: "pwrite64", 19: "readv", 20: "writev",
    65: "semop", 74: "fsync", 75: "fdatasync", 162: "sync", 220: "semtimedop", 306: "syncfs", 23: "select", 34: "pause", 35: "nanosleep", 42: "connect",
    43: "accept", 44: "sendto", 45: "recvfrom", 46: "sendmsg", 47: "recvmsg", 61: "wait4", 72: "fcntl", 73: "flock",
    128: "rt_sigtimedwait", 130: "rt_sigsuspend", 202: "futex", 230: "clock_nanosleep", 232: "epoll_wait", 247: "waitid",
    257: "openat", 270: "pselect6", 271: "ppoll", 281: "epoll_pwait", 288: "accept4", 426: "io_uring_enter",
    441: "epoll_pwait2", 449: "futex_waitv",
}  # fmt: skip
_AARCH64 = {
    22: "epoll_pwait", 25: "fcntl", 32: "flock", 56: "openat", 63: "read", 64: "write", 66: "writev", 72: "pselect6",
    73: "ppoll", 95: "waitid", 98: "futex", 101: "nanosleep", 115: "clock_nanosleep", 133: "rt_sigsuspend",
    137: "rt_sigtimedwait", 202: "accept", 203: "connect", 206: "sendto", 207: "recvfrom", 211: "sendmsg", 212: "recvmsg",
    242: "accept4", 260: "wait4", 426: "io_uring_enter", 441: "epoll_pwait2", 449: "futex_waitv",
}  # fmt: skip
_CALLS = {"x86_64": _X86_64, "aarch64": _AARCH64}.get(platform.machine(), {})


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """The kernel to look at. ``dump`` asks it for a stack (``None``: it cannot), ``dumped`` reads what it answered."""

    pid: int
    page: Page | None
    number: int
    dump: Callable[[], None] | None
    dumped: Callable[[], tuple[Frame, ...]]
    frames: Callable[[list[tuple[str, int, str, int]]], tuple[Frame, ...]]


async def look(subject: Subject) -> Looked:
    """Watch for 0.4 s, then ask for the stack."""
    pid = subject.pid
    before, children_before = _cpu(pid), _children(pid)
    calls, states = [], []
    clock = asyncio.get_running_loop().time
    start = clock()
    for _ in range(LOOKS):
        await asyncio.sleep(WINDOW_SECONDS / LOOKS)
        calls.append(_syscall(pid))
        states.append(_state(pid) if subject.page is not None else _busiest(pid))
    window = clock() - start
    after, children_after = _cpu(pid), _children(pid)
    main = procfs.stat(pid, pid)
    stack, awaiting = await _stack(subject, main.state if main else None)
    waits, places, starved = _samples(subject, start_age=window)
    return Looked(
        state=main.state if main else None,
        cpu_share=None if before is None or after is None else max(0.0, after - before) / window,
        syscall=_most_common([call for call in calls if call]),
        runnable=states.count("R") / len(states),
        stack=stack,
        gil_waits=waits,
        lines=places,
        awaiting=awaiting,
        children=len(children_after),
        children_cpu_share=sum(
            max(0.0, seconds - children_before.get(child, seconds)) for child, seconds in children_after.items()
        )
        / window,
        window=window,
        starved=starved,
        reads_terminal=any(_reads_terminal(child) for child in children_after),
        ignores_interrupt=procfs.ignores(pid, signal.SIGINT),
        fitted=subject.page is not None,
    )


async def _stack(subject: Subject, state: str | None) -> tuple[tuple[Frame, ...], str | None]:
    """The main thread's stack: asked for by a signal that C code answers, else what was sampled last."""
    rows, awaits = _sampled(subject)
    if awaits:
        return subject.frames(rows), _what_is_awaited(rows)
    if subject.dump is not None and state not in ("T", "t"):
        subject.dump()
        before: tuple[Frame, ...] = ()
        for _ in range(20):
            await asyncio.sleep(0.01)
            stack = subject.dumped()
            if stack and stack == before:  # it comes in small pieces: whole when it grows no more
                return stack, None
            before = stack
        if before:
            return before, None
    return subject.frames(rows), None


def _sampled(subject: Subject) -> tuple[list[tuple[str, int, str, int]], bool]:
    if subject.page is None:
        return [], False
    cell, rows, awaits = subject.page.stack()
    return (rows, awaits) if cell == subject.number else ([], False)


def _what_is_awaited(rows: list[tuple[str, int, str, int]]) -> str:
    """The innermost coroutine that has a name, as ``module.function``."""
    for function, _, file, cell in rows:
        if cell:
            break  # the notebook's own code awaits the future itself
        if function not in ("Future", "FutureIter", "Task", "_GatheringFuture", "future_iterator"):
            return f"{Path(file).stem if '/' in file else file}.{function}"
    return "a future"


def _samples(subject: Subject, start_age: float) -> tuple[tuple[float, ...], int | None, bool | None]:
    """Waits of the sampling thread in the window, distinct places, and whether it got no turn at all."""
    if subject.page is None or not subject.page.alive:
        return (), None, None
    import time

    now = time.monotonic()
    recent = [s for s in subject.page.history() if s.cell == subject.number and now - s.time < start_age + 1.0]
    last = subject.page.sample().time
    return tuple(s.wait for s in recent), len({s.place for s in recent}), now - last > STARVED_SECONDS


def _state(pid: int) -> str | None:
    found = procfs.stat(pid, pid)
    return found.state if found else None


def _busiest(pid: int) -> str | None:
    """``R`` where any thread has work to do: which one runs the cells of a kernel without code of ours nobody knows."""
    try:
        tasks = [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    except OSError:
        return None
    return next(("R" for task in tasks if (found := procfs.stat(pid, task)) is not None and found.state == "R"), "S")


def _most_common(values: list[str]) -> str | None:
    return max(set(values), key=values.count) if values else None


def _cpu(pid: int) -> float | None:
    found = procfs.stat(pid)
    return found.cpu if found else None


def _children(pid: int) -> dict[int, float]:
    return {child: found.cpu for child in procfs.descendants(pid) if (found := procfs.stat(child)) is not None}


def _syscall(pid: int) -> str | None:
    """The call in which the main thread is blocked (/proc/PID/syscall); ``None`` when it runs or may not be read."""
    try:
        first = Path(f"/proc/{pid}/task/{pid}/syscall").read_text().split()[0]
        return None if first == "running" else _CALLS.get(int(first), first)
    except (OSError, ValueError, IndexError):
        return None


def _reads_terminal(pid: int) -> bool:
    """Whether a process is blocked reading a terminal on its standard input: it waits for a person."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        fields = Path(f"/proc/{pid}/syscall").read_text().split()
        if _CALLS.get(int(fields[0])) in ("read", "pselect6", "select", "poll", "ppoll"):
            waits_for = int(fields[1], 16) if _CALLS[int(fields[0])] == "read" else 0
            return os.readlink(f"/proc/{pid}/fd/{waits_for}").startswith(("/dev/pts/", "/dev/tty"))
    return False
