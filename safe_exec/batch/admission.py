"""How many notebooks run at a time. Pure; imports errors only.

What a notebook may use counts, not what it uses: a notebook is admitted while the memory limits of those that run, its own among them, fit
into the memory that there is. One without a limit may use all of it, and runs alone; so does one that may use more than there is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from msgspec import Struct

from safe_exec.errors import UsageError

AUTO = "auto"
RESERVE_BYTES = 256 << 20
"""Left free for ourselves and the keepers."""
START_BYTES = 512 << 20
"""What a kernel may take that has started and runs nothing yet; most take a tenth of it."""


class Capacity(Struct, frozen=True, kw_only=True):
    """What there is: ``jobs`` notebooks at a time, ``memory`` bytes for all of them together (``None``: not known, does not count)."""

    jobs: int
    memory: int | None


def parse_jobs(text: str, cpus: int) -> int:
    """``-j``: a number, or ``auto`` for that of the processors. Raises UsageError."""
    if text == AUTO:
        return max(1, cpus)
    if not text.isascii() or not text.isdigit() or not int(text):
        raise UsageError(
            f"-j: expected a number of notebooks from 1 on, or {AUTO}, found {text[:40]!r}"
        )
    return int(text)


def room_for(jobs: int, available: int | None) -> Capacity:
    """The room on a machine with ``available`` bytes of memory that nobody uses yet."""
    return Capacity(
        jobs=jobs, memory=None if available is None else max(0, available - RESERVE_BYTES)
    )


def admits(
    capacity: Capacity, running: Sequence[int | None], requested: int | None, ahead: int = 0
) -> bool:
    """Whether one with the memory limit ``wanted`` may start beside those that run, given by theirs, and ``ahead`` kernels that only wait."""
    if not running:
        return True
    if len(running) >= capacity.jobs:
        return False
    if capacity.memory is None:
        return True
    limits = [limit for limit in (*running, requested) if limit is not None]
    return len(limits) == len(running) + 1 and sum(limits) + ahead * START_BYTES <= capacity.memory


def most_ahead(capacity: Capacity) -> int:
    """How many kernels may wait: half as many as run keep all processors busy, and as many do no better."""
    return (capacity.jobs + 1) // 2


def admits_ahead(capacity: Capacity, running: Sequence[int | None], ahead: int) -> bool:
    """Whether one more kernel may be started for a notebook whose turn comes later, beside ``ahead`` others that wait: it only starts."""
    if ahead >= most_ahead(capacity):
        return False
    limits = [limit for limit in running if limit is not None]
    return capacity.memory is None or (
        len(limits) == len(running) and sum(limits) + (ahead + 1) * START_BYTES <= capacity.memory
    )


def first_fitting(
    capacity: Capacity, running: Sequence[int | None], waiting: Iterable[int | None], ahead: int = 0
) -> int | None:
    """The number of the first in line that may start now."""
    return next(
        (
            number
            for number, requested in enumerate(waiting)
            if admits(capacity, running, requested, ahead)
        ),
        None,
    )
