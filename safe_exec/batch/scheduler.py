"""Run a batch: admit, run, record, report.

The main thread only decides; each notebook runs on its own thread (``worker``). Signals are handled
once, here, and broadcast to every run.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from msgspec import Struct, field
from msgspec.structs import replace

from safe_exec._version import __version__
from safe_exec.batch.admission import admits_prestart, first_fitting, max_prestarted
from safe_exec.batch.journal import Journal, JournalRecord
from safe_exec.batch.outcome import exit_code, worst
from safe_exec.batch.queue import BatchListener, NotebookQueue, Plan, not_run
from safe_exec.batch.worker import NotebookTask, StartGate, reserve_for_others, run_task
from safe_exec.files import OutputRoot, one_line
from safe_exec.model.limits import FolderUse
from safe_exec.model.verdict import Status
from safe_exec.reports.batch.results import NOT_RUN, BatchResult, NotebookResult
from safe_exec.sandbox.keeper_process import ForkServer
from safe_exec.workflows.job import PreparedJob
from safe_exec.workflows.signals import signals

log = logging.getLogger("safe_exec")

LOOK_AHEAD = 32
"""How many waiting notebooks are considered if the first in line does not fit."""
DRAW_SECONDS = 0.2


class QueuedNotebook(Struct, frozen=True, kw_only=True):
    """A notebook that runs as soon as there is capacity.

    ``memory`` is its memory limit in bytes. ``prestarts`` is true if its sandbox may be built
    before its turn.
    """

    task: NotebookTask
    memory: int | None
    prestarts: bool
    gate: StartGate = field(default_factory=StartGate)


class Scheduler(NotebookQueue[QueuedNotebook]):
    """Runs the notebooks of a batch on this machine, as many at a time as there is capacity."""

    def __init__(
        self, plan: Plan, tree: OutputRoot, journal: Journal, listener: BatchListener
    ) -> None:
        super().__init__(plan, tree, journal, listener)
        self.ready: dict[asyncio.Future[JournalRecord | None], QueuedNotebook] = {}
        self.running: dict[asyncio.Future[JournalRecord | None], QueuedNotebook] = {}

    def enqueue(
        self,
        task: NotebookTask,
        prepared: PreparedJob,
        inputs: Mapping[str, str | None],  # noqa: ARG002 - hashed again just before the run
    ) -> QueuedNotebook:
        """Return the queue's entry for a notebook."""
        limits = prepared.limits.values
        # With a copied folder the sandbox copies the files when it is built. Built early, it would
        # miss what other notebooks write until its turn.
        prestarts = limits.disk is None and prepared.limits.isolation.folder is not FolderUse.COPY
        job = reserve_for_others(
            task.job, limits, self.plan.capacity.jobs + max_prestarted(self.plan.capacity)
        )
        return QueuedNotebook(
            task=replace(task, job=job), memory=limits.memory, prestarts=prestarts
        )

    # --- the run --------------------------------------------------------------------------------

    async def run(self) -> None:
        """Run all notebooks; on return each has a result and nothing is running."""
        with ThreadPoolExecutor(
            self.plan.capacity.jobs + max_prestarted(self.plan.capacity), "notebook"
        ) as pool:
            try:
                while True:
                    while not self.stopped and (queued := await self._next()) is not None:
                        self._start(queued, pool)
                    # Kernels take about as long to start as a short notebook takes to run: the next
                    # ones start while these run, and wait at their gates.
                    while (
                        not self.stopped and (candidate := await self._next_prestart()) is not None
                    ):
                        self.ready[self._submit(candidate, pool)] = candidate
                    if self.stopped:
                        self._refuse()
                    if not self.running and not self.ready:
                        break
                    finished_futures, _ = await asyncio.wait(
                        [*self.running, *self.ready], return_when=asyncio.FIRST_COMPLETED
                    )
                    for future in finished_futures:
                        self._record_result(future)
            except BaseException:
                # The pool waits for its threads on exit, so each has to end: none may stay behind
                # with a kernel.
                self._refuse()
                self.broadcast.receive(signal.SIGTERM)
                raise
        for notebook in (*(queued.task.notebook for queued in self.waiting), *self.todo):
            self.results[notebook.path] = not_run(notebook, NOT_RUN)

    def _submit(
        self, queued: QueuedNotebook, pool: ThreadPoolExecutor
    ) -> asyncio.Future[JournalRecord | None]:
        return asyncio.get_running_loop().run_in_executor(
            pool, run_task, queued.task, self.context, queued.gate
        )

    def _start(self, queued: QueuedNotebook, pool: ThreadPoolExecutor) -> None:
        queued.gate.open()
        # A notebook whose kernel started ahead of its turn already has a thread.
        future = next((future for future, ready in self.ready.items() if ready is queued), None)
        if future is None:
            future = self._submit(queued, pool)
        else:
            del self.ready[future]
        self.running[future] = queued

    def _refuse(self) -> None:
        for queued in self.ready.values():
            queued.gate.refuse()

    def _record_result(self, future: asyncio.Future[JournalRecord | None]) -> None:
        """Record the result of a notebook that ended or that was not allowed to start."""
        queued = self.running.pop(future, None) or self.ready.pop(future)
        record = future.result()
        # Without a record the gate was refused: nothing of the notebook ran.
        if record is None:
            self.results[queued.task.notebook.path] = not_run(queued.task.notebook, NOT_RUN)
        else:
            self.finish(queued.task.notebook, record)

    async def _next(self) -> QueuedNotebook | None:
        """Remove and return the first waiting notebook that may start, reading more as needed."""
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
            # Reading a notebook takes time. Enough of them are read to find one that fits, no more.
            full = len(self.running) >= self.plan.capacity.jobs or len(self.waiting) >= LOOK_AHEAD
            if full or not self.todo or self.stopped:
                return None
            await self.read_notebook(self.todo.pop(0))

    async def _next_prestart(self) -> QueuedNotebook | None:
        """Return the first waiting notebook if its kernel may start ahead of its turn."""
        if not admits_prestart(
            self.plan.capacity, [queued.memory for queued in self.running.values()], len(self.ready)
        ):
            return None
        while not self.waiting and self.todo and not self.stopped:
            await self.read_notebook(self.todo.pop(0))
        return self.waiting.pop(0) if self.waiting and self.waiting[0].prestarts else None


