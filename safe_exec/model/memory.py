"""Types for the memory of a run: its holders, and the lines that allocated it. Sizes are bytes."""

from __future__ import annotations

from msgspec import Struct

from safe_exec.model.limits import Count


class CensusRow(Struct, frozen=True, kw_only=True):
    """One holder in a census. ``cell`` is the index of the cell that bound it, if known."""

    name: str
    type: str
    bytes: int
    summary: str
    cell: int | None = None


class CensusSite(Struct, frozen=True, kw_only=True):
    """A line of a cell in a census; ``cell`` is the index of the cell."""

    cell: int
    line: int
    function: str


class CensusLine(Struct, frozen=True, kw_only=True):
    """Memory that one stack of lines allocated and that is still in use.

    The innermost line is first.
    """

    bytes: int
    sites: tuple[CensusSite, ...]


class Census(Struct, frozen=True, kw_only=True):
    """The holders of the kernel's memory at one moment, as claimed by the kernel.

    ``cell`` is the index of the cell at whose end, or during which, the census was taken; it is
    ``None`` before the first cell. ``memory`` is the memory of the kernel process then, ``total``
    the sum over all holders, also those without a row. ``finished`` is true if all holders were
    measured, ``complete`` if every object was counted and none was estimated from others, and
    ``settled`` if no cell ran, so that no local variable existed. ``lines`` are the lines that
    allocated memory.
    """

    cell: int | None
    memory: int
    total: int
    complete: bool
    finished: bool = True
    settled: bool = True
    rows: tuple[CensusRow, ...] = ()
    lines: tuple[CensusLine, ...] = ()


class CellGrowth(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The bytes that a holder gained in one code cell."""

    code_index: Count
    bytes: Count


class Holder(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A variable, or another place, that held memory.

    ``name`` is ``None`` for memory that no name held yet: the running statement had allocated it
    since the last census; with the type ``process``, the memory of all processes but the kernel.
    ``code_index`` is the cell that bound the name.
    """

    name: str | None
    type: str | None
    bytes: Count
    summary: str
    code_index: Count | None = None
    # The cells in which it grew.
    growth: tuple[CellGrowth, ...] = ()


class CallSite(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A line of a code cell, and the function that it is in."""

    code_index: Count
    line: Count
    function: str


class AllocationLine(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A line of a code cell, and the bytes allocated by it that were still in use at the end.

    ``callers`` are the lines of cells that led to it, the nearest first.
    """

    code_index: Count
    line: Count
    function: str
    bytes: Count
    callers: tuple[CallSite, ...] = ()


class MemoryUse(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The holders of memory in a run that came near its limit, the largest first.

    ``peak_bytes`` was measured outside. ``attributed_bytes`` is the sum over the holders,
    ``native_bytes`` the memory of the kernel process that no Python object held; the rest of the
    peak is not attributed. ``complete`` is true if no figure is an estimate. ``recording_error`` is
    the reason why memray's recording failed, if it did; the lines then come from samples.
    """

    peak_bytes: Count | None
    attributed_bytes: Count | None
    native_bytes: Count | None
    complete: bool
    holders: tuple[Holder, ...] = ()
    lines: tuple[AllocationLine, ...] = ()
    recording_error: str | None = None
