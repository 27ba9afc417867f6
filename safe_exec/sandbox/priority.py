"""Keeps a fork bomb from starving the watchdog."""

from __future__ import annotations

import contextlib
import math
import os
import time
from pathlib import Path

from safe_exec.keeper import procfs

# If all processes share one queue of the scheduler (in a container, or in the same session), each
# of hundreds of busy processes gets as much time as the watchdog. With 64 on two processors the
# watchdog ran every 107 ms instead of every 20 ms, and 441 ms apart at worst. So if the watchdog is
# late and the notebook has many more runnable threads than there are processors, the threads get a
# nice value. Only then, since the notebook can see it (``os.nice(0)``), is slower on a busy
# machine, and an ordinary user cannot lower it again.

# With autogroups (sched(7)) each session has the weight of one ordinary thread, whatever the nice
# values in it: a hundred children that each called setsid(2) and spin left the runner one hundredth
# of the time, and a cell with 5 s ended after 24 s. Only root may change the weight of so many
# sessions at once (a user one in 0.1 s, /proc/PID/autogroup). So their threads give up one
# processor, which remains for us. The notebook can see that, and undo it.

LATE_SECONDS = 0.05
# This many checks in a row must be late; a single one can be chance.
LATE_LOOKS = 2
# More runnable threads per processor than this count as a crowd.
CROWD = 4
# Each nice value divides a thread's weight by this factor (sched(7)).
WEIGHT_STEP = 1.25
# The crowd as a whole gets the weight of this many ordinary threads per processor.
ALL_WEIGH = 2
MOST_NICE = 19

# We are starved if our own work takes so long, and gets less than this share of a processor.
STARVED_SECONDS = 0.2
STARVED_SHARE = 0.2
# After so much processor time we know.
TRIED_SECONDS = 0.03


def nice_for(runnable: int, processors: int) -> int:
    """Return the nice value at which so many runnable threads leave processor time for others.

    0 if there are few threads.
    """
    if runnable <= CROWD * processors:
        return 0
    return min(MOST_NICE, math.ceil(math.log(runnable / (ALL_WEIGH * processors), WEIGHT_STEP)))


class PriorityGuard:
    """Lowers the priority of the notebook's threads when they delay the watchdog.

    If they are in many sessions, they also leave one processor to others.
    """

    def __init__(self, keeper: int, processors: int | None = None) -> None:
        self._keeper = keeper
        self._processors = processors or os.cpu_count() or 1
        self._late_looks = 0

    def looked(self, late: float) -> int:
        """Lower the priority of the notebook's threads if checks were late several times in a row.

        ``late`` is the delay of this check in seconds. Returns how many threads were held back.
        """
        self._late_looks = self._late_looks + 1 if late > LATE_SECONDS else 0
        if self._late_looks < LATE_LOOKS:
            return 0
        self._late_looks = 0
        return self.hold_back()

    def hold_back(self) -> int:
        """Lower the priority of the notebook's threads if they are a crowd.

        Return how many threads' nice value or processors were changed.
        """
        threads = runnable_threads(self._keeper)
        value = nice_for(len(threads), self._processors)
        if not value:
            return 0
        changed_threads: set[int] = set()
        if has_autogroups() and _sessions(threads) > ALL_WEIGH * self._processors:
            # The kernel too: its next children inherit this (sched_setaffinity(2)).
            changed_threads = {thread for thread in threads if _leave_processor(thread)}
        return len(changed_threads | {thread for thread in threads if _make_nice(thread, value)})

    def crowd(self) -> int | None:
        """Return the number of runnable threads if they leave us hardly any processor time."""
        # Only work tells, no idle wait: the scheduler serves those first who have slept, and grants
        # everybody a short piece at once.
        start, cpu_start = time.monotonic(), time.thread_time()
        while True:
            threads = runnable_threads(self._keeper)
            seconds, cpu_seconds = time.monotonic() - start, time.thread_time() - cpu_start
            if not nice_for(len(threads), self._processors):
                return None
            if seconds > STARVED_SECONDS and cpu_seconds < STARVED_SHARE * seconds:
                return len(threads)
            if cpu_seconds >= TRIED_SECONDS:
                return None


def has_autogroups() -> bool:
    """Whether each session has a scheduling group of its own (sched(7))."""
    try:
        return Path("/proc/sys/kernel/sched_autogroup_enabled").read_text().strip() == "1"
    except OSError:
        return False


def runnable_threads(root: int) -> list[int]:
    """Return the running or runnable threads of a process's descendants."""
    threads = []
    for pid in procfs.descendants(root):
        threads += [
            task
            for task in _threads_of(pid)
            if (stat := procfs.stat(pid, task)) is not None and stat.state == "R"
        ]
    return threads


def _threads_of(pid: int) -> list[int]:
    try:
        return [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    except OSError:
        return []


def _sessions(threads: list[int]) -> int:
    """Return the number of sessions that the threads belong to."""
    sessions = set()
    for thread in threads:
        with contextlib.suppress(OSError):
            sessions.add(os.getsid(thread))
    return len(sessions)


def _leave_processor(thread: int) -> bool:
    """Keep a thread off the first of our processors; false if it was, or has no other."""
    # The thread may have ended, or belong to another user.
    with contextlib.suppress(OSError):
        current = os.sched_getaffinity(thread)
        others = current - {min(os.sched_getaffinity(0))}
        if others and others != current:
            os.sched_setaffinity(thread, others)
            return True
    return False


def _make_nice(thread: int, value: int) -> bool:
    """Raise the nice value of a thread; false if it was not raised."""
    # The thread may have ended, or belong to another user.
    with contextlib.suppress(OSError):
        if os.getpriority(os.PRIO_PROCESS, thread) < value:
            os.setpriority(os.PRIO_PROCESS, thread, value)
            return True
    return False
