"""Run one notebook of a batch, on its own thread and event loop.

Notebooks do not share an event loop, because starting a keeper, ending a large process tree,
writing documents and searching for culprits block a loop for moments, and the wall times of a
notebook must not depend on its neighbours.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from safe_exec.batch.fingerprint import Kernels, inputs_of, key_of_pass, key_of_run
from safe_exec.batch.history import History, RunHistory
from safe_exec.batch.journal import Journal, JournalRecord
from safe_exec.batch.outcome import REFUSED_CODE
from safe_exec.batch.selection import SelectedNotebook
from safe_exec.errors import SafeExecError, UsageError
from safe_exec.files import OutputDirectory, OutputRoot, one_line
from safe_exec.kernel.prestart import PrestartedKernel
from safe_exec.model.events import EventSink
from safe_exec.model.limits import Limits
from safe_exec.model.verdict import Status, Verdict
from safe_exec.reports.batch.results import REFUSED
from safe_exec.reports.follow import OutputFollower
from safe_exec.reports.text.common import headline
from safe_exec.trial.request import Cancellation
from safe_exec.workflows.job import Job, PreparedJob
from safe_exec.workflows.prepare import prepare, start_clock
from safe_exec.workflows.retry import RetryPolicy, after_attempt, is_last_attempt
from safe_exec.workflows.run import run_job

log = logging.getLogger("safe_exec")

OWN_TASKS = 64
"""A rough number of safe-exec's own threads and processes for each notebook."""


class SignalBroadcast:
    """Passes the signals of the batch on to every running notebook.

    Each notebook receives them on its own thread.
    """

    def __init__(self) -> None:
        self.signals: list[int] = []
        self._live: list[tuple[Cancellation, asyncio.AbstractEventLoop]] = []
        self._lock = threading.Lock()

    def receive(self, number: int) -> None:
        """Pass a signal on to all running notebooks."""
        with self._lock:
            self.signals.append(number)
            for cancellation, loop in self._live:
                loop.call_soon_threadsafe(cancellation.arrive, number)

    @contextlib.contextmanager
    def subscribed(self, cancellation: Cancellation) -> Iterator[None]:
        """Within the context, pass every signal on to a run, including earlier ones.

        Call it on the thread of the run's event loop.
        """
        entry = (cancellation, asyncio.get_running_loop())
        with self._lock:
            self._live.append(entry)
            for number in self.signals:
                cancellation.arrive(number)
        try:
            yield
        finally:
            # Unsubscribed before its loop closes: a closed loop raises on call_soon_threadsafe.
            with self._lock:
                self._live.remove(entry)


class StartGate:
    """Holds back a notebook that is prepared, with its kernel started, until its turn comes."""

    def __init__(self) -> None:
        self._decided = threading.Event()
        self._allowed = False

    def open(self) -> None:
        """Let the notebook run, immediately or as soon as it is prepared."""
        self._allowed = True
        self._decided.set()

    def refuse(self) -> None:
        """Keep the notebook from running, if it has not started."""
        self._decided.set()

    def wait(self) -> bool:
        """Block until the gate is opened or refused; return whether the notebook may run."""
        self._decided.wait()
        return self._allowed


class NotebookTask(Struct, frozen=True, kw_only=True):
    """A notebook and the job that runs it."""

    notebook: SelectedNotebook
    job: Job


class BatchContext(Struct, frozen=True, kw_only=True):
    """State that all notebooks of a batch share.

    ``sink`` takes a notebook's path and attempt and returns the sink for its events; ``follower``
    returns the display of its output.
    """

    out: OutputRoot
    jobs: int
    retry: RetryPolicy
    journal: Journal
    history: History
    kernels: Kernels
    broadcast: SignalBroadcast
    sink: Callable[[str, int], EventSink]
    follower: Callable[[str], OutputFollower | None] = lambda _path: None


def run_task(task: NotebookTask, context: BatchContext, gate: StartGate) -> JournalRecord | None:
    """Prepare a notebook, run it when its gate opens, and retry it if that may help.

    The record is in the journal on return. Returns ``None`` if the gate was refused. Never raises.
    """
    try:
        return _run(task, context, gate)
    # The notebook was valid when the scheduler read it, and has changed since.
    except UsageError as error:
        return refused(task, error)
    # One broken notebook must not end the batch: the error becomes its record.
    except Exception as error:
        log.exception("%s: safe-exec failed", one_line(task.notebook.path))
        message = (
            str(error) if isinstance(error, SafeExecError) else f"{type(error).__name__}: {error}"
        )
        return record_without_verdict(
            task, str(Status.INTERNAL_ERROR), Status.INTERNAL_ERROR.exit_code, message
        )


def refused(task: NotebookTask, error: UsageError) -> JournalRecord:
    """Return the record of a notebook that cannot be used."""
    return record_without_verdict(task, REFUSED, REFUSED_CODE, str(error))


