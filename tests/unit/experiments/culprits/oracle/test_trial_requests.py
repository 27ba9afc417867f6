"""The cells of a trial and their deadlines."""

from __future__ import annotations

from typing import Any

import nbformat
import pytest

from safe_exec.experiments.culprits.oracle.trial_requests import (
    CRASH_SECONDS,
    SLACK_FACTOR,
    SLACK_SECONDS,
    deadline_of,
    request_of,
    with_timeout,
)
from safe_exec.experiments.culprits.protocol import Query
from safe_exec.experiments.rerun import SETTLE_SECONDS
from safe_exec.model.limits import Limits
from safe_exec.model.verdict import CauseKind
from tests.unit.experiments.culprits.oracle.subjects import CRASH, subject

SECONDS = {0: 2.0, 1: 0.0, CRASH: 0.0}


@pytest.mark.parametrize(
    ("kind", "cell", "deadline"),
    [
        (CauseKind.SEGFAULT, 0, 2.0 * SLACK_FACTOR + SLACK_SECONDS),
        (CauseKind.SEGFAULT, 1, SLACK_SECONDS),
        (CauseKind.SEGFAULT, CRASH, CRASH_SECONDS),
        (CauseKind.CELL_TIMEOUT, 1, SLACK_SECONDS),
        (CauseKind.CELL_TIMEOUT, CRASH, None),
    ],
)
def test_deadlines(kind: CauseKind, cell: int, deadline: float | None) -> None:
    assert deadline_of(subject(kind, seconds=SECONDS), cell) == deadline


@pytest.mark.parametrize(("own", "expected"), [(None, 5.0), (600.0, 5.0), (3.0, 3.0)])
def test_a_deadline_only_tightens_the_limit_of_a_cell(own: float | None, expected: float) -> None:
    one = subject(limits=Limits(cell_timeout=own), seconds=SECONDS)
    query = Query(cells=(1, CRASH), time_budget=50.0)
    request = request_of(one, one.request, query, None)
    assert request.cells == frozenset({1, CRASH})
    assert request.cell_limits(request.node.cells[1]).cell_timeout == expected
    assert all(
        mine is not theirs for mine, theirs in zip(request.node.cells, one.node.cells, strict=True)
    )


def test_another_notebook_keeps_its_limits_and_runs_as_a_whole() -> None:
    one = subject(seconds=SECONDS)
    other = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("x")])
    request = request_of(one, one.request, Query(cells=(0,), time_budget=50.0), other)
    assert request.cells is None and [cell.source for cell in request.node.cells] == ["x"]
    assert request.cell_limits(request.node.cells[0]).cell_timeout == 600.0


@pytest.mark.parametrize(
    ("timeout", "budget", "expected"),
    [
        (None, 50.0, 50.0 - SETTLE_SECONDS),
        (30.0, 50.0, 30.0),
        (90.0, 50.0, 50.0 - SETTLE_SECONDS),
        (None, 0.5, 1.0),
    ],
)
def test_the_budget_bounds_a_trial(timeout: float | None, budget: float, expected: float) -> None:
    one = subject(limits=Limits(timeout=timeout))
    request = request_of(one, one.request, Query(cells=(0,), time_budget=budget), None)
    assert request.limits.timeout == expected


@pytest.mark.parametrize(
    ("own", "seconds", "expected"),
    [(600.0, 7.0, 7.0), (5.0, 7.0, 5.0), (600.0, None, 600.0), (None, 7.0, None)],
)
def test_a_smaller_timeout_of_one_cell(
    own: float | None, seconds: float | None, expected: float | None
) -> None:
    cell, another = object(), object()

    def limits(_cell: Any) -> Limits:
        return Limits(cell_timeout=own)

    changed = with_timeout(limits, cell, seconds)
    assert changed(cell).cell_timeout == expected
    assert changed(another).cell_timeout == own
