"""The failure of a verdict, run again here. May import aside, conclude, culprit and what is below."""

from __future__ import annotations

import time
from pathlib import Path

from msgspec import Struct

from safe_exec.diagnosis.verdict import conclude
from safe_exec.errors import SandboxError, UsageError
from safe_exec.experiments.compare import Agreement, compare
from safe_exec.experiments.culprits.reproduction import is_reproduction
from safe_exec.model import events
from safe_exec.model.events import EventSink
from safe_exec.model.verdict import Culprit, Verdict
from safe_exec.workflows.prepare import Bisect, Job, Prepared, prepare
from safe_exec.workflows.scratch import set_aside


class Replay(Struct, frozen=True, kw_only=True):
    """What is to be run again: the job, and the cells it holds where it is a reproduction."""

    then: Verdict
    prepared: Prepared
    cells: tuple[Culprit, ...] | None


class Replayed(Struct, frozen=True, kw_only=True):
    """What came of it."""

    replay: Replay
    here: Verdict
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
    return Replay(then=verdict, prepared=prepared, cells=cells)


async def replay(asked: Replay, sink: EventSink) -> Replayed:
    """Run it once, in a copy of the folder, and compare. Raises SandboxError where it cannot be run."""
    from safe_exec.experiments.rerun import Change, NoTrial, why_not_run
    from safe_exec.model.ending import InternalError

    prepared = asked.prepared
    sink(_started(prepared))
    async with set_aside(prepared) as aside:
        try:
            ran = await aside.runs.run(
                Change(limits=prepared.resolved.limits, cell_limits=aside.cell_limits, sink=sink)
            )
        except NoTrial as trouble:
            raise SandboxError(str(trouble)) from trouble
        gaps = aside.gaps
    if isinstance(ran.result.ending, InternalError):
        raise SandboxError(f"it could not be run here: {why_not_run(ran.result)}")
    here = conclude(prepared, ran.result, ran.request.plan, allow_errors=ran.request.allow_errors)
    return Replayed(
        replay=asked,
        here=here,
        agreement=compare(asked.then, here, asked.cells),
        warnings=(*here.warnings, *(f"the run may have seen {gap}" for gap in gaps)),
    )


def _started(prepared: Prepared) -> events.RunStarted:
    return events.RunStarted(
        time=time.monotonic() - prepared.started,
        run_id=prepared.run_id,
        notebook=str(prepared.job.path),
        kernel=prepared.kernel_name,
        code_cells=sum(cell.cell_type == "code" for cell in prepared.node.cells),
        limits=prepared.resolved.limits.as_dict(),
    )
