"""Keeps a fork bomb from starving those who watch it."""

from __future__ import annotations

import contextlib
import math
import os

from safe_exec.keeper import procfs

# Where all share one queue of the scheduler (a container, the same session), each of hundreds of
# busy processes gets as much as the watchdog: with 64 on two processors it got a turn every 107 ms
# in place of 20, and 441 ms at worst. So when we are late and the notebook has many more runnable
# threads than there are processors, those get a nice value. Only then: a nice value is seen by the
# notebook (``os.nice(0)``), makes it slower on a busy machine, and an ordinary user cannot take it
# back.

LATE_SECONDS = 0.05
# So many looks in a row have to be late: a single one says nothing.
LATE_LOOKS = 2
# Runnable threads per processor from which they are a crowd.
CROWD = 4
# By this factor a thread's share falls with each nice value (sched(7)).
WEIGHT_STEP = 1.25
# The crowd together is to weigh as much as so many ordinary threads per processor.
ALL_WEIGH = 2
MOST_NICE = 19


def nice_for(runnable: int, processors: int) -> int:
    """The nice value with which so many runnable threads leave time for others; 0 for no crowd."""
    if runnable <= CROWD * processors:
        return 0
    return min(MOST_NICE, math.ceil(math.log(runnable / (ALL_WEIGH * processors), WEIGHT_STEP)))


class PriorityGuard:
    """Lowers the priority of the notebook's threads when they delay the watchdog."""

    def __init__(self, keeper: int, processors: int | None = None) -> None:
        self._keeper = keeper
        self._processors = processors or os.cpu_count() or 1
        self._late_looks = 0

    def looked(self, late: float) -> int:
        """A look came ``late`` seconds after its time; how many threads got a nice value for it."""
        self._late_looks = self._late_looks + 1 if late > LATE_SECONDS else 0
        if self._late_looks < LATE_LOOKS:
            return 0
        self._late_looks = 0
        threads = runnable_threads(self._keeper)
        value = nice_for(len(threads), self._processors)
        return sum(_make_nice(thread, value) for thread in threads) if value else 0


def runnable_threads(root: int) -> list[int]:
    """The threads of all descendants of a process that run or wait for a processor."""
    threads = []
    for pid in procfs.descendants(root):
        with contextlib.suppress(OSError):
            tasks = [int(name) for name in os.listdir(f"/proc/{pid}/task")]
            threads += [
                task
                for task in tasks
                if (stat := procfs.stat(pid, task)) is not None and stat.state == "R"
            ]
    return threads


def _make_nice(thread: int, value: int) -> bool:
    """Raise the nice value of a thread, never lower it; whether it was raised."""
    # It has ended, or is another user's.
    with contextlib.suppress(OSError):
        if os.getpriority(os.PRIO_PROCESS, thread) < value:
            os.setpriority(os.PRIO_PROCESS, thread, value)
            return True
    return False
