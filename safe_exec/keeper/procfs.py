"""Reads processes from /proc, and kills whole process trees. Linux only.

Standard library only (the keeper uses it).

Sources: proc(5), prctl(2) PR_SET_CHILD_SUBREAPER, kernel documentation admin-guide/cgroup-v2
(``cgroup.kill``).
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


class Stat(NamedTuple):
    """The fields of /proc/PID/stat that we use.

    ``cpu`` in seconds, ``started`` in clock ticks since boot.
    """

    pid: int
    state: str
    ppid: int
    cpu: float
    threads: int
    started: int


def stat(pid: int, task: int | None = None) -> Stat | None:
    """Read the stat line of a process or of one of its threads; ``None`` if it has ended."""
    path = f"/proc/{pid}/stat" if task is None else f"/proc/{pid}/task/{task}/stat"
    try:
        with open(path, "rb") as handle:
            text = handle.read().decode("utf-8", "replace")
    except OSError:
        return None
    # The command name may hold spaces and parentheses: only what follows the last ")" is safe to
    # split.
    head, _, tail = text.rpartition(")")
    fields = tail.split()
    cpu = (int(fields[11]) + int(fields[12])) / TICKS
    return Stat(
        int(head.split(" ", 1)[0]), fields[0], int(fields[1]), cpu, int(fields[17]), int(fields[19])
    )


def age(process: Stat) -> float:
    """Return the seconds since a process was started."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - process.started / TICKS


def exit_status(pid: int) -> int | None:
    """Return the raw wait status of a zombie; ``None`` if it was reaped."""
    # The last field of its stat line reads 0 without the right to trace it.
    try:
        with open(f"/proc/{pid}/stat", "rb") as handle:
            return int(handle.read().rpartition(b")")[2].split()[49])
    except (OSError, ValueError, IndexError):
        return None


def children(pid: int) -> list[int]:
    """Return the children of all threads of a process; empty if the system does not list them.

    Needs Linux 4.2 with CONFIG_PROC_CHILDREN.
    """
    pids: list[int] = []
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children", "rb") as handle:
                pids += map(int, handle.read().split())
    except (OSError, ValueError):
        pass
    return pids


def voluntary_switches(pid: int) -> int | None:
    """Return how often the main thread of a process has blocked."""
    try:
        with open(f"/proc/{pid}/task/{pid}/status", "rb") as handle:
            return next(
                int(line.split()[1])
                for line in handle
                if line.startswith(b"voluntary_ctxt_switches:")
            )
    except (OSError, ValueError, StopIteration):
        return None


def status_bytes(pid: int, key: str) -> int | None:
    """Return a ``kB`` field of /proc/PID/status (VmStk, VmRSS, ...) in bytes.

    ``None`` if unreadable.
    """
    try:
        for line in Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        return None
    return None


def soft_limit(pid: int, title: str) -> int | None:
    """Return the soft value of a row of /proc/PID/limits; ``None`` for unlimited or unreadable."""
    try:
        for line in Path(f"/proc/{pid}/limits").read_text().splitlines():
            if line.startswith(title):
                value = line[len(title) :].split()[0]
                return None if value == "unlimited" else int(value)
    except (OSError, ValueError, IndexError):
        return None
    return None


def catches(pid: int, signum: int) -> bool:
    """Whether a process has a handler for a signal (SigCgt in /proc/PID/status)."""
    return bool(_in_mask(f"/proc/{pid}/status", "SigCgt", signum))


def ignores(pid: int, signum: int) -> bool | None:
    """Whether a process ignores a signal (SigIgn in /proc/PID/status); ``None`` if unreadable."""
    return _in_mask(f"/proc/{pid}/status", "SigIgn", signum)


def blocks(pid: int, task: int, signum: int) -> bool:
    """Whether a thread blocks a signal (SigBlk); it also does while it handles that signal."""
    return bool(_in_mask(f"/proc/{pid}/task/{task}/status", "SigBlk", signum))


def caught_signals(pid: int) -> int | None:
    """Return the mask of signals with a handler (SigCgt: bit N-1 for signal N).

    Works for zombies.
    """
    return _mask(f"/proc/{pid}/status", "SigCgt")


