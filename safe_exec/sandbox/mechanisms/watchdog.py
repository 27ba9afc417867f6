"""The last resort: polls the processes of a sandbox and reports an exceeded limit."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from msgspec import Struct
from msgspec.structs import replace

from safe_exec.model.limits import Enforcement, LimitName, Limits, Mechanism
from safe_exec.sandbox.host.capabilities import HostCapabilities
from safe_exec.sandbox.mechanisms.offers import ANYWHERE, Placement
from safe_exec.sandbox.plan import Offer
from safe_exec.sandbox.priority import PriorityGuard
from safe_exec.sandbox.usage.process_tree import ProcessTree, TreeUse

# The watchdog notices an excess only afterwards. ``make bench`` measures how far a kernel gets past
# its memory limit within the period of 20 ms; docs/limits.md states the result.

PERIOD_SECONDS = 0.02
# The same while the memory grows so fast that it could pass its limit before the next check. A
# program that fills its memory and exits holds the most of it for a moment only.
SHORT_PERIOD_SECONDS = 0.004
# The fastest growth between so many checks counts: a process that gets no processor for a moment
# seems to have stopped growing.
GROWTHS = 10
# Checking hundreds of processes takes milliseconds. After a check it rests for this multiple of the
# time that the check took.
REST_SHARE = 2
# The same after counting shared pages, which takes up to 50 ms per GB.
COUNT_REST_SHARE = 4
# No allocation fills memory faster than this. It bounds the time until the counted memory can reach
# the limit, and no new count is needed before.
FASTEST_BYTES_PER_SECOND = 5 << 30
WATCHED = (LimitName.MEMORY, LimitName.PROCESSES, LimitName.CPU_TIME)


def offer(
    limits: Limits, machine: HostCapabilities, _placement: Placement = ANYWHERE
) -> Offer | None:
    """Return the offer of the watchdog, including the disk watchdog's."""
    if not machine.allows(Mechanism.WATCHDOG):
        return None
    note = f"looked at every {PERIOD_SECONDS * 1000:.0f} ms: can be passed for a moment"
    holds = {
        name: Enforcement(by=Mechanism.WATCHDOG, hard=False, note=note)
        for name in WATCHED
        if limits.of(name) is not None
    }
    if limits.disk is not None:
        disk_note = (
            "its folder and temporary files, walked now and then: can be passed by what is "
            "written in a second; other places are not seen"
        )
        holds[LimitName.DISK] = Enforcement(by=Mechanism.WATCHDOG, hard=False, note=disk_note)
    return Offer(mechanism=Mechanism.WATCHDOG, holds=holds)


class Peaks(Struct, frozen=True, kw_only=True):
    """The highest figures so far: bytes of memory (if watched) and tasks.

    If ``upper_bound`` is set, the true memory may be less. ``children`` are the bytes of processes
    other than the kernel at the peak, without shared memory. ``process`` is the largest resident
    memory of a single process, pages of files included. ``kernel`` is the last anonymous memory of
    the kernel process. ``interval`` are the seconds between the two checks that were furthest
    apart.
    """

    memory: int | None = None
    upper_bound: bool = False
    children: int | None = None
    tasks: int | None = None
    process: int = 0
    kernel: int | None = None
    interval: float = 0.0


