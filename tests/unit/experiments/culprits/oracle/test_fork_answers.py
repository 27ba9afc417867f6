"""What may be asked in a fork, from where it starts, and what its ending answers."""

from __future__ import annotations

import signal
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safe_exec.experiments.culprits.failure import Failure
from safe_exec.experiments.culprits.oracle.fork_answers import (
    LEAST_SECONDS,
    ForkAnswer,
    ForkCell,
    ForkEnding,
    answer_of,
    can_ask,
    cells_of_one_process,
    cells_with_files,
    nearest,
    positions_to_keep,
    seconds_allowed,
)
from safe_exec.experiments.culprits.protocol import PASSED, Outcome
from safe_exec.model.verdict import CauseKind

CRASH = 5


def failure(kind: CauseKind, number: int | None = None, code: int | None = None) -> Failure:
    return Failure(kind=kind, signal=number, exit_code=code, cell=CRASH)


SEGFAULT = failure(CauseKind.SEGFAULT, -signal.SIGSEGV)
EXIT = failure(CauseKind.EXIT, code=3)
ERROR = Failure(
    kind=CauseKind.EXCEPTION, signal=None, exit_code=None, cell=CRASH, error="ValueError"
)
LACK = Failure(
    kind=CauseKind.EXCEPTION,
    signal=None,
    exit_code=None,
    cell=CRASH,
    error="NameError",
    missing=("never",),
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """An ending in a fork, and what it answers; ``None``: a trial has to tell."""

    name: str
    failure: Failure
    ending: ForkEnding
    answer: tuple[Outcome, str] | None
    stopped_at: int | None = None
    names: frozenset[str] = frozenset()


def cells(*indexes: int) -> tuple[ForkCell, ...]:
    return tuple(ForkCell(index=index, source=f"x{index} = 1") for index in indexes)


def ended(status: int | None, cell: int | None = CRASH, **fields: object) -> ForkEnding:
    return ForkEnding(cell=cell, status=status, **fields)  # type: ignore[arg-type]


FAIL, PASS, UNRESOLVED = Outcome.FAIL, Outcome.PASS, Outcome.UNRESOLVED
ROWS = [
    Row(name="same", failure=SEGFAULT, ending=ended(11), answer=(FAIL, "segfault")),
    Row(name="dumped core", failure=SEGFAULT, ending=ended(11 | 0x80), answer=(FAIL, "segfault")),
    Row(name="another cell", failure=SEGFAULT, ending=ended(11, 4), answer=None),
    Row(name="another signal", failure=SEGFAULT, ending=ended(6), answer=None),
    Row(name="killed", failure=SEGFAULT, ending=ended(9), answer=None),
    Row(name="exited", failure=SEGFAULT, ending=ended(139 << 8), answer=None),
    Row(name="exit", failure=EXIT, ending=ended(3 << 8), answer=(FAIL, "exit")),
    Row(name="another exit", failure=EXIT, ending=ended(4 << 8), answer=None),
    Row(name="silent end", failure=EXIT, ending=ended(0), answer=None),
    Row(name="passed", failure=SEGFAULT, ending=ended(0, passed=True), answer=(PASS, PASSED)),
    Row(name="passed and died", failure=SEGFAULT, ending=ended(11, passed=True), answer=None),
    Row(name="status unknown", failure=SEGFAULT, ending=ended(None), answer=None),
    Row(name="no cell began", failure=SEGFAULT, ending=ended(11, None), answer=None),
    Row(name="odd", failure=SEGFAULT, ending=ended(0, odd="took too long"), answer=None),
    Row(
        name="lacks a name",
        failure=SEGFAULT,
        ending=ended(0, 3, error=("NameError", "name 'frame' is not defined")),
        answer=(UNRESOLVED, "exception"),
        stopped_at=3,
        names=frozenset({"frame"}),
    ),
    Row(
        name="another error",
        failure=SEGFAULT,
        ending=ended(0, 3, error=("KeyError", "name 'frame' is not defined")),
        answer=(UNRESOLVED, "exception"),
        stopped_at=3,
    ),
    Row(
        name="error that the system may have caused",
        failure=SEGFAULT,
        ending=ended(0, 3, error=("MemoryError", "")),
        answer=None,
    ),
    Row(
        name="same error",
        failure=ERROR,
        ending=ended(0, error=("ValueError", "no")),
        answer=(FAIL, "exception"),
    ),
    Row(
        name="same error elsewhere",
        failure=ERROR,
        ending=ended(0, 2, error=("ValueError", "no")),
        answer=(UNRESOLVED, "exception"),
        stopped_at=2,
    ),
    Row(
        name="same lack",
        failure=LACK,
        ending=ended(0, error=("NameError", "name 'never' is not defined")),
        answer=(FAIL, "exception"),
    ),
    Row(
        name="another lack",
        failure=LACK,
        ending=ended(0, error=("NameError", "name 'frame' is not defined")),
        answer=(UNRESOLVED, "exception"),
        stopped_at=CRASH,
        names=frozenset({"frame"}),
    ),
    Row(name="a death in place of an error", failure=ERROR, ending=ended(11), answer=None),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_answer_of_an_ending(row: Row) -> None:
    expected = row.answer and ForkAnswer(
        outcome=row.answer[0], ended=row.answer[1], stopped_at=row.stopped_at, names=row.names
    )
    assert answer_of(row.failure, row.ending) == expected


@pytest.mark.parametrize(
    ("subject", "expected"),
    [
        (SEGFAULT, True),
        (EXIT, True),
        (ERROR, True),
        (failure(CauseKind.OUT_OF_MEMORY, -signal.SIGKILL), False),
        (failure(CauseKind.CELL_TIMEOUT), False),
        (failure(CauseKind.KILLED, -signal.SIGKILL), False),
        (failure(CauseKind.EXIT), False),
        (
            Failure(
                kind=CauseKind.ABORT, signal=-signal.SIGABRT, exit_code=None, cell=CRASH, moves=True
            ),
            False,
        ),
    ],
    ids=["segfault", "exit", "error", "memory", "hang", "killed", "asked to exit", "heap"],
)
def test_which_failures_a_fork_can_tell(subject: Failure, *, expected: bool) -> None:
    assert can_ask(subject) is expected


def test_a_failure_tells_its_line() -> None:
    answer = answer_of(SEGFAULT, ended(11, line=7))
    assert answer is not None
    assert answer.line == 7


def test_cells_that_write_files_directly_or_by_a_function_of_the_notebook() -> None:
    sources = {
        0: "import pandas as pd\nframe = pd.read_csv('a.csv')",
        1: "frame.to_csv('b.csv')",
        2: "def save(rows):\n    with open('c', 'w') as file:\n        file.write(rows)",
        4: "save(frame)",
        5: "print(open('c').read())",
        6: "import numpy as np\nsignal = np.memmap('d', mode='r+')",
    }
    assert cells_with_files(sources) == {1, 4, 6}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import os\nme = os.getpid()", True),
        ("from multiprocessing import Pool", True),
        ("with ProcessPoolExecutor() as pool: pass", True),
        ("import asyncio", True),
        ("frame = forked_tables.merge()", True),
        ("signal.alarm(5)", True),
        ("alarms = []", False),
        ("frame.groupby('pid').sum()", False),
    ],
)
def test_cells_after_which_another_process_is_not_the_same(source: str, *, expected: bool) -> None:
    assert bool(cells_of_one_process({0: source})) is expected


