"""The last resort: psutil looks at the processes of the sandbox and reports what goes past a limit.

It sees a limit passed only after the fact. Its period is 20 ms; how far a kernel gets past its memory limit meanwhile is measured by
``make bench`` and stated in docs/limits.md. May import model, machine, plan.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from safe_exec.model import Enforcement, LimitName, Limits, Mechanism
from safe_exec.records import dataclass, replace
from safe_exec.sandbox.held import held
from safe_exec.sandbox.machine import Machine
from safe_exec.sandbox.plan import Offer

if TYPE_CHECKING:
    import psutil

PERIOD_SECONDS = 0.02
LIST_SECONDS = 0.1
WATCHED = (LimitName.MEMORY, LimitName.PROCESSES, LimitName.CPU_TIME)
HELD_SHARE = 20
"""To look at all descriptors takes a twentieth of the time at most."""


def offer(limits: Limits, machine: Machine) -> Offer | None:
    """What a watch can hold: memory, processes and processor time of the whole tree, and what it writes (diskwatch.py)."""
    if not machine.may(Mechanism.WATCHDOG):
        return None
    note = f"looked at every {PERIOD_SECONDS * 1000:.0f} ms: can be passed for a moment"
    holds = {name: Enforcement(by=Mechanism.WATCHDOG, hard=False, note=note) for name in WATCHED if limits.of(name) is not None}
    if limits.disk is not None:
        what = "its folder and temporary files, walked now and then: can be passed by what is written in a second; other places are not seen"
        holds[LimitName.DISK] = Enforcement(by=Mechanism.WATCHDOG, hard=False, note=what)
    return Offer(mechanism=Mechanism.WATCHDOG, holds=holds)


@dataclass(frozen=True, kw_only=True, slots=True)
class TreeUse:
    """What the processes below the keeper use: bytes (unreclaimable), seconds, tasks."""

    memory: int
    cpu_seconds: float
    tasks: int
    processes: int = 1


class Tree:
    """The processes below one process, as psutil sees them. The list is renewed every tenth of a second.

    A process that ended takes its processor time with it: what it was last seen with is kept and added.
    """

    def __init__(self, root: int) -> None:
        import psutil  # 25 ms of imports that a run with control groups does without

        self._psutil = psutil
        self._root = psutil.Process(root)
        self._members: dict[int, psutil.Process] = {}
        self._cpu: dict[int, float] = {}
        self._listed = 0.0
        self._held = 0
        self._held_next = 0.0

    def read(self) -> TreeUse:
        """Sum over the tree. Memory is resident minus file-backed pages."""
        if time.monotonic() - self._listed > LIST_SECONDS:
            self._list()
        memory = tasks = 0
        for pid, process in list(self._members.items()):
            try:
                with process.oneshot():
                    info = process.memory_info()
                    memory += max(0, info.rss - getattr(info, "shared", 0))
                    times = process.cpu_times()
                    self._cpu[pid] = times.user + times.system
                    tasks += process.num_threads()
            except self._psutil.Error:
                self._members.pop(pid, None)
        return TreeUse(
            memory=memory + self._shared(), cpu_seconds=sum(self._cpu.values()), tasks=tasks, processes=len(self._members)
        )

    def exact(self) -> int | None:
        """The memory of the tree with pages that several processes share counted once (Pss, proc(5)); ``None`` where it cannot be read.

        After a fork parent and child share all pages until one of them writes: what each of them has resident counts them twice. Slow for
        large processes: only asked when it matters.
        """
        anonymous = shared = 0
        for pid in list(self._members):
            try:
                text = Path(f"/proc/{pid}/smaps_rollup").read_text()
            except ProcessLookupError:
                continue
            except OSError:
                return None
            figures = {line.split()[0]: int(line.split()[1]) * 1024 for line in text.splitlines()[1:]}
            anonymous += figures.get("Pss_Anon:", 0)
            shared += figures.get("Pss_Shmem:", 0)
        return anonymous + max(shared, self._held)

    def _list(self) -> None:
        try:
            found = self._root.children(recursive=True)
        except self._psutil.Error:
            found = []
        self._members = {p.pid: self._members.get(p.pid, p) for p in found}
        self._listed = time.monotonic()
        if self._listed >= self._held_next:
            self._held = sum(held(self._members).memory.values())
            now = time.monotonic()
            self._held_next = now + HELD_SHARE * (now - self._listed)

    def _shared(self) -> int:
        """Shared memory that is no file (anonymous MAP_SHARED, /dev/shm, memfd), once: the most any member maps, or all that they hold open.

        The sum over members would count the same pages many times; the largest is a lower bound. What is held open need not be mapped.
        """
        from safe_exec.sandbox import procfs

        return max((self._held, *(procfs.status_bytes(pid, "RssShmem") or 0 for pid in self._members)))


class Watchdog(threading.Thread):
    """Looks at a tree until stopped, and calls ``on_passed(limit, used)`` once, for the first limit passed."""

    def __init__(
        self, root: int, limits: Limits, names: frozenset[LimitName], on_passed: Callable[[LimitName, float], None]
    ) -> None:
        super().__init__(name="safe-exec-watchdog", daemon=True)
        self._tree = Tree(root)
        self._limits = limits
        self._names = names
        self._on_passed = on_passed
        self._stop_event = threading.Event()
        self.peak: TreeUse | None = None

    def run(self) -> None:
        """Look every 20 ms."""
        while not self._stop_event.wait(PERIOD_SECONDS):
            use = self._checked(self._tree.read())
            self._keep_peak(use)
            for name, used in self._figures(use):
                allowed = self._limits.of(name)
                if name in self._names and allowed is not None and used > allowed:
                    self._on_passed(name, used)
                    return

    def _checked(self, use: TreeUse) -> TreeUse:
        """A reading; one past the memory limit with shared pages counted once, as nobody is to be killed for what was counted twice."""
        allowed = self._limits.memory
        if allowed is None or use.memory <= allowed or use.processes == 1:
            return use
        exact = self._tree.exact()
        return use if exact is None else replace(use, memory=min(use.memory, exact))

    def stop(self) -> None:
        """End the watch and wait for its thread, unless called from it."""
        self._stop_event.set()
        if self.is_alive() and threading.current_thread() is not self:
            self.join()

    @staticmethod
    def _figures(use: TreeUse) -> tuple[tuple[LimitName, float], ...]:
        return (
            (LimitName.MEMORY, use.memory),
            (LimitName.PROCESSES, use.tasks),
            (LimitName.CPU_TIME, use.cpu_seconds),
        )

    def _keep_peak(self, use: TreeUse) -> None:
        old = self.peak
        if old is None:
            self.peak = use
        else:
            self.peak = TreeUse(
                memory=max(old.memory, use.memory),
                cpu_seconds=max(old.cpu_seconds, use.cpu_seconds),
                tasks=max(old.tasks, use.tasks),
            )
