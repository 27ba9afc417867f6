"""The whole of ``batch``: admit, run, record, report. May import pipeline and what is below.

The main thread only decides; each notebook runs on a thread of its own (``worker``). Signals are taken once, here, and told to every run.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from msgspec import Struct, field
from msgspec.structs import replace

from safe_exec._version import __version__
from safe_exec.batch.admission import Capacity, admits_ahead, first_fitting, most_ahead
from safe_exec.batch.fingerprint import Kernels, inputs_of, key_of_pass, key_of_run
from safe_exec.batch.history import History
from safe_exec.batch.journal import Journal, JournalRecord
from safe_exec.batch.ordering import longest_first
from safe_exec.batch.outcome import exit_code
from safe_exec.batch.selection import SelectedNotebook
from safe_exec.batch.worker import (
    BatchContext,
    NotebookTask,
    SignalBroadcast,
    StartGate,
    beside_others,
    refused,
    run_task,
)
from safe_exec.errors import UsageError
from safe_exec.files import OutputRoot, one_line
from safe_exec.model.events import EventSink
from safe_exec.model.limits import FolderUse
from safe_exec.reports.batch.results import NOT_RUN, UNCHANGED, BatchResult, NotebookResult
from safe_exec.sandbox.keeper_process import Nursery
from safe_exec.workflows.prepare import Job, PreparedJob, prepare
from safe_exec.workflows.run import signals

log = logging.getLogger("safe_exec")

LOOK_AHEAD = 32
"""How many of those that wait are looked at for one that fits, when the first does not."""
DRAW_SECONDS = 0.2


class BatchListener(Protocol):
    """Whoever shows the batch while it runs. Events come on the threads of the notebooks, all else on the main one."""

    def begin(self, total: int, jobs: int) -> None:
        """So many notebooks, so many at a time."""

    def note(self, text: str) -> None:
        """Something that the user should know."""

    def sink(self, path: str, attempt: int) -> EventSink:
        """The watcher's end of a notebook's events."""

    def finished(self, result: NotebookResult, headline: str) -> None:
        """A notebook came to its end, or needs not be run; ``headline`` is its verdict in one line."""

    def draw(self) -> None:
        """Called every now and then."""


class Plan(Struct, frozen=True, kw_only=True):
    """A batch as it was asked for. ``template`` is the job of every notebook but for its paths. ``limits`` is what ``--limits`` named."""

    notebooks: tuple[SelectedNotebook, ...]
    root: Path
    out: Path
    capacity: Capacity
    template: Job
    command: tuple[str, ...]
    retries: int = 0
    fail_fast: bool = False
    resume: bool = False
    only_changed: bool = False
    shard: tuple[int, int] | None = None
    limits: str | None = None


class _QueuedNotebook(Struct, frozen=True, kw_only=True):
    """A notebook that can run as soon as there is room; ``memory`` is its limit in bytes. ``early``: its sandbox may be built before its turn."""

    task: NotebookTask
    memory: int | None
    prestarts: bool
    gate: StartGate = field(default_factory=StartGate)


class _Scheduler:
    """The state of a batch that runs."""

    def __init__(
        self, plan: Plan, tree: OutputRoot, journal: Journal, watcher: BatchListener
    ) -> None:
        self.plan, self.tree, self.watcher = plan, tree, watcher
        self.broadcast = SignalBroadcast()
        self.history = History.of_user()
        self.context = BatchContext(
            out=tree,
            jobs=plan.capacity.jobs,
            retries=plan.retries,
            journal=journal,
            history=self.history,
            kernels=Kernels(),
            broadcast=self.broadcast,
            sink=watcher.sink,
        )
        self.past = journal.past.finished if plan.resume else {}
        self.results: dict[str, NotebookResult] = {}
        self.todo = self._in_order()
        self.waiting: list[_QueuedNotebook] = []
        self.ready: dict[asyncio.Future[JournalRecord | None], _QueuedNotebook] = {}
        self.running: dict[asyncio.Future[JournalRecord | None], _QueuedNotebook] = {}
        self.failed = False

    def _in_order(self) -> list[SelectedNotebook]:
        """Those still to be looked at, the longest first."""
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
        """Whether nothing more is to be started."""
        return bool(self.broadcast.signals) or (self.plan.fail_fast and self.failed)

    # --- the run ------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Run all; when this returns every notebook has an entry and nothing is under way."""
        with ThreadPoolExecutor(
            self.plan.capacity.jobs + most_ahead(self.plan.capacity), "notebook"
        ) as pool:
            try:
                while True:
                    while not self.stopped and (queued := await self._next()) is not None:
                        self._start(queued, pool)
                    while not self.stopped and (candidate := await self._next_ahead()) is not None:
                        self.ready[self._submit(candidate, pool)] = candidate
                    if self.stopped:
                        self._refuse()
                    if not self.running and not self.ready:
                        break
                    finished_futures, _ = await asyncio.wait(
                        [*self.running, *self.ready], return_when=asyncio.FIRST_COMPLETED
                    )
                    for future in finished_futures:
                        self._take(future)
            except BaseException:
                # Whatever went wrong here: no thread may be left with a kernel, and the pool waits for them.
                self._refuse()
                self.broadcast.receive(signal.SIGTERM)
                raise
        for notebook in (*(queued.task.notebook for queued in self.waiting), *self.todo):
            self.results[notebook.path] = _not_run(notebook, NOT_RUN)

    def _submit(
        self, queued: _QueuedNotebook, pool: ThreadPoolExecutor
    ) -> asyncio.Future[JournalRecord | None]:
        return asyncio.get_running_loop().run_in_executor(
            pool, run_task, queued.task, self.context, queued.gate
        )

    def _start(self, queued: _QueuedNotebook, pool: ThreadPoolExecutor) -> None:
        """Let it run; one that was got ready is on a thread already."""
        queued.gate.open()
        future = next((future for future, ready in self.ready.items() if ready is queued), None)
        if future is None:
            future = self._submit(queued, pool)
        else:
            del self.ready[future]
        self.running[future] = queued

    def _refuse(self) -> None:
        """None of those that are ready is going to run."""
        for queued in self.ready.values():
            queued.gate.refuse()

    def _take(self, future: asyncio.Future[JournalRecord | None]) -> None:
        """What became of one that ran, or was got ready."""
        queued = self.running.pop(future, None) or self.ready.pop(future)
        record = future.result()
        if record is None:
            self.results[queued.task.notebook.path] = _not_run(queued.task.notebook, NOT_RUN)
        else:
            self._finish(queued.task.notebook, record)

    async def _next(self) -> _QueuedNotebook | None:
        """The first in line that may start now."""
        while True:
            limits = [queued.memory for queued in self.running.values()]
            line = [*self.ready.values(), *self.waiting]
            at = first_fitting(
                self.plan.capacity, limits, [queued.memory for queued in line], len(self.ready)
            )
            if at is not None:
                queued = line[at]
                if at >= len(self.ready):
                    del self.waiting[at - len(self.ready)]
                return queued
            full = len(self.running) >= self.plan.capacity.jobs or len(self.waiting) >= LOOK_AHEAD
            if full or not self.todo or self.stopped:
                return None
            await self._look_at(self.todo.pop(0))

    async def _next_ahead(self) -> _QueuedNotebook | None:
        """The first in line, whose kernel may start by now though its turn has not come."""
        if not admits_ahead(
            self.plan.capacity, [queued.memory for queued in self.running.values()], len(self.ready)
        ):
            return None
        while not self.waiting and self.todo and not self.stopped:
            await self._look_at(self.todo.pop(0))
        return self.waiting.pop(0) if self.waiting and self.waiting[0].prestarts else None

    async def _look_at(self, notebook: SelectedNotebook) -> None:
        """Read a notebook: it waits from now on, or needs not be run, or cannot be."""
        task = NotebookTask(notebook=notebook, job=job_of(self.plan, notebook, self.tree))
        try:
            outcome = await asyncio.to_thread(self._survey, task)
        except UsageError as error:
            self._finish(notebook, refused(task, error))
            return
        if isinstance(outcome, _QueuedNotebook):
            self.waiting.append(outcome)
        elif isinstance(outcome, JournalRecord):
            self._finish(notebook, outcome)
        else:
            self._show(outcome, "passed before, and nothing has changed")

    def _survey(self, task: NotebookTask) -> _QueuedNotebook | JournalRecord | NotebookResult:
        prepared = prepare(task.job)
        inputs = inputs_of(prepared)  # wrong ones are found before anything runs
        record = self.past.get(task.notebook.path)
        if (
            record is not None
            and record.key == key_of_run(prepared)
            and _stands(record, self.tree.path)
        ):
            return record
        if self.plan.only_changed and self._passed_before(task, prepared, inputs):
            return _not_run(task.notebook, UNCHANGED)
        limits = prepared.limits.values
        # A copy of the folder is made with the sandbox: what others write there until its turn comes would not be in it.
        prestarts = limits.disk is None and prepared.limits.isolation.folder is not FolderUse.COPY
        job = beside_others(
            task.job, limits, self.plan.capacity.jobs + most_ahead(self.plan.capacity)
        )
        return _QueuedNotebook(
            task=replace(task, job=job), memory=limits.memory, prestarts=prestarts
        )

    def _passed_before(
        self, task: NotebookTask, prepared: PreparedJob, inputs: dict[str, str | None]
    ) -> bool:
        key = self.history.get(task.notebook.source).passed
        return key is not None and key == key_of_pass(prepared, self.context.kernels, inputs)

    def _finish(self, notebook: SelectedNotebook, record: JournalRecord) -> None:
        self.failed = self.failed or record.exit_code != 0
        self._show(_entry_of(record, notebook, self.tree.path), record.headline)

    def _show(self, result: NotebookResult, headline: str) -> None:
        self.results[result.path] = result
        self.watcher.finished(result, headline)


