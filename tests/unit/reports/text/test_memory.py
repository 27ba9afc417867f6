"""The wording on holders of memory and on lines that allocated it."""

from __future__ import annotations

from msgspec.structs import replace

from safe_exec.model.limits import Limits
from safe_exec.model.memory import AllocationLine, CallSite, CellGrowth, Holder, MemoryUse
from safe_exec.reports.text import memory
from tests.unit.builders import make_verdict

MIB = 1 << 20
CACHE = Holder(
    name="cache",
    type="dict",
    bytes=390 * MIB,
    summary="dict of 3 bytearray",
    code_index=0,
    growth=tuple(CellGrowth(code_index=cell, bytes=130 * MIB) for cell in (1, 2, 3)),
)
UNNAMED = Holder(name=None, type=None, bytes=60 * MIB, summary="allocated while line 2 ran")
LINE = AllocationLine(
    code_index=0,
    line=5,
    function="load",
    bytes=260 * MIB,
    callers=(CallSite(code_index=1, line=1, function="<module>"),),
)
USE = MemoryUse(
    peak_bytes=512 * MIB,
    attributed_bytes=450 * MIB,
    native_bytes=61 * MIB,
    complete=True,
    holders=(CACHE, UNNAMED),
    lines=(LINE, replace(LINE, bytes=130 * MIB)),
)
VERDICT = replace(make_verdict(), memory=USE)


def test_a_holder_has_its_size_content_and_cells() -> None:
    first, second, third = memory.holder_lines(VERDICT)
    assert first == "cache  390 MiB · dict of 3 bytearray · code cells 2-4"
    assert second == "(no name yet)  60.0 MiB · allocated while line 2 ran"
    assert third == "not held by Python objects: 61.0 MiB"


def test_a_refused_request_far_below_the_limit_has_no_holders() -> None:
    limits = Limits(memory=4 << 30)
    far = replace(VERDICT, limits=limits)
    assert memory.holder_lines(far) == [] and memory.allocation_lines(far) == []
    assert memory.largest_holder(far) == ""
    assert memory.holder_lines(replace(far, limits=Limits(memory=600 * MIB))) != []


def test_an_estimate_is_one() -> None:
    use = replace(USE, complete=False)
    assert memory.holder_lines(replace(VERDICT, memory=use))[0].startswith("cache  about 390 MiB")


def test_what_nothing_held_is_not_attributed() -> None:
    use = replace(USE, attributed_bytes=300 * MIB, native_bytes=None)
    assert memory.holder_lines(replace(VERDICT, memory=use))[-1] == "not attributed: 212 MiB"


def test_a_line_has_the_sum_of_its_callers() -> None:
    assert memory.allocation_lines(VERDICT) == [
        "390 MiB · code cell 1, line 5, in `load` · called in code cell 2"
    ]


def test_a_line_has_no_more_than_the_peak() -> None:
    use = replace(USE, lines=(replace(LINE, bytes=900 * MIB),))
    assert memory.allocation_lines(replace(VERDICT, memory=use))[0].startswith("512 MiB")


def test_names_cannot_break_the_line() -> None:
    use = replace(USE, holders=(replace(CACHE, name="a\nb\x1b[31m"),))
    assert "\n" not in memory.holder_lines(replace(VERDICT, memory=use))[0]
    assert "\x1b" not in memory.holder_lines(replace(VERDICT, memory=use))[0]


def test_other_processes_are_named_as_such() -> None:
    others = Holder(name=None, type="process", bytes=300 * MIB, summary="processes")
    assert memory.holder_name(others) == "(other processes)"
    assert memory.largest_holder(replace(VERDICT, memory=replace(USE, holders=(others,)))) == ""


def test_the_largest_holder_in_one_line() -> None:
    assert memory.largest_holder(VERDICT) == f"held by {memory.holder_lines(VERDICT)[0]}"


def test_nothing_is_said_without_figures() -> None:
    assert memory.holder_lines(make_verdict()) == memory.allocation_lines(make_verdict()) == []
