"""The queue of a batch: takes notebooks from the list, and records their results.

A scheduler decides when and where they run: on this machine (``scheduler``) or on the workers of a
cluster (``cluster.scheduler``). Both use the same order, the same checks before a run, and the same
records.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from msgspec import Struct, field
from msgspec.structs import replace

from safe_exec.batch.admission import Capacity
from safe_exec.batch.fingerprint import Kernels, inputs_of, key_of_run, pass_key
from safe_exec.batch.history import History
from safe_exec.batch.journal import Journal, JournalRecord
from safe_exec.batch.ordering import longest_first
from safe_exec.batch.selection import SelectedNotebook
from safe_exec.batch.worker import BatchContext, NotebookTask, SignalBroadcast, refused
from safe_exec.errors import UsageError
from safe_exec.files import OutputRoot
from safe_exec.model.events import EventSink
from safe_exec.reports.batch.results import NOT_RUN, UNCHANGED, NotebookResult
from safe_exec.reports.follow import OutputFollower
from safe_exec.workflows.job import Job, PreparedJob
from safe_exec.workflows.prepare import prepare
from safe_exec.workflows.retry import RetryPolicy

QueuedT = TypeVar("QueuedT")


class BatchListener(Protocol):
    """The progress display of a batch.

    Events arrive on the threads of the notebooks, all other calls on the main thread.
    """

    def begin(self, total: int, jobs: int) -> None:
        """Start with ``total`` notebooks, at most ``jobs`` at a time."""

    def note(self, text: str) -> None:
        """Show a message to the user."""

    def sink(self, path: str, attempt: int, machine: str = "") -> EventSink:
        """Return the sink for the events of one notebook, on ``machine`` of a cluster."""

    def load(self, machines: Mapping[str, tuple[int, int]]) -> None:
        """Show the machines of a cluster: how many notebooks run, and how many may."""

    def follower(self, path: str) -> OutputFollower | None:
        """Return a display of a notebook's output, ``None`` if nobody follows it."""

    def finished(self, result: NotebookResult, headline: str) -> None:
        """Show a notebook that finished or was skipped, with its verdict in one line."""

    def draw(self) -> None:
        """Redraw; called every 0.2 s."""


class Plan(Struct, frozen=True, kw_only=True):
    """A batch as the user requested it.

    ``template`` is the job of every notebook except for its paths; ``limits`` is the value of
    ``--limits``.
    """

    notebooks: tuple[SelectedNotebook, ...]
    root: Path
    out: Path
    capacity: Capacity
    template: Job
    command: tuple[str, ...]
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    fail_fast: bool = False
    resume: bool = False
    only_changed: bool = False
    shard: tuple[int, int] | None = None
    limits: str | None = None