def _in_mask(path: str, name: str, signum: int) -> bool | None:
    mask = _mask(path, name)
    return None if mask is None else bool(mask >> (signum - 1) & 1)


def _mask(path: str, name: str) -> int | None:
    try:
        for line in Path(path).read_text(errors="replace").splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1], 16)
    except (OSError, ValueError, IndexError):
        return None
    return None


def innermost_pid(pid: int) -> int | None:
    """Return a process's id in its own pid namespace, ``None`` if it has ended."""
    # NSpid exists since Linux 4.1.
    try:
        for line in Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines():
            if line.startswith("NSpid:"):
                return int(line.split()[-1])
    except (OSError, ValueError):
        return None
    return pid


def ancestors(pid: int) -> list[int]:
    """Return the ids of a process's parent, its parent's parent and so on."""
    pids: list[int] = []
    while (status := stat(pid)) is not None and status.ppid:
        pid = status.ppid
        pids.append(pid)
    return pids


def all_pids() -> list[int]:
    """Return the ids of all processes that /proc shows."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def descendants(root: int) -> list[int]:
    """Return all live and zombie descendants of ``root``, nearest first. One pass over /proc."""
    children: dict[int, list[int]] = {}
    for pid in all_pids():
        status = stat(pid)
        if status is not None:
            children.setdefault(status.ppid, []).append(pid)
    order: list[int] = []
    queue = list(children.get(root, ()))
    while queue:
        pid = queue.pop(0)
        order.append(pid)
        queue.extend(children.get(pid, ()))
    return order


def signal_one(pid: int, signum: int) -> None:
    """Send a signal to a process; nothing happens if it has ended."""
    signal_all([pid], signum)


def run_delay(task: int) -> float | None:
    """Return the seconds that a thread has waited for a processor (/proc/PID/schedstat).

    ``None`` if the system does not count them.
    """
    try:
        with open(f"/proc/{task}/schedstat", "rb") as handle:
            return int(handle.read().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return None


def tasks_of(uid: int) -> int:
    """Return the number of tasks (threads) of a user, as RLIMIT_NPROC counts them."""
    count = 0
    for pid in all_pids():
        try:
            if os.stat(f"/proc/{pid}").st_uid == uid:
                process = stat(pid)
                count += process.threads if process else 0
        except OSError:
            continue
    return count


def signal_all(pids: Iterable[int], signum: int) -> None:
    """Send a signal to each process that has not ended."""
    for pid in pids:
        try:
            os.kill(pid, signum)
        except (ProcessLookupError, PermissionError):
            continue


def signal_group(pid: int, signum: int) -> None:
    """Send a signal to a process and all others of its group."""
    # The signal goes to the process alone if it does not lead the group. Whoever leads a group of
    # its own shares it with its descendants only: nobody else can join it from another session
    # (setpgid(2)).
    try:
        if os.getpgid(pid) == pid:
            os.killpg(pid, signum)
            return
    except (ProcessLookupError, PermissionError):
        pass
    signal_one(pid, signum)


def private_bytes(pid: int) -> int | None:
    """Return the memory that no other process shares with this one, ``None`` if it has ended."""
    try:
        with open(f"/proc/{pid}/smaps_rollup", "rb") as file:
            lines = file.read().splitlines()
    except OSError:
        return None
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(b"Private_"))


def kill_descendants(
    root: int, *, deadline: float, reap: Callable[[], bool], spared: int | None = None
) -> list[int]:
    """Kill every descendant of ``root`` (a subreaper, so that orphans stay its descendants).

    Except for the ``spared`` one.

    All are stopped before any is killed: otherwise a process that forks faster than we read /proc
    would outrun us. ``reap`` collects zombies and says whether any child is left. Returns the pids
    that outlived ``deadline`` (``time.monotonic`` seconds): a process in uninterruptible sleep
    cannot be killed at once.
    """
    while True:
        alive = [
            pid
            for pid in descendants(root)
            if pid != spared and (s := stat(pid)) is not None and s.state not in "ZX"
        ]
        if not alive and (not reap() or spared is not None):
            return []
        signal_all(alive, signal.SIGSTOP)
        signal_all(alive, signal.SIGKILL)
        reap()
        if time.monotonic() > deadline:
            return alive
        time.sleep(0.002)
