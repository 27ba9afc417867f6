"""The wording of the time profile."""

from __future__ import annotations

from safe_exec.model.verdict import ProfileLine, Status, Verdict
from safe_exec.reports.text import common
from safe_exec.units import format_seconds


def hottest(verdict: Verdict) -> ProfileLine | None:
    """Return the line with the most time of its own, without the functions that it called."""
    return max(verdict.profile, key=lambda row: row.own_seconds, default=None)


def summary(verdict: Verdict) -> str:
    """Return the place where a timed-out run spent its time; empty for all other runs.

    For example ``98 % of 300 s in code cell 4, line 7, called from line 12``.
    """
    row = hottest(verdict)
    total = sum(line.own_seconds for line in verdict.profile)
    if verdict.status is not Status.TIMEOUT or row is None or not row.own_seconds:
        return ""
    share = round(100 * row.own_seconds / total)
    place = f"{common.cell_name(row.code_index)}, line {row.line}"
    return f"{share} % of {format_seconds(total)} in {place}{_caller(row, verdict)}"


def _caller(row: ProfileLine, verdict: Verdict) -> str:
    """Return the line of the crash cell that called the hottest line."""
    crash = verdict.crash_cell
    if crash is None or crash.line is None:
        return ""
    if (crash.code_index, crash.line) == (row.code_index, row.line):
        return ""
    cell = "" if crash.code_index == row.code_index else f"{common.cell_name(crash.code_index)}, "
    return f", called from {cell}line {crash.line}"


def line_times(verdict: Verdict, code_index: int) -> dict[int, str]:
    """Return, by line number, the time of each line of a code cell."""
    return {
        row.line: format_seconds(row.seconds)
        for row in verdict.profile
        if row.code_index == code_index
    }
