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
from safe_exec.batch.admission import Room, admits_ahead, first_fitting, most_ahead
from safe_exec.batch.fingerprint import Kernels, inputs_of, key_of_pass, key_of_run
from safe_exec.batch.history import History
from safe_exec.batch.journal import Finished, Journal
from safe_exec.batch.ordering import longest_first
from safe_exec.batch.outcome import exit_code
from safe_exec.batch.selection import Chosen
from safe_exec.batch.worker import Shared, Stops, Task, Turn, beside_others, refused, run_task
from safe_exec.errors import UsageError
from safe_exec.files import HeldTree, one_line
from safe_exec.model.events import EventSink
from safe_exec.model.limits import FolderUse
from safe_exec.reports.batch.results import NOT_RUN, UNCHANGED, Batch, Entry
from safe_exec.sandbox.keeper_process import Nursery
from safe_exec.workflows.prepare import Job, Prepared, prepare
from safe_exec.workflows.run import signals

log = logging.getLogger("safe_exec")

LOOK_AHEAD = 32
"""How many of those that wait are looked at for one that fits, when the first does not."""
DRAW_SECONDS = 0.2


class Watcher(Protocol):
    """Whoever shows the batch while it runs. Events come on the threads of the notebooks, all else on the main one."""

    def begin(self, total: int, jobs: int) -> None:
        """So many notebooks, so many at a time."""

    def note(self, words: str) -> None:
        """Something that the user should know."""

    def sink(self, path: str, attempt: int) -> EventSink:
        """The watcher's end of a notebook's events."""

    def finished(self, entry: Entry, headline: str) -> None:
        """A notebook came to its end, or needs not be run; ``headline`` is its verdict in one line."""

    def draw(self) -> None:
        """Called every now and then."""


class Plan(Struct, frozen=True, kw_only=True):
    """A batch as it was asked for. ``template`` is the job of every notebook but for its paths. ``limits`` is what ``--limits`` named."""

    chosen: tuple[Chosen, ...]
    root: Path
    out: Path
    room: Room
    template: Job
    command: tuple[str, ...]
    retries: int = 0
    fail_fast: bool = False
    resume: bool = False
    only_changed: bool = False
    shard: tuple[int, int] | None = None
    limits: str | None = None


class _Waiting(Struct, frozen=True, kw_only=True):
    """A notebook that can run as soon as there is room; ``memory`` is its limit in bytes. ``early``: its sandbox may be built before its turn."""

    task: Task
    memory: int | None
    early: bool
    turn: Turn = field(default_factory=Turn)


