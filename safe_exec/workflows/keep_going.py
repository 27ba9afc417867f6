"""Continue after a failure, to find all failures of a notebook in one run (``--keep-going``).

The kernel leaves a sleeping copy of itself before each cell (``kernel/snapshots.py``). After a
failure the copy from before the failed cell becomes the kernel and runs the cells below it, without
those that need names of the failed one. The keeper reads its wait status, and it has a session of
its own like any kernel, so a failure has the same evidence.

If there is no copy, or the failed cell has changed files, the cells run again in a fresh kernel and
a fresh sandbox, with the folder as it was before the first run, but without the failed cells. That
is a trial like those of the culprit search. Either way the search confirms each failure from
scratch, and the first failure stays the result of the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from msgspec import Struct
from msgspec.structs import replace

from safe_exec.model import events
from safe_exec.model.ending import StartFailed
from safe_exec.model.verdict import (
    CauseKind,
    CellRecord,
    CellStatus,
    FailureRecord,
    Status,
    Usage,
    Verdict,
)
from safe_exec.workflows.job import Bisect, PreparedJob
from safe_exec.workflows.snapshots import leaves_snapshots, snapshots_of

if TYPE_CHECKING:
    from safe_exec.experiments.workspace import WorkspaceFactory
    from safe_exec.trial.request import TrialRequest, TrialResult
    from safe_exec.workflows.bisect import FolderSnapshot

# Failures of the notebook itself, after which its other cells are worth a run.
CONTINUED = frozenset(
    {Status.CELL_ERROR, Status.KERNEL_DIED, Status.TIMEOUT, Status.LIMIT_EXCEEDED}
)
RAN = frozenset({CellStatus.PASSED, CellStatus.FAILED, CellStatus.KILLED})

VerdictOf = Callable[["TrialRequest", "TrialResult"], Verdict]


class Continuation(Struct, kw_only=True):
    """The run so far: the verdict of the last trial, and the results of all trials together.

    ``records`` are the cells' figures, each from the trial in which the cell ran first. ``verdicts``
    has one entry for each failure.
    """

    last: Verdict
    records: dict[int, CellRecord]
    verdicts: list[Verdict]
    usage: Usage
    reasons: dict[int, str]

    @classmethod
    def of_first_run(cls, verdict: Verdict) -> Continuation:
        """Begin with the verdict of the first run."""
        return cls(
            last=verdict,
            records={record.index: record for record in verdict.cells},
            verdicts=[verdict],
            usage=verdict.usage,
            reasons={},
        )

    def failed(self) -> frozenset[int]:
        """Return the indexes of the cells that failed."""
        return frozenset(v.crash_cell.index for v in self.verdicts if v.crash_cell is not None)

    def can_continue(self) -> bool:
        """Tell whether the last trial failed in a cell, and other cells can run without it."""
        verdict = self.last
        if verdict.status not in CONTINUED or verdict.crash_cell is None or verdict.cause is None:
            return False
        # The time of the whole notebook is used up; differing outputs leave no cell behind.
        return verdict.cause.kind not in (CauseKind.NOTEBOOK_TIMEOUT, CauseKind.OUTPUT_DIFFERS)

    def cells_left(self) -> frozenset[int]:
        """Return the cells that have not run yet and do not need names from failed cells."""
        return frozenset(
            index
            for index, record in self.records.items()
            if record.status is CellStatus.NOT_RUN and index not in self.reasons
        )

    def skip_dependents(self, node: Any, skipped: frozenset[int]) -> None:
        """Mark the cells that need names from failed cells."""
        from safe_exec.experiments.static_analysis.lost_names import cells_without_names

        sources = {
            index: str(node.cells[index].source) for index in self.records if index not in skipped
        }
        self.reasons = cells_without_names(
            sources, self.failed(), language=self.verdicts[0].notebook.language
        )
        for index, reason in self.reasons.items():
            if self.records[index].status is CellStatus.NOT_RUN:
                self.records[index] = replace(
                    self.records[index], status=CellStatus.SKIPPED, reason=reason
                )

    def add(self, verdict: Verdict, offset_seconds: float) -> frozenset[int]:
        """Add a trial that began after ``offset_seconds``; return the cells that it ran first."""
        added = set()
        for record in verdict.cells:
            if self.records[record.index].status is CellStatus.NOT_RUN and record.status in RAN:
                began = None if record.started is None else record.started + offset_seconds
                self.records[record.index] = replace(record, started=began)
                added.add(record.index)
        self.last = verdict
        self.usage = _sum(self.usage, verdict.usage)
        if verdict.status in CONTINUED and verdict.crash_cell is not None:
            self.verdicts.append(verdict)
        return frozenset(added)


def _sum(a: Usage, b: Usage) -> Usage:
    """Return the joint usage of two trials that ran one after the other."""

    def both(first: Any, second: Any, combine: Callable[[Any, Any], Any]) -> Any:
        # What one of the trials did not measure is unknown for both.
        return None if first is None or second is None else combine(first, second)

    def add(first: Any, second: Any) -> Any:
        return first + second

    return Usage(
        wall_seconds=both(a.wall_seconds, b.wall_seconds, add),
        cpu_seconds=both(a.cpu_seconds, b.cpu_seconds, add),
        memory_peak=both(a.memory_peak, b.memory_peak, max),
        memory_peak_raw=both(a.memory_peak_raw, b.memory_peak_raw, max),
        oom_kills=both(a.oom_kills, b.oom_kills, add),
        processes_peak=both(a.processes_peak, b.processes_peak, max),
        output_bytes=both(a.output_bytes, b.output_bytes, add),
        memory_upper_bound=a.memory_upper_bound or b.memory_upper_bound,
        memory_lower_bound=a.memory_lower_bound or b.memory_lower_bound,
    )


async def keep_going(
    prepared: PreparedJob,
    verdict: Verdict,
    trials: ContinuedTrials,
    verdict_of: VerdictOf,
) -> tuple[Verdict, list[Verdict]]:
    """Run the cells below each failure, until none is left that can run.

    Fills the outputs of these cells into the notebook of the run. Returns the verdict with all
    failures, and one verdict for each of them, for a search of its culprits.
    """
    from safe_exec.experiments.rerun import RerunFailed
    from safe_exec.experiments.workspace import WorkspaceUnavailable

    progress, warnings = Continuation.of_first_run(verdict), list[str]()
    try:
        if not progress.can_continue():
            return verdict, []
        await _continue(prepared, progress, trials, verdict_of)
        warnings += trials.warnings()
    except (WorkspaceUnavailable, RerunFailed, OSError) as trouble:
        warnings.append(f"the run did not continue after a failure: {trouble}")
    finally:
        trials.close()
    cells = tuple(progress.records[index] for index in sorted(progress.records))
    return (
        replace(
            verdict,
            cells=cells,
            usage=progress.usage,
            failures=tuple(FailureRecord.of(each) for each in progress.verdicts),
            warnings=(*verdict.warnings, *warnings),
        ),
        progress.verdicts,
    )


async def _continue(
    prepared: PreparedJob, progress: Continuation, trials: ContinuedTrials, verdict_of: VerdictOf
) -> None:
    """Run trials until no cell is left that can run."""
    request = trials.request
    while progress.can_continue() and not request.cancellation.signals:
        progress.skip_dependents(prepared.fresh_node(), prepared.skipped)
        cells_left = progress.cells_left()
        if not cells_left:
            break
        offset = progress.usage.wall_seconds or 0.0
        omitted = progress.failed() | progress.reasons.keys()
        trial, result = await trials.run(
            frozenset(progress.records) - omitted, _with_offset(request.sink, cells_left, offset)
        )
        for index in progress.add(verdict_of(trial, result), offset):
            request.node.cells[index] = result.node.cells[index]


class ContinuedTrials:
    """Runs the cells below each failure: in a copy of the kernel, or again from the start."""

    def __init__(
        self,
        prepared: PreparedJob,
        request: TrialRequest,
        folder: FolderSnapshot,
        first: TrialResult,
    ) -> None:
        self.request = request
        self._prepared, self._folder = prepared, folder
        self._workspaces: WorkspaceFactory | None = None
        # The trial that failed last, and its request.
        self._last, self._last_request = first, request
        self._troubles: dict[str, None] = {}

    async def run(
        self, cells: frozenset[int], sink: events.EventSink
    ) -> tuple[TrialRequest, TrialResult]:
        """Run these cells; return the trial's request and result.

        Raises WorkspaceUnavailable, RerunFailed and OSError.
        """
        from safe_exec.trial.run import run_trial

        trial = await self._continued(cells)
        if trial is not None:
            trial = replace(trial, sink=sink)
            self._last, self._last_request = await run_trial(trial), trial
            if not isinstance(self._last.ending, StartFailed):
                return trial, self._last
            self._troubles[self._last.ending.reason] = None
        trial = replace(self._restarted(cells), sink=sink)
        self._last, self._last_request = await run_trial(trial), trial
        return trial, self._last

    async def _continued(self, cells: frozenset[int]) -> TrialRequest | None:
        """Return the request for a copy of the kernel, ``None`` if there is none to wake."""
        sleeping = self._last.sleeping
        if sleeping is None:
            if self._last.no_copy:
                self._troubles[self._last.no_copy] = None
            return None
        if not await sleeping.wake():
            self._troubles[sleeping.trouble] = None
            sleeping.close()
            return None
        return replace(
            self._last_request,
            node=self._prepared.fresh_node(),
            cells=frozenset(index for index in cells if index >= sleeping.cell),
            continues=sleeping,
            early=None,
            before_cells=None,
            started=time.monotonic(),
            snapshots=snapshots_of(self._prepared, self._last_request.cwd),
        )

    def _restarted(self, cells: frozenset[int]) -> TrialRequest:
        """Return the request for a fresh kernel in a sandbox and a folder of its own."""
        from safe_exec.experiments.rerun import isolated_request
        from safe_exec.experiments.workspace import WorkspaceUnavailable, workspace_factory
        from safe_exec.workflows.bisect import documents_of

        if self._workspaces is None:
            if self._folder.snapshot is None:
                raise WorkspaceUnavailable(self._folder.trouble or "the folder was not copied")
            self._workspaces = workspace_factory(
                self._folder.snapshot, ours=documents_of(self._prepared), insist=True
            )
        trial = isolated_request(self.request, self._workspaces, node=self._prepared.fresh_node())
        if leaves_snapshots(
            self._prepared.job, trial.plan, trial.limits, self._prepared.kernel_name
        ):
            trial = replace(trial, snapshots=snapshots_of(self._prepared, trial.cwd))
        return replace(trial, cells=cells)

    def warnings(self) -> list[str]:
        """Return warnings about what a run from the start could see, and why there was one."""
        if self._workspaces is None:
            return []
        warnings = [
            f"the cells behind a failure could see {gap}, which a run from the start would not have"
            for gap in self._workspaces.gaps
        ]
        if self._troubles:
            reasons = "; ".join(self._troubles)
            warnings.append(
                "after a failure the cells before it ran again, and files that the cells behind it "
                f"wrote were discarded: {reasons}"
            )
        return warnings

    def close(self) -> None:
        """Remove the sandbox of the last trial, if a copy of its kernel is still there."""
        if self._last.sleeping is not None:
            self._last.sleeping.close()


def _with_offset(
    sink: events.EventSink, cells: frozenset[int], offset_seconds: float
) -> events.EventSink:
    """Pass on the events of cells that run for the first time, with times of the whole run."""

    def emit(event: events.Event) -> None:
        if isinstance(event, events.CellStarted | events.CellFinished) and event.index in cells:
            sink(replace(event, time=event.time + offset_seconds))

    return emit


async def search_each(
    prepared: PreparedJob,
    verdict: Verdict,
    failures: list[Verdict],
    search: Callable[[Verdict, int], Any],
) -> Verdict:
    """Search for the culprits of the failures after the first one; return the verdict with them.

    ``search`` takes a failure's verdict and its number, counted from 1.
    """
    if prepared.job.bisect is Bisect.NEVER:
        return verdict
    records = list(verdict.failures)
    warnings = list(verdict.warnings)
    for number, failure in enumerate(failures[1:], 2):
        outcome = await search(failure, number)
        records[number - 1] = FailureRecord.of(outcome)
        warnings += [
            f"failure {number}: {text}" for text in outcome.warnings if text not in failure.warnings
        ]
    return replace(verdict, failures=tuple(records), warnings=tuple(warnings))
