"""The last resort: looks at the processes of a sandbox and reports a limit that is passed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from msgspec import Struct
from msgspec.structs import replace

from safe_exec.model.limits import Enforcement, LimitName, Limits, Mechanism
from safe_exec.sandbox.host.capabilities import HostCapabilities
from safe_exec.sandbox.mechanisms.offers import ANYWHERE, Placement
from safe_exec.sandbox.plan import Offer
from safe_exec.sandbox.priority import PriorityGuard
from safe_exec.sandbox.usage.process_tree import ProcessTree, TreeUse

# It sees a limit passed only after the fact. Its period is 20 ms; how far a kernel gets past its
# memory limit meanwhile is measured by ``make bench`` and stated in docs/limits.md.

PERIOD_SECONDS = 0.02
# After a look it rests so many times as long as the look took: hundreds of processes take
# milliseconds.
REST_SHARE = 2
# The same after shared pages were counted, which takes up to 50 ms per GB.
COUNT_REST_SHARE = 4
# No allocation fills memory faster: until then what was counted cannot have grown to the limit.
FASTEST_BYTES_PER_SECOND = 5 << 30
WATCHED = (LimitName.MEMORY, LimitName.PROCESSES, LimitName.CPU_TIME)


def offer(
    limits: Limits, machine: HostCapabilities, _placement: Placement = ANYWHERE
) -> Offer | None:
    """Return what the watchdog can enforce of these limits."""
    # It sees the whole process tree, and what that writes (disk_watchdog.py).
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
    """The highest figures seen: bytes where memory is watched, tasks.

    ``upper_bound``: the memory may be less.

    ``children`` are the bytes that processes other than the kernel's had at the peak; shared memory
    is nobody's.
    """

    memory: int | None = None
    upper_bound: bool = False
    children: int | None = None
    tasks: int | None = None


class Watchdog(threading.Thread):
    """Watches a process tree; calls ``on_passed(limit, used)`` once, for the first limit passed."""

    def __init__(
        self,
        tree: ProcessTree,
        limits: Limits,
        names: frozenset[LimitName],
        on_passed: Callable[[LimitName, float], None],
        guard: PriorityGuard | None = None,
    ) -> None:
        super().__init__(name="safe-exec-watchdog", daemon=True)
        self._guard = guard
        self.tree = tree
        self.peaks = Peaks()
        self._limits = limits
        self._names = names
        self._on_passed = on_passed
        self._stop_event = threading.Event()
        self._looking = threading.Lock()
        self._passed = False
        self._count_next = 0.0

    def run(self) -> None:
        """Check every 20 ms until a limit is passed."""
        pause, ended = PERIOD_SECONDS, time.monotonic()
        while not self._stop_event.wait(pause):
            check_start = time.monotonic()
            # A check that comes late says that the machine is busy, perhaps by the notebook itself.
            if self._guard is not None:
                self._guard.looked(check_start - ended - pause)
            if self.check():
                return
            ended = time.monotonic()
            pause = max(PERIOD_SECONDS, REST_SHARE * (ended - check_start))

    def check(self, *, last: bool = False) -> bool:
        """Look now; whether a limit was passed.

        The ``last`` look of a run spares no time to be sure.
        """
        with self._looking:
            if self._passed or self._stop_event.is_set():
                return self._passed
            use = self.tree.read()
            self.peaks = replace(self.peaks, tasks=max(use.tasks, self.peaks.tasks or 0))
            for name, used in self._figures(use, last=last):
                allowed = self._limits.of(name)
                if name in self._names and allowed is not None and used > allowed:
                    self._passed = True
                    self._on_passed(name, used)
                    break
            return self._passed

    def stop(self) -> None:
        """End the watch and wait for its thread, unless called from it."""
        self._stop_event.set()
        # ``on_passed`` runs on this thread and may end in ``stop``: a thread cannot join itself.
        if self.is_alive() and threading.current_thread() is not self:
            self.join()

    def _figures(self, use: TreeUse, *, last: bool) -> tuple[tuple[LimitName, float], ...]:
        return (
            (LimitName.MEMORY, self._memory(use, last=last)),
            (LimitName.PROCESSES, use.tasks),
            (LimitName.CPU_TIME, use.cpu_seconds),
        )

    def _memory(self, use: TreeUse, *, last: bool) -> int:
        """Return the memory to compare with the limit."""
        # Nobody is to be killed for pages that were counted twice.
        allowed = self._limits.memory
        if allowed is None or LimitName.MEMORY not in self._names:
            return use.memory
        memory, is_upper_bound = use.memory, use.upper_bound
        if use.least <= allowed < use.most:
            memory = use.least
            if last or time.monotonic() >= self._count_next:
                count = self.tree.count()
                memory, is_upper_bound = count.at_least, count.upper_bound
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