class _Run:
    """The state of a batch that runs."""

    def __init__(self, plan: Plan, tree: HeldTree, journal: Journal, watcher: Watcher) -> None:
        self.plan, self.tree, self.watcher = plan, tree, watcher
        self.stops = Stops()
        self.history = History.of_user()
        self.shared = Shared(
            out=tree,
            jobs=plan.room.jobs,
            retries=plan.retries,
            journal=journal,
            history=self.history,
            kernels=Kernels(),
            stops=self.stops,
            sink=watcher.sink,
        )
        self.past = journal.past.finished if plan.resume else {}
        self.entries: dict[str, Entry] = {}
        self.todo = self._in_order()
        self.waiting: list[_Waiting] = []
        self.ready: dict[asyncio.Future[Finished | None], _Waiting] = {}
        self.running: dict[asyncio.Future[Finished | None], _Waiting] = {}
        self.failed = False

    def _in_order(self) -> list[Chosen]:
        """Those still to be looked at, the longest first."""
        by_path = {chosen.path: chosen for chosen in self.plan.chosen}
        seconds, sizes = {}, {}
        for path, chosen in by_path.items():
            known = self.history.get(chosen.source).seconds
            if known is not None:
                seconds[path] = known
            with contextlib.suppress(OSError):
                sizes[path] = chosen.source.stat().st_size
        return [by_path[path] for path in longest_first(list(by_path), seconds, sizes)]

    @property
    def stopped(self) -> bool:
        """Whether nothing more is to be started."""
        return bool(self.stops.signals) or (self.plan.fail_fast and self.failed)

    # --- the run ------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Run all; when this returns every notebook has an entry and nothing is under way."""
        with ThreadPoolExecutor(
            self.plan.room.jobs + most_ahead(self.plan.room), "notebook"
        ) as pool:
            try:
                while True:
                    while not self.stopped and (found := await self._next()) is not None:
                        self._start(found, pool)
                    while not self.stopped and (ahead := await self._next_ahead()) is not None:
                        self.ready[self._submit(ahead, pool)] = ahead
                    if self.stopped:
                        self._refuse()
                    if not self.running and not self.ready:
                        break
                    done, _ = await asyncio.wait(
                        [*self.running, *self.ready], return_when=asyncio.FIRST_COMPLETED
                    )
                    for future in done:
                        self._take(future)
            except BaseException:
                # Whatever went wrong here: no thread may be left with a kernel, and the pool waits for them.
                self._refuse()
                self.stops.arrive(signal.SIGTERM)
                raise
        for chosen in (*(found.task.chosen for found in self.waiting), *self.todo):
            self.entries[chosen.path] = _not_run(chosen, NOT_RUN)

    def _submit(self, found: _Waiting, pool: ThreadPoolExecutor) -> asyncio.Future[Finished | None]:
        return asyncio.get_running_loop().run_in_executor(
            pool, run_task, found.task, self.shared, found.turn
        )

    def _start(self, found: _Waiting, pool: ThreadPoolExecutor) -> None:
        """Let it run; one that was got ready is on a thread already."""
        found.turn.give()
        future = next((future for future, ready in self.ready.items() if ready is found), None)
        if future is None:
            future = self._submit(found, pool)
        else:
            del self.ready[future]
        self.running[future] = found

    def _refuse(self) -> None:
        """None of those that are ready is going to run."""
        for found in self.ready.values():
            found.turn.refuse()

    def _take(self, future: asyncio.Future[Finished | None]) -> None:
        """What became of one that ran, or was got ready."""
        found = self.running.pop(future, None) or self.ready.pop(future)
        record = future.result()
        if record is None:
            self.entries[found.task.chosen.path] = _not_run(found.task.chosen, NOT_RUN)
        else:
            self._finish(found.task.chosen, record)

    async def _next(self) -> _Waiting | None:
        """The first in line that may start now."""
        while True:
            limits = [found.memory for found in self.running.values()]
            line = [*self.ready.values(), *self.waiting]
            at = first_fitting(
                self.plan.room, limits, [found.memory for found in line], len(self.ready)
            )
            if at is not None:
                found = line[at]
                if at >= len(self.ready):
                    del self.waiting[at - len(self.ready)]
                return found
            full = len(self.running) >= self.plan.room.jobs or len(self.waiting) >= LOOK_AHEAD
            if full or not self.todo or self.stopped:
                return None
            await self._look_at(self.todo.pop(0))

    async def _next_ahead(self) -> _Waiting | None:
        """The first in line, whose kernel may start by now though its turn has not come."""
        if not admits_ahead(
            self.plan.room, [found.memory for found in self.running.values()], len(self.ready)
        ):
            return None
        while not self.waiting and self.todo and not self.stopped:
            await self._look_at(self.todo.pop(0))
        return self.waiting.pop(0) if self.waiting and self.waiting[0].early else None

    async def _look_at(self, chosen: Chosen) -> None:
        """Read a notebook: it waits from now on, or needs not be run, or cannot be."""
        task = Task(chosen=chosen, job=job_of(self.plan, chosen, self.tree))
        try:
            found = await asyncio.to_thread(self._survey, task)
        except UsageError as error:
            self._finish(chosen, refused(task, error))
            return
        if isinstance(found, _Waiting):
            self.waiting.append(found)
        elif isinstance(found, Finished):
            self._finish(chosen, found)
        else:
            self._show(found, "passed before, and nothing has changed")

    def _survey(self, task: Task) -> _Waiting | Finished | Entry:
        prepared = prepare(task.job)
        inputs = inputs_of(prepared)  # wrong ones are found before anything runs
        done = self.past.get(task.chosen.path)
        if done is not None and done.key == key_of_run(prepared) and _stands(done, self.tree.place):
            return done
        if self.plan.only_changed and self._passed_before(task, prepared, inputs):
            return _not_run(task.chosen, UNCHANGED)
        limits = prepared.resolved.limits
        # A copy of the folder is made with the sandbox: what others write there until its turn comes would not be in it.
        early = limits.disk is None and prepared.resolved.isolation.folder is not FolderUse.COPY
        job = beside_others(task.job, limits, self.plan.room.jobs + most_ahead(self.plan.room))
        return _Waiting(task=replace(task, job=job), memory=limits.memory, early=early)

    def _passed_before(self, task: Task, prepared: Prepared, inputs: dict[str, str | None]) -> bool:
        known = self.history.get(task.chosen.source).passed
        return known is not None and known == key_of_pass(prepared, self.shared.kernels, inputs)

    def _finish(self, chosen: Chosen, record: Finished) -> None:
        self.failed = self.failed or record.exit_code != 0
        self._show(_entry_of(record, chosen, self.tree.place), record.headline)

    def _show(self, entry: Entry, headline: str) -> None:
        self.entries[entry.path] = entry
        self.watcher.finished(entry, headline)