def job_of(plan: Plan, notebook: SelectedNotebook, tree: OutputRoot) -> Job:
    """The job of one notebook: it runs in its own folder, and its documents go below the output directory, which is held."""
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


def _stands(record: JournalRecord, out: Path) -> bool:
    """Whether the documents of a finished notebook are still there."""
    return record.verdict is not None and all(
        (out / name).is_file()
        for name in (record.verdict, record.notebook, record.repro)
        if name is not None
    )


def _entry_of(record: JournalRecord, notebook: SelectedNotebook, out: Path) -> NotebookResult:
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
    )


def _moved(result: NotebookResult, old_root: Path, new_root: Path) -> NotebookResult:
    """The entry, whose documents moved with the output directory."""
    documents = {name: getattr(result, name) for name in ("verdict", "notebook", "repro")}
    moved = {
        name: new_root / path.relative_to(old_root)
        for name, path in documents.items()
        if path and path.is_relative_to(old_root)
    }
    return replace(result, **moved) if new_root != old_root else result


def _not_run(notebook: SelectedNotebook, status: str) -> NotebookResult:
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


async def run_batch(
    plan: Plan, watcher: BatchListener, report: Callable[[BatchResult], int]
) -> BatchResult:
    """Run a batch; ``report`` writes what is written of it in the end, and returns an exit code that may be worse.

    Whatever ends it, SIGKILL excepted, every notebook has its documents and all reports are written when this returns. Raises UsageError,
    before anything is run, where the output directory cannot be used.
    """
    started, began = datetime.now(UTC), time.monotonic()
    with OutputRoot(plan.out) as tree, Journal(plan.out, resume=plan.resume) as journal, Nursery():
        run = _Scheduler(plan, tree, journal, watcher)
        with signals(run.broadcast.receive):
            journal.batch_started(
                version=__version__,
                command=plan.command,
                root=str(plan.root),
                notebooks=len(plan.notebooks),
            )
            if not plan.resume and not journal.past.empty and not journal.past.complete:
                watcher.note(
                    f"the batch before in {one_line(plan.out)} was not finished; this one begins anew (--resume goes on with it)"
                )
            watcher.begin(len(plan.notebooks), plan.capacity.jobs)
            drawing = asyncio.create_task(_draw_forever(watcher))
            try:
                await run.run()
            finally:
                drawing.cancel()
            results = tuple(
                _moved(run.results[notebook.path], plan.out, tree.path)
                for notebook in plan.notebooks
            )
            cancelled = bool(run.broadcast.signals)
            batch = BatchResult(
                results=results,
                root=plan.root,
                out=tree.path,
                started=started,
                seconds=time.monotonic() - began,
                exit_code=exit_code(results, cancelled=cancelled),
                command=plan.command,
                safe_exec_version=__version__,
                limits=plan.limits,
                shard=plan.shard,
                jobs=plan.capacity.jobs,
                cancelled=cancelled,
                resumed=plan.resume and not journal.past.empty,
            )
            if batch.out != plan.out:
                log.warning(
                    "%s was moved away while notebooks ran; all is in %s",
                    one_line(plan.out),
                    one_line(batch.out),
                )
            batch = replace(batch, exit_code=report(batch))
            if not cancelled and not any(result.status == NOT_RUN for result in results):
                journal.batch_finished(exit_code=batch.exit_code)
            if journal.trouble is not None:
                log.error(
                    "%s: could not be written: %s; --resume will run more again",
                    one_line(journal.path),
                    journal.trouble.strerror,
                )
            run.history.tidy()
    return batch


async def _draw_forever(watcher: BatchListener) -> None:
    while True:
        watcher.draw()
        await asyncio.sleep(DRAW_SECONDS)
