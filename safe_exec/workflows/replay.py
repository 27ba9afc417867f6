"""Run the notebook of a verdict again, and compare the outcomes."""

from __future__ import annotations

from pathlib import Path

from msgspec import Struct

from safe_exec.diagnosis.verdict import build_verdict
from safe_exec.errors import SandboxError, UsageError
from safe_exec.experiments.compare import Agreement, compare
from safe_exec.experiments.culprits.reproduction import is_reproduction
from safe_exec.model.events import EventSink
from safe_exec.model.verdict import Culprit, Verdict
from safe_exec.workflows.job import Bisect, Job, PreparedJob
from safe_exec.workflows.prepare import inputs_of_run, prepare
from safe_exec.workflows.run import run_info
from safe_exec.workflows.run_events import run_started
from safe_exec.workflows.scratch import open_scratch


class Replay(Struct, frozen=True, kw_only=True):
    """A verdict and the job that replays it; ``cells`` are those of a reproduction."""

    original: Verdict
    prepared: PreparedJob
    cells: tuple[Culprit, ...] | None


class ReplayResult(Struct, frozen=True, kw_only=True):
    """The original and the new outcome, and their comparison."""

    replay: Replay
    rerun: Verdict
    agreement: Agreement
    warnings: tuple[str, ...]


def prepare_replay(
    verdict: Verdict, source: Path, *, reproduction: bool, command: tuple[str, ...]
) -> Replay:
    """Prepare to replay a verdict, with the limits of its run.

    Raises UsageError if the notebook has changed since.
    """
    cwd = Path(verdict.cwd)
    prepared = prepare(
        Job(
            path=source,
            limits=verdict.limits,
            isolation=verdict.isolation,
            inputs=inputs_of_run(verdict),
            kernel=verdict.notebook.kernel,
            # The verdict may come from another machine, where the folder had another path.
            cwd=cwd if cwd.is_dir() else None,
            allow_errors=verdict.allow_errors,
            # One comparison is wanted, not an explanation of the failure.
            bisect=Bisect.NEVER,
            command=command,
            writes=False,
        )
    )
    # A reproduction is a notebook of its own: its hash says nothing about the original.
    cells = verdict.culprits.cells if reproduction and verdict.culprits is not None else None
    if cells is None and prepared.notebook.sha256 != verdict.notebook.sha256:
        raise UsageError(
            f"{source}: changed since the verdict was written; run `safe-exec run` again"
        )
    if cells is not None and not (
        is_reproduction(prepared.node) and len(prepared.node.cells) == len(cells)
    ):
        raise UsageError(
            f"{source}: not the reproduction that belongs to the verdict; "
            "run `safe-exec bisect` again"
        )
    return Replay(original=verdict, prepared=prepared, cells=cells)


async def replay(request: Replay, sink: EventSink) -> ReplayResult:
    """Run once, in a copy of the folder, and compare. Raises SandboxError if it cannot run."""
    from safe_exec.experiments.rerun import RerunFailed, RerunOptions, why_not_run
    from safe_exec.model.ending import InternalError

    prepared = request.prepared
    # The progress display needs the number of cells before the first of them starts.
    sink(run_started(prepared))
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
