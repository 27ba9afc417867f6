"""Run a notebook: the first run, the search for culprits, the verdict, the documents."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import Struct
from msgspec.structs import replace

from safe_exec.errors import EnforcementError, SafeExecError
from safe_exec.files import ReservedSpace
from safe_exec.limits import profiles
from safe_exec.model.ending import InternalError, OutputsDiffer, Passed
from safe_exec.model.events import EventSink
from safe_exec.model.evidence import Evidence
from safe_exec.model.verdict import CellStatus, Verdict
from safe_exec.notebook import notebook
from safe_exec.notebook.inputs import ExitMeaning
from safe_exec.reports.masking import Mask
from safe_exec.sandbox.plan import SpawnPlan, require
from safe_exec.sandbox.stale_runs import sweep
from safe_exec.workflows.documents import Documents, mask_of, write
from safe_exec.workflows.job import Bisect, PreparedJob
from safe_exec.workflows.prepare import largest_output
from safe_exec.workflows.read_ahead import read_ahead, warm_up
from safe_exec.workflows.run_events import fan_out, run_finished, run_started
from safe_exec.workflows.signals import no_signal_handlers, signals

if TYPE_CHECKING:
    from safe_exec.diagnosis.verdict import RunInfo
    from safe_exec.keeper.protocol import KeptFile
    from safe_exec.trial.request import Cancellation, TrialRequest, TrialResult
    from safe_exec.workflows.bisect import FolderSnapshot


# Called with the index of a cell, the name of a stream, and a text.
OutputListener = Callable[[int, str, str], None]

HELD_BYTES = 1 << 20
SEARCH_WARNING = "no search for the culprits"


class FirstRun(Struct, frozen=True, kw_only=True):
    """The first run: its request, its plan and its result."""

    request: TrialRequest
    result: TrialResult
    plan: SpawnPlan


async def run_job(
    prepared: PreparedJob,
    sinks: tuple[EventSink, ...] = (),
    *,
    cancellation: Cancellation | None = None,
    on_output: OutputListener | None = None,
    worth_a_search: Callable[[Verdict], bool] = lambda _verdict: True,
) -> Verdict:
    """Run the notebook and write its documents; return the verdict.

    A signal ends the run, but everything is still written. A caller that runs several notebooks
    passes its own ``cancellation`` and handles signals itself. ``worth_a_search`` may decline the
    search for culprits, depending on the verdict. ``on_output`` gets each text that a cell writes:
    the cell's index, the stream, and the text with secrets masked.
    """
    from safe_exec.trial.request import Cancellation
    from safe_exec.workflows.bisect import FolderSnapshot

    # A batch handles signals once, for all its notebooks.
    handle_signals = signals if cancellation is None else no_signal_handlers
    cancellation = cancellation or Cancellation()
    emit = fan_out((*prepared.job.sinks, *sinks, read_ahead()), mask_of(prepared))
    with (
        handle_signals(cancellation.arrive),
        Documents(prepared) as documents,
        FolderSnapshot(prepared) as folder,
    ):
        # Earlier runs whose runner and keeper were both killed may have left cgroups behind.
        sweep()
        emit(run_started(prepared))
        # A notebook that fills its disk must not keep the verdict from being written.
        reserved = ReservedSpace(prepared.paths.notebook.absolute().parent, HELD_BYTES)
        try:
            first = await _first_run(
                prepared, emit, cancellation, folder, _texts(on_output, documents.mask)
            )
        finally:
            reserved.release()
        first = _compared(prepared, first)
        documents.write_coverage(prepared)
        verdict = _with_files(
            _verdict_of(prepared, first, documents.mask), prepared, first.result.kept_files
        )
        # The first verdict is on disk before the search starts, which may run long and may be
        # killed.
        write_partial = partial(write, prepared, node=first.result.node, documents=documents)
        if worth_a_search(verdict):
            verdict, failures = await _continue(prepared, first, verdict, folder, documents.mask)
            if failures:
                # Cells that ran below a failure may have written more.
                verdict = _with_files(verdict, prepared, first.result.kept_files)
            verdict = await _search(prepared, first, verdict, folder, write_partial)
            verdict = await _search_each(
                prepared,
                first,
                verdict,
                failures=failures,
                folder=folder,
                write_partial=write_partial,
            )
        elif first.result.sleeping is not None:
            first.result.sleeping.close()
        if prepared.job.repeat > 1:
            from safe_exec.workflows.repeat import FinishedRun, repeated

            finished_run = FinishedRun(verdict, first.result.node)
            verdict = await repeated(prepared, finished_run, cancellation)
        verdict = write(prepared, verdict, first.result.node, documents)
        emit(run_finished(prepared, verdict))
    return verdict


async def run_undocumented(
    prepared: PreparedJob,
    sinks: tuple[EventSink, ...] = (),
    on_message: Callable[[int, dict[str, Any]], None] | None = None,
    *,
    cancellation: Cancellation | None = None,
) -> tuple[Verdict, Any]:
    """Run the notebook for a tool that writes its own documents; no culprit search follows.

    ``on_message`` gets each message that put something into a cell. The notebook is ``prepared``'s
    own, filled in place.
    """
    from safe_exec.trial.request import Cancellation
    from safe_exec.workflows.bisect import FolderSnapshot

    # A caller with a cancellation of its own handles signals.
    handle_signals = signals if cancellation is None else no_signal_handlers
    cancellation, mask = cancellation or Cancellation(), mask_of(prepared)
    emit = fan_out((*prepared.job.sinks, *sinks), mask)
    with handle_signals(cancellation.arrive), FolderSnapshot(prepared) as folder:
        sweep()
        emit(run_started(prepared))
        first = await _first_run(prepared, emit, cancellation, folder, on_message)
        if first.result.sleeping is not None:
            first.result.sleeping.close()
        verdict = mask.everywhere(_verdict_of(prepared, first, mask))
        emit(run_finished(prepared, verdict))
    return verdict, first.result.node


async def bisect_job(
    prepared: PreparedJob,
    verdict: Verdict,
    sinks: tuple[EventSink, ...] = (),
    *,
    cancellation: Cancellation | None = None,
) -> Verdict:
    """Search for the culprits of an earlier run, and write its documents again.

    A caller that passes its own ``cancellation`` handles signals itself. Raises EnforcementError.
    """
    from safe_exec.trial.request import Cancellation
    from safe_exec.workflows.bisect import FolderSnapshot, search

    plan = prepared.plan()
    require(plan, prepared.limits.required)
    handle_signals = signals if cancellation is None else no_signal_handlers
    cancellation = cancellation or Cancellation()
    emit = fan_out((*prepared.job.sinks, *sinks), mask_of(prepared))
    with (
        handle_signals(cancellation.arrive),
        Documents(prepared) as documents,
        FolderSnapshot(prepared, of=verdict.run_id) as folder,
    ):
        sweep()
        emit(run_started(prepared))
        folder.begin()
        await folder.done()
        request = request_for(prepared, plan, prepared.node, cancellation, emit)
        # Warnings about an earlier search are out of date after this one.
        bare = replace(
            verdict,
            culprits=None,
            warnings=tuple(w for w in verdict.warnings if not w.startswith(SEARCH_WARNING)),
        )
        verdict_with_culprits = await search(prepared, bare, request, folder)
        verdict_with_culprits = write(
            prepared, verdict_with_culprits, _outputs_so_far(prepared), documents
        )
        emit(run_finished(prepared, verdict_with_culprits))
    return verdict_with_culprits


def _outputs_so_far(prepared: PreparedJob) -> Any:
    """Return the notebook with the outputs of the earlier run, if its document still exists."""
    try:
        # The annotated notebook is the only place with the outputs of the earlier run.
        return notebook.strip_annotations(notebook.read(prepared.paths.notebook).node)
    except SafeExecError:
        return prepared.node


async def _first_run(
    prepared: PreparedJob,
    emit: EventSink,
    cancellation: Cancellation,
    folder: FolderSnapshot,
    on_message: Callable[[int, dict[str, Any]], None] | None = None,
) -> FirstRun:
    # Imports jupyter_client and zmq, which takes 100 ms, while the kernel starts.
    from safe_exec.trial.run import run_trial

    kernel = prepared.kernel
    plan = kernel.plan if kernel is not None else None
    if kernel is None or plan is None:
        plan = prepared.plan()
    else:
        kernel.sandbox_for(plan).add_cleanup(folder.directories)
    # The keeper deletes the copy of the folder if it outlives the runner.
    plan = replace(plan, cleanup_if_runner_dies=folder.directories)
    request = request_for(prepared, plan, prepared.node, cancellation, emit)
    try:
        require(plan, prepared.limits.required)
    except EnforcementError as error:
        ending = InternalError(message=str(error), refused=True)
        return FirstRun(request=request, result=_without_trial(prepared, ending), plan=plan)
    folder.begin()
    # A task beside the trial: the event loop is idle while the kernel starts.
    warming = asyncio.create_task(warm_up())
    # The trials of a search run the same lines again, so only this run is measured.
    coverage_file = None if prepared.coverage is None else prepared.coverage.file
    first_request = replace(request, before_cells=folder.done, early=kernel, coverage=coverage_file)
    if _leaves_snapshots(prepared, plan):
        from safe_exec.workflows.snapshots import snapshots_of

        first_request = replace(first_request, snapshots=snapshots_of(prepared, request.cwd))
    if on_message is not None:
        # Not in the request that is returned: nobody follows the trials of a search.
        first_request = replace(first_request, on_message=on_message)
    result = await run_trial(first_request)
    await warming
    return FirstRun(request=request, result=result, plan=plan)


def _leaves_snapshots(prepared: PreparedJob, plan: SpawnPlan) -> bool:
    """Whether the first run's kernel leaves copies of itself."""
    from safe_exec.workflows.snapshots import leaves_snapshots

    kernel = prepared.kernel
    if kernel is not None and kernel.is_launched:
        return kernel.snapshots
    return leaves_snapshots(prepared.job, plan, prepared.limits.values, prepared.kernel_name)


