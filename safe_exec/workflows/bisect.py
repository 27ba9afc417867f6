"""Search for the culprits as part of a run.

Before the run the notebook's folder is copied; afterwards this module decides whether to search,
searches, and writes the reproduction. The search itself and its oracle know nothing of profiles,
verdict files or commands.
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
from safe_exec.sandbox.keeper_process import ForkServer
from safe_exec.workflows.job import Bisect, PreparedJob

if TYPE_CHECKING:
    from safe_exec.experiments.culprits.finder import InvestigationResult
    from safe_exec.experiments.workspace import Snapshot
    from safe_exec.model.memory import MemoryUse
    from safe_exec.trial.request import TrialRequest, TrialResult

LEAST_BUDGET = 60.0
BUDGET_RUNS = 3.0
"""The default budget of a search: a minute, or three times the duration of the first run."""
MOST_HOSTS = 3
REPRO_ENDING = ".repro.ipynb"


class FolderSnapshot:
    """A copy of the notebook's folder, made before the first run; a context manager.

    The copy starts while the kernel starts and ends before the first cell runs. It is deleted on
    exit, unless ``keep`` is set because a later search may continue from it.
    """

    def __init__(self, prepared: PreparedJob, *, of: str | None = None) -> None:
        """Prepare the copy; ``of`` names an earlier run whose copy is reused if it still exists."""
        self.prepared = prepared
        self.run_id = of or prepared.run_id
        self.snapshot: Snapshot | None = None
        self.trouble = ""
        self.keep = False
        self._scratch: Path | None = None
        self._task: asyncio.Task[None] | None = None
        self._place: OutputDirectory | None = None
        if prepared.job.bisect is not Bisect.NEVER or prepared.job.keep_going:
            # The reproduction reports its own error when it is written.
            with contextlib.suppress(OSError):
                self._place = OutputDirectory(prepared.paths.repro, prepared.job.tree)
            self._claim()

    def _claim(self) -> None:
        from safe_exec.cache import cache_root
        from safe_exec.experiments.trial_cache import claim_folder

        try:
            self._scratch = claim_folder(cache_root(), self.run_id)
        except OSError as error:
            self.trouble = str(error)

    @property
    def directories(self) -> tuple[str, ...]:
        """Directories to delete if the runner is killed during the first run."""
        return () if self._scratch is None else (str(self._scratch),)

    def begin(self) -> None:
        """Start copying, on another thread."""
        if self._scratch is not None:
            # A thread: copying a large folder would delay the events of the starting kernel.
            self._task = asyncio.create_task(asyncio.to_thread(self._take_snapshot, self._scratch))

    def _take_snapshot(self, scratch: Path) -> None:
        from safe_exec.experiments.workspace import reopen, take

        try:
            # An earlier search may have left a copy of the folder as it was before the first run.
            self.snapshot = reopen(self.prepared.paths.cwd, scratch) or take(
                self.prepared.paths.cwd,
                scratch,
                ours=documents_of(self.prepared),
                repository=repository_of(self.prepared),
            )
        # Usually a full disk. The run goes on without a copy, and so without a search.
        except OSError as error:
            self.trouble = str(error)

    def write_reproduction(self, data: bytes) -> Path:
        """Write the reproduction and return its current path. Raises OSError."""
        # The folder was opened before the run: the notebook may have moved it meanwhile.
        place = self._place or OutputDirectory(self.prepared.paths.repro, self.prepared.job.tree)
        place.write(data)
        return place.path

    def write_numbered_reproduction(self, number: int, data: bytes) -> Path:
        """Write the reproduction of a further failure beside that of the first. Raises OSError."""
        path = numbered_path(self.prepared.paths.repro, number)
        with contextlib.closing(OutputDirectory(path, self.prepared.job.tree)) as place:
            place.write(data)
            return place.path

    async def done(self) -> None:
        """Wait until the copy is complete."""
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


def numbered_path(path: Path, number: int) -> Path:
    """Return ``a.2.repro.ipynb`` for ``a.repro.ipynb``, and ``a.2.ipynb`` for any other name."""
    ending = REPRO_ENDING if path.name.endswith(REPRO_ENDING) else path.suffix
    return path.with_name(f"{path.name.removesuffix(ending)}.{number}{ending}")


async def search_after(
    prepared: PreparedJob,
    verdict: Verdict,
    request: TrialRequest,
    folder: FolderSnapshot,
    write: Callable[[Verdict], object],
    *,
    number: int = 1,
) -> Verdict:
    """Search after a first run, if the outcome of the run calls for it.

    Returns the verdict with the culprits, or with a warning that says why there was no search.
    ``number`` counts the failures of a run from 1.
    """
    # An empty reason means that nobody expects a search after such a run: no warning then.
    reason = _why_not(prepared, verdict, request, folder)
    if reason is not None:
        folder.keep = folder.keep or (bool(reason) and folder.snapshot is not None)
        return (
            _with_warning(verdict, f"no search for the culprits: {reason}") if reason else verdict
        )
    write(verdict)
    return await search(prepared, verdict, request, folder, number=number)


def _why_not(
    prepared: PreparedJob, verdict: Verdict, request: TrialRequest, folder: FolderSnapshot
) -> str | None:
    from safe_exec.experiments.culprits.failure import why_not_searched
    from safe_exec.experiments.culprits.reproduction import is_reproduction

    always = prepared.job.bisect is Bisect.ALWAYS
    reason = why_not_searched(verdict, always=always)
    if reason is not None or request.cancellation.signals:
        return reason or ""
    # A reproduction is the result of a search: searching it again would find the same cells.
    if is_reproduction(prepared.node) and not always:
        return ""
    # Running cells again could send an e-mail twice or order a second time.
    hosts = verdict.remote_hosts
    if hosts and not always:
        host_names = ", ".join(hosts[:MOST_HOSTS]) + (
            " and others" if len(hosts) > MOST_HOSTS else ""
        )
        return (
            f"the notebook talked to {host_names}, and a search runs its cells again; "
            "start it with `safe-exec bisect`"
        )
    return (
        None
        if folder.snapshot is not None
        else f"the folder could not be copied: {folder.trouble or 'the copy was not started'}"
    )


async def search(
    prepared: PreparedJob,
    verdict: Verdict,
    request: TrialRequest,
    folder: FolderSnapshot,
    *,
    number: int = 1,
) -> Verdict:
    """Search, and decide whether ``safe-exec bisect`` may continue from the copy of the folder."""
    if folder.snapshot is None:
        return _with_warning(
            verdict, f"no search for the culprits: the folder cannot be copied: {folder.trouble}"
        )
    kept_before, folder.keep = folder.keep and number > 1, True
    # Kept during the search in case it is killed, and afterwards if it is not complete.
    verdict = await _search(prepared, verdict, request, folder, folder.snapshot, number=number)
    complete = verdict.culprits is None or verdict.culprits.minimal
    folder.keep = kept_before or not complete
    return verdict


async def _search(
    prepared: PreparedJob,
    verdict: Verdict,
    request: TrialRequest,
    folder: FolderSnapshot,
    snapshot: Snapshot,
    *,
    number: int,
) -> Verdict:
    """Search, and write the reproduction.

    Returns the verdict with the culprits, or with a warning that says why there are none.
    """
    from safe_exec.cache import cache_root
    from safe_exec.experiments.culprits.finder import FirstRun, Investigation
    from safe_exec.experiments.culprits.oracle.oracle import Oracle
    from safe_exec.experiments.rerun import RerunFailed
    from safe_exec.experiments.trial_cache import TrialCache, tidy
    from safe_exec.experiments.workspace import WorkspaceUnavailable, workspace_factory

    with contextlib.suppress(OSError):
        tidy(cache_root())
    try:
        workspaces = workspace_factory(
            snapshot, ours=documents_of(prepared), insist=prepared.job.bisect is Bisect.ALWAYS
        )
        oracle = Oracle(_subject(prepared, verdict, request), workspaces, TrialCache(cache_root()))
        problem = FirstRun(
            verdict=verdict,
            node=prepared.fresh_node(),
            budget=budget_of(prepared.job.bisect_budget, verdict),
            sink=request.sink,
            started=prepared.started,
        )
        # Trials start keepers in quick succession; forking them saves an interpreter start each.
        with ForkServer():
            try:
                outcome = await Investigation(problem, oracle).run()
            finally:
                await oracle.close()
    except (WorkspaceUnavailable, RerunFailed, OSError) as trouble:
        return _with_warning(verdict, f"no search for the culprits: {trouble}")
    return _with_culprits(folder, verdict, outcome, number)


def repository_of(prepared: PreparedJob) -> Path | None:
    """Return the repository that the notebook may write to despite its isolation."""
    from safe_exec.sandbox.enclosure import written_repository

    limits = prepared.limits
    return written_repository(
        limits.isolation, prepared.paths.cwd, has_disk_limit=limits.values.disk is not None
    )


def documents_of(prepared: PreparedJob) -> frozenset[Path]:
    """Return the paths of safe-exec's own files, which copies of the folder leave out."""
    from safe_exec.cache import cache_root

    documents = [path.resolve() for path in (*prepared.paths.documents, *prepared.job.own_paths)]
    # Without a cache there is nothing of it in the folder.
    with contextlib.suppress(OSError):
        documents.append(cache_root())
    return frozenset(documents)