def job_of(plan: Plan, chosen: Chosen, tree: HeldTree) -> Job:
    """The job of one notebook: it runs in its own folder, and its documents go below the output directory, which is held."""
    base = plan.out / chosen.documents
    return replace(
        plan.template,
        path=chosen.source,
        output=base.with_name(f"{base.name}.out.ipynb"),
        verdict=base.with_name(f"{base.name}.verdict.json"),
        repro=base.with_name(f"{base.name}.repro.ipynb"),
        beside=(plan.out,),
        tree=tree,
        command=plan.command,
    )


def _stands(record: Finished, out: Path) -> bool:
    """Whether the documents of a finished notebook are still there."""
    return record.verdict is not None and all(
        (out / name).is_file()
        for name in (record.verdict, record.notebook, record.repro)
        if name is not None
    )


def _entry_of(record: Finished, chosen: Chosen, out: Path) -> Entry:
    return Entry(
        path=chosen.path,
        status=record.status,
        exit_code=record.exit_code,
        seconds=record.seconds,
        attempts=record.attempts,
        flaky=record.flaky,
        error=record.error,
        verdict=out / record.verdict if record.verdict is not None else None,
        notebook=out / record.notebook if record.notebook is not None else None,
        repro=out / record.repro if record.repro is not None else None,
        source=chosen.source,
    )


def _moved(entry: Entry, before: Path, now: Path) -> Entry:
    """The entry, whose documents moved with the output directory."""
    documents = {name: getattr(entry, name) for name in ("verdict", "notebook", "repro")}
    moved = {
        name: now / path.relative_to(before)
        for name, path in documents.items()
        if path and path.is_relative_to(before)
    }
    return replace(entry, **moved) if now != before else entry


def _not_run(chosen: Chosen, status: str) -> Entry:
    return Entry(
        path=chosen.path,
        status=status,
        exit_code=None,
        seconds=None,
        attempts=0,
        flaky=False,
        error=None,
        verdict=None,
        notebook=None,
        repro=None,
        source=chosen.source,
    )


async def run_batch(plan: Plan, watcher: Watcher, report: Callable[[Batch], int]) -> Batch:
    """Run a batch; ``report`` writes what is written of it in the end, and returns an exit code that may be worse.

    Whatever ends it, SIGKILL excepted, every notebook has its documents and all reports are written when this returns. Raises UsageError,
    before anything is run, where the output directory cannot be used.
    """
    started, began = datetime.now(UTC), time.monotonic()
    with HeldTree(plan.out) as tree, Journal(plan.out, resume=plan.resume) as journal, Nursery():
        run = _Run(plan, tree, journal, watcher)
        with signals(run.stops.arrive):
            journal.batch_started(
                version=__version__,
                command=plan.command,
                root=str(plan.root),
                notebooks=len(plan.chosen),
            )
            if not plan.resume and not journal.past.empty and not journal.past.complete:
                watcher.note(
                    f"the batch before in {one_line(plan.out)} was not finished; this one begins anew (--resume goes on with it)"
                )
            watcher.begin(len(plan.chosen), plan.room.jobs)
            drawing = asyncio.create_task(_draw_forever(watcher))
            try:
                await run.run()
            finally:
                drawing.cancel()
            entries = tuple(
                _moved(run.entries[chosen.path], plan.out, tree.place) for chosen in plan.chosen
            )
            cancelled = bool(run.stops.signals)
            batch = Batch(
                entries=entries,
                root=plan.root,
                out=tree.place,
                started=started,
                seconds=time.monotonic() - began,
                exit_code=exit_code(entries, cancelled=cancelled),
                command=plan.command,
                safe_exec_version=__version__,
                limits=plan.limits,
                shard=plan.shard,
                jobs=plan.room.jobs,
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
            if not cancelled and not any(entry.status == NOT_RUN for entry in entries):
                journal.batch_finished(exit_code=batch.exit_code)
            if journal.trouble is not None:
                log.error(
                    "%s: could not be written: %s; --resume will run more again",
                    one_line(journal.path),
                    journal.trouble.strerror,
                )
            run.history.tidy()
    return batch


async def _draw_forever(watcher: Watcher) -> None:
    while True:
        watcher.draw()
        await asyncio.sleep(DRAW_SECONDS)