class NotebookQueue(Generic[QueuedT]):
    """The state of a running batch. A scheduler derives from it and runs the notebooks."""

    def __init__(
        self, plan: Plan, tree: OutputRoot, journal: Journal, listener: BatchListener
    ) -> None:
        self.plan, self.tree, self.listener = plan, tree, listener
        self.broadcast = SignalBroadcast()
        self.history = History.of_user()
        self.context = BatchContext(
            out=tree,
            jobs=plan.capacity.jobs,
            retry=plan.retry,
            journal=journal,
            history=self.history,
            kernels=Kernels(),
            broadcast=self.broadcast,
            sink=listener.sink,
            follower=listener.follower,
        )
        # Without --resume the records of the previous batch are not trusted: limits may differ.
        self.past = journal.past.finished if plan.resume else {}
        self.results: dict[str, NotebookResult] = {}
        self.todo = self._in_order()
        self.waiting: list[QueuedT] = []
        self.failed = False
        # The most notebooks that run at a time.
        self.jobs = plan.capacity.jobs
        # The reason why the batch could not go on, for the user.
        self.trouble: str | None = None

    async def run(self) -> None:
        """Run all notebooks; on return each has a result and nothing is running."""
        raise NotImplementedError

    def enqueue(
        self, task: NotebookTask, prepared: PreparedJob, inputs: Mapping[str, str | None]
    ) -> QueuedT | JournalRecord:
        """Return the queue's entry for a notebook, or the record of a notebook that cannot run.

        ``inputs`` are the hashes of the files that the notebook declares. Called on any thread.
        """
        raise NotImplementedError

    def _in_order(self) -> list[SelectedNotebook]:
        """Return all notebooks, the longest first."""
        by_path = {notebook.path: notebook for notebook in self.plan.notebooks}
        seconds, sizes = {}, {}
        for path, notebook in by_path.items():
            duration = self.history.get(notebook.source).seconds
            if duration is not None:
                seconds[path] = duration
            with contextlib.suppress(OSError):
                sizes[path] = notebook.source.stat().st_size
        return [by_path[path] for path in longest_first(list(by_path), seconds, sizes)]

    @property
    def stopped(self) -> bool:
        """Whether the batch must not start any more notebooks."""
        return bool(self.broadcast.signals) or (self.plan.fail_fast and self.failed)

    async def read_notebook(self, notebook: SelectedNotebook) -> None:
        """Read a notebook: queue it, or record that it is finished, unchanged or unusable."""
        task = NotebookTask(notebook=notebook, job=job_of(self.plan, notebook, self.tree))
        try:
            outcome = await asyncio.to_thread(self._survey, task)
        except UsageError as error:
            self.finish(notebook, refused(task, error))
            return
        if isinstance(outcome, JournalRecord):
            self.finish(notebook, outcome)
        elif isinstance(outcome, NotebookResult):
            self._show(outcome, "passed before, and nothing has changed")
        else:
            self.waiting.append(outcome)

    def _survey(self, task: NotebookTask) -> QueuedT | JournalRecord | NotebookResult:
        prepared = prepare(task.job)
        # Input patterns are checked here, so that a wrong one is reported before anything runs.
        inputs = inputs_of(prepared)
        record = self.past.get(task.notebook.path)
        if (
            record is not None
            and record.key == key_of_run(prepared)
            and _documents_exist(record, self.tree.path)
        ):
            return record
        if self.plan.only_changed and self._passed_before(task, prepared, inputs):
            return not_run(task.notebook, UNCHANGED)
        # A finished or unchanged notebook never gets here, so no kernel starts for it.
        return self.enqueue(task, prepared, inputs)

    def _passed_before(
        self, task: NotebookTask, prepared: PreparedJob, inputs: dict[str, str | None]
    ) -> bool:
        # Compared last: collecting the packages of a kernel takes half a second.
        key = self.history.get(task.notebook.source).passed
        if key is None:
            return False
        environment = self.kernel_environment(prepared.kernel_name)
        if environment is None:
            return False
        return key == pass_key(key_of_run(prepared), prepared.paths.cwd, environment, inputs)

    def kernel_environment(self, name: str) -> str | None:
        """Describe a kernel and its packages where notebooks run; ``None`` if that is not known.

        Called on any thread but that of the event loop.
        """
        return self.context.kernels.environment(name)

    def finish(self, notebook: SelectedNotebook, record: JournalRecord) -> None:
        """Store and show the record of a notebook that finished or cannot run."""
        self.failed = self.failed or record.exit_code != 0
        self._show(_result_of(record, notebook, self.tree.path), record.headline)

    def _show(self, result: NotebookResult, headline: str) -> None:
        self.results[result.path] = result
        self.listener.finished(result, headline)


def job_of(plan: Plan, notebook: SelectedNotebook, tree: OutputRoot) -> Job:
    """Return the job of one notebook; its documents go below the output directory."""
    base = plan.out / notebook.documents
    return replace(
        plan.template,
        path=notebook.source,
        output=base.with_name(f"{base.name}.out.ipynb"),
        verdict=base.with_name(f"{base.name}.verdict.json"),
        repro=base.with_name(f"{base.name}.repro.ipynb"),
        own_paths=(plan.out,),
        tree=tree,
        command=plan.command,
    )


def _documents_exist(record: JournalRecord, out: Path) -> bool:
    # Somebody may have deleted documents since the earlier batch: such a notebook runs again.
    return record.verdict is not None and all(
        (out / name).is_file()
        for name in (record.verdict, record.notebook, record.repro)
        if name is not None
    )


def _result_of(record: JournalRecord, notebook: SelectedNotebook, out: Path) -> NotebookResult:
    return NotebookResult(
        path=notebook.path,
        status=record.status,
        exit_code=record.exit_code,
        seconds=record.seconds,
        attempts=record.attempts,
        flaky=record.flaky,
        error=record.error,
        verdict=out / record.verdict if record.verdict is not None else None,
        notebook=out / record.notebook if record.notebook is not None else None,
        repro=out / record.repro if record.repro is not None else None,
        source=notebook.source,
        losses=record.losses,
    )


def not_run(notebook: SelectedNotebook, status: str = NOT_RUN) -> NotebookResult:
    """Return the result of a notebook that did not run in this batch."""
    return NotebookResult(
        path=notebook.path,
        status=status,
        exit_code=None,
        seconds=None,
        attempts=0,
        flaky=False,
        error=None,
        verdict=None,
        notebook=None,
        repro=None,
        source=notebook.source,
    )
