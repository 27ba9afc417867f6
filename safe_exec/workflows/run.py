"""The whole of ``run``: first run, cause, search, verdict, reports. May import everything below commands."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, Self

from msgspec import Struct
from msgspec.structs import replace

from safe_exec.errors import EnforcementError, SafeExecError
from safe_exec.files import OutputDirectory, ReservedSpace, one_line
from safe_exec.limits import profiles
from safe_exec.model import events
from safe_exec.model.ending import InternalError
from safe_exec.model.events import Event, EventSink
from safe_exec.model.evidence import Evidence
from safe_exec.model.verdict import Verdict
from safe_exec.notebook import notebook
from safe_exec.reports.masking import Mask, mask_for
from safe_exec.sandbox.plan import SpawnPlan, require
from safe_exec.sandbox.stale_runs import sweep
from safe_exec.workflows.prepare import Bisect, PreparedJob, largest_output

if TYPE_CHECKING:
    from safe_exec.diagnosis.verdict import RunInfo
    from safe_exec.trial.request import Cancellation, TrialRequest, TrialResult
    from safe_exec.workflows.bisect import FolderSnapshot

log = logging.getLogger("safe_exec")

HELD_BYTES = 1 << 20
_NEEDED_LATER = (
    "safe_exec.diagnosis.verdict",
    "safe_exec.reports.annotated_notebook",
    "safe_exec.reports.verdict_json",
)
_SENT_SECONDS = 0.001
"""By then the first cell has been sent."""
SEARCH_WARNING = "no search for the culprits"


class FirstRun(Struct, frozen=True, kw_only=True):
    """The first run: what was asked of the trial, and what came of it."""

    request: TrialRequest
    result: TrialResult
    plan: SpawnPlan


async def run_job(
    prepared: PreparedJob,
    sinks: tuple[EventSink, ...] = (),
    *,
    cancellation: Cancellation | None = None,
    worth_a_search: Callable[[Verdict], bool] = lambda _verdict: True,
) -> Verdict:
    """First run, cause, search, verdict, reports. Signals end the run in order until all is written.

    With a ``cancellation`` of the caller's, who runs several at a time, signals are the caller's to take.
    """
    from safe_exec.trial.request import Cancellation
    from safe_exec.workflows.bisect import FolderSnapshot

    handle_signals = signals if cancellation is None else _leave_signals
    cancellation = cancellation or Cancellation()
    emit = _fan_out((*prepared.job.sinks, *sinks, _read_ahead()), _mask(prepared))
    with (
        handle_signals(cancellation.arrive),
        Documents(prepared) as documents,
        FolderSnapshot(prepared) as folder,
    ):
        sweep()
        emit(_run_started(prepared))
        reserved = ReservedSpace(prepared.paths.notebook.absolute().parent, HELD_BYTES)
        try:
            first = await _first_run(prepared, emit, cancellation, folder)
        finally:
            reserved.release()
        verdict = _verdict_of(prepared, first, documents.mask)
        # What is known by now is on disk before anything else is run: a search may be killed.
        write_partial = partial(write, prepared, node=first.result.node, documents=documents)
        if worth_a_search(verdict):
            verdict = await _search(prepared, first, verdict, folder, write_partial)
        verdict = write(prepared, verdict, first.result.node, documents)
        emit(_run_finished(prepared, verdict))
    return verdict


async def run_undocumented(
    prepared: PreparedJob,
    sinks: tuple[EventSink, ...] = (),
    on_message: Callable[[int, dict[str, Any]], None] | None = None,
) -> tuple[Verdict, Any]:
    """First run and cause, for tools that write documents of their own; nothing is searched for. Verdict, notebook with its outputs.

    ``on_message`` is told of each message that put something into a cell. The notebook is ``prepared``'s own, filled in place.
    """
    from safe_exec.trial.request import Cancellation
    from safe_exec.workflows.bisect import FolderSnapshot

    cancellation, mask = Cancellation(), _mask(prepared)
    emit = _fan_out((*prepared.job.sinks, *sinks), mask)
    with signals(cancellation.arrive), FolderSnapshot(prepared) as folder:
        sweep()
        emit(_run_started(prepared))
        first = await _first_run(prepared, emit, cancellation, folder, on_message)
        verdict = mask.everywhere(_verdict_of(prepared, first, mask))
        emit(_run_finished(prepared, verdict))
    return verdict, first.result.node


async def bisect_job(
    prepared: PreparedJob, verdict: Verdict, sinks: tuple[EventSink, ...] = ()
) -> Verdict:
    """The search alone, after a run of before; its documents are written anew. Raises EnforcementError."""
    from safe_exec.trial.request import Cancellation
    from safe_exec.workflows.bisect import FolderSnapshot, search

    plan = prepared.plan()
    require(plan, prepared.limits.required)
    cancellation = Cancellation()
    emit = _fan_out((*prepared.job.sinks, *sinks), _mask(prepared))
    with (
        signals(cancellation.arrive),
        Documents(prepared) as documents,
        FolderSnapshot(prepared, of=verdict.run_id) as folder,
    ):
        sweep()
        emit(_run_started(prepared))
        folder.begin()
        await folder.done()
        request = request_for(prepared, plan, prepared.node, cancellation, emit)
        bare = replace(
            verdict,
            culprits=None,
            warnings=tuple(w for w in verdict.warnings if not w.startswith(SEARCH_WARNING)),
        )
        verdict_with_culprits = await search(prepared, bare, request, folder)
        verdict_with_culprits = write(
            prepared, verdict_with_culprits, _outputs_so_far(prepared), documents
        )
        emit(_run_finished(prepared, verdict_with_culprits))
    return verdict_with_culprits


def _outputs_so_far(prepared: PreparedJob) -> Any:
    """The notebook with the outputs of the run before, where it is still there."""
    try:
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
    from safe_exec.trial.metrics import MetricsRecorder
    from safe_exec.trial.request import TrialResult
    from safe_exec.trial.run import run_trial  # jupyter_client and zmq: the kernel starts meanwhile

    kernel = prepared.kernel
    plan = kernel.plan if kernel is not None else None
    if kernel is None or plan is None:
        plan = prepared.plan()
    else:
        kernel.sandbox_for(plan).entrust(folder.directories)
    plan = replace(plan, orphans=folder.directories)
    request = request_for(prepared, plan, prepared.node, cancellation, emit)
    if on_message is not None:
        request = replace(request, on_message=on_message)
    try:
        require(plan, prepared.limits.required)
    except EnforcementError as error:
        metrics = MetricsRecorder.for_notebook(prepared.node, prepared.started)
        metrics.close(time.monotonic() - prepared.started)
        result = TrialResult(
            ending=InternalError(message=str(error), refused=True),
            evidence=Evidence(),
            metrics=metrics,
            node=prepared.node,
            location=None,
            hello={},
            warnings=(),
        )
        return FirstRun(request=request, result=result, plan=plan)
    folder.begin()
    warming = asyncio.create_task(_warm_up())
    result = await run_trial(replace(request, before_cells=folder.done, early=kernel))
    await warming
    return FirstRun(request=request, result=result, plan=plan)


async def _warm_up() -> None:
    """Do what would be done later anyway while there is nothing to do but wait for the kernel."""
    from nbformat import v4

    from safe_exec.diagnosis import verdict as _verdict  # noqa: F401
    from safe_exec.reports import annotated_notebook  # noqa: F401

    v4.new_output("stream", text="")  # reads and compiles the schema of notebooks: 30 ms


def request_for(
    prepared: PreparedJob, plan: SpawnPlan, node: Any, cancellation: Cancellation, emit: EventSink
) -> TrialRequest:
    """What a trial of the whole notebook is asked; trials of a search start from it."""
    from safe_exec.trial.request import TrialRequest

    return TrialRequest(
        run_id=prepared.run_id,
        node=node,
        kernel_name=prepared.kernel_name,
        cwd=prepared.paths.cwd,
        limits=prepared.limits.values,
        machine=prepared.limits.machine,
        plan=plan,
        cell_limits=lambda cell: profiles.cell_limits(
            prepared.limits.resolved, cell.metadata, where="cell"
        )[0],
        largest_output=largest_output(prepared.limits.resolved, prepared.node.cells),
        allow_errors=_allow_errors(prepared),
        env=dict(prepared.job.env if prepared.job.env is not None else os.environ),
        sink=emit,
        started=prepared.started,
        cancellation=cancellation,
    )


def _allow_errors(prepared: PreparedJob) -> bool:
    """The option, or the notebook's ``metadata.execution.allow_errors`` as nbclient reads it."""
    execution = prepared.node.metadata.get("execution")
    own = execution.get("allow_errors") if isinstance(execution, Mapping) else None
    return prepared.job.allow_errors or own is True


