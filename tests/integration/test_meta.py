"""No cause, status, limit or mechanism stands in the code that no real kernel was put through."""

from __future__ import annotations

import json
from pathlib import Path

from safe_exec.model import Activity, CauseKind, LimitName, Mechanism, Status
from tests.integration.kills import KILLS, OPEN_CAUSES, OPEN_MECHANISMS

CASES = json.loads((Path(__file__).parent.parent / "cases" / "cases.json").read_text())["cases"]
INTERRUPTS = (Path(__file__).parent / "test_interrupts.py").read_text()


def test_every_cause_kills_a_real_kernel() -> None:
    assert {kill.cause for kill in KILLS if kill.cause} | set(OPEN_CAUSES) == set(CauseKind)


def test_no_open_cause_is_exercised_already() -> None:
    assert not {kill.cause for kill in KILLS} & set(OPEN_CAUSES)


def test_every_status_is_reached() -> None:
    reached = {kill.status for kill in KILLS}
    assert 'verdict["status"] == "cancelled"' in INTERRUPTS
    assert reached | {Status.CANCELLED} == set(Status)


def test_every_limit_is_struck() -> None:
    assert {kill.limit for kill in KILLS if kill.limit} == set(LimitName)


def test_every_mechanism_holds_a_limit() -> None:
    assert {kill.by for kill in KILLS if kill.by} | set(OPEN_MECHANISMS) | {Mechanism.NONE} == set(Mechanism)


def test_every_limit_of_a_machine_without_control_groups_is_tried_as_an_ordinary_user() -> None:
    struck = {kill.limit for kill in KILLS if kill.user and kill.limit}
    assert struck >= {LimitName.MEMORY, LimitName.PROCESSES, LimitName.OPEN_FILES, LimitName.FILE_SIZE, LimitName.CELL_TIMEOUT}


def test_every_activity_is_seen() -> None:
    expected: set[str] = {kill.activity for kill in KILLS if kill.activity}
    for case in CASES:
        value = case["expected"]["activity"]
        expected.update(value if isinstance(value, list) else [value] if value else [])
    assert expected >= {activity.value for activity in Activity}
