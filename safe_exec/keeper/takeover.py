"""Lets a sleeping snapshot of the kernel outlive it, and makes the snapshot the kernel.

A snapshot is a fork of the kernel whose parent has ended. So its parent is the subreaper above it:
the keeper, or the init in a pid namespace of its own. That one reaps it and gets its wait status,
as it does for the first kernel. Standard library only.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

from safe_exec.keeper import procfs

PAUSE_SECONDS = 0.002
# A snapshot that has more memory of its own is given up near the limit: this share of the limit,
# but at least what every snapshot soon has (7 to 15 MiB), since Python counts references in its
# objects.
MOST_OWN_SHARE = 0.02
LEAST_OWN_BYTES = 16 << 20
KILL_SECONDS = 5.0
# The next look at it comes when the use has grown by this share.
STEP_SHARE = 0.02


class Takeover:
    """The snapshot of one sandbox, 0 for none, from the keeper's side."""

    def __init__(self, keeper: int, reap: Callable[[], bool]) -> None:
        self._keeper, self._reap = keeper, reap
        self._memory = OwnMemory()
        self.snapshot = 0

    def kill_all_but_snapshot(self) -> bool:
        """Kill every other process in the sandbox; false if there is no living snapshot."""
        spared_pids = survivors(self.snapshot, self._keeper)
        if spared_pids:
            deadline = time.monotonic() + KILL_SECONDS
            kill_all_but(spared_pids, self._keeper, deadline=deadline, reap=self._reap)
        return bool(spared_pids)

    def give_up_for_memory(self, share: float, limit: int) -> None:
        """End the snapshot near the memory limit unless it shares its memory with the kernel."""
        pid = self.snapshot
        if pid and self._memory.is_too_much(pid, share, limit):
            self.snapshot = 0
            if survivors(pid, self._keeper):
                procfs.signal_one(pid, signal.SIGKILL)


def survivors(snapshot: int, keeper: int) -> frozenset[int]:
    """Return a snapshot and the processes between it and the keeper; empty if it is not below.

    A snapshot is named from inside the sandbox, so it may be any number.
    """
    if not is_alive(snapshot):
        return frozenset()
    above = procfs.ancestors(snapshot)
    if keeper not in above:
        return frozenset()
    return frozenset([snapshot, *above[: above.index(keeper)]])


class OwnMemory:
    """Decides near the memory limit whether a snapshot has to go: it must not cost the kernel.

    The memory that snapshot and kernel share is there with and without the snapshot. Its own is the
    former content of pages that the kernel has changed since.
    """

    def __init__(self) -> None:
        self._pid, self._share = 0, 0.0

    def is_too_much(self, pid: int, share: float, limit: int) -> bool:
        """Tell whether a snapshot has too much memory of its own at this ``share`` of the limit."""
        if pid == self._pid and share < self._share + STEP_SHARE:
            return False
        self._pid, self._share = pid, share
        own = own_bytes(pid)
        return own is None or own > most_own_bytes(limit)


def most_own_bytes(limit: int) -> float:
    """Return the memory of its own that a snapshot may have near a memory limit."""
    return max(LEAST_OWN_BYTES, MOST_OWN_SHARE * limit)


def own_bytes(pid: int) -> int | None:
    """Return the memory that no other process shares, in bytes; ``None`` if it is unreadable."""
    total = 0
    try:
        with open(f"/proc/{pid}/smaps_rollup", "rb") as file:
            for line in file:
                if line.startswith((b"Private_Dirty:", b"SwapPss:")):
                    total += int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        return None
    return total


def is_alive(pid: int) -> bool:
    """Whether a process exists that has not ended."""
    process = procfs.stat(pid) if pid > 0 else None
    return process is not None and process.state not in "ZX"


def kill_all_but(
    spared: frozenset[int], keeper: int, *, deadline: float, reap: Callable[[], bool]
) -> None:
    """Kill every descendant of the keeper that is not spared, as ``procfs.kill_descendants``."""
    while True:
        alive = [pid for pid in procfs.descendants(keeper) if pid not in spared and is_alive(pid)]
        reap()
        if not alive or time.monotonic() > deadline:
            return
        procfs.signal_all(alive, signal.SIGSTOP)
        procfs.signal_all(alive, signal.SIGKILL)
        time.sleep(PAUSE_SECONDS)
