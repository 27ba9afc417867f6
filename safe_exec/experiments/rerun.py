"""Runs a notebook again in a sandbox and folder of its own, for every kind of experiment.

The culprit search, ``probe`` and ``replay`` all start their runs here, so that these are alike: the
folder as it was before, a fresh kernel, control group, /dev/shm and /tmp.

May import trial, sandbox, kernel and workspace.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from safe_exec.experiments.culprits import failure as failures
from safe_exec.experiments.workspace import WorkspaceFactory
from safe_exec.model.ending import Cancelled, InternalError, TimedOut
from safe_exec.model.events import EventSink
from safe_exec.model.limits import LimitName, Limits
from safe_exec.sandbox import keeper_process
from safe_exec.sandbox.planner import build_plan
from safe_exec.trial.request import TrialRequest, TrialResult
from safe_exec.trial.run import run_trial

# The time that a run may take beyond its own to be interrupted and taken down.
SETTLE_SECONDS = 1.0


class RerunFailed(Exception):  # noqa: N818 - told in a warning
    """Trials cannot be run; the text says why."""


def isolated_request(
    template: TrialRequest,
    workspaces: WorkspaceFactory,
    *,
    node: Any | None = None,
    limits: Limits | None = None,
    cleanup_if_runner_dies: tuple[str, ...] = (),
) -> TrialRequest:
    """Return a copy of ``template`` without listeners, with its own name, sandbox and workspace.

    ``node`` and ``limits`` replace those of the template. The keeper removes the paths in
    ``cleanup_if_runner_dies`` if this process is killed. Raises RerunFailed.
    """
    run_id = keeper_process.new_run_id()
    run_limits = limits or template.limits
    try:
        workspace = workspaces.make(run_id, Path(keeper_process.runtime_directory(run_id)))
    except OSError as error:
        raise RerunFailed(f"the folder cannot be restored to its earlier state: {error}") from error
    plan = replace(
        build_plan(run_limits, template.machine, run_id, template.plan.isolation),
        mounts=workspace.mounts,
        user_namespace=workspace.user_namespace,
        directories=(str(workspace.directory),),
        cleanup_if_runner_dies=cleanup_if_runner_dies,
    )
    return replace(
        template,
        run_id=run_id,
        node=copy.deepcopy(template.node if node is None else node),
        cwd=workspace.cwd,
        limits=run_limits,
        plan=plan,
        sink=lambda _event: None,
        started=time.monotonic(),
        hasty=True,
    )


class RerunOptions(Struct, frozen=True, kw_only=True):
    """The settings of one rerun. ``limits`` apply to the run, ``cell_limits`` to each cell.

    ``time_budget`` is the most seconds that the run may take; at ``deadline`` it is given up as
    slow.
    """

    limits: Limits
    cell_limits: Callable[[Any], Limits]
    # The seconds that the run may take, and the time after which it is given up as slow.
    time_budget: float = float("inf")
    deadline: float = float("inf")
    sink: EventSink = lambda _event: None


class RerunResult(Struct, frozen=True, kw_only=True):
    """The result of one rerun.

    ``request`` has the limits that were asked for, not the shorter timeout of the budget. ``cut``
    is true if the run exceeded its time budget, and ``slow`` if it exceeded its deadline.
    ``seconds`` is wall time including the start of the kernel.
    """

    # The request with the limits as the user knows them.
    request: TrialRequest
    result: TrialResult
    # Wall time, including the start of the kernel.
    seconds: float
    # The run exceeded its time budget.
    cut: bool = False
    # The run exceeded its deadline.
    slow: bool = False


class Rerunner:
    """Runs one notebook repeatedly, each time in a cold kernel and without a cache."""

    def __init__(self, template: TrialRequest, workspaces: WorkspaceFactory) -> None:
        self.template, self.workspaces = template, workspaces

    async def run(self, options: RerunOptions) -> RerunResult:
        """Run the notebook once. Raises RerunFailed if it cannot be run at all."""
        start_time = time.monotonic()
        # If this process is killed, only the keeper can still remove our copy of the folder.
        request = isolated_request(
            self.template,
            self.workspaces,
            limits=options.limits,
            cleanup_if_runner_dies=(str(self.workspaces.snapshot.scratch),),
        )
        request = replace(request, cell_limits=options.cell_limits, sink=options.sink)
        # The smallest of the three bounds tells afterwards why the run was ended.
        bounds = (
            options.limits.timeout or float("inf"),
            options.deadline,
            max(SETTLE_SECONDS, options.time_budget - SETTLE_SECONDS),
        )
        timeout = min(bounds)
        timed = replace(
            request,
            limits=replace(request.limits, timeout=timeout if timeout < float("inf") else None),
        )
        # The request keeps the user's limits; only the copy has the bound.
        result = await run_trial(timed)
        if isinstance(result.ending, Cancelled) and not request.cancellation.signals:
            raise RerunFailed("a run was cancelled without a signal")
        ours = (
            isinstance(result.ending, TimedOut)
            and result.ending.whole_notebook
            and timeout < bounds[0]
        )
        return RerunResult(
            request=request,
            result=result,
            seconds=min(time.monotonic() - start_time, options.time_budget),
            cut=ours and timeout == bounds[2],
            slow=ours and timeout != bounds[2],
        )


def why_not_run(result: TrialResult) -> str | None:
    """Return the reason if safe-exec itself made a trial fail, else ``None``."""
    if not failures.is_ours(result.ending):
        return None
    message = (
        result.ending.message
        if isinstance(result.ending, InternalError)
        else getattr(result.ending, "reason", None)
    )
    return str(message or result.ending)


def peak_of(name: LimitName, result: TrialResult) -> float | None:
    """Return the highest use of a limited resource in a trial; ``None`` if it is not measured."""
    records = result.metrics.records.values()
    match name:
        case LimitName.MEMORY:
            return result.evidence.memory_peak
        case LimitName.CPU_TIME:
            return result.evidence.cpu_seconds
        case LimitName.PROCESSES:
            return result.evidence.processes_peak
        case LimitName.CELL_TIMEOUT:
            return max(
                (record.seconds for record in records if record.seconds is not None), default=None
            )
        case LimitName.TIMEOUT:
            # The limit is checked while cells run: what comes after the last of them does not
            # count.
            ends = (
                r.started + r.seconds
                for r in records
                if r.started is not None and r.seconds is not None
            )
            return max(ends, default=None)
    return None
