"""The failure of a verdict, run again here. May import aside, conclude, culprit and what is below."""

from __future__ import annotations

import time
from pathlib import Path

from msgspec import Struct

from safe_exec.diagnosis.verdict import build_verdict
from safe_exec.errors import SandboxError, UsageError
from safe_exec.experiments.compare import Agreement, compare
from safe_exec.experiments.culprits.reproduction import is_reproduction
from safe_exec.model import events
from safe_exec.model.events import EventSink
from safe_exec.model.verdict import Culprit, Verdict
from safe_exec.workflows.prepare import Bisect, Job, PreparedJob, prepare
from safe_exec.workflows.run import run_info
from safe_exec.workflows.scratch import open_scratch


class Replay(Struct, frozen=True, kw_only=True):
    """What is to be run again: the job, and the cells it holds where it is a reproduction."""

    original: Verdict
    prepared: PreparedJob
    cells: tuple[Culprit, ...] | None


class ReplayResult(Struct, frozen=True, kw_only=True):
    """What came of it."""

    replay: Replay
    rerun: Verdict
    agreement: Agreement
    warnings: tuple[str, ...]


def prepare_replay(
    verdict: Verdict, source: Path, *, reproduction: bool, command: tuple[str, ...]
) -> Replay:
    """The job of a verdict, under the limits of then. Raises UsageError where the notebook is not the one of then."""
    cwd = Path(verdict.cwd)
    prepared = prepare(
        Job(
            path=source,
            limits=verdict.limits,
            isolation=verdict.isolation,
            kernel=verdict.notebook.kernel,
            cwd=cwd if cwd.is_dir() else None,
            allow_errors=verdict.allow_errors,
            bisect=Bisect.NEVER,
            command=command,
            writes=False,
        )
    )
    cells = verdict.culprits.cells if reproduction and verdict.culprits is not None else None
    if cells is None and prepared.notebook.sha256 != verdict.notebook.sha256:
        raise UsageError(
            f"{source}: changed since the verdict was written; run `safe-exec run` again"
        )
    if cells is not None and not (
        is_reproduction(prepared.node) and len(prepared.node.cells) == len(cells)
    ):
        raise UsageError(
            f"{source}: not the reproduction that the verdict was written with; run `safe-exec bisect` again"
        )
    return Replay(original=verdict, prepared=prepared, cells=cells)


async def replay(request: Replay, sink: EventSink) -> ReplayResult:
    """Run it once, in a copy of the folder, and compare. Raises SandboxError where it cannot be run."""
    from safe_exec.experiments.rerun import RerunFailed, RerunOptions, why_not_run
    from safe_exec.model.ending import InternalError

    prepared = request.prepared
    sink(_started(prepared))
    async with open_scratch(prepared) as scratch:
        try:
            rerun_result = await scratch.rerunner.run(
                RerunOptions(
                    limits=prepared.limits.values, cell_limits=scratch.cell_limits, sink=sink
                )
            )
        except RerunFailed as trouble:
            raise SandboxError(str(trouble)) from trouble
        gaps = scratch.gaps
    if isinstance(rerun_result.result.ending, InternalError):
        raise SandboxError(f"it could not be run here: {why_not_run(rerun_result.result)}")
    rerun = build_verdict(
        run_info(prepared, rerun_result.request), rerun_result.result, rerun_result.request.plan
    )
    return ReplayResult(
        replay=request,
        rerun=rerun,
        agreement=compare(request.original, rerun, request.cells),
        warnings=(*rerun.warnings, *(f"the run may have seen {gap}" for gap in gaps)),
    )


def _started(prepared: PreparedJob) -> events.RunStarted:
    return events.RunStarted(
        time=time.monotonic() - prepared.started,
        run_id=prepared.run_id,
        notebook=str(prepared.job.path),
        kernel=prepared.kernel_name,
        code_cells=sum(cell.cell_type == "code" for cell in prepared.node.cells),
        limits=prepared.limits.values.as_dict(),
    )