def budget_of(requested_seconds: float | None, verdict: Verdict) -> float:
    """Return the seconds that a search may take."""
    return (
        requested_seconds
        if requested_seconds is not None
        else max(LEAST_BUDGET, BUDGET_RUNS * (verdict.usage.wall_seconds or 0.0))
    )


def _subject(prepared: PreparedJob, verdict: Verdict, request: TrialRequest) -> Any:
    from safe_exec.experiments.culprits.failure import Failure
    from safe_exec.experiments.culprits.oracle.hang import HangPicture
    from safe_exec.experiments.culprits.oracle.subject import Subject

    assert verdict.cause is not None and verdict.crash_cell is not None
    return Subject(
        node=prepared.fresh_node(),
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
        hang=HangPicture.of_verdict(verdict, prepared.fresh_node()),
    )


def cause_of_trial(result: TrialResult, request: TrialRequest, verdict: Verdict) -> Cause | None:
    """Return the cause of a trial's ending, by the rules that the run uses."""
    from safe_exec.diagnosis.verdict import cause_of

    return cause_of(result, request.limits, request.plan, verdict.notebook.language)


def _with_culprits(
    folder: FolderSnapshot, verdict: Verdict, outcome: InvestigationResult, number: int
) -> Verdict:
    """Add the culprits to the verdict, and write the reproduction."""
    verdict = replace(
        verdict,
        culprits=outcome.culprits,
        memory=_memory_use(verdict, outcome),
        warnings=(*verdict.warnings, *outcome.warnings),
    )
    if outcome.reproduction is None:
        return verdict
    try:
        data = notebook.dumps(outcome.reproduction)
        written = (
            folder.write_reproduction(data)
            if number == 1
            else folder.write_numbered_reproduction(number, data)
        )
    except OSError as error:
        return _with_warning(verdict, f"the reproduction could not be written: {error}")
    return replace(verdict, culprits=replace(outcome.culprits, repro_notebook=str(written)))


def _memory_use(verdict: Verdict, outcome: InvestigationResult) -> MemoryUse | None:
    """Return the holders of memory, from the trial that observed them or from the first run.

    ``better_use`` chooses between the two if they have the same kind of cause.
    """
    from safe_exec.diagnosis.memory_use import better_use, in_notebook, memory_use
    from safe_exec.diagnosis.verdict import context_of

    if outcome.observed is None:
        return verdict.memory
    result, request = outcome.observed.result, outcome.observed.request
    cause = cause_of_trial(result, request, verdict)
    if verdict.cause is None or cause is None or cause.kind is not verdict.cause.kind:
        return verdict.memory
    context = context_of(result, request.limits, request.plan, verdict.notebook.language)
    use = memory_use(context, cause)
    code_indexes = [culprit.code_index for culprit in outcome.culprits.cells]
    return better_use(verdict.memory, None if use is None else in_notebook(use, code_indexes))


def _with_warning(verdict: Verdict, warning: str) -> Verdict:
    return replace(verdict, warnings=(*verdict.warnings, warning))
