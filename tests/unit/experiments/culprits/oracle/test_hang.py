"""The picture of a hang: what makes two of them the same one, and what does not."""

from __future__ import annotations

from typing import Any

import nbformat
import pytest
from msgspec.structs import replace

from safe_exec.experiments.culprits.oracle.hang import (
    HangPicture,
    seconds_until_recognised,
)
from safe_exec.model.evidence import ActivityObservation, Frame
from safe_exec.model.verdict import (
    Activity,
    Cause,
    CauseKind,
    Confidence,
    CrashCell,
    Fact,
    Origin,
    Status,
    Verdict,
)
from tests.unit.builders import make_verdict

HELPER = "def pull(q):\n    return q.get()"
CRASH = "x = 1\nfor i in range(3):\n    if i:\n        pull(q)\nprint(x)"


def notebook(*sources: str) -> Any:
    node = nbformat.v4.new_notebook()
    node.cells = [nbformat.v4.new_code_cell(source) for source in sources]
    return node


NODE = notebook(HELPER, CRASH)
STACK = (
    Frame(function="wait", line=327, file="/lib/threading.py"),
    Frame(function="get", line=171, file="/lib/queue.py"),
    Frame(function="pull", line=2, cell=0),
    Frame(function="<module>", line=4, cell=1),
)
BLOCKED = ActivityObservation(
    state="S", cpu_share=0.0, syscall="futex", stack=STACK, runnable=0.0, window=0.4
)
LOOP = replace(
    BLOCKED,
    state="R",
    cpu_share=1.0,
    syscall=None,
    runnable=1.0,
    gil_waits=(0.005,) * 10,
    lines=5,
    stack=STACK[2:],
)


def verdict_of(
    kind: CauseKind, activity: Activity | None, stack: tuple[Frame, ...], **facts: str
) -> Verdict:
    cause = Cause(
        kind=kind,
        summary="it ran past its time",
        confidence=Confidence.CERTAIN,
        activity=activity,
        evidence=tuple(
            Fact(fact=name.replace("_", " "), value=value, source="/proc", origin=Origin.OUTSIDE)
            for name, value in facts.items()
        ),
    )
    crash = CrashCell(
        index=1,
        code_index=1,
        id=None,
        execution_count=2,
        line=4,
        source_line="        pull(q)",
        stack=stack,
    )
    return replace(make_verdict(Status.TIMEOUT), cause=cause, crash_cell=crash)


def picture(observation: ActivityObservation, node: Any = NODE, cell: int = 1) -> HangPicture:
    return HangPicture.of_observation(observation, observation.stack, cell, node)


def test_the_picture_in_a_verdict_is_the_one_that_was_observed() -> None:
    blocked = verdict_of(
        CauseKind.CELL_TIMEOUT, Activity.WAITING_LOCK, STACK, blocked_in="futex", process_state="S"
    )
    assert HangPicture.of_verdict(blocked, NODE) == picture(BLOCKED)
    loop = verdict_of(CauseKind.CELL_TIMEOUT, Activity.PYTHON_LOOP, STACK[2:], process_state="R")
    assert HangPicture.of_verdict(loop, NODE) == picture(LOOP)


def test_a_stopped_process_is_known_by_that_alone() -> None:
    stopped = verdict_of(CauseKind.CELL_TIMEOUT, Activity.STOPPED, (), process_state="T")
    wanted = HangPicture.of_verdict(stopped, NODE)
    assert wanted == picture(replace(BLOCKED, state="T", syscall=None, stack=()))


def test_another_line_of_the_same_loop_in_python_is_the_same_hang() -> None:
    elsewhere = replace(LOOP, stack=(Frame(function="<module>", line=3, cell=1),))
    assert picture(elsewhere) == picture(LOOP)


@pytest.mark.parametrize(
    "other",
    [
        replace(BLOCKED, syscall="poll"),
        replace(BLOCKED, stack=(Frame(function="<module>", line=5, cell=1),)),
        replace(BLOCKED, stack=(Frame(function="recv", line=9, file="/lib/x.py"), *STACK[1:])),
        replace(BLOCKED, stack=(*STACK[:3], Frame(function="<module>", line=1, cell=1))),
        LOOP,
        replace(BLOCKED, state="T"),
    ],
    ids=["another call", "another statement", "another frame", "earlier", "busy", "stopped"],
)
def test_what_is_another_hang(other: ActivityObservation) -> None:
    assert picture(other) != picture(BLOCKED)


def test_a_part_of_the_crash_cell_in_another_notebook_shows_the_same_picture() -> None:
    part = notebook("y = 2", HELPER, "for i in range(3):\n    if i:\n        pull(q)")
    stack = (
        *STACK[:2],
        Frame(function="pull", line=2, cell=1),
        Frame(function="<module>", line=3, cell=2),
    )
    assert picture(replace(BLOCKED, stack=stack), part, 2) == picture(BLOCKED)


@pytest.mark.parametrize(
    ("kind", "activity", "facts"),
    [
        (CauseKind.SEGFAULT, None, {}),
        (CauseKind.NOTEBOOK_TIMEOUT, Activity.SLEEPING, {"blocked_in": "poll"}),
        (CauseKind.CELL_TIMEOUT, None, {"process_state": "S"}),
    ],
)
def test_no_picture(kind: CauseKind, activity: Activity | None, facts: dict[str, str]) -> None:
    stack = STACK if kind is not CauseKind.CELL_TIMEOUT else ()
    assert HangPicture.of_verdict(verdict_of(kind, activity, stack, **facts), NODE) is None


def test_recognition_takes_at_least_two_seconds_and_less_than_a_tenth_of_a_long_timeout() -> None:
    assert seconds_until_recognised(None) is None
    assert seconds_until_recognised(3.0) is None
    for timeout in (4.0, 20.1, 600.0):
        seconds = seconds_until_recognised(timeout)
        assert seconds is not None
        assert 2.0 <= seconds < max(timeout / 10, 2.1)
