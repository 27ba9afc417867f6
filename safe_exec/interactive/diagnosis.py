"""The last word: the diagnosis of a kernel that died, or of a cell that ran out of time, as the ``error`` output of a cell.

May import trial, diagnosis and reports. The text is that of an annotated notebook.
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
_BOLD, _PLAIN = "\x1b[1m", "\x1b[0m"


class Diagnosis:
    """One verdict, and the ways in which a client is told of it."""

    def __init__(self, run: RunInfo, result: TrialResult, plan: SpawnPlan, mask: Mask) -> None:
        masked = replace(
            result,
            ending=mask.everywhere(result.ending),
            evidence=mask.everywhere(result.evidence),
        )
        self.verdict: Verdict = mask.everywhere(build_verdict(run, masked, plan))
        self._mask = mask

    def error(self, source: str, notes: list[str]) -> dict[str, Any]:
        """The content of an ``error`` message for the cell with this source; ``notes`` are further lines at its end."""
        output: Mapping[str, Any] = error_output(self._mask(source), self.verdict)
        traceback = [*output["traceback"], *(f"{_BOLD}Note:{_PLAIN} {note}" for note in notes)]
        return {
            "ename": output["ename"],
            "evalue": output["evalue"],
            "traceback": traceback,
        }

    def reply(self, error: Mapping[str, Any], execution_count: int | None) -> dict[str, Any]:
        """The content of the reply to the cell that failed with ``error``."""
        return {
            "status": "error",
            **error,
            "execution_count": execution_count,
            "user_expressions": {},
            "payload": [],
        }


def session_note(path: Path | None) -> list[str]:
    """How to search for the culprits of an interactive death."""
    return (
        [] if path is None else [f"the session so far is recorded: safe-exec bisect {quoted(path)}"]
    )


def quoted(path: Path) -> str:
    """A path as a shell takes it."""
    import shlex

    return shlex.quote(re.sub(r"[\x00-\x1f]", "?", str(path)))
