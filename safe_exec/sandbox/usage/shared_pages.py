"""Memory of several processes with shared pages counted once. Reads /proc/PID/smaps_rollup."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from msgspec import Struct

from safe_exec.sandbox.usage.process_files import Member, ProcessFiles

# After a fork, parent and child share all pages until one of them writes: the sum of their resident
# memory counts those pages twice. The system divides each page by the number of processes that map
# it (Pss, proc(5), smaps_rollup since Linux 4.14), so the sum of these shares counts it once. To
# work them out the system walks all page tables of a process, 3 to 50 ms per GB, so the caller
# decides how often.

# Bytes that may be counted twice without being worth a walk through page tables.
SMALL = 16 << 20


class SharedCount(Struct, frozen=True, kw_only=True):
    """The memory of some processes in bytes, each page once.

    When it was counted and how long that took (seconds).

    ``departed`` is what processes gave up while others were still being read: pages they shared
    count more in those read later, by half of them at most. ``upper_bound``: some processes could
    not be looked into and were added whole, so pages that they share are in it several times.
    """

    memory: int
    departed: int = 0
    upper_bound: bool = False
    at: float = 0.0
    seconds: float = 0.0

    @property
    def at_least(self) -> int:
        """Bytes that were in use whatever ended meanwhile."""
        return max(0, self.memory - self.departed // 2)


def lower_bound(members: Sequence[Member], open_files: int) -> int:
    """Return the least memory that the processes can use: everything shareable is shared."""
    shared = max((open_files, *(member.shmem for member in members)))
    return shared + max((member.anonymous for member in members), default=0)


def upper_bound(members: Sequence[Member], open_files: int) -> int:
    """Return the most memory that the processes can use: nothing is shared.

    ``open_files`` are bytes of files in memory, held open.
    """
    shared = max(open_files, sum(member.shmem for member in members))
    return shared + sum(member.anonymous for member in members)


def estimate(
    last: SharedCount,
    previous_counts: Mapping[tuple[int, int], int],
    members: Sequence[Member],
    bounds: tuple[int, int],
) -> int:
    """Return the memory by the last count and the growth since, within its bounds.

    ``earlier`` has the anonymous bytes of processes at the last count. How much new processes share
    is not known: they count with the next one.
    """
    growth = sum(
        member.anonymous - previous_counts[member.key]
        for member in members
        if member.key in previous_counts
    )
    least, most = bounds
    return min(most, max(least, last.memory + growth))


def count_once(files: ProcessFiles, members: Sequence[Member], open_files: int) -> SharedCount:
    """Read the shares of all processes."""
    # One that has ended meanwhile has no memory any more, which is no failure.
    start = time.monotonic()
    anonymous = shmem = total = 0
    for member in members:
        share = _share(files, member)
        if share is not None:
            anonymous += share[0]
            shmem += share[1]
        elif not files.has_ended(member):
            # Not ours to look into: a setuid program, another user, prctl(PR_SET_DUMPABLE).
            total += member.anonymous
            shmem += member.shmem
    end = time.monotonic()
    return SharedCount(
        memory=anonymous + total + max(shmem, open_files),
        departed=sum(
            max(0, member.anonymous - files.anonymous(member.pid, member.task))
            for member in members
        ),
        upper_bound=total > SMALL,
        at=end,
        seconds=end - start,
    )


def _share(files: ProcessFiles, member: Member) -> tuple[int, int] | None:
    """A process's share of anonymous and of shared memory in bytes.

    ``None`` where it cannot be read.
    """
    try:
        text = files.read(member, "smaps_rollup")
    except OSError:
        return None
    rows = (line.split() for line in text.splitlines()[1:])
    figures = {row[0]: int(row[1]) * 1024 for row in rows if len(row) > 1 and row[1].isdigit()}
    # Before Linux 5.4 the shares were not told apart.
    if b"Pss_Anon:" not in figures:
        return None
    return figures[b"Pss_Anon:"], figures.get(b"Pss_Shmem:", 0)
