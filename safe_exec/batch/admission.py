"""Decide how many notebooks run at a time.

Admission compares memory limits, not memory use: a notebook starts if its limit and the limits of
the running notebooks fit into the available memory together. A notebook without a limit, or with
one larger than the available memory, runs alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from msgspec import Struct

from safe_exec.errors import UsageError

AUTO = "auto"
RESERVE_BYTES = 256 << 20
"""Memory left free for the runner and the keepers."""
START_BYTES = 512 << 20
"""Memory of a kernel that has started and runs no cell yet; most kernels use a tenth of it."""


class Capacity(Struct, frozen=True, kw_only=True):
    """The number of notebooks at a time, and the memory for all of them together in bytes.

    ``memory`` is ``None`` if it could not be measured; then only ``jobs`` counts.
    """

    jobs: int
    memory: int | None


def parse_jobs(text: str, cpus: int) -> int:
    """Parse ``-j``: a number, or ``auto`` for the number of processors. Raises UsageError."""
    if text == AUTO:
        return max(1, cpus)
    # str.isdigit accepts digits of every script, and int() reads them.
    if not text.isascii() or not text.isdigit() or not int(text):
        raise UsageError(
            f"-j: expected a number of notebooks from 1 on, or {AUTO}, found {text[:40]!r}"
        )
    return int(text)


def capacity_for(jobs: int, available: int | None) -> Capacity:
    """Return the capacity of a machine with ``available`` bytes of free memory."""
    return Capacity(
        jobs=jobs, memory=None if available is None else max(0, available - RESERVE_BYTES)
    )


def admits(
    capacity: Capacity, running: Sequence[int | None], requested: int | None, prestarted: int = 0
) -> bool:
    """Return whether a notebook with the memory limit ``requested`` may start.

    ``running`` are the memory limits of the running notebooks. ``prestarted`` counts kernels that
    have started but still wait for their notebook's turn.
    """
    # A notebook that exceeds the machine still has to run at some time: it runs alone.
    if not running:
        return True
    if len(running) >= capacity.jobs:
        return False
    if capacity.memory is None:
        return True
    # A notebook without a limit can use all memory, so it neither joins others nor lets them join.
    limits = [limit for limit in (*running, requested) if limit is not None]
    return (
        len(limits) == len(running) + 1
        and sum(limits) + prestarted * START_BYTES <= capacity.memory
    )


def max_prestarted(capacity: Capacity) -> int:
    """Return how many kernels may start ahead of their notebook's turn."""
    # Measured: with half as many waiting kernels as running ones all processors stay busy, and more
    # waiting kernels gain nothing.
    return (capacity.jobs + 1) // 2


def admits_prestart(capacity: Capacity, running: Sequence[int | None], prestarted: int) -> bool:
    """Return whether one more kernel may start ahead of its notebook's turn."""
    if prestarted >= max_prestarted(capacity):
        return False
    # The notebook itself starts later, by ``admits``: here only the start of its kernel has to fit.
    limits = [limit for limit in running if limit is not None]
    return capacity.memory is None or (
        len(limits) == len(running)
        and sum(limits) + (prestarted + 1) * START_BYTES <= capacity.memory
    )


def first_fitting(
    capacity: Capacity,
    running: Sequence[int | None],
    waiting: Iterable[int | None],
    prestarted: int = 0,
) -> int | None:
    """Return the index of the first waiting notebook that may start, by the rules of ``admits``."""
    return next(
        (
            number
            for number, requested in enumerate(waiting)
            if admits(capacity, running, requested, prestarted)
        ),
        None,
    )
