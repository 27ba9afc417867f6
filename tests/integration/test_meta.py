"""No cause, status, limit or mechanism stands in the code that no real kernel was put through."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safe_exec.model.limits import LimitName, Mechanism
from safe_exec.model.verdict import Activity, CauseKind, Status
from tests.cases.catalogue import read_all
from tests.integration.kills import KILLS, OPEN_CAUSES, OPEN_MECHANISMS

INTERRUPTS = (Path(__file__).parent / "test_interrupts.py").read_text()


def expected_by_cases(key: str) -> set[Any]:
    """The values of a key that some case expects."""
    values = [case.expected.get(key) for case in read_all()]
    lists = [value if isinstance(value, list) else [value] for value in values if value]
    return {value for values in lists for value in values}


def test_every_cause_kills_a_real_kernel() -> None:
    caused = {kill.cause for kill in KILLS if kill.cause} | expected_by_cases("cause")
    assert caused | set(OPEN_CAUSES) == set(CauseKind)


def test_no_open_cause_is_exercised_already() -> None:
    assert not {kill.cause for kill in KILLS} & set(OPEN_CAUSES)


def test_every_status_is_reached() -> None:
    reached = {kill.status for kill in KILLS}
    assert 'verdict["status"] == "cancelled"' in INTERRUPTS
    assert reached | {Status.CANCELLED} == set(Status)


def test_every_limit_is_struck() -> None:
    assert {kill.limit for kill in KILLS if kill.limit} == set(LimitName)


def test_every_mechanism_holds_a_limit() -> None:
    assert {kill.by for kill in KILLS if kill.by} | set(OPEN_MECHANISMS) | {Mechanism.NONE} == set(
        Mechanism
    )


def test_every_limit_of_a_machine_without_control_groups_is_tried_as_an_ordinary_user() -> None:
    struck = {kill.limit for kill in KILLS if kill.user and kill.limit}
    assert struck >= {
        LimitName.MEMORY,
        LimitName.PROCESSES,
        LimitName.OPEN_FILES,
        LimitName.FILE_SIZE,
        LimitName.CELL_TIMEOUT,
    }


def test_every_activity_is_seen() -> None:
    expected = {kill.activity for kill in KILLS if kill.activity} | expected_by_cases("activity")
    assert expected >= {activity.value for activity in Activity}
