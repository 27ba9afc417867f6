"""What is known of a failed run before the first trial of a search."""

from __future__ import annotations

import nbformat
import pytest
from msgspec.structs import replace

from safe_exec.experiments.culprits.problem import SearchedRun
from safe_exec.model.evidence import Frame
from safe_exec.model.limits import Limits
from safe_exec.model.verdict import CauseKind, CellStatus, CrashCell
from tests.unit.builders import make_cause, make_records, make_verdict

GIB = 1 << 30
SOURCES = ("import mod", "data = mod.load()", "other = 1", "mod.change(data)\nuse(data)")
CRASH = CrashCell(
    index=4, code_index=3, id="fifth", execution_count=4, line=2, source_line="use(data)", stack=()
)


def searched(
    kind: CauseKind = CauseKind.SEGFAULT,
    *,
    limits: Limits | None = None,
    crash: CrashCell = CRASH,
    skips: tuple[int, ...] = (),
) -> SearchedRun:
    """A markdown cell and four code cells, of which the last one failed; ``skips`` count these."""
    node = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_markdown_cell("text"), *map(nbformat.v4.new_code_cell, SOURCES)]
    )
    statuses = [
        CellStatus.SKIPPED if n in skips else CellStatus.PASSED for n in range(len(SOURCES) - 1)
    ]
    records = make_records(*statuses, CellStatus.KILLED)
    records = tuple(
        replace(r, started=0.5 + n, memory_kept=n * GIB, cpu_seconds=n / 2)
        for n, r in enumerate(records)
    )
    verdict = make_verdict(
        cause=make_cause(kind), crash_cell=crash, cells=records, limits=limits or Limits()
    )
    return SearchedRun.of(verdict, node)


def test_the_cells_that_ran_with_the_crash_cell_last() -> None:
    run = searched(skips=(2,))
    assert run.order == (1, 2, 4)
    assert run.sources == {1: SOURCES[0], 2: SOURCES[1], 4: SOURCES[3]}


def test_the_problem_by_indexes_of_the_notebook() -> None:
    problem = searched().problem(budget=60.0, recognition_seconds=None, stops_at_errors=True)
    assert (problem.cells, problem.crash, problem.budget) == ((1, 2, 3, 4), 4, 60.0)
    assert problem.slice == {1, 2, 4}
    assert problem.needs[2] == {1} and problem.needs[3] == frozenset()
    assert problem.definers("data", 4) == (2,)
    assert problem.start_seconds == 0.5
    assert problem.erratic


def test_a_set_that_lacks_a_name_is_certain_to_stop() -> None:
    problem = searched().problem(budget=60.0, recognition_seconds=None, stops_at_errors=True)
    assert problem.predicted_stop(frozenset({1, 2, 4})) is None
    assert problem.predicted_stop(frozenset({2, 4})) == 2
    assert problem.predicted_stop(frozenset({1, 4})) == 4


@pytest.mark.parametrize(
    ("recognition_seconds", "expected", "fresh"),
    [(None, 1.5, 0.0), (0.5, 0.5, 1.0), (2.0, 1.5, 0.0)],
)
def test_a_recognised_hang_shortens_trials_and_not_confirmations(
    recognition_seconds: float | None, expected: float, fresh: float
) -> None:
    seconds, fresh_seconds = searched().seconds_of_cells(recognition_seconds)
    assert seconds == {1: 1.5, 2: 1.5, 3: 1.5, 4: expected}
    assert fresh_seconds == fresh


@pytest.mark.parametrize(
    ("kind", "limits", "use", "limit"),
    [
        (
            CauseKind.OUT_OF_MEMORY,
            Limits(memory=GIB),
            {1: 0.0, 2: GIB, 3: 2 * GIB, 4: 3 * GIB},
            GIB,
        ),
        (CauseKind.OUT_OF_MEMORY, Limits(), None, None),
        (CauseKind.NOTEBOOK_TIMEOUT, Limits(timeout=9.0), dict.fromkeys((1, 2, 3, 4), 1.5), 9.0),
        (CauseKind.CPU_TIME, Limits(cpu_time=5.0), {1: 0.0, 2: 0.5, 3: 1.0, 4: 1.5}, 5.0),
        (CauseKind.SEGFAULT, Limits(memory=GIB), None, None),
    ],
)
def test_the_use_of_what_ran_out(
    kind: CauseKind, limits: Limits, use: dict[int, float] | None, limit: float | None
) -> None:
    assert searched(kind, limits=limits).resource_use() == (use, limit)


def test_the_names_that_the_frames_had_read() -> None:
    stack = (
        Frame(function="load", line=3, file="mod.py"),
        Frame(function="<module>", line=1, file="", cell=2),
        Frame(function="<module>", line=2, file="", cell=4),
    )
    names = searched(crash=replace(CRASH, stack=stack)).names_in_frames()
    assert "data" in names[3] and "mod" in names[1]


def test_a_frame_in_a_cell_that_did_not_run_ends_the_reading_of_frames() -> None:
    elsewhere = (Frame(function="<module>", line=1, file="", cell=0), *CRASH.stack)
    run = searched(crash=replace(CRASH, index=4, line=None, stack=elsewhere))
    assert run.names_in_frames() == {}
