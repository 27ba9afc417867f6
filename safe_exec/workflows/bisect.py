"""The search as part of a run: keep the folder as it was, decide whether to search, search, and hand over the reproduction.

May import culprit, conclude and what is below. The pure search and its oracle know nothing of profiles, verdict files or commands.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from msgspec.structs import replace

from safe_exec.files import OutputDirectory
from safe_exec.model.verdict import Cause, Verdict
from safe_exec.notebook import notebook
from safe_exec.sandbox.keeper_process import Nursery
from safe_exec.workflows.prepare import Bisect, PreparedJob

if TYPE_CHECKING:
    from safe_exec.experiments.culprits.finder import InvestigationResult
    from safe_exec.experiments.workspace import Snapshot
    from safe_exec.trial.request import TrialRequest, TrialResult

LEAST_BUDGET = 60.0
BUDGET_RUNS = 3.0
"""What a search may cost by itself: a minute, or so many times the first run."""
MOST_HOSTS = 3


class FolderSnapshot:
    """Keeps what a search needs of the folder before the first run: begun while the kernel starts, done before the first cell runs.

    A context manager: what was kept is gone at its end, unless a search may go on from it.
    """

    def __init__(self, prepared: PreparedJob, *, of: str | None = None) -> None:
        """``of`` is the run whose copy is to be used again, where it is still there."""
        self.prepared = prepared
        self.run_id = of or prepared.run_id
        self.snapshot: Snapshot | None = None
        self.trouble = ""
        self.keep = False
        self._scratch: Path | None = None
        self._task: asyncio.Task[None] | None = None
        self._place: OutputDirectory | None = None
        if prepared.job.bisect is not Bisect.NEVER:
            with contextlib.suppress(OSError):  # said when there is something to write
                self._place = OutputDirectory(prepared.paths.repro, prepared.job.tree)
            self._claim()

    def _claim(self) -> None:
        from safe_exec.experiments.trial_cache import cache_root, claim_folder

        try:
            self._scratch = claim_folder(cache_root(), self.run_id)
        except OSError as error:
            self.trouble = str(error)

    @property
    def directories(self) -> tuple[str, ...]:
        """What is to be removed should we be killed during the first run."""
        return () if self._scratch is None else (str(self._scratch),)

    def begin(self) -> None:
        """Start, on a thread of its own."""
        if self._scratch is not None:
            self._task = asyncio.create_task(asyncio.to_thread(self._take, self._scratch))

    def _take(self, scratch: Path) -> None:
        from safe_exec.experiments.workspace import reopen, take

        try:
            self.snapshot = reopen(self.prepared.paths.cwd, scratch) or take(
                self.prepared.paths.cwd,
                scratch,
                ours=_documents_of(self.prepared),
                repository=repository_of(self.prepared),
            )
        except OSError as error:  # no room, say: the run goes on without
            self.trouble = str(error)

    def write_reproduction(self, data: bytes) -> Path:
        """Write it into the folder that was there before anything ran; where it is by now. Raises OSError."""
        place = self._place or OutputDirectory(self.prepared.paths.repro, self.prepared.job.tree)
        place.write(data)
        return place.path

    async def done(self) -> None:
        """Wait until the folder is kept."""
        if self._task is not None:
            await self._task

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._place is not None:
            self._place.close()
        if self._scratch is not None and not self.keep:
            from safe_exec.experiments.trial_cache import release_folder

            release_folder(self._scratch)


async def search_after(
    prepared: PreparedJob,
    verdict: Verdict,
    request: TrialRequest,
    folder: FolderSnapshot,
    write: Callable[[Verdict], Verdict],
) -> Verdict:
    """Search after a first run, if that is what one does after such a run; the verdict with what came of it."""
    reason = _why_not(prepared, verdict, request, folder)
    if reason is not None:
        folder.keep = bool(reason) and folder.snapshot is not None
        return (
            _with_warning(verdict, f"no search for the culprits: {reason}") if reason else verdict
        )
    write(verdict)
    return await search(prepared, verdict, request, folder)


def _why_not(
    prepared: PreparedJob, verdict: Verdict, request: TrialRequest, folder: FolderSnapshot
) -> str | None:
    from safe_exec.experiments.culprits.failure import why_not_searched
    from safe_exec.experiments.culprits.reproduction import is_reproduction

    always = prepared.job.bisect is Bisect.ALWAYS
    reason = why_not_searched(verdict, always=always)
    if reason is not None or request.cancellation.signals:
        return reason or ""
    if is_reproduction(prepared.node) and not always:
        return ""
    hosts = verdict.remote_hosts
    if hosts and not always:
        host_names = ", ".join(hosts[:MOST_HOSTS]) + (
            " and others" if len(hosts) > MOST_HOSTS else ""
        )
        return f"the notebook talked to {host_names}, and a search runs its cells again; `safe-exec bisect` does it all the same"
    return (
        None
        if folder.snapshot is not None
        else f"the folder could not be kept as it was: {folder.trouble or 'it was not begun'}"
    )


async def search(
    prepared: PreparedJob, verdict: Verdict, request: TrialRequest, folder: FolderSnapshot
) -> Verdict:
    """Search as in :func:`_search`; the folder is kept for ``bisect`` while a search is under way and after one that is not at its end."""
    if folder.snapshot is None:
        return _with_warning(
            verdict, f"no search for the culprits: the folder cannot be copied: {folder.trouble}"
        )
    folder.keep = True
    verdict = await _search(prepared, verdict, request, folder, folder.snapshot)
    folder.keep = verdict.culprits is not None and not verdict.culprits.minimal
    return verdict


async def _search(
    prepared: PreparedJob,
    verdict: Verdict,
    request: TrialRequest,
    folder: FolderSnapshot,
    snapshot: Snapshot,
) -> Verdict:
    """Search, and write the reproduction; the verdict with the culprits, or with a warning that says why there are none."""
    from safe_exec.experiments.culprits.finder import FirstRun, Investigation
    from safe_exec.experiments.culprits.oracle import Oracle
    from safe_exec.experiments.rerun import RerunFailed
    from safe_exec.experiments.trial_cache import TrialCache, cache_root, tidy
    from safe_exec.experiments.workspace import WorkspaceUnavailable, workspace_factory

    with contextlib.suppress(OSError):
        tidy(cache_root())
    try:
        workspaces = workspace_factory(
            snapshot, ours=_documents_of(prepared), insist=prepared.job.bisect is Bisect.ALWAYS
        )
        oracle = Oracle(_subject(prepared, verdict, request), workspaces, TrialCache(cache_root()))
        problem = FirstRun(
            verdict=verdict,
            node=notebook.strip_annotations(prepared.notebook.node),
            budget=budget_of(prepared.job.bisect_budget, verdict),
            sink=request.sink,
            started=prepared.started,
        )
        with Nursery():
            try:
                outcome = await Investigation(problem, oracle).run()
            finally:
                await oracle.close()
    except (WorkspaceUnavailable, RerunFailed, OSError) as trouble:
        return _with_warning(verdict, f"no search for the culprits: {trouble}")
    return _with_culprits(folder, verdict, outcome)


def repository_of(prepared: PreparedJob) -> Path | None:
    """The root of the repository that the notebook may write to behind its walls."""
    from safe_exec.sandbox.enclosure import written_repository

    limits = prepared.limits
    return written_repository(
        limits.isolation, prepared.paths.cwd, has_disk_limit=limits.values.disk is not None
    )


def _documents_of(prepared: PreparedJob) -> frozenset[Path]:
    """The documents of a run."""
    from safe_exec.experiments.trial_cache import cache_root

    documents = [path.resolve() for path in (*prepared.paths.documents, *prepared.job.own_paths)]
    with contextlib.suppress(OSError):  # no cache, nothing of it in the folder
        documents.append(cache_root())
    return frozenset(documents)


def budget_of(requested_seconds: float | None, verdict: Verdict) -> float:
    """The seconds that a search may take."""
    return (
        requested_seconds
        if requested_seconds is not None
        else max(LEAST_BUDGET, BUDGET_RUNS * (verdict.usage.wall_seconds or 0.0))
    )


def _subject(prepared: PreparedJob, verdict: Verdict, request: TrialRequest) -> Any:
    from safe_exec.experiments.culprits.failure import Failure
    from safe_exec.experiments.culprits.oracle import Subject

    assert verdict.cause is not None and verdict.crash_cell is not None
    return Subject(
        node=notebook.strip_annotations(prepared.notebook.node),
        request=request,
        failure=Failure.of(verdict.cause, verdict.crash_cell.index),
        seconds={
            record.index: record.seconds for record in verdict.cells if record.seconds is not None
        },
        environment={
            "kernel": verdict.notebook.kernel,
            "python": verdict.environment.python,
            "packages": verdict.environment.packages,
            "platform": verdict.environment.platform,
        },
        cause_of=lambda result, trial_request: cause_of_trial(result, trial_request, verdict),
    )


def cause_of_trial(result: TrialResult, request: TrialRequest, verdict: Verdict) -> Cause | None:
    """The cause of a trial's ending, by the same rules as the run's."""
    from safe_exec.diagnosis.verdict import cause_of

    return cause_of(result, request.limits, request.plan, verdict.notebook.language)


def _with_culprits(
    folder: FolderSnapshot, verdict: Verdict, outcome: InvestigationResult
) -> Verdict:
    """The verdict with the culprits; the reproduction is written."""
    verdict = replace(
        verdict, culprits=outcome.culprits, warnings=(*verdict.warnings, *outcome.warnings)
    )
    if outcome.reproduction is None:
        return verdict
    try:
        written = folder.write_reproduction(notebook.dumps(outcome.reproduction))
    except OSError as error:
        return _with_warning(verdict, f"the reproduction could not be written: {error}")
    return replace(verdict, culprits=replace(outcome.culprits, repro_notebook=str(written)))


def _with_warning(verdict: Verdict, warning: str) -> Verdict:
    return replace(verdict, warnings=(*verdict.warnings, warning))
