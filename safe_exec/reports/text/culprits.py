"""The wording on culprits: their names, the effect of each, the progress of the search."""

from __future__ import annotations

import os
import shlex

from safe_exec.model.verdict import Culprit, Culprits, Role, Stopped, Verdict
from safe_exec.reports.text import common
from safe_exec.units import format_seconds

PASSED = "passed"
MOST_SHOWN = 8
"""The most culprits beside the crash cell that a report for people lists."""

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
    """Return the names of the culprits: ``code cells 3 + 7``, or ``code cell 7 alone``."""
    cells = common.cell_sum(culprit.code_index for culprit in search.cells)
    return f"{cells} alone" if len(search.cells) == 1 else cells


def note(culprit: Culprit) -> str:
    """Return the effect of a culprit: its note, or the description of its role."""
    return common.single_line(culprit.note) or _ROLE_WORDS[culprit.role]


def others(verdict: Verdict) -> list[Culprit]:
    """Return the culprits except the crash cell, which reports show separately."""
    crash = verdict.crash_cell.index if verdict.crash_cell is not None else None
    return (
        [culprit for culprit in verdict.culprits.cells if culprit.index != crash]
        if verdict.culprits is not None
        else []
    )


def look_first(verdict: Verdict) -> Culprit | None:
    """Return the culprit to read first, unless it is the crash cell."""
    search = verdict.culprits
    return next(
        (culprit for culprit in others(verdict) if search and culprit.index == search.look_first),
        None,
    )


def figures(search: Culprits) -> str:
    """Return the figures of the search: ``reproduced 2/2 · 6 trials · 14.2 s``."""
    failures, runs = search.reproduced
    checked = f"reproduced {failures}/{runs}" if runs and search.cells else ""
    # Runs that ended in other ways are named, because they weaken the result.
    if checked and len(search.endings.keys() - {PASSED}) > 1:
        checked += f" ({endings(search)})"
    cached_trials = f" + {search.cached} cached" if search.cached else ""
    forks = f" + {common.counted(search.forked, 'fork')}" if search.forked else ""
    parts = (
        checked,
        f"{common.counted(search.trials, 'trial')}{forks}{cached_trials}",
        format_seconds(search.seconds),
    )
    return common.SEPARATOR.join(part for part in parts if part)


def endings(search: Culprits) -> str:
    """Return the endings of the runs: ``abort 3, passed 2``."""
    return ", ".join(
        f"{common.single_line(kind).replace('_', ' ')} {count}"
        for kind, count in sorted(search.endings.items())
    )


def outcome(search: Culprits) -> str:
    """Return why no culprits are known, or why the set may not be minimal; "" if it is."""
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
        # The failure changed between runs, so there is nothing stable to search for.
        return f"it ended another way in {sum(others.values())} of {common.counted(runs, 'run')}: {endings(search)}"
    if search.stopped is Stopped.TOO_RARE:
        return (
            f"it happened in {failures} of {common.counted(runs, 'run')}: too rare for the budget"
        )
    return _NONE_FOUND[search.stopped] if search.stopped else "no culprits were found"


def reproduce_command(verdict: Verdict) -> str:
    """Return the shell command that reproduces the failure, or ""."""
    path = verdict.culprits.repro_notebook if verdict.culprits is not None else None
    if not path:
        return ""
    argument = common.path_seen(path, verdict)
    command = (
        f"safe-exec run {shlex.quote(f'./{argument}' if argument.startswith('-') else argument)}"
    )
    # Cells open files relative to the directory where the notebook ran.
    if os.path.dirname(path) != verdict.cwd:
        command += f" --cwd {shlex.quote(verdict.cwd)}"
    return common.code_line(command)
