"""Keeps a fork bomb from starving the watchdog."""

from __future__ import annotations

import contextlib
import math
import os

from safe_exec.keeper import procfs

# If all processes share one queue of the scheduler (in a container, or in the same session), each
# of hundreds of busy processes gets as much time as the watchdog. With 64 on two processors the
# watchdog ran every 107 ms instead of every 20 ms, and 441 ms apart at worst. So if the watchdog is
# late and the notebook has many more runnable threads than there are processors, the threads get a
# nice value. Only then, since the notebook can see it (``os.nice(0)``), is slower on a busy
# machine, and an ordinary user cannot lower it again.

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


def nice_for(runnable: int, processors: int) -> int:
    """Return the nice value at which so many runnable threads leave processor time for others.

    0 if there are few threads.
    """
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
        """Lower the priority of the notebook's threads if checks were late several times in a row.

        ``late`` is the delay of this check in seconds. Returns how many threads' nice value was
        raised.
        """
        self._late_looks = self._late_looks + 1 if late > LATE_SECONDS else 0
        if self._late_looks < LATE_LOOKS:
            return 0
        self._late_looks = 0
        threads = runnable_threads(self._keeper)
        value = nice_for(len(threads), self._processors)
        return sum(_make_nice(thread, value) for thread in threads) if value else 0


def runnable_threads(root: int) -> list[int]:
    """Return the running or runnable threads of a process's descendants."""
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
    """Raise the nice value of a thread; false if it was not raised."""
    # The thread may have ended, or belong to another user.
    with contextlib.suppress(OSError):
        if os.getpriority(os.PRIO_PROCESS, thread) < value:
            os.setpriority(os.PRIO_PROCESS, thread, value)
            return True
    return False