def _verdict_of(prepared: PreparedJob, first: FirstRun, mask: Mask) -> Verdict:
    from safe_exec.diagnosis.verdict import build_verdict

    # Before texts are shortened: half a secret is no longer found.
    result = replace(
        first.result,
        ending=mask.everywhere(first.result.ending),
        evidence=mask.everywhere(first.result.evidence),
    )
    return build_verdict(run_info(prepared, first.request), result, first.plan)


def run_info(prepared: PreparedJob, request: TrialRequest) -> RunInfo:
    """The facts of a run that its trial does not know."""
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
        warnings=prepared.limits.resolved.warnings,
    )


async def _search(
    prepared: PreparedJob,
    first: FirstRun,
    verdict: Verdict,
    folder: FolderSnapshot,
    write_partial: Callable[[Verdict], Verdict],
) -> Verdict:
    """The culprits, where the failure is one that is searched for."""
    if prepared.job.bisect is Bisect.NEVER or verdict.cause is None:
        return verdict
    from safe_exec.workflows.bisect import search_after

    return await search_after(prepared, verdict, first.request, folder, write_partial)


class Documents:
    """Where the documents go, their folders held open from the start, and the mask for what they say. A context manager."""

    def __init__(self, prepared: PreparedJob) -> None:
        self.mask = _mask(prepared)
        self.warnings: list[str] = []
        self._run_id = prepared.run_id
        self._stack = contextlib.ExitStack()
        self._folders: dict[str, OutputDirectory] = {}
        for name, path in (
            ("notebook", prepared.paths.notebook),
            ("verdict", prepared.paths.verdict),
        ):
            with contextlib.suppress(
                OSError
            ):  # what became of it is said when there is something to write
                folder = self._folders[name] = OutputDirectory(path, prepared.job.tree)
                self._stack.callback(folder.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def paths(self) -> dict[str, str]:
        """Where each document is by now, or will be."""
        return {name: str(folder.path) for name, folder in self._folders.items()}

    def put(self, name: str, data: bytes | notebook.Encoded) -> None:
        """Write a document; under a name beside its own, with a warning, where what stands there cannot be replaced. Raises OSError."""
        if name not in self._folders:
            raise FileNotFoundError(errno.ENOENT, "the folder is gone")
        folder = self._folders[name]
        try:
            folder.write(data)
        except (IsADirectoryError, PermissionError) as error:
            other = folder.sibling(self._run_id)
            other.write(data)
            self._folders[name] = other
            self.warnings.append(
                f"{folder.path.name} could not be replaced ({error.strerror}): see {other.path.name}"
            )


def _mask(prepared: PreparedJob) -> Mask:
    """The mask for the secrets of our environment and of the kernel's."""
    return mask_for({**os.environ, **(prepared.job.env or {})})


def write(prepared: PreparedJob, verdict: Verdict, node: Any, documents: Documents) -> Verdict:
    """The annotated notebook first, then the verdict, which says what was written. Here a verdict is finished: secrets are masked."""
    from safe_exec.reports import annotated_notebook, verdict_json

    verdict = _with_output_paths(documents.mask.everywhere(verdict), documents)
    try:
        documents.put(
            "notebook", notebook.Encoded(annotated_notebook.annotate(node, verdict, documents.mask))
        )
    except (OSError, SafeExecError) as error:
        verdict = _without_output(
            verdict, "notebook", f"the annotated notebook could not be written: {error}"
        )
    try:
        for _ in range(2):  # once more where it went by another name, which it says itself
            warning_count = len(documents.warnings)
            verdict = _with_output_paths(verdict, documents)
            documents.put("verdict", verdict_json.dumps(verdict))
            if len(documents.warnings) == warning_count:
                break
    except OSError as error:
        verdict = _without_output(verdict, "verdict", f"the verdict could not be written: {error}")
        # The one document that programs read: that it is missing is said even to those who want to hear nothing.
        log.error(  # noqa: TRY400
            "%s: the verdict could not be written: %s",
            one_line(prepared.paths.verdict),
            one_line(error),
        )
    return verdict


def _with_output_paths(verdict: Verdict, documents: Documents) -> Verdict:
    """The verdict that says which documents there are, but for one that is known not to be, and what became of their names."""
    missing = {"notebook"} - verdict.outputs.keys() if verdict.outputs else set()
    outputs = {name: path for name, path in documents.paths().items() if name not in missing}
    if verdict.culprits is not None and verdict.culprits.repro_notebook is not None:
        outputs["repro"] = verdict.culprits.repro_notebook
    fresh = [warning for warning in documents.warnings if warning not in verdict.warnings]
    return replace(verdict, outputs=outputs, warnings=(*verdict.warnings, *fresh))


def _without_output(verdict: Verdict, name: str, warning: str) -> Verdict:
    outputs = {key: path for key, path in verdict.outputs.items() if key != name}
    return replace(verdict, outputs=outputs, warnings=(*verdict.warnings, warning))


def _run_started(prepared: PreparedJob) -> events.RunStarted:
    return events.RunStarted(
        time=time.monotonic() - prepared.started,
        run_id=prepared.run_id,
        notebook=str(prepared.job.path),
        kernel=prepared.kernel_name,
        code_cells=sum(cell.cell_type == "code" for cell in prepared.node.cells),
        limits=prepared.limits.values.as_dict(),
    )


def _run_finished(prepared: PreparedJob, verdict: Verdict) -> events.RunFinished:
    cause = verdict.cause.kind.value if verdict.cause else None
    return events.RunFinished(
        time=time.monotonic() - prepared.started, status=verdict.status, cause=cause
    )


def _read_ahead() -> EventSink:
    """Imports what concludes and writes while the kernel is at work on its first cell: after a death somebody waits."""
    scheduled = False

    def sink(event: Event) -> None:
        nonlocal scheduled
        if isinstance(event, events.CellStarted) and not scheduled:
            scheduled = True
            for number, name in enumerate(_NEEDED_LATER):
                asyncio.get_running_loop().call_later(
                    _SENT_SECONDS * (1 + number), import_module, name
                )

    return sink


def _fan_out(sinks: tuple[EventSink, ...], mask: Mask) -> EventSink:
    """One sink for all, which hears of no secrets. One that raises is left out from then on: a broken progress display must not cost the run."""
    live = list(sinks)

    def emit(event: Event) -> None:
        event = mask.everywhere(event)
        for sink in tuple(live):
            try:
                sink(event)
            except Exception:
                live.remove(sink)
                log.exception("an event sink failed and gets no more events")

    return emit


def _leave_signals(_arrive: Any) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


@contextlib.contextmanager
def signals(arrive: Any) -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP are told to ``arrive`` until everything is written.

    Elsewhere than on the main thread nothing is taken over. A signal that is ignored stays ignored:
    under nohup the run goes on when the terminal is gone, and in the background of a script (`&`)
    when somebody presses Ctrl-C.
    """
    loop, handled = asyncio.get_running_loop(), []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            continue
        with contextlib.suppress(RuntimeError, ValueError, NotImplementedError):
            loop.add_signal_handler(number, arrive, number)
            handled.append(number)
    try:
        yield
    finally:
        for number in handled:
            loop.remove_signal_handler(number)