class Watchdog(threading.Thread):
    """Watches a process tree; calls ``on_passed(limit, used)`` for the first exceeded limit.

    ``refuse_more(tasks)`` is called first for a tree with too many tasks. It returns whether the
    system refuses further ones.
    """

    def __init__(
        self,
        tree: ProcessTree,
        limits: Limits,
        names: frozenset[LimitName],
        on_passed: Callable[[LimitName, float], None],
        *,
        guard: PriorityGuard | None = None,
        refuse_more: Callable[[int], bool] | None = None,
    ) -> None:
        super().__init__(name="safe-exec-watchdog", daemon=True)
        self._guard = guard
        self._refuse_more = refuse_more
        self.tree = tree
        self.peaks = Peaks()
        self._limits = limits
        self._names = names
        self._on_passed = on_passed
        self._stop_event = threading.Event()
        self._looking = threading.Lock()
        self._passed = False
        self._count_next = 0.0
        # Tells, when a limit is exceeded, whether something of ours was ended first to keep it.
        self.makes_room: Callable[[LimitName], bool] = lambda _name: False
        self._last_memory: tuple[float, int] | None = None
        self._growths: deque[float] = deque(maxlen=GROWTHS)
        self._is_near = False
        self._last_check: float | None = None

    def run(self) -> None:
        """Check every 20 ms until a limit is exceeded, and more often while memory is about to."""
        pause, ended = PERIOD_SECONDS, time.monotonic()
        while not self._stop_event.wait(pause):
            check_start = time.monotonic()
            # A late check means that the machine is busy, perhaps because of the notebook.
            if self._guard is not None:
                self._guard.looked(check_start - ended - pause)
            if self.check():
                return
            ended = time.monotonic()
            period = SHORT_PERIOD_SECONDS if self._is_near else PERIOD_SECONDS
            pause = max(period, REST_SHARE * (ended - check_start))

    def check(self, *, last: bool = False) -> bool:
        """Check now; true if a limit was exceeded. The ``last`` check always counts exactly."""
        with self._looking:
            if self._passed or self._stop_event.is_set():
                return self._passed
            use = self.tree.read()
            self._is_near = self._grows_past(use)
            self._note(use)
            for name, used in self._figures(use, last=last):
                allowed = self._limits.of(name)
                if name in self._names and allowed is not None and used > allowed:
                    if self.makes_room(name):
                        break
                    # An error in the cell tells more than a killed kernel.
                    if name is LimitName.PROCESSES and self._refuses_more(use.tasks):
                        continue
                    self._passed = True
                    self._on_passed(name, used)
                    break
            return self._passed

    def _refuses_more(self, tasks: int) -> bool:
        return self._refuse_more is not None and self._refuse_more(tasks)

    def _note(self, use: TreeUse) -> None:
        """Record the figures of a check that are compared with no limit."""
        moment, peaks = time.monotonic(), self.peaks
        since_last = 0.0 if self._last_check is None else moment - self._last_check
        self._last_check = moment
        self.peaks = replace(
            peaks,
            tasks=max(use.tasks, peaks.tasks or 0),
            process=max(use.largest, peaks.process),
            kernel=peaks.kernel if use.kernel_memory is None else use.kernel_memory,
            interval=max(since_last, peaks.interval),
        )

    def judge(self, use: TreeUse) -> None:
        """Compare the memory limit with a reading of the processes that the caller has taken."""
        # A peak of a few milliseconds falls between two checks, above all on a busy machine. Only
        # the lower bound counts: no page in it is counted twice.
        with self._looking:
            self.peaks = replace(self.peaks, process=max(use.largest, self.peaks.process))
        allowed = self._limits.memory
        if allowed is None or LimitName.MEMORY not in self._names or use.least <= allowed:
            return
        with self._looking:
            if self._passed or self._stop_event.is_set() or self.makes_room(LimitName.MEMORY):
                return
            self._passed = True
            if self.peaks.memory is None or use.least > self.peaks.memory:
                children = replace(use, memory=use.least).children_memory
                self.peaks = replace(
                    self.peaks, memory=use.least, upper_bound=use.upper_bound, children=children
                )
            self._on_passed(LimitName.MEMORY, use.least)

    def stop(self) -> None:
        """Stop the watch and wait for its thread."""
        self._stop_event.set()
        # ``on_passed`` runs on this thread and may call ``stop``, but a thread cannot join itself.
        if self.is_alive() and threading.current_thread() is not self:
            self.join()

    def _grows_past(self, use: TreeUse) -> bool:
        """Whether memory may pass its limit within two periods, by its growth so far."""
        allowed, last, moment = self._limits.memory, self._last_memory, time.monotonic()
        if allowed is None or LimitName.MEMORY not in self._names:
            return False
        self._last_memory = (moment, use.most)
        if last is not None:
            seconds = max(moment - last[0], SHORT_PERIOD_SECONDS)
            self._growths.append(max(0.0, (use.most - last[1]) / seconds))
        growth = max(self._growths, default=0.0)
        return growth > 0 and use.most + 2 * PERIOD_SECONDS * growth > allowed

    def _figures(self, use: TreeUse, *, last: bool) -> tuple[tuple[LimitName, float], ...]:
        return (
            (LimitName.MEMORY, self._memory(use, last=last)),
            (LimitName.PROCESSES, use.tasks),
            (LimitName.CPU_TIME, use.cpu_seconds),
        )

    def _memory(self, use: TreeUse, *, last: bool) -> int:
        """Return the memory to compare with the limit, in bytes."""
        # A kernel must not be killed because shared pages were counted twice. So count exactly if
        # the limit lies between the lower and the upper bound.
        allowed = self._limits.memory
        if allowed is None or LimitName.MEMORY not in self._names:
            return use.memory
        memory, is_upper_bound = use.memory, use.upper_bound
        if use.least <= allowed < use.most:
            memory = use.least
            if last or time.monotonic() >= self._count_next:
                count = self.tree.count()
                # A process may have ended during the count. What was seen of it before still counts.
                memory, is_upper_bound = max(use.least, count.at_least), count.upper_bound
                pause = max(
                    COUNT_REST_SHARE * count.seconds, (allowed - memory) / FASTEST_BYTES_PER_SECOND
                )
                self._count_next = count.at + pause
        if self.peaks.memory is None or memory > self.peaks.memory:
            children = replace(use, memory=memory).children_memory
            self.peaks = replace(
                self.peaks, memory=memory, upper_bound=is_upper_bound, children=children
            )
        return memory
