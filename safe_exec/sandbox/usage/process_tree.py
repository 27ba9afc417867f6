"""The processes of a sandbox and their resource use from /proc, without cgroups."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from msgspec import Struct
from msgspec.structs import replace

from safe_exec.keeper.procfs import TICKS
from safe_exec.sandbox.usage.open_files import hidden_usage
from safe_exec.sandbox.usage.process_files import Member, ProcessFiles
from safe_exec.sandbox.usage.shared_pages import (
    SMALL,
    SharedCount,
    count_once,
    estimate,
    lower_bound,
    upper_bound,
)

# Members are the descendants of the keeper except those between it and the kernel (bubblewrap and
# our init). These are part of safe-exec, do not count against the notebook's limits, and an
# ordinary user cannot inspect one of them.

# A reading is reused for this time, since the watchdog and the meter read one after the other.
FRESH_SECONDS = 0.002
# At each reading, one in this many foreign processes is checked again, since its id may have been
# reused by a member.
OTHERS_SHARE = 50
# Scanning all descriptors takes at most a twentieth of the time.
OPEN_FILES_SHARE = 20
# Counting shared pages takes at most a tenth of the time, unless a limit is near.
COUNT_SHARE = 10
# While fork(2) copies the page tables of shared memory, the memory of the new process seems to
# grow. So younger processes do not count as growing.
SETTLED_SECONDS = 2.0
# The figures of one address space, read through two processes in a row, can differ by this much.
VFORK_BYTES = 256 << 10


class TreeUse(Struct, frozen=True, kw_only=True):
    """The use of all processes: bytes (unreclaimable), seconds, tasks.

    ``memory`` counts shared pages once, by the last count; ``least`` and ``most`` are its bounds.
    If ``upper_bound`` is set, some processes could not be inspected, and the true memory may be
    less. ``shared_memory`` are files in memory, ``kernel_memory`` is the anonymous memory of the
    kernel process; the rest belongs to its children. ``largest`` is the resident memory of the
    largest process, pages of files included.
    """

    memory: int
    cpu_seconds: float
    tasks: int
    least: int = 0
    most: int = 0
    upper_bound: bool = False
    shared_memory: int = 0
    kernel_memory: int | None = None
    largest: int = 0

    @property
    def children_memory(self) -> int | None:
        """The memory of processes other than the kernel, without shared memory."""
        own = self.kernel_memory
        return None if own is None else max(0, self.memory - self.shared_memory - own)


class ProcessTree:
    """The processes below a keeper. Can be read from several threads.

    ``counts_shared`` tells whether to count pages that several processes share only once.
    """

    # Counting shared pages takes time, and is not needed if a cgroup counts the memory.

    def __init__(
        self,
        keeper: int,
        kernel: int | None = None,
        *,
        counts_shared: bool = True,
        files: ProcessFiles | None = None,
    ) -> None:
        self._files = files or ProcessFiles()
        self._counts_shared = counts_shared
        self._lock = threading.RLock()
        self._kernel = kernel
        # A sleeping copy of the kernel: ours, and not of the notebook.
        self.left_out: int | None = None
        self._roots = self._supervisors(keeper, kernel)
        self._members: dict[int, Member] = {}
        self._others: dict[int, None] = {}
        self._cpu: dict[tuple[int, int], float] = {}
        self._open_files = 0
        self._open_files_next = 0.0
        self._count: SharedCount | None = None
        self._at_count: dict[tuple[int, int], int] = {}
        self._use: TreeUse | None = None
        self._read_at = 0.0
        self._fresh_seconds = FRESH_SECONDS

    def _supervisors(self, keeper: int, kernel: int | None) -> frozenset[int]:
        """Return the keeper and the processes between it and the kernel."""
        # All of them live at least as long as the kernel, so once is enough.
        roots = {keeper}
        pid = kernel
        # Bubblewrap forks at most twice.
        for _ in range(8 if kernel else 0):
            member = self._files.measure(pid) if pid else None
            if member is None or member.parent in (0, 1):
                # The kernel has ended, or is not a descendant.
                return frozenset({keeper})
            if member.parent == keeper:
                return frozenset(roots)
            roots.add(member.parent)
            pid = member.parent
        return frozenset(roots)

    # --- reading ----------------------------------------------------------------------------------

    def read(self) -> TreeUse:
        """Return the use of the whole tree."""
        # If processes may share pages, the pages are counted when it is time for it. In between,
        # the memory is estimated from the last count.
        with self._lock:
            read_at = time.monotonic()
            if self._use is not None and read_at - self._read_at < self._fresh_seconds:
                return self._use
            self._refresh()
            self._measure_memory_files(read_at)
            self._use = self._sum(read_at)
            self._read_at = time.monotonic()
            return self._use

    def pids(self) -> tuple[int, ...]:
        """Return the ids of the processes of the last reading."""
        with self._lock:
            return tuple(self._members)

    def count(self) -> SharedCount:
        """Count the memory now, with each shared page counted once."""
        with self._lock:
            members = self._with_memory()
            self._count = count_once(self._files, members, self._open_files)
            settled = self._files.now() - SETTLED_SECONDS * TICKS
            old = (
                member
                for member in members
                if member.pid == self._kernel or member.started < settled
            )
            self._at_count = {member.key: member.anonymous for member in old}
            self._use = None
            return self._count

    def _sum(self, read_at: float) -> TreeUse:
        members = self._with_memory()
        least, most = lower_bound(members, self._open_files), upper_bound(members, self._open_files)
        kernel = self._members.get(self._kernel) if self._kernel else None
        use = TreeUse(
            memory=most,
            cpu_seconds=self._cpu_seconds(),
            tasks=sum(member.threads for member in self._members.values()),
            least=least,
            most=most,
            shared_memory=max((self._open_files, *(member.shmem for member in members))),
            kernel_memory=kernel.anonymous if kernel is not None else None,
            largest=max((member.resident for member in members), default=0),
        )
        if most - least <= SMALL or not self._counts_shared:
            # One process has nearly all of the memory, so little can be counted twice.
            return use
        last = self._count
        if last is None or read_at - last.at >= COUNT_SHARE * last.seconds:
            last = self.count()
            return replace(
                use, memory=min(most, max(least, last.at_least)), upper_bound=last.upper_bound
            )
        memory = estimate(last, self._at_count, members, (least, most))
        return replace(use, memory=memory, upper_bound=last.upper_bound)

    def _with_memory(self) -> Sequence[Member]:
        """Return the processes with their own address space."""
        return [
            member for member in self._members.values() if member.size and not self._borrows(member)
        ]

    def _borrows(self, member: Member) -> bool:
        """Whether a process runs in its parent's address space."""
        # This is the case between vfork(2) and exec, which subprocess uses.
        parent = self._members.get(member.parent)
        if parent is None or member.size != parent.size:
            return False
        near = (
            abs(member.anonymous - parent.anonymous) <= VFORK_BYTES
            and abs(member.shared - parent.shared) <= VFORK_BYTES
        )
        return near and self._files.same_memory(member.pid, parent.pid)

    def _cpu_seconds(self) -> float:
        """Return the processor time of all members so far."""
        # An ended process takes its time with it. One sum adds the last known times of all members
        # ever seen; it misses the time between the last reading and the end. The other adds the
        # living members and the children that they have waited for; it misses unawaited children.
        alive = sum(member.cpu + member.cpu_waited for member in self._members.values())
        return max(alive, sum(self._cpu.values()))

    def _measure_memory_files(self, read_at: float) -> None:
        if read_at >= self._open_files_next:
            self._open_files = sum(hidden_usage(self._members).memory.values())
            end = time.monotonic()
            self._open_files_next = end + OPEN_FILES_SHARE * (end - read_at)

    # --- who belongs to it ------------------------------------------------------------------------

    def _refresh(self) -> None:
        """Read the members again, and find new ones among the new processes."""
        pids = set(self._files.pids())
        self._others = {pid: None for pid in self._others if pid in pids}
        pids.discard(self.left_out or 0)
        members: dict[int, Member] = {}
        for pid, older_member in self._members.items():
            member = self._files.measure(pid) if pid in pids else None
            if member is not None and member.started == older_member.started:
                members[pid] = member
            else:
                self._files.forget(older_member)
        self._members = members
        batch = list(self._others)[: len(self._others) // OTHERS_SHARE + 1]
        unknown = (*batch, *(pids - self._others.keys() - members.keys() - self._roots))
        self._sort(
            {pid: parent for pid in unknown if (parent := self._files.parent(pid)) is not None}
        )
        for member in self._members.values():
            self._cpu[member.key] = member.cpu

    def _sort(self, parents: dict[int, int]) -> None:
        """Classify unknown processes: those below a member or a supervisor are members."""
        for pid in parents:
            self._others.pop(pid, None)
        for pid, parent in parents.items():
            ancestor = parent
            # The number of steps is bounded, since ids that are reused meanwhile could form a
            # circle.
            for _ in parents:
                ancestor = parents.get(ancestor, ancestor)
            if ancestor in self._members or ancestor in self._roots:
                member = self._files.measure(pid)
                if member is not None:
                    self._members[pid] = member
            elif ancestor in self._others or ancestor in (0, 1):
                self._others[pid] = None
            # Otherwise its parent has just ended. The next reading shows its new parent.
