"""Memory of several processes with shared pages counted once. Reads /proc/PID/smaps_rollup."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from msgspec import Struct

from safe_exec.sandbox.usage.process_files import Member, ProcessFiles

# After a fork, parent and child share all pages until one of them writes, so the sum of their
# resident memory counts these pages twice. For Pss Linux divides each page by the number of
# processes that map it (proc(5), smaps_rollup since Linux 4.14), so the sum of Pss counts it once.
# To compute Pss Linux walks all page tables of a process, which takes 3 to 50 ms per GB. So the
# caller decides how often.

# If fewer bytes than this can be counted twice, a walk through page tables is not worth its time.
SMALL = 16 << 20


class SharedCount(Struct, frozen=True, kw_only=True):
    """The memory of some processes in bytes, counting each page once.

    ``departed`` are bytes that processes freed during the count. If ``upper_bound`` is set, some
    processes could not be inspected and were added as a whole, so their shared pages may be counted
    several times. ``at`` is the time of the count, ``seconds`` its duration.
    """

    memory: int
    departed: int = 0
    upper_bound: bool = False
    at: float = 0.0
    seconds: float = 0.0

    @property
    def at_least(self) -> int:
        """A lower bound of the memory in use, even if processes ended during the count."""
        # Pages that an ended process shared have a larger share in processes that are read later.
        # This overcounts at most half of the freed bytes.
        return max(0, self.memory - self.departed // 2)


def lower_bound(members: Sequence[Member], open_files: int) -> int:
    """Return a lower bound of the processes' memory: they share as many pages as possible."""
    # Anonymous pages are shared through forks alone: a program that was executed since then has
    # none in common with its parent. A process that cannot be inspected may be a fork of any other.
    shared = max((open_files, *(member.shmem for member in members)))
    largest: dict[tuple[bytes, bytes], int] = {}
    unknown = 0
    for member in members:
        if member.image is None:
            unknown = max(unknown, member.anonymous)
        else:
            largest[member.image] = max(largest.get(member.image, 0), member.anonymous)
    return shared + max(unknown, sum(largest.values()))


def upper_bound(members: Sequence[Member], open_files: int) -> int:
    """Return an upper bound of the processes' memory: they share no pages.

    ``open_files`` are the bytes of open files in memory.
    """
    shared = max(open_files, sum(member.shmem for member in members))
    return shared + sum(member.anonymous for member in members)


def estimate(
    last: SharedCount,
    previous_counts: Mapping[tuple[int, int], int],
    members: Sequence[Member],
    bounds: tuple[int, int],
) -> int:
    """Estimate the memory: the last count and the growth since then, within ``bounds``.

    ``previous_counts`` are the anonymous bytes of processes at the last count.
    """
    # It is unknown how much new processes share, so they count only from the next count on.
    growth = sum(
        member.anonymous - previous_counts[member.key]
        for member in members
        if member.key in previous_counts
    )
    least, most = bounds
    return min(most, max(least, last.memory + growth))


def count_once(files: ProcessFiles, members: Sequence[Member], open_files: int) -> SharedCount:
    """Measure the memory of all processes, each shared page once; ``open_files`` are bytes."""
    # A process that has ended meanwhile has no memory any more, which is not an error.
    start = time.monotonic()
    anonymous = shmem = total = 0
    for member in members:
        share = _share(files, member)
        if share is not None:
            anonymous += share[0]
            shmem += share[1]
        elif not files.has_ended(member):
            # We may not inspect it: a setuid program, another user's, or one that has cleared its
            # PR_SET_DUMPABLE (prctl(2)).
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
    """Return a process's share of anonymous and shared memory in bytes, ``None`` if unreadable."""
    try:
        text = files.read(member, "smaps_rollup")
    except OSError:
        return None
    rows = (line.split() for line in text.splitlines()[1:])
    figures = {row[0]: int(row[1]) * 1024 for row in rows if len(row) > 1 and row[1].isdigit()}
    # Linux before 5.4 does not distinguish anonymous and shared memory in Pss.
    if b"Pss_Anon:" not in figures:
        return None
    return figures[b"Pss_Anon:"], figures.get(b"Pss_Shmem:", 0)
