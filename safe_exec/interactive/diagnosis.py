"""The diagnosis of a dead kernel or of a timed-out cell, as an ``error`` output of the cell.

The text is the one that an annotated notebook shows. May import trial, diagnosis and reports.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from safe_exec.diagnosis.verdict import RunInfo, build_verdict
from safe_exec.model.verdict import Verdict
from safe_exec.reports.annotated_notebook import error_output
from safe_exec.reports.masking import Mask

if TYPE_CHECKING:
    from safe_exec.sandbox.plan import SpawnPlan
    from safe_exec.trial.request import TrialResult

LOST = (
    "[safe-exec: the kernel was restarted after it died; all variables, imports and open files of"
    " before are lost]\n"
)
RESTORED = "the kernel goes on; its variables are as they were before this cell"
_BOLD, _PLAIN = "\x1b[1m", "\x1b[0m"


def idle_death(cause: str) -> str:
    """Return the note on a kernel that died while no cell ran."""
    return f"[safe-exec: the kernel before this one died while no cell ran: {cause}]\n"


def idle_restoration() -> str:
    """Return the note on a kernel that was restored while no cell ran."""
    return (
        "[safe-exec: the kernel goes on; its variables are as they were before the last cell, whose"
        " effects are lost]\n"
    )


def not_restored(reason: str) -> str:
    """Return the note on a death after which nothing could be restored."""
    return f"nothing could be restored: {reason}"


def snapshots_suspended(reason: str) -> str:
    """Return the note that no cell can be undone from now on."""
    return f"[safe-exec: --restore is off from now on: {reason}]\n"


class Diagnosis:
    """One verdict, as messages for a client."""

    def __init__(self, run: RunInfo, result: TrialResult, plan: SpawnPlan, mask: Mask) -> None:
        masked = replace(
            result,
            ending=mask.everywhere(result.ending),
            evidence=mask.everywhere(result.evidence),
        )
        self.verdict: Verdict = mask.everywhere(build_verdict(run, masked, plan))
        self._mask = mask

    def error(self, source: str, notes: list[str]) -> dict[str, Any]:
        """Return the content of the cell's ``error`` message; ``notes`` follow the traceback."""
        output: Mapping[str, Any] = error_output(self._mask(source), self.verdict)
        traceback = [*output["traceback"], *(f"{_BOLD}Note:{_PLAIN} {note}" for note in notes)]
        return {
            "ename": output["ename"],
            "evalue": output["evalue"],
            "traceback": traceback,
        }

    def reply(self, error: Mapping[str, Any], execution_count: int | None) -> dict[str, Any]:
        """Return the content of the ``execute_reply`` for a cell that failed with ``error``."""
        return {
            "status": "error",
            **error,
            "execution_count": execution_count,
            "user_expressions": {},
            "payload": [],
        }


def session_note(path: Path | None) -> list[str]:
    """Return a note on how to search the recorded session; empty if nothing was recorded."""
    return (
        [] if path is None else [f"the session so far is recorded: safe-exec bisect {quoted(path)}"]
    )


def quoted(path: Path) -> str:
    """Quote a path for a shell."""
    import shlex

    # The path is shown in a terminal and in an HTML page: no control characters.
    return shlex.quote(re.sub(r"[\x00-\x1f]", "?", str(path)))
