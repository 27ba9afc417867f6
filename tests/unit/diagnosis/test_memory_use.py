"""What held the memory: figures from outside bound every claim of the kernel."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from safe_exec.diagnosis.context import Context
from safe_exec.diagnosis.memory_use import memory_use
from safe_exec.model.ending import Died
from safe_exec.model.evidence import CellLocation, Evidence
from safe_exec.model.limits import Limits
from safe_exec.model.memory import (
    CellGrowth,
    Census,
    CensusLine,
    CensusRow,
    CensusSite,
    MemoryUse,
)
from safe_exec.model.verdict import Cause, CauseKind, CellRecord, CellStatus, Confidence

MIB = 1 << 20
OOM = Cause(kind=CauseKind.OUT_OF_MEMORY, summary="out of memory", confidence=Confidence.CERTAIN)
SEGFAULT = Cause(kind=CauseKind.SEGFAULT, summary="crash", confidence=Confidence.CERTAIN)
# A text cell at index 1: positions among the code cells differ from those in the notebook.
RECORDS = tuple(
    CellRecord(index=index, code_index=number, id=None, status=CellStatus.PASSED)
    for number, index in enumerate((0, 2, 3))
)


def row(name: str, size: int, cell: int | None = 0) -> CensusRow:
    return CensusRow(name=name, type="dict", bytes=size, summary="dict of 1 bytearray", cell=cell)


def census(cell: int | None, memory: int, *rows: CensusRow, complete: bool = True) -> Census:
    total = sum(row.bytes for row in rows)
    return Census(cell=cell, memory=memory, total=total, complete=complete, rows=rows)


def context(*censuses: Census, peak: int | None = 500 * MIB, limit: int = 512 * MIB) -> Context:
    return Context(
        ending=Died(cell=3, exit=None),
        evidence=Evidence(
            censuses=censuses,
            memory_peak=peak,
            location=CellLocation(cell=3, line=7, source="statement"),
        ),
        limits=Limits(memory=limit),
        cells=RECORDS,
        current=3,
    )


START = census(None, 60 * MIB)
FIRST = census(0, 160 * MIB, row("cache", 100 * MIB))
SECOND = census(2, 360 * MIB, row("cache", 300 * MIB))


def used(given_context: Context, cause: Cause | None = OOM) -> MemoryUse:
    memory = memory_use(given_context, cause)
    assert memory is not None
    return memory


def test_a_holder_has_its_size_and_the_cells_that_filled_it() -> None:
    memory = used(context(START, FIRST, SECOND))
    holders = {holder.name: holder for holder in memory.holders}
    assert holders["cache"].bytes == 300 * MIB
    assert holders["cache"].code_index == 0
    assert holders["cache"].growth == (
        CellGrowth(code_index=0, bytes=100 * MIB),
        CellGrowth(code_index=1, bytes=200 * MIB),
    )


def test_memory_since_the_last_census_has_no_name_and_belongs_to_the_line_that_ran() -> None:
    memory = used(context(START, FIRST, SECOND))
    (unnamed,) = (holder for holder in memory.holders if holder.name is None)
    assert (unnamed.bytes, unnamed.code_index) == (140 * MIB, 2)
    assert "line 7" in unnamed.summary
    assert memory.attributed_bytes == 440 * MIB
    assert memory.native_bytes == 60 * MIB


def test_without_any_holder_the_running_line_has_it_all() -> None:
    memory = used(context(START))
    assert [(holder.name, holder.bytes) for holder in memory.holders] == [(None, 440 * MIB)]


def test_memory_of_other_processes_is_not_the_kernels() -> None:
    given_context = context(START, FIRST)
    evidence = replace(given_context.evidence, memory_children=330 * MIB)
    memory = used(replace(given_context, evidence=evidence))
    assert [(holder.name, holder.type, holder.bytes) for holder in memory.holders] == [
        (None, "process", 330 * MIB),
        ("cache", "dict", 100 * MIB),
        (None, None, 10 * MIB),
    ]


def test_a_kernel_that_was_small_leaves_the_memory_to_other_processes() -> None:
    given_context = context(START)
    evidence = replace(given_context.evidence, memory_kernel=70 * MIB)
    memory = used(replace(given_context, evidence=evidence))
    assert [(holder.type, holder.bytes) for holder in memory.holders] == [
        ("process", 430 * MIB),
        (None, 10 * MIB),
    ]


def test_a_run_that_passed_is_described_at_its_highest_census() -> None:
    given_context = replace(
        context(START, SECOND, census(3, 70 * MIB), peak=470 * MIB), current=None
    )
    memory = used(given_context, None)
    assert [(holder.name, holder.bytes) for holder in memory.holders] == [("cache", 300 * MIB)]


@pytest.mark.parametrize("cause", [SEGFAULT, None])
def test_it_is_reported_only_if_memory_was_short(cause: Cause | None) -> None:
    assert memory_use(context(START, FIRST, peak=170 * MIB), cause) is None
    assert memory_use(context(START, FIRST, peak=461 * MIB), cause) is not None


def test_a_census_that_ran_out_of_time_does_not_replace_one_that_saw_more() -> None:
    cut = replace(census(3, 400 * MIB), complete=False, finished=False, settled=False)
    assert used(context(START, FIRST, SECOND, cut)).holders[0].bytes == 300 * MIB


def test_lines_have_their_callers_and_the_line_at_the_end_has_what_came_last() -> None:
    sites = (
        CensusSite(cell=0, line=3, function="load"),
        CensusSite(cell=2, line=1, function="<module>"),
    )
    lines = (CensusLine(bytes=300 * MIB, sites=sites),)
    memory = used(context(START, FIRST, replace(SECOND, lines=lines)))
    first, last = memory.lines
    assert (first.code_index, first.line, first.function, first.bytes) == (0, 3, "load", 300 * MIB)
    assert [(caller.code_index, caller.line) for caller in first.callers] == [(1, 1)]
    assert (last.code_index, last.line, last.bytes) == (2, 7, 140 * MIB)


def test_without_a_census_nothing_is_known() -> None:
    assert memory_use(context(), OOM) is None


def test_a_census_that_ran_out_of_time_says_nothing_of_native_memory() -> None:
    cut = replace(FIRST, complete=False, finished=False)
    assert used(context(cut)).native_bytes is None
    # An earlier one shows a part of it.
    memory = used(context(START, cut))
    assert memory.native_bytes == 60 * MIB
    assert not memory.complete


def test_what_a_killed_worker_took_between_two_looks_is_no_memory_of_the_kernel() -> None:
    given_context = context(START, FIRST)
    evidence = replace(given_context.evidence, memory_children=200 * MIB)
    worker = replace(OOM, kind=CauseKind.WORKER_OUT_OF_MEMORY)
    memory = used(replace(given_context, evidence=evidence), worker)
    assert [(holder.name, holder.type, holder.bytes) for holder in memory.holders] == [
        (None, "process", 340 * MIB),
        ("cache", "dict", 100 * MIB),
    ]
    assert (memory.attributed_bytes, memory.native_bytes) == (440 * MIB, 60 * MIB)


sizes = st.integers(0, 1 << 47)
claims = st.lists(
    st.builds(
        Census,
        cell=st.sampled_from([None, 0, 2, 3]),
        memory=sizes,
        total=sizes,
        complete=st.booleans(),
        rows=st.lists(st.builds(row, st.text(max_size=3), sizes), max_size=5).map(tuple),
    ),
    min_size=1,
    max_size=4,
)


@given(claims, st.integers(0, 512 * MIB))
def test_no_claim_exceeds_the_peak_that_was_measured(censuses: list[Census], peak: int) -> None:
    memory = used(context(*censuses, peak=peak))
    assert memory.attributed_bytes is not None
    assert memory.attributed_bytes + (memory.native_bytes or 0) <= peak
    assert all(holder.bytes <= peak for holder in memory.holders)
    if censuses[-1].total > peak:
        assert not memory.complete