def _without_trial(prepared: PreparedJob, ending: InternalError) -> TrialResult:
    """Return the result of a run that did not take place."""
    from safe_exec.trial.metrics import MetricsRecorder
    from safe_exec.trial.request import TrialResult

    metrics = MetricsRecorder.for_notebook(prepared.node, prepared.started)
    metrics.close(time.monotonic() - prepared.started)
    return TrialResult(
        ending=ending,
        evidence=Evidence(),
        metrics=metrics,
        node=prepared.node,
        location=None,
        hello={},
        warnings=(),
    )


def abandon_job(prepared: PreparedJob, message: str) -> Verdict:
    """Write the documents of a notebook that no machine could run to its end.

    Return the verdict.
    """
    from safe_exec.trial.request import Cancellation

    # Nothing is known of what held its limits elsewhere.
    plan = replace(prepared.plan(), enforcement={}, walls={})
    request = request_for(prepared, plan, prepared.node, Cancellation(), lambda _event: None)
    result = _without_trial(prepared, InternalError(message=message))
    with Documents(prepared) as documents:
        first = FirstRun(request=request, result=result, plan=plan)
        verdict = _verdict_of(prepared, first, documents.mask)
        environment = replace(verdict.environment, machine=None)
        verdict = replace(verdict, environment=environment)
        return write(prepared, verdict, result.node, documents)


