"""Finds the holders of memory in the kernel's censuses. Pure.

A census is the kernel's claim. The peak was measured from outside and is the upper bound for all of
them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec.structs import replace

from safe_exec.diagnosis.context import Context
from safe_exec.model.evidence import CellLocation
from safe_exec.model.memory import (
    AllocationLine,
    CallSite,
    CellGrowth,
    Census,
    CensusRow,
    CensusSite,
    Holder,
    MemoryUse,
)
from safe_exec.model.verdict import Cause, CauseKind

# From this share of the limit on a run came near it.
NEAR_LIMIT = 0.9
MEMORY_CAUSES = (
    CauseKind.OUT_OF_MEMORY,
    CauseKind.MEMORY_ERROR,
    CauseKind.WORKER_OUT_OF_MEMORY,
)
# Smaller holders and lines explain nothing.
LEAST_SHARE = 0.01
MOST_HOLDERS = 20
# A larger share of the peak is worth another look.
EXPLAINED_SHARE = 0.9
# Of the peak; more of it is worth another look.
MOST_NATIVE_SHARE = 0.3
MOST_LINES = 20
# Growth since the last census that is worth a row of its own.
LEAST_GROWTH_BYTES = 4 << 20
LEAST_GROWTH_SHARE = 0.02
# Memory that the system counts for the group and not for the kernel process is a few percent.
LEAST_OTHERS_SHARE = 0.1
# A cell in which a holder grew by less did not fill it.
LEAST_CELL_SHARE = 0.02


def memory_use(context: Context, cause: Cause | None) -> MemoryUse | None:
    """Return the holders of memory; ``None`` if memory was not short, or nothing is known."""
    censuses, peak = context.evidence.censuses, context.evidence.memory_peak
    if not censuses or not _is_short(context, cause):
        return None
    last = _last(censuses) if context.current is not None else _highest(censuses)
    upper_bound = last.memory if peak is None else peak
    holders = [
        holder
        for holder in _holders(context, last, upper_bound)
        if holder.bytes >= upper_bound * LEAST_SHARE
    ]
    settled = _settled(censuses)
    # The memory of the kernel process that no Python object held.
    native = 0 if settled is None else max(0, settled.memory - settled.total)
    attributed = min(last.total, upper_bound)
    others = _other_processes(context, cause, last)
    unnamed = _unnamed(context, last, native, others)
    for holder in (unnamed, others):
        if holder is not None:
            holders.append(holder)
            attributed = min(upper_bound, attributed + holder.bytes)
    # A sum above the memory of the process contradicts itself.
    consistent = last.total <= last.memory <= upper_bound
    return MemoryUse(
        peak_bytes=peak,
        attributed_bytes=attributed,
        native_bytes=_native_bytes(censuses, upper_bound - attributed),
        complete=last.complete and consistent,
        holders=tuple(sorted(holders, key=lambda holder: -holder.bytes))[:MOST_HOLDERS],
        lines=_lines(context, last, unnamed, others),
        recording_error=context.evidence.allocations_error,
    )


def _last(censuses: tuple[Census, ...]) -> Census:
    """Return the last complete census, or a later one that measured more memory."""
    last = censuses[0]
    for census in censuses:
        if census.finished or census.total >= last.total:
            last = census
    return last


def _highest(censuses: tuple[Census, ...]) -> Census:
    """Return the census with the most memory: a run that passed has released memory since then."""
    return max(censuses, key=lambda census: (census.memory, census.total))


def _settled(censuses: tuple[Census, ...]) -> Census | None:
    """Return the last census between two cells.

    While a cell runs, local variables and temporary objects hold memory too, and a census may not
    see them.
    """
    return next((census for census in reversed(censuses) if census.settled), None)


def _native_bytes(censuses: tuple[Census, ...], most: int) -> int | None:
    """Return the memory outside of Python objects between two cells; ``None`` without a census.

    A census that ran out of time is skipped: the objects that it missed would count as native
    memory.
    """
    finished = _settled(tuple(census for census in censuses if census.finished))
    return None if finished is None else min(max(0, finished.memory - finished.total), most)


def _is_short(context: Context, cause: Cause | None) -> bool:
    """Whether memory was the cause of the failure, or nearly ran out."""
    if cause is not None and cause.kind in MEMORY_CAUSES:
        return True
    peak, limit = context.evidence.memory_peak, context.limits.memory
    return peak is not None and limit is not None and peak >= NEAR_LIMIT * limit


def _holders(context: Context, last: Census, upper_bound: int) -> list[Holder]:
    numbers = {record.index: record.code_index for record in context.cells}
    censuses = context.evidence.censuses
    until_last = censuses[: censuses.index(last) + 1]
    return [
        Holder(
            name=row.name,
            type=row.type,
            bytes=min(row.bytes, upper_bound),
            summary=row.summary,
            code_index=None if row.cell is None else numbers.get(row.cell),
            growth=_growth(row, until_last, numbers),
        )
        for row in last.rows
    ]


def _growth(
    row: CensusRow, censuses: tuple[Census, ...], numbers: Mapping[int, int]
) -> tuple[CellGrowth, ...]:
    """Return how much a holder grew in each cell."""
    growth: dict[int, int] = {}
    size = 0
    for census in censuses:
        current = next((other.bytes for other in census.rows if other.name == row.name), 0)
        code_index = None if census.cell is None else numbers.get(census.cell)
        if code_index is not None and current - size >= LEAST_CELL_SHARE * row.bytes:
            growth[code_index] = growth.get(code_index, 0) + current - size
        size = current
    return tuple(CellGrowth(code_index=cell, bytes=size) for cell, size in growth.items())


def _other_processes(context: Context, cause: Cause | None, last: Census) -> Holder | None:
    """Return the memory of the processes that the notebook started, as observed outside."""
    evidence = context.evidence
    peak, own = evidence.memory_peak, evidence.memory_kernel
    if peak is None:
        return None
    size = max(evidence.memory_children or 0, 0 if own is None else peak - own)
    if cause is not None and cause.kind is CauseKind.WORKER_OUT_OF_MEMORY:
        # A process that fills its memory within milliseconds dies between two looks. The kernel
        # lived on and knows its own memory: the remainder was the other processes'.
        size = max(size, peak - last.memory)
    if size < max(LEAST_GROWTH_BYTES, LEAST_OTHERS_SHARE * peak):
        return None
    return Holder(
        name=None,
        type="process",
        bytes=min(size, peak),
        summary="processes that the notebook started, and files in memory",
    )


def _unnamed(context: Context, last: Census, native: int, others: Holder | None) -> Holder | None:
    """Return the memory that no variable held yet: the crash cell allocated it while it ran."""
    peak, children = context.evidence.memory_peak, 0 if others is None else others.bytes
    if peak is None or context.current is None:
        return None
    size = peak - children - last.total - native
    if size < max(LEAST_GROWTH_BYTES, LEAST_GROWTH_SHARE * peak):
        return None
    numbers = {record.index: record.code_index for record in context.cells}
    location = context.evidence.location
    line = location.line if location is not None and location.cell == context.current else None
    return Holder(
        name=None,
        type=None,
        bytes=size,
        summary="allocated while the cell ran"
        if line is None
        else f"allocated while line {line} ran",
        code_index=numbers.get(context.current),
    )


def _lines(
    context: Context, last: Census, unnamed: Holder | None, others: Holder | None
) -> tuple[AllocationLine, ...]:
    """Return the lines that allocated the memory in use at the end, the largest first.

    Growth after the last census is charged to the line that ran at the end.
    """
    sums: dict[tuple[CensusSite, ...], int] = {}
    peak, location = context.evidence.memory_peak, context.evidence.location
    recorded_lines = context.evidence.allocations
    for line in recorded_lines or last.lines:
        sums[line.sites] = sums.get(line.sites, 0) + line.bytes
    # What was recorded includes the last allocation, and all of it: also what was not written yet.
    if not recorded_lines and unnamed and location is not None and peak is not None:
        size = peak - (0 if others is None else others.bytes) - last.memory
        sites = _sites(location)
        if sites and size >= LEAST_GROWTH_BYTES:
            sums[sites] = sums.get(sites, 0) + size
    numbers = {record.index: record.code_index for record in context.cells}
    lines = [
        _line(sites, size if peak is None else min(size, peak), numbers)
        for sites, size in sums.items()
        if sites[0].cell in numbers and size >= (peak or 0) * LEAST_SHARE
    ]
    return tuple(sorted(lines, key=lambda line: -line.bytes))[:MOST_LINES]


def _sites(location: CellLocation) -> tuple[CensusSite, ...]:
    """Return the lines of cells in the stack of a location, or its line alone."""
    sites = tuple(
        CensusSite(cell=frame.cell, line=frame.line, function=frame.function)
        for frame in location.stack
        if frame.cell is not None and frame.line
    )
    return sites or (CensusSite(cell=location.cell, line=location.line, function="<module>"),)


def _line(sites: tuple[CensusSite, ...], size: int, numbers: Mapping[int, int]) -> AllocationLine:
    return AllocationLine(
        code_index=numbers[sites[0].cell],
        line=sites[0].line,
        function=sites[0].function,
        bytes=size,
        callers=tuple(
            CallSite(code_index=numbers[site.cell], line=site.line, function=site.function)
            for site in sites[1:]
            if site.cell in numbers
        ),
    )


def in_notebook(use: MemoryUse, code_indexes: Sequence[int]) -> MemoryUse:
    """Convert the cell numbers in a trial's memory use to those of the notebook.

    ``code_indexes`` are, in the order of the trial, the positions of its cells among the notebook's
    code cells.
    """

    def original(code_index: int | None) -> int | None:
        is_known = code_index is not None and code_index < len(code_indexes)
        return code_indexes[code_index] if code_index is not None and is_known else None

    holders = tuple(
        replace(
            holder,
            code_index=original(holder.code_index),
            growth=tuple(
                replace(growth, code_index=code_indexes[growth.code_index])
                for growth in holder.growth
                if growth.code_index < len(code_indexes)
            ),
        )
        for holder in use.holders
    )
    lines = tuple(
        replace(
            line,
            code_index=code_indexes[line.code_index],
            callers=tuple(
                replace(caller, code_index=code_indexes[caller.code_index])
                for caller in line.callers
                if caller.code_index < len(code_indexes)
            ),
        )
        for line in use.lines
        if line.code_index < len(code_indexes)
    )
    return replace(use, holders=holders, lines=lines)


def better_use(first: MemoryUse | None, observed: MemoryUse | None) -> MemoryUse | None:
    """Of two reports on one failure, return the one whose named holders have more memory.

    The lines are those of the observed trial, which samples more often or records all allocations.
    """
    if first is None or observed is None:
        return first or observed
    if _named_share(observed) >= _named_share(first):
        return observed
    lines = observed.lines or first.lines
    return replace(first, lines=lines, recording_error=observed.recording_error)


def is_explained(use: MemoryUse) -> bool:
    """Whether the report names the holders of nearly all memory."""
    peak, native = use.peak_bytes or 0, use.native_bytes or 0
    # Libraries take some. Where it is much, objects without a variable may be part of it.
    if native > MOST_NATIVE_SHARE * peak:
        return False
    named_bytes = sum(holder.bytes for holder in use.holders if holder.name is not None)
    return use.complete and native + named_bytes >= EXPLAINED_SHARE * peak


def _named_share(use: MemoryUse) -> float:
    """Return the share of the peak that holders with a known name have."""
    named_bytes = sum(holder.bytes for holder in use.holders if holder.name is not None)
    return named_bytes / (use.peak_bytes or 1)
