"""The texts on culprits that the reports for people share: their names, what each did, how the search for them went.

Pure. Imports ``model``, ``units`` and ``text``.
"""

from __future__ import annotations

import os
import shlex

from safe_exec.model.verdict import Culprit, Culprits, Role, Stopped, Verdict
from safe_exec.reports.text import common
from safe_exec.units import format_seconds

PASSED = "passed"
MOST_SHOWN = 8
"""How many culprits beside the crash cell a report for people lists."""

_ROLE_WORDS = {
    Role.CRASH: "ran when it happened",
    Role.ACCUMULATOR: "kept much of what ran out",
    Role.DEFINITION: "defines what another culprit uses",
    Role.TRIGGER: "set off what struck later",
    Role.SETUP: "must run before",
}
_NOT_MINIMAL = {
    Stopped.BUDGET: "not known to be minimal: the budget ran out",
    Stopped.CANCELLED: "stopped by the user; the smallest set so far",
    Stopped.NOT_REPRODUCED: "not known to be minimal: it did not happen again each time",
    Stopped.TOO_RARE: "not known to be minimal: too rare for the budget",
}
_NONE_FOUND = {
    Stopped.BUDGET: "the budget ran out before any culprits were found",
    Stopped.CANCELLED: "stopped by the user before any culprits were found",
}


def names(search: Culprits) -> str:
    """``code cells 3 + 7``, or ``code cell 7 alone``."""
    cells = common.cell_sum(culprit.code_index for culprit in search.cells)
    return f"{cells} alone" if len(search.cells) == 1 else cells


def note(culprit: Culprit) -> str:
    """What a culprit did: its note, or what its role says where there is none."""
    return common.one_line(culprit.note) or _ROLE_WORDS[culprit.role]


def others(verdict: Verdict) -> list[Culprit]:
    """The culprits but the crash cell, which every report shows by itself."""
    crash = verdict.crash_cell.index if verdict.crash_cell is not None else None
    return (
        [culprit for culprit in verdict.culprits.cells if culprit.index != crash]
        if verdict.culprits is not None
        else []
    )


def look_first(verdict: Verdict) -> Culprit | None:
    """The culprit to read first, unless that is the crash cell."""
    search = verdict.culprits
    return next(
        (culprit for culprit in others(verdict) if search and culprit.index == search.look_first),
        None,
    )


def figures(search: Culprits) -> str:
    """``reproduced 2/2 · 6 trials · 14.2 s``."""
    failures, runs = search.reproduced
    checked = f"reproduced {failures}/{runs}" if runs and search.cells else ""
    if checked and len(search.endings.keys() - {PASSED}) > 1:
        checked += f" ({endings(search)})"
    earlier = f" + {search.cached} cached" if search.cached else ""
    parts = (
        checked,
        f"{common.counted(search.trials, 'trial')}{earlier}",
        format_seconds(search.seconds),
    )
    return common.SEPARATOR.join(part for part in parts if part)


def endings(search: Culprits) -> str:
    """``abort 3, passed 2``: how the runs ended."""
    return ", ".join(
        f"{common.one_line(kind).replace('_', ' ')} {count}"
        for kind, count in sorted(search.endings.items())
    )


def outcome(search: Culprits) -> str:
    """Why there are no culprits, or why there may be fewer; nothing where the set is minimal."""
    if search.minimal:
        return ""
    if search.cells:
        return _NOT_MINIMAL[search.stopped] if search.stopped else "not known to be minimal"
    failures, runs = search.reproduced
    if search.stopped is Stopped.NOT_REPRODUCED:
        others = {kind: count for kind, count in search.endings.items() if kind != PASSED}
        if not others:
            return "it did not happen again" + (
                f" in {runs - failures} of {common.counted(runs, 'run')}" if runs else ""
            )
        return f"it ended another way in {sum(others.values())} of {common.counted(runs, 'run')}: {endings(search)}"
    if search.stopped is Stopped.TOO_RARE:
        return (
            f"it happened in {failures} of {common.counted(runs, 'run')}: too rare for the budget"
        )
    return _NONE_FOUND[search.stopped] if search.stopped else "no culprits were found"


def reproduce_command(verdict: Verdict) -> str:
    """The command that makes it happen again, to be typed into a shell; nothing where no reproduction was written."""
    path = verdict.culprits.repro_notebook if verdict.culprits is not None else None
    if not path:
        return ""
    argument = common.path_seen(path, verdict)
    command = (
        f"safe-exec run {shlex.quote(f'./{argument}' if argument.startswith('-') else argument)}"
    )
    if os.path.dirname(path) != verdict.cwd:  # what the cells open stands where the notebook ran
        command += f" --cwd {shlex.quote(verdict.cwd)}"
    return common.code_line(command)