def _texts(
    on_output: OutputListener | None, mask: Mask
) -> Callable[[int, dict[str, Any]], None] | None:
    """Return a listener for messages that passes the texts of cells on."""
    if on_output is None:
        return None

    def on_message(index: int, message: dict[str, Any]) -> None:
        if message["msg_type"] == "stream":
            content = message["content"]
            on_output(index, content["name"], mask(content["text"]))

    return on_message


def _compared(prepared: PreparedJob, first: FirstRun) -> FirstRun:
    """Compare the outputs of a run that passed with the stored ones, if that was requested."""
    rules, result = prepared.job.comparison, first.result
    if rules is None or not isinstance(result.ending, Passed):
        return first
    from safe_exec.notebook.comparison import compare_notebooks

    records = result.metrics.records.items()
    indexes = [index for index, record in records if record.status is not CellStatus.SKIPPED]
    found_differences = compare_notebooks(prepared.fresh_node(), result.node, indexes, rules)
    if not found_differences:
        return first
    ending = OutputsDiffer(cell=found_differences[0].index, differences=found_differences)
    return replace(first, result=replace(result, ending=ending))


def request_for(
    prepared: PreparedJob, plan: SpawnPlan, node: Any, cancellation: Cancellation, emit: EventSink
) -> TrialRequest:
    """Return the request for a trial of the whole notebook; trials of a search modify it."""
    from safe_exec.trial.request import TrialRequest

    stdin = prepared.job.inputs.stdin
    return TrialRequest(
        run_id=prepared.run_id,
        node=node,
        kernel_name=prepared.kernel_name,
        cwd=prepared.paths.cwd,
        limits=prepared.limits.values,
        machine=prepared.limits.machine,
        plan=plan,
        cell_limits=lambda cell: profiles.cell_limits(
            prepared.limits.resolved, cell.metadata, error_prefix="cell"
        )[0],
        largest_output=largest_output(prepared.limits.resolved, prepared.node.cells),
        skipped=prepared.skipped,
        may_raise=prepared.may_raise,
        exit_is_success=prepared.job.inputs.exit_is is ExitMeaning.SUCCESS,
        strict_shell=prepared.job.inputs.strict_shell,
        stdin_lines=None if stdin is None else stdin.lines,
        allow_errors=_allow_errors(prepared),
        with_locals=prepared.job.with_locals,
        env=dict(prepared.job.env if prepared.job.env is not None else os.environ),
        sink=emit,
        started=prepared.started,
        cancellation=cancellation,
    )


