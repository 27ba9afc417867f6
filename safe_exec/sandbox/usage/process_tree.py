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

# Members are the descendants of the keeper, but for those between it and the kernel (bubblewrap,
# our init): these are ours, do not count against the notebook's limits, and one of them cannot be
# looked into by an ordinary user.

# For so long a reading stands: the watchdog and the meter ask one after the other.
FRESH_SECONDS = 0.002
# Of the processes that are not ours, one in so many is looked at again each time: their ids may
# have been taken over.
OTHERS_SHARE = 50
# To look at all descriptors takes a twentieth of the time at most.
OPEN_FILES_SHARE = 20
# To count shared pages once takes a tenth of the time at most, where no limit is near.
COUNT_SHARE = 10
# The memory of a younger process may seem to grow while fork(2) still copies the page tables of
# what it shares.
SETTLED_SECONDS = 2.0
# By so much the figures of one address space may differ when read one after the other.
VFORK_BYTES = 256 << 10


class TreeUse(Struct, frozen=True, kw_only=True):
    """The use of all processes: bytes (unreclaimable), seconds, tasks.

    ``memory`` has shared pages once, as last counted; ``least`` and ``most`` are what it can be at
    all. ``upper_bound``: some could not be looked into, so it may be less. ``shared_memory`` is
    what is in files in memory, ``kernel_memory`` the anonymous memory of the kernel's own process;
    the rest is its children's.
    """

    memory: int
    cpu_seconds: float
    tasks: int
    least: int = 0
    most: int = 0
    upper_bound: bool = False
    shared_memory: int = 0
    kernel_memory: int | None = None

    @property
    def children_memory(self) -> int | None:
        """Of the memory, what processes other than the kernel's have; shared memory is nobody's."""
        own = self.kernel_memory
        return None if own is None else max(0, self.memory - self.shared_memory - own)


class ProcessTree:
    """The processes below a keeper. May be read from several threads.

    A process that ended takes its processor time with it: the time it was last seen with is kept
    and added. ``counts_shared``: whether pages that several processes share are to be counted once,
    which takes time; where a control group counts the memory nobody asks for it.
    """

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
        # They stay for as long as the kernel is there.
        roots = {keeper}
        pid = kernel
        # Bubblewrap forks at most twice.
        for _ in range(8 if kernel else 0):
            member = self._files.measure(pid) if pid else None
            if member is None or member.parent in (0, 1):
                # The kernel is gone, or no descendant.
                return frozenset({keeper})
            if member.parent == keeper:
                return frozenset(roots)
            roots.add(member.parent)
            pid = member.parent
        return frozenset(roots)

    # --- reading ----------------------------------------------------------------------------------

    def read(self) -> TreeUse:
        """Return the use of the whole tree."""
        # Where processes may share pages they are counted once if the time for it has come, else
        # estimated.
        with self._lock:
            read_at = time.monotonic()
            if self._use is not None and read_at - self._read_at < self._fresh_seconds:
                return self._use
            self._refresh()
            self._look_at_open_files(read_at)
            self._use = self._sum(read_at)
            self._read_at = time.monotonic()
            return self._use

    def count(self) -> SharedCount:
        """Count shared pages once, now."""
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
        )
        if most - least <= SMALL or not self._counts_shared:
            # One process has nearly all of it: nothing to speak of can be counted twice.
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
        """The processes with memory of their own."""
        return [
            member for member in self._members.values() if member.size and not self._borrows(member)
        ]

    def _borrows(self, member: Member) -> bool:
        """Whether a process lives in its parent's address space."""
        # So it does between vfork(2) and exec, as with subprocess.
        parent = self._members.get(member.parent)
        if parent is None or member.size != parent.size:
            return False
        near = (
            abs(member.anonymous - parent.anonymous) <= VFORK_BYTES
            and abs(member.shared - parent.shared) <= VFORK_BYTES
        )
        return near and self._files.same_memory(member.pid, parent.pid)

    def _cpu_seconds(self) -> float:
        """Of all that were ever seen as last seen."""
        # Or of those alive with all that they waited for. Either misses something.
        alive = sum(member.cpu + member.cpu_waited for member in self._members.values())
        return max(alive, sum(self._cpu.values()))

    def _look_at_open_files(self, read_at: float) -> None:
        if read_at >= self._open_files_next:
            self._open_files = sum(hidden_usage(self._members).memory.values())
            end = time.monotonic()
            self._open_files_next = end + OPEN_FILES_SHARE * (end - read_at)

    # --- who belongs to it ------------------------------------------------------------------------

    def _refresh(self) -> None:
        """Read the members again, and find new ones among the new processes."""
        pids = set(self._files.pids())
        self._others = {pid: None for pid in self._others if pid in pids}
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
        """Each unknown process is a member if one of its ancestors is one, or a supervisor."""
        for pid in parents:
            self._others.pop(pid, None)
        for pid, parent in parents.items():
            ancestor = parent
            # No more steps than there are: ids that are given anew meanwhile could make a circle.
            for _ in parents:
                ancestor = parents.get(ancestor, ancestor)
            if ancestor in self._members or ancestor in self._roots:
                member = self._files.measure(pid)
                if member is not None:
                    self._members[pid] = member
            elif ancestor in self._others or ancestor in (0, 1):
                self._others[pid] = None
            # Else its parent has just ended: whose child it is now shows the next time.
