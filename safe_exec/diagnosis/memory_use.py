"""Concludes from the kernel's censuses what held the memory. Pure.

The censuses are the kernel's word; the peak was measured outside and bounds them all.
"""

from __future__ import annotations

from collections.abc import Mapping

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
# Smaller holders explain nothing.
LEAST_SHARE = 0.01
MOST_HOLDERS = 20
MOST_LINES = 20
# Growth since the last census that is worth a row of its own.
LEAST_GROWTH_BYTES = 4 << 20
LEAST_GROWTH_SHARE = 0.02
# A cell in which a holder grew by less did not fill it.
LEAST_CELL_SHARE = 0.02


def memory_use(context: Context, cause: Cause | None) -> MemoryUse | None:
    """Return what held the memory; ``None`` if it was not short or nothing is known."""
    censuses, peak = context.evidence.censuses, context.evidence.memory_peak
    if not censuses or not _is_short(context, cause):
        return None
    last = _last(censuses)
    upper_bound = last.memory if peak is None else peak
    holders = [
        holder
        for holder in _holders(context, last, upper_bound)
        if holder.bytes >= upper_bound * LEAST_SHARE
    ]
    attributed, native = min(last.total, upper_bound), _native_bytes(censuses)
    unnamed = _unnamed(context, last, native)
    if unnamed is not None:
        holders.append(unnamed)
        attributed = min(upper_bound, attributed + unnamed.bytes)
    # A sum above the memory of the process contradicts itself.
    consistent = last.total <= last.memory <= upper_bound
    return MemoryUse(
        peak_bytes=peak,
        attributed_bytes=attributed,
        native_bytes=None if native is None else min(native, upper_bound - attributed),
        complete=last.complete and consistent,
        holders=tuple(sorted(holders, key=lambda holder: -holder.bytes))[:MOST_HOLDERS],
        lines=_lines(context, last, unnamed),
    )


def _last(censuses: tuple[Census, ...]) -> Census:
    """Return the last census that looked at all holders, or a later one that saw more."""
    last = censuses[0]
    for census in censuses:
        if census.finished or census.total >= last.total:
            last = census
    return last


def _native_bytes(censuses: tuple[Census, ...]) -> int | None:
    """Return the memory of the kernel process that no Python object held.

    While a cell runs, local variables and temporary objects hold memory too, and a census may not
    see them. So the last census between two cells counts.
    """
    settled = next((census for census in reversed(censuses) if census.settled), None)
    if settled is None or not settled.finished:
        return None
    return max(0, settled.memory - settled.total)


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


def _unnamed(context: Context, last: Census, native: int | None) -> Holder | None:
    """Return the memory that no name held yet: the crash cell allocated it while it ran."""
    peak, children = context.evidence.memory_peak, context.evidence.memory_children or 0
    if peak is None or context.current is None:
        return None
    known_bytes = max(last.memory, last.total) if native is None else last.total + native
    size = peak - children - known_bytes
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


def _lines(context: Context, last: Census, unnamed: Holder | None) -> tuple[AllocationLine, ...]:
    """Return the lines that allocated what was there at the end, the largest first.

    What came after the last census belongs to the line that ran at the end.
    """
    sums: dict[tuple[CensusSite, ...], int] = {}
    for line in last.lines:
        sums[line.sites] = sums.get(line.sites, 0) + line.bytes
    peak, location = context.evidence.memory_peak, context.evidence.location
    if unnamed is not None and location is not None and peak is not None:
        size = peak - (context.evidence.memory_children or 0) - last.memory
        sites = _sites(location)
        if sites and size >= LEAST_GROWTH_BYTES:
            sums[sites] = sums.get(sites, 0) + size
    numbers = {record.index: record.code_index for record in context.cells}
    lines = [
        _line(sites, size, numbers) for sites, size in sums.items() if sites[0].cell in numbers
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