def _allow_errors(prepared: PreparedJob) -> bool:
    """Return whether cells may raise, by the option or by ``metadata.execution.allow_errors``."""
    # Jupyter tools store the option there, so a notebook behaves alike in nbclient and here.
    execution = prepared.node.metadata.get("execution")
    own = execution.get("allow_errors") if isinstance(execution, Mapping) else None
    return prepared.job.allow_errors or own is True


def _verdict_of(prepared: PreparedJob, first: FirstRun, mask: Mask) -> Verdict:
    from safe_exec.diagnosis.verdict import build_verdict

    # Masked before texts are shortened: half a secret would not be recognised.
    result = replace(
        first.result,
        ending=mask.everywhere(first.result.ending),
        evidence=mask.everywhere(first.result.evidence),
    )
    return build_verdict(run_info(prepared, first.request), result, first.plan)


def run_info(prepared: PreparedJob, request: TrialRequest) -> RunInfo:
    """Return the facts of a run that its trial does not know."""
    from safe_exec.diagnosis.verdict import RunInfo

    return RunInfo(
        run_id=prepared.run_id,
        started_at=prepared.started_at,
        command=prepared.job.command,
        cwd=prepared.paths.cwd,
        path=prepared.job.path,
        sha256=prepared.notebook.sha256,
        kernel_name=prepared.kernel_name,
        language=prepared.notebook.language,
        limits=prepared.limits.values,
        isolation=prepared.limits.isolation,
        allow_errors=request.allow_errors,
        inputs=prepared.job.inputs,
        warnings=prepared.limits.resolved.warnings,
        file_lines=prepared.notebook.file_lines,
        earlier_attempts=prepared.job.earlier_attempts,
    )


def _with_files(
    verdict: Verdict, prepared: PreparedJob, kept_files: tuple[KeptFile, ...]
) -> Verdict:
    """Add the files that the run created or changed in its working directory."""
    from safe_exec.workflows.created_files import created_files

    own_paths = {*map(Path.absolute, (*prepared.paths.documents, *prepared.job.own_paths))}
    listing = created_files(
        prepared.paths.cwd, prepared.started_at.timestamp(), own_paths, kept_files
    )
    return replace(verdict, files=listing.files, more_files=not listing.is_complete)


async def _search(
    prepared: PreparedJob,
    first: FirstRun,
    verdict: Verdict,
    folder: FolderSnapshot,
    write_partial: Callable[[Verdict], Verdict],
) -> Verdict:
    """Search for the culprits, if the kind of failure and the options call for it."""
    if prepared.job.bisect is Bisect.NEVER or verdict.cause is None:
        return verdict
    from safe_exec.workflows.bisect import search_after

    return await search_after(prepared, verdict, first.request, folder, write_partial)


async def _continue(
    prepared: PreparedJob, first: FirstRun, verdict: Verdict, folder: FolderSnapshot, mask: Mask
) -> tuple[Verdict, list[Verdict]]:
    """Run the cells after each failure, if that was requested; return all failures' verdicts."""
    if not prepared.job.keep_going:
        return verdict, []
    from safe_exec.workflows.keep_going import ContinuedTrials, keep_going

    def verdict_of(request: TrialRequest, result: TrialResult) -> Verdict:
        trial = FirstRun(request=request, result=result, plan=request.plan)
        return _verdict_of(prepared, trial, mask)

    trials = ContinuedTrials(prepared, first.request, folder, first.result)
    return await keep_going(prepared, verdict, trials, verdict_of)


async def _search_each(
    prepared: PreparedJob,
    first: FirstRun,
    verdict: Verdict,
    *,
    failures: list[Verdict],
    folder: FolderSnapshot,
    write_partial: Callable[[Verdict], Verdict],
) -> Verdict:
    """Search for the culprits of each further failure."""
    if len(failures) < 2:  # noqa: PLR2004
        return verdict
    from safe_exec.workflows.bisect import search_after
    from safe_exec.workflows.keep_going import search_each

    def search(failure: Verdict, number: int) -> Awaitable[Verdict]:
        # The partial verdict on disk is that of the whole run.
        return search_after(
            prepared,
            failure,
            first.request,
            folder,
            lambda _: write_partial(verdict),
            number=number,
        )

    return await search_each(prepared, verdict, failures, search)