def record_without_verdict(
    task: NotebookTask, status: str, exit_code: int, message: str
) -> JournalRecord:
    """Return the record of a notebook that has no verdict, with the reason."""
    # The record names the notebook already, so the prefix of the error message is dropped.
    return JournalRecord(
        path=task.notebook.path,
        status=status,
        exit_code=exit_code,
        seconds=None,
        attempts=0,
        flaky=False,
        key="",
        error=one_line(message).removeprefix(f"{one_line(task.notebook.source)}:").lstrip(),
    )


def _run(task: NotebookTask, context: BatchContext, gate: StartGate) -> JournalRecord | None:
    job = task.job
    for attempt in itertools.count(1):
        # A retry must not find the documents of the attempt before.
        _remove_documents(task.job)
        is_last = partial(is_last_attempt, context.retry, attempt)
        # The kernel starts while the notebook is read and while it waits for its turn.
        with PrestartedKernel() as kernel:
            prepared = prepare(job, kernel)
            key, inputs = key_of_run(prepared), inputs_of(prepared)
            if not gate.wait():
                return None
            # Waiting for other notebooks does not count as this notebook's time.
            prepared = start_clock(prepared)
            context.journal.started(task.notebook.path, attempt=attempt, run_id=prepared.run_id)
            verdict = asyncio.run(
                run_attempt(
                    prepared,
                    context.sink(task.notebook.path, attempt),
                    context.broadcast,
                    is_last,
                    context.follower(task.notebook.path),
                )
            )
        if context.broadcast.signals or is_last(verdict):
            break
        job = after_attempt(job, verdict)
    record = record_of(task, verdict, attempt, key, context.out.path)
    # A cancelled notebook is not recorded, so --resume runs it again.
    if verdict.status is not Status.CANCELLED:
        context.journal.finished(record)
        _remember(task, record, prepared, inputs, context)
    return record


def _remember(
    task: NotebookTask,
    record: JournalRecord,
    prepared: PreparedJob,
    inputs: Mapping[str, str | None],
    context: BatchContext,
) -> None:
    """Store duration and fingerprint, for the order and ``--only-changed`` of later batches."""
    passed: str | None = None
    # A flaky notebook is not skipped next time: its pass was luck.
    if record.status == Status.PASSED and not record.flaky:
        try:
            passed = key_of_pass(prepared, context.kernels, inputs)
        # The notebook is finished and recorded: an error from here on must not change its result.
        except Exception:
            log.exception(
                "%s: its fingerprint cannot be computed; a later batch will run it again",
                one_line(task.notebook.path),
            )
    context.history.put(task.notebook.source, RunHistory(seconds=record.seconds, passed=passed))


async def run_attempt(
    prepared: PreparedJob,
    sink: EventSink,
    broadcast: SignalBroadcast,
    is_last: Callable[[Verdict], bool],
    follower: OutputFollower | None = None,
) -> Verdict:
    """Run once; skip the search for culprits if the failure will be retried."""
    cancellation = Cancellation()
    with broadcast.subscribed(cancellation):
        return await run_job(
            prepared,
            (sink,) if follower is None else (follower, sink),
            on_output=None if follower is None else follower.take,
            cancellation=cancellation,
            worth_a_search=is_last,
        )


def _remove_documents(job: Job) -> None:
    # Documents of an earlier run must not be mistaken for those of this one.
    for path in (job.output, job.verdict, job.repro):
        if path is not None:
            with (
                contextlib.suppress(OSError),
                contextlib.closing(OutputDirectory(path, job.tree)) as folder,
            ):
                # Anything else that blocks the path, such as a directory, is reported by prepare.
                folder.remove()


def reserve_for_others(job: Job, limits: Limits, jobs: int) -> Job:
    """Leave room for the processes of the batch's other notebooks in RLIMIT_NPROC."""
    # RLIMIT_NPROC counts all tasks of a user (setrlimit(2)), so the tasks of other notebooks would
    # use up the limit of this one.
    machine = job.machine
    if machine is None or machine.user_tasks is None or jobs == 1:
        return job
    others = (jobs - 1) * ((limits.processes or 0) + OWN_TASKS)
    return replace(job, machine=replace(machine, user_tasks=machine.user_tasks + others))


def record_of(
    task: NotebookTask, verdict: Verdict, attempt: int, key: str, out: Path
) -> JournalRecord:
    """Return the record of a notebook with a verdict; ``out`` is the output directory."""
    documents = {name: Path(path) for name, path in verdict.outputs.items()}
    # Paths are stored relative to the output directory, which may move between two batches.
    below = {
        name: str(path.relative_to(out))
        for name, path in documents.items()
        if path.is_relative_to(out) and path.exists()
    }
    return JournalRecord(
        path=task.notebook.path,
        status=str(verdict.status),
        exit_code=verdict.exit_code,
        seconds=verdict.usage.wall_seconds,
        attempts=attempt,
        flaky=attempt > 1 and verdict.status is Status.PASSED,
        key=key,
        headline=headline(verdict),
        verdict=below.get("verdict"),
        notebook=below.get("notebook"),
        repro=below.get("repro"),
    )