def _moved(result: NotebookResult, old_root: Path, new_root: Path) -> NotebookResult:
    # The output directory may have been moved during the batch; results name its current path.
    documents = {name: getattr(result, name) for name in ("verdict", "notebook", "repro")}
    moved = {
        name: new_root / path.relative_to(old_root)
        for name, path in documents.items()
        if path and path.is_relative_to(old_root)
    }
    return replace(result, **moved) if new_root != old_root else result


SchedulerFactory = Callable[[Plan, OutputRoot, Journal, BatchListener], NotebookQueue[Any]]


async def run_batch(
    plan: Plan,
    listener: BatchListener,
    report: Callable[[BatchResult], int],
    scheduler_of: SchedulerFactory = Scheduler,
) -> BatchResult:
    """Run a batch and return its result.

    ``scheduler_of`` makes the scheduler: the default runs the notebooks on this machine.

    ``report`` writes the reports and returns an exit code that may be worse than the batch's own.
    Whatever ends the batch, except SIGKILL, all documents and reports are written on return. Raises
    UsageError before anything runs if the output directory cannot be used.
    """
    started, began = datetime.now(UTC), time.monotonic()
    # The root is opened before anything runs: a notebook may move it away or replace it by a link.
    # The fork server imports what keepers need once, for all of them.
    with (
        OutputRoot(plan.out) as tree,
        Journal(plan.out, resume=plan.resume) as journal,
        ForkServer(),
    ):
        scheduler = scheduler_of(plan, tree, journal, listener)
        with signals(scheduler.broadcast.receive):
            journal.batch_started(
                version=__version__,
                command=plan.command,
                root=str(plan.root),
                notebooks=len(plan.notebooks),
                shard=plan.shard,
            )
            if not plan.resume and not journal.past.empty and not journal.past.complete:
                listener.note(
                    f"the previous batch in {one_line(plan.out)} did not finish; "
                    "this one starts from the beginning (--resume continues it)"
                )
            listener.begin(len(plan.notebooks), plan.capacity.jobs)
            # Drawn by time, not by event: a notebook that computes emits no events.
            drawing = asyncio.create_task(_draw_forever(listener))
            try:
                await scheduler.run()
            finally:
                drawing.cancel()
            results = tuple(
                _moved(scheduler.results[notebook.path], plan.out, tree.path)
                for notebook in plan.notebooks
            )
            cancelled = bool(scheduler.broadcast.signals)
            code = exit_code(results, cancelled=cancelled)
            if scheduler.trouble is not None:
                log.error("%s", one_line(scheduler.trouble))
                code = worst((code, Status.INTERNAL_ERROR.exit_code))
            batch = BatchResult(
                results=results,
                root=plan.root,
                out=tree.path,
                started=started,
                seconds=time.monotonic() - began,
                exit_code=code,
                command=plan.command,
                safe_exec_version=__version__,
                limits=plan.limits,
                shard=plan.shard,
                jobs=max(1, scheduler.jobs),
                cancelled=cancelled,
                resumed=plan.resume and not journal.past.empty,
            )
            if batch.out != plan.out:
                log.warning(
                    "%s was moved away while notebooks ran; all is in %s",
                    one_line(plan.out),
                    one_line(batch.out),
                )
            # Reports come before the journal's last line: a batch without reports is not complete.
            batch = replace(batch, exit_code=report(batch))
            if not cancelled and not any(result.status == NOT_RUN for result in results):
                journal.batch_finished(exit_code=batch.exit_code)
            if journal.trouble is not None:
                log.error(
                    "%s: could not be written: %s; --resume will run more notebooks again",
                    one_line(journal.path),
                    journal.trouble.strerror,
                )
            # Last, because the user waits for the reports, not for this.
            scheduler.history.tidy()
    return batch


async def _draw_forever(listener: BatchListener) -> None:
    while True:
        listener.draw()
        await asyncio.sleep(DRAW_SECONDS)
