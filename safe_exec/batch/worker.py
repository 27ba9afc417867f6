"""One notebook of a batch, on a thread and an event loop of its own. May import pipeline and what is below.

A thread each, and not one loop for all: starting a keeper, taking a large tree down, writing documents and the search for culprits hold their
loop up for moments, and a notebook's wall times must not depend on its neighbours' moments. What waits for the system lets other threads run.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from safe_exec.batch.fingerprint import Kernels, inputs_of, key_of_pass, key_of_run
from safe_exec.batch.history import History, RunHistory
from safe_exec.batch.journal import Journal, JournalRecord
from safe_exec.batch.outcome import REFUSED_CODE
from safe_exec.batch.retry import is_transient
from safe_exec.batch.selection import SelectedNotebook
from safe_exec.errors import SafeExecError, UsageError
from safe_exec.files import OutputDirectory, OutputRoot, one_line
from safe_exec.kernel.prestart import Early
from safe_exec.model.events import EventSink
from safe_exec.model.limits import Limits
from safe_exec.model.verdict import Status, Verdict
from safe_exec.reports.batch.results import REFUSED
from safe_exec.reports.text.common import headline
from safe_exec.trial.request import Cancellation
from safe_exec.workflows.prepare import Job, PreparedJob, prepare, start_clock
from safe_exec.workflows.run import run_job

log = logging.getLogger("safe_exec")

OWN_TASKS = 64
"""Threads and keepers of ours beside each notebook, roughly."""


class SignalBroadcast:
    """Signals that came for the batch, and the runs that are to hear of them; each lives on a thread of its own."""

    def __init__(self) -> None:
        self.signals: list[int] = []
        self._live: list[tuple[Cancellation, asyncio.AbstractEventLoop]] = []
        self._turn = threading.Lock()

    def receive(self, number: int) -> None:
        """A signal came: every run that is under way is told."""
        with self._turn:
            self.signals.append(number)
            for cancellation, loop in self._live:
                loop.call_soon_threadsafe(cancellation.arrive, number)

    @contextlib.contextmanager
    def subscribed(self, cancellation: Cancellation) -> Iterator[None]:
        """Within it a run of this thread's loop hears of all signals, of those that came before too."""
        entry = (cancellation, asyncio.get_running_loop())
        with self._turn:
            self._live.append(entry)
            for number in self.signals:
                cancellation.arrive(number)
        try:
            yield
        finally:
            with self._turn:  # before its loop closes: a closed one takes no calls
                self._live.remove(entry)


class StartGate:
    """Whether a notebook may run. It is got ready before, with a kernel that has started, so that no processor waits for the next one."""

    def __init__(self) -> None:
        self._decided = threading.Event()
        self._allowed = False

    def open(self) -> None:
        """It may run, now or as soon as it is ready."""
        self._allowed = True
        self._decided.set()

    def refuse(self) -> None:
        """It is not going to run, if it does not already."""
        self._decided.set()

    def wait(self) -> bool:
        """Whether it may run, once that is said."""
        self._decided.wait()
        return self._allowed


class NotebookTask(Struct, frozen=True, kw_only=True):
    """A notebook and the whole of what is asked of its run."""

    notebook: SelectedNotebook
    job: Job


class BatchContext(Struct, frozen=True, kw_only=True):
    """What all notebooks of a batch have in common. ``sink`` gives the events of a notebook, by its path, to whoever watches."""

    out: OutputRoot
    jobs: int
    retries: int
    journal: Journal
    history: History
    kernels: Kernels
    broadcast: SignalBroadcast
    sink: Callable[[str, int], EventSink]


def run_task(task: NotebookTask, context: BatchContext, gate: StartGate) -> JournalRecord | None:
    """Get a notebook ready and run it when its turn comes, again where that may help; on record when this returns. Never raises.

    ``None``: its turn did not come, and nothing of it was run.
    """
    try:
        return _run(task, context, gate)
    except UsageError as error:  # it was read before, and has changed since
        return refused(task, error)
    except Exception as error:
        log.exception("%s: safe-exec failed", one_line(task.notebook.path))
        message = (
            str(error) if isinstance(error, SafeExecError) else f"{type(error).__name__}: {error}"
        )
        return _without_verdict(
            task, str(Status.INTERNAL_ERROR), Status.INTERNAL_ERROR.exit_code, message
        )


def refused(task: NotebookTask, error: UsageError) -> JournalRecord:
    """What there is to say of a notebook that cannot be used."""
    return _without_verdict(task, REFUSED, REFUSED_CODE, str(error))


def _without_verdict(
    task: NotebookTask, status: str, exit_code: int, message: str
) -> JournalRecord:
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
    for attempt in itertools.count(1):
        _remove_documents(task.job)
        is_retried = is_transient if attempt <= context.retries else _never
        with Early() as kernel:
            prepared = prepare(task.job, kernel)
            key, inputs = key_of_run(prepared), inputs_of(prepared)
            if not gate.wait():
                return None
            prepared = start_clock(prepared)
            context.journal.started(task.notebook.path, attempt=attempt, run_id=prepared.run_id)
            verdict = asyncio.run(
                _attempt(
                    prepared,
                    context.sink(task.notebook.path, attempt),
                    context.broadcast,
                    is_retried,
                )
            )
        if context.broadcast.signals or not is_retried(verdict):
            break
    record = _record(task, verdict, attempt, key, context.out.path)
    if verdict.status is not Status.CANCELLED:  # that one is to be run again
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
    """For the order of later batches, and for those that run only what has changed."""
    passed: str | None = None
    if record.status == Status.PASSED and not record.flaky:
        try:
            passed = key_of_pass(prepared, context.kernels, inputs)
        except Exception:  # the notebook is finished and on record: that must not change any more
            log.exception(
                "%s: it cannot be told what it depends on; it will be run again",
                one_line(task.notebook.path),
            )
    context.history.put(task.notebook.source, RunHistory(seconds=record.seconds, passed=passed))


def _never(_verdict: Verdict) -> bool:
    return False


async def _attempt(
    prepared: PreparedJob,
    sink: EventSink,
    broadcast: SignalBroadcast,
    is_retried: Callable[[Verdict], bool],
) -> Verdict:
    """One run. What is going to be tried again anyhow is not searched before."""
    cancellation = Cancellation()
    with broadcast.subscribed(cancellation):
        return await run_job(
            prepared,
            (sink,),
            cancellation=cancellation,
            worth_a_search=lambda verdict: not is_retried(verdict),
        )


def _remove_documents(job: Job) -> None:
    """Those of an earlier run: they must not be taken for this one's."""
    for path in (job.output, job.verdict, job.repro):
        if path is not None:
            with (
                contextlib.suppress(OSError),
                contextlib.closing(OutputDirectory(path, job.tree)) as folder,
            ):
                folder.remove()  # what stands there and is no file is found by prepare


def beside_others(job: Job, limits: Limits, jobs: int) -> Job:
    """RLIMIT_NPROC counts all tasks of a user (setrlimit(2)): those of the other notebooks must not be taken for this one's."""
    machine = job.machine
    if machine is None or machine.user_tasks is None or jobs == 1:
        return job
    others = (jobs - 1) * ((limits.processes or 0) + OWN_TASKS)
    return replace(job, machine=replace(machine, user_tasks=machine.user_tasks + others))


def _record(
    task: NotebookTask, verdict: Verdict, attempt: int, key: str, out: Path
) -> JournalRecord:
    documents = {name: Path(path) for name, path in verdict.outputs.items()}
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