def test_a_run_starts_from_the_longest_sequence_that_it_begins_with() -> None:
    snapshots = [cells(), cells(0), cells(0, 1), cells(0, 2), cells(0, 1, 3, 4)]
    assert nearest(snapshots, cells(0, 1, 3, 5)) == cells(0, 1)
    assert nearest(snapshots, cells(1, 3)) == ()
    # One cell at least has to run in the fork.
    assert nearest(snapshots, cells(0, 1, 3, 4)) == cells(0, 1)
    # A part of a cell is another cell.
    part = ForkCell(index=1, source="")
    assert nearest(snapshots, (*cells(0), part, *cells(3))) == cells(0)


def test_snapshots_are_kept_after_work() -> None:
    much, little = LEAST_SECONDS * 10, LEAST_SECONDS / 10
    assert positions_to_keep([much, little, little, much, little], room=9, last=4) == (1, 4)
    assert positions_to_keep([much, little, little, much, little], room=9, last=3) == (1,)
    assert positions_to_keep([much] * 5, room=0, last=4) == ()
    assert positions_to_keep([little] * 5, room=9, last=4) == ()


@given(
    seconds=st.lists(st.floats(0, 1000), max_size=40),
    room=st.integers(-2, 12),
    last=st.integers(0, 50),
)
def test_no_more_snapshots_than_there_is_room_and_none_after_the_last_cell(
    seconds: list[float], room: int, last: int
) -> None:
    positions = positions_to_keep(seconds, room, last)
    assert len(positions) <= max(0, room)
    assert list(positions) == sorted(set(positions))
    assert all(1 <= position <= min(last, len(seconds) - 1) for position in positions)


@given(seconds=st.lists(st.floats(0, 100), max_size=9), budget=st.floats(0, 1000))
def test_a_run_takes_no_longer_than_the_budget(seconds: list[float], budget: float) -> None:
    allowed = seconds_allowed(seconds, budget)
    assert allowed <= budget
    assert allowed == budget or allowed > sum(seconds)
