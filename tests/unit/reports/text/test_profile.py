"""The wording of the time profile."""

from __future__ import annotations

import pytest

from safe_exec.model.verdict import CauseKind, ProfileLine, Status
from safe_exec.reports.text import profile
from tests.unit.builders import make_crash, make_verdict


def row(code_index: int, line: int, seconds: float, own_seconds: float) -> ProfileLine:
    return ProfileLine(code_index=code_index, line=line, seconds=seconds, own_seconds=own_seconds)


@pytest.mark.parametrize(
    ("rows", "summary"),
    [
        ((row(3, 12, 300, 0), row(3, 7, 294, 294), row(3, 8, 6, 6)), "98 % of 5m in code cell 4, line 7, called from line 12"),
        ((row(3, 12, 30, 30),), "100 % of 30.0 s in code cell 4, line 12"),
        ((row(3, 12, 40, 0), row(1, 2, 40, 40)), "100 % of 40.0 s in code cell 2, line 2, called from code cell 4, line 12"),
        ((), ""),
    ],
)  # fmt: skip
def test_summary_of_a_timeout(rows: tuple[ProfileLine, ...], summary: str) -> None:
    crash = make_crash(code_index=3, line=12)
    verdict = make_verdict(
        Status.TIMEOUT, kind=CauseKind.CELL_TIMEOUT, crash_cell=crash, profile=rows
    )
    assert profile.summary(verdict) == summary


def test_only_a_timeout_is_about_time() -> None:
    rows = (row(0, 3, 2.5, 2.0), row(1, 1, 1.0, 1.0))
    verdict = make_verdict(profile=rows)
    assert profile.summary(verdict) == ""
    assert profile.line_times(verdict, 0) == {3: "2.5 s"}
