"""The notebook that a culprit search is about."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from msgspec import Struct

from safe_exec.experiments.culprits.failure import Failure
from safe_exec.experiments.culprits.oracle.hang import HangPicture
from safe_exec.model.verdict import Cause
from safe_exec.trial.request import TrialRequest, TrialResult

CauseOf = Callable[[TrialResult, TrialRequest], Cause | None]


class Subject(Struct, frozen=True, kw_only=True):
    """The notebook to search: its stripped form, the failure, and how to run it."""

    node: Any
    request: TrialRequest
    failure: Failure
    # The cells' run times in the first run; the deadlines of a trial's cells derive from them.
    seconds: Mapping[int, float]
    # Whatever else the answers depend on: the kernel, its packages, versions.
    environment: Mapping[str, object]
    # The diagnosis is passed in, so that this package does not depend on it.
    cause_of: CauseOf
    # The picture of the hang that is searched for, if the failure is one.
    hang: HangPicture | None = None

    def crash_timeout(self) -> float | None:
        """Return the timeout of the crash cell in seconds; ``None`` without one."""
        return self.request.cell_limits(self.node.cells[self.failure.cell]).cell_timeout
