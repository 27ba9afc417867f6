"""The wording on the memory of a run: its holders and the lines that allocated it."""

from __future__ import annotations

from collections.abc import Iterable

from safe_exec.model.memory import AllocationLine, CallSite, Holder, MemoryUse
from safe_exec.model.verdict import Verdict
from safe_exec.reports.text import common
from safe_exec.units import format_size

MOST_SHOWN = 4
MOST_LINES = 2
LONGEST_REASON = 80
# Smaller shares of the peak are not worth a line.
LEAST_SHARE = 0.05
LEAST_REST = 0.1
# A request that was refused while little was in use was itself too large: holders explain nothing.
LEAST_FILL = 0.5
NO_NAME = "(no name yet)"
OTHER_PROCESSES = "(other processes)"
NATIVE = "not held by Python objects"
REST = "not attributed"


def holder_lines(verdict: Verdict, most: int = MOST_SHOWN) -> list[str]:
    """Return a line for each large holder: ``cache  390 MiB · dict of 3 bytearray · code cells 2-4``."""
    memory = _explaining(verdict)
    if memory is None:
        return []
    least = (memory.peak_bytes or 0) * LEAST_SHARE
    holders = [holder for holder in memory.holders if holder.bytes >= least]
    lines = [holder_line(holder, exact=memory.complete) for holder in holders[:most]]
    if len(holders) > most:
        lines.append(f"and {len(holders) - most} more")
    return lines + rest_lines(memory)


def largest_holder(verdict: Verdict) -> str:
    """Return the largest named holder in a few words, or ""."""
    memory = _explaining(verdict)
    holder = next((holder for holder in memory.holders if holder.name), None) if memory else None
    if memory is None or holder is None or holder.bytes < (memory.peak_bytes or 0) * LEAST_REST:
        return ""
    return f"held by {holder_line(holder, exact=memory.complete)}"


def _explaining(verdict: Verdict) -> MemoryUse | None:
    """Return the memory of a run that came near its memory limit, or whose limit is unknown."""
    memory, limit = verdict.memory, verdict.limits.memory
    if memory is None or limit is None or memory.peak_bytes is None:
        return memory
    return memory if memory.peak_bytes >= limit * LEAST_FILL else None


def holder_line(holder: Holder, *, exact: bool = True) -> str:
    """Return one holder with its size, content and cells."""
    return f"{holder_name(holder)}  {holder_detail(holder, exact=exact)}"


def holder_name(holder: Holder) -> str:
    """Return the variable's name, or words for memory without a name or of other processes."""
    if holder.name is not None:
        return common.single_line(holder.name)
    return NO_NAME if holder.type is None else OTHER_PROCESSES


def holder_detail(holder: Holder, *, exact: bool = True) -> str:
    """Return the size, content and cells of a holder."""
    size = format_size(holder.bytes)
    parts = (
        size if exact or holder.name is None else f"about {size}",
        common.single_line(holder.summary),
        holder_cells(holder),
    )
    return common.SEPARATOR.join(part for part in parts if part)


def holder_cells(holder: Holder) -> str:
    """Return the cells that filled a holder, or the one that bound it."""
    grown_in = [growth.code_index for growth in holder.growth]
    if grown_in:
        return common.cell_names(grown_in)
    return "" if holder.code_index is None else common.cell_name(holder.code_index)


def allocation_lines(verdict: Verdict, most: int = MOST_LINES) -> list[str]:
    """Return the lines that allocated most: ``390 MiB · code cell 1, line 5, in `load```."""
    memory = _explaining(verdict)
    if memory is None:
        return []
    least = (memory.peak_bytes or 0) * LEAST_REST
    rows = [row for row in by_line(memory) if row[1] >= least]
    lines = [allocation_line(line, size, callers) for line, size, callers in rows[:most]]
    return lines + recording_lines(memory)


def recording_lines(memory: MemoryUse) -> list[str]:
    """Return a line if allocations could not be recorded, so that the lines come from samples."""
    if memory.recording_error is None:
        return []
    reason = common.clip(common.single_line(memory.recording_error), LONGEST_REASON)
    return [f"from samples: memray's recording cannot be used ({reason})"]


def allocation_line(line: AllocationLine, size: int, callers: Iterable[CallSite]) -> str:
    """Return a row of text: the bytes that a line of a cell allocated, its place, its callers."""
    parts = (
        format_size(size),
        site_name(line.code_index, line.line, line.function),
        caller_names(line, callers),
    )
    return common.SEPARATOR.join(part for part in parts if part)


def caller_names(line: AllocationLine, callers: Iterable[CallSite]) -> str:
    """Return a text such as ``called in code cells 2-5``, without the line's own cell.

    The text is empty if no other cell called the line.
    """
    caller_cells = {caller.code_index for caller in callers} - {line.code_index}
    return f"called in {common.cell_names(caller_cells)}" if caller_cells else ""


def site_name(code_index: int, line: int, function: str) -> str:
    """Return the place of a line: ``code cell 1, line 5, in `load```."""
    place = f"{common.cell_name(code_index)}, line {line}"
    own_code = function.startswith("<")
    return place if own_code else f"{place}, in `{common.single_line(function)}`"


def by_line(memory: MemoryUse) -> list[tuple[AllocationLine, int, tuple[CallSite, ...]]]:
    """Return a row for each allocating line, the largest first: line, total bytes, callers."""
    # What was allocated and not yet written to is no memory yet: the peak bounds it.
    peak = memory.peak_bytes
    groups: dict[tuple[int, int], list[AllocationLine]] = {}
    for line in memory.lines:
        groups.setdefault((line.code_index, line.line), []).append(line)
    rows = [
        (
            group[0],
            min(size, peak) if peak else size,
            tuple(caller for line in group for caller in line.callers),
        )
        for group in groups.values()
        for size in (sum(line.bytes for line in group),)
    ]
    return sorted(rows, key=lambda row: -row[1])


def line_sizes(memory: MemoryUse | None, code_index: int) -> dict[int, str]:
    """Return, by line number, the memory that each line of a code cell allocated."""
    rows = [] if memory is None else by_line(memory)
    return {line.line: format_size(size) for line, size, _ in rows if line.code_index == code_index}


def rest_lines(memory: MemoryUse) -> list[str]:
    """Return lines about the memory without a holder, if it is much."""
    peak = memory.peak_bytes
    if not peak:
        return []
    native = memory.native_bytes or 0
    remainder = peak - (memory.attributed_bytes or 0) - native
    return [
        f"{name}: {format_size(size)}"
        for name, size in ((NATIVE, native), (REST, remainder))
        if size >= LEAST_REST * peak
    ]
