"""A notebook to search, and the ends of its trials, made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat

from safe_exec.experiments.culprits.failure import Failure
from safe_exec.experiments.culprits.oracle.subject import Subject
from safe_exec.model.ending import Ending
from safe_exec.model.evidence import CellLocation, Evidence
from safe_exec.model.limits import Limits
from safe_exec.model.verdict import Cause, CauseKind
from safe_exec.sandbox.host.capabilities import HostCapabilities
from safe_exec.sandbox.planner import build_plan
from safe_exec.trial.metrics import MetricsRecorder
from safe_exec.trial.request import TrialRequest, TrialResult
from tests.unit.builders import make_cause

CRASH = 2


def subject(
    kind: CauseKind = CauseKind.SEGFAULT,
    *,
    limits: Limits | None = None,
    cause: Cause | None = None,
    seconds: dict[int, float] | None = None,
    **changes: Any,
) -> Subject:
    """Three cells, of which the last one fails with a cause of a kind; each trial has ``cause``."""
    limits = limits or Limits(cell_timeout=600.0)
    node = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(f"x{n}") for n in range(3)])
    request = TrialRequest(
        run_id="0",
        node=node,
        kernel_name="python3",
        cwd=Path("/folder"),
        limits=limits,
        machine=HostCapabilities(),
        plan=build_plan(limits, HostCapabilities(), "0"),
        cell_limits=lambda _: limits,
    )
    fields = {
        "node": node,
        "request": request,
        "failure": Failure(kind=kind, signal=None, exit_code=None, cell=CRASH),
        "seconds": seconds or {},
        "environment": {},
        "cause_of": lambda _result, _request: cause,
    }
    return Subject(**(fields | changes))


def cause_of_kind(kind: CauseKind) -> Cause:
    """A cause without signal, exit code and evidence."""
    return make_cause(kind, signal=None, exit_code=None, evidence=())


def result(ending: Ending, location: CellLocation | None = None) -> TrialResult:
    """The end of a trial that measured nothing."""
    return TrialResult(
        ending=ending,
        evidence=Evidence(),
        metrics=MetricsRecorder({}, 0.0),
        node=None,
        location=location,
        hello={},
        warnings=(),
    )
