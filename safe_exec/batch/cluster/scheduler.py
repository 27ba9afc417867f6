"""Run the notebooks of a batch on the workers of a dask cluster.

dask places the tasks and repeats those whose worker was lost. This module keeps the facts that dask
cannot know: which notebooks have finished (the journal), which start is the first one, and how
often a notebook lost its worker. A task starts its notebook only with this module's permission, so
a notebook that is in the journal never runs again.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections import Counter
from collections.abc import Set as AbstractSet
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec.structs import replace

from safe_exec.batch.cluster import placement
from safe_exec.batch.cluster.connection import LOCAL, ClusterAddress, connected
from safe_exec.batch.cluster.flights import Flight, WaitingNotebook
from safe_exec.batch.cluster.messages import (
    Grant,
    NotStarted,
    RefusedNotebook,
    Reply,
    ShownEvent,
)
from safe_exec.batch.cluster.queue import ClusterQueue
from safe_exec.batch.cluster.transfers import FileTransfers
from safe_exec.batch.cluster.workers import ClusterWorkers
from safe_exec.batch.journal import Journal
from safe_exec.batch.outcome import REFUSED_CODE
from safe_exec.batch.queue import BatchListener, Plan, not_run
from safe_exec.files import OutputRoot, one_line
from safe_exec.reports.batch.results import REFUSED

if TYPE_CHECKING:
    from distributed import Client

WATCH_SECONDS = 1.0
"""The time between two looks at the workers of the cluster."""
FIRST_WATCH_SECONDS = 0.1
SIGNAL_SECONDS = 60.0
"""The time that notebooks have to end after a signal, with their search and their documents."""
SPARE = 4
"""Requests beyond the number of threads, so that no worker waits for the runner."""
_EVENTS = msgspec.json.Decoder(ShownEvent)


class ClusterScheduler(ClusterQueue):
    """Runs the notebooks of a batch on a cluster."""

    def __init__(
        self,
        plan: Plan,
        tree: OutputRoot,
        journal: Journal,
        listener: BatchListener,
        *,
        address: ClusterAddress,
    ) -> None:
        super().__init__(plan, tree, journal, listener)
        self.address = address
        self.batch = f"safe-exec-{uuid.uuid4().hex}"
        self.flights: dict[str, Flight] = {}
        self.tasks: dict[asyncio.Task[None], Flight] = {}
        self.changed = asyncio.Event()
        self.forwarded = 0
        self.stop_deadline: float | None = None
        self.adopted = False

    # --- the run --------------------------------------------------------------------------------

    async def run(self) -> None:
        """Run all notebooks; on return each has a result and nothing is running."""
        async with connected(self.address, self._local_memory()) as client:
            self.client: Client = client
            self.loop = asyncio.get_running_loop()
            self.workers = ClusterWorkers(
                client,
                self.address,
                mechanisms=self.plan.template.mechanisms,
                memory=self._local_memory(),
                note=self.listener.note,
            )
            self.transfers = FileTransfers(client, self.tree.path)
            if client.dashboard_link:
                self.listener.note(f"dask dashboard: {client.dashboard_link}")
            client.subscribe_topic(self.batch, self._receive_event)
            watching = asyncio.create_task(self._watch_workers())
            try:
                await self._run_all()
            finally:
                watching.cancel()
                for flight in self.flights.values():
                    await self._release(flight)
                self.transfers.close()
        for notebook in (*(waiting.task.notebook for waiting in self.waiting), *self.todo):
            self.results[notebook.path] = not_run(notebook)

    async def _run_all(self) -> None:
        await self._wait_for_workers()
        while True:
            self._adopt_memory()
            while not self.stopped and len(self.flights) < self._most_flights():
                waiting = await self._next()
                if waiting is None:
                    break
                self._submit(waiting)
            if self.stopped:
                await self._stop()
            if self.trouble is not None:
                await self._give_back()
                return
            if not self.tasks and (self.stopped or not (self.waiting or self.todo)):
                return
            await self._wait_for_change()

    async def _give_back(self) -> None:
        """Abandon all notebooks after the loss of the dask scheduler.

        --resume can run them later.
        """
        for task in self.tasks:
            task.cancel()
        await asyncio.wait(self.tasks) if self.tasks else None
        for flight in self.tasks.values():
            if flight.waiting.task.notebook.path not in self.results:
                self.results[flight.waiting.task.notebook.path] = not_run(
                    flight.waiting.task.notebook
                )

    async def _wait_for_workers(self) -> None:
        is_announced = False
        while not self.workers.usable and not self.stopped and self.trouble is None:
            if not is_announced and self.address.kind != LOCAL:
                self.listener.note(f"waiting for workers of {self.address.text}")
                is_announced = True
            await self._wait_for_change()

    async def _wait_for_change(self) -> None:
        """Wait until a notebook ends, a worker comes or goes, or a signal arrives."""
        self.changed.clear()
        waker = asyncio.create_task(self.changed.wait())
        # Signals only leave a number behind, so they are looked for now and then.
        finished_tasks, _ = await asyncio.wait(
            [waker, *self.tasks], timeout=FIRST_WATCH_SECONDS, return_when=asyncio.FIRST_COMPLETED
        )
        waker.cancel()
        for task in finished_tasks - {waker}:
            del self.tasks[task]  # type: ignore[arg-type]
            task.result()

    def _most_flights(self) -> int:
        threads = self.workers.threads
        # Without a worker nothing is submitted: see _place_again.
        if not threads:
            return 0
        jobs = self.plan.capacity.jobs
        return min(jobs, threads + SPARE) if jobs else threads + SPARE

    async def _next(self) -> WaitingNotebook | None:
        """Remove and return the first waiting notebook, reading more as needed."""
        while not self.waiting and self.todo and not self.stopped:
            await self.read_notebook(self.todo.pop(0))
        return self.waiting.pop(0) if self.waiting else None

    # --- the workers ----------------------------------------------------------------------------

    async def _watch_workers(self) -> None:
        """Keep ``workers`` up to date; record the loss of the dask scheduler in ``trouble``."""
        while self.trouble is None:
            try:
                await self._update_workers()
            # Whatever the transport raises, the scheduler cannot be asked any more.
            except Exception as error:  # noqa: BLE001
                self.trouble = (
                    f"the dask scheduler of {self.address.text} was lost ({one_line(error)}); "
                    "finished notebooks are recorded; continue with --resume"
                )
                self.changed.set()
                return
            await asyncio.sleep(WATCH_SECONDS if self.workers.usable else FIRST_WATCH_SECONDS)

    async def _update_workers(self) -> None:
        change = await self.workers.update()
        if change.departed or change.fresh:
            await self._place_again(change.departed)
            threads = self.workers.threads
            self.jobs = max(self.jobs, min(threads, self.plan.capacity.jobs or threads))
            self.changed.set()
        self._show_load()

    async def _place_again(self, departed: AbstractSet[str]) -> None:
        """Withdraw notebooks that wait or whose worker was lost, so that dask places them again."""
        # dask does not reconsider a task without a fitting worker when a worker announces its
        # resources later. And tasks that wait at a busy worker may start earlier at a new one.
        for flight in tuple(self.flights.values()):
            if flight.address is None or flight.address in departed:
                await self._withdraw(flight)

    def _local_memory(self) -> int | None:
        machine = self.plan.template.machine
        # The template's machine has the share of one notebook already.
        return machine.memory_total if machine is not None and self.address.kind == LOCAL else None

    def _adopt_memory(self) -> None:
        """Make memory limits in per cent refer to the smallest worker."""
        machine, self_made = self.plan.template.machine, self.address.kind == LOCAL
        if machine is None or self_made or not self.workers.usable or self.adopted:
            return
        # Once: a worker that joins later must not change the limits of the batch.
        self.adopted = True
        smallest = replace(machine, memory_total=self.workers.smallest_memory)
        template = replace(self.plan.template, machine=smallest)
        self.plan = replace(self.plan, template=template)

    def _show_load(self) -> None:
        running = Counter(flight.machine for flight in self.flights.values() if flight.machine)
        threads = self.workers.threads_by_machine()
        self.listener.load({name: (running[name], count) for name, count in threads.items()})

    # --- one notebook ---------------------------------------------------------------------------

    def _submit(self, waiting: WaitingNotebook) -> None:
        from safe_exec.batch.cluster.task import run_notebook

        workers = list(self.workers.usable.values())
        reason = placement.refusal(waiting.needs, workers)
        if reason is not None:
            self.finish_without_verdict(waiting, REFUSED, REFUSED_CODE, reason)
            return
        flight = Flight(waiting)
        # After a loss on another machine, if there is one. Only workers that are known here: others
        # may still announce the resources that an earlier batch gave them.
        chosen = placement.elsewhere(flight.losses, waiting.needs, workers)
        chosen = chosen or placement.elsewhere((), waiting.needs, workers)
        flight.future = self.client.submit(
            run_notebook,
            self.request(flight),
            key=flight.name,
            pure=False,
            resources=placement.resources(waiting.needs, workers),
            workers=chosen,
            retries=0,
        )
        self.flights[flight.name] = flight
        self.tasks[asyncio.create_task(self._fly(flight))] = flight

    async def _fly(self, flight: Flight) -> None:
        """Wait for the reply to a request, and record it."""
        assert flight.future is not None
        try:
            reply = await flight.future
        # dask cancels a task that was withdrawn, and all of them if the scheduler is lost.
        except (asyncio.CancelledError, CancelledError):
            reply = NotStarted()
        except Exception as error:  # noqa: BLE001 - dask passes on whatever went wrong on a worker
            reply = self._reply_of_error(flight, error)
        # From here on no task of this flight may start, whatever dask makes of a lost worker.
        flight.settled = True
        del self.flights[flight.name]
        try:
            await self.settle(flight, reply)
        finally:
            await self._release(flight)
            self.changed.set()

    def _reply_of_error(self, flight: Flight, error: Exception) -> Reply:
        from distributed.scheduler import KilledWorker

        # dask gave up after several losses; whether the notebook is to blame is decided here.
        if isinstance(error, KilledWorker):
            self._count_loss(flight)
            return NotStarted()
        return RefusedNotebook(message=f"{type(error).__name__}: {error}", usage=False)

    # --- starts and losses ----------------------------------------------------------------------

    async def _receive_event(self, event: tuple[float, dict[str, Any]]) -> None:
        """Handle a message from a task."""
        _, message = event
        flight = self.flights.get(message["flight"])
        if message["kind"] == "start":
            grant = self._decide(flight, message["worker"])
            await self._answer(message["question"], message["worker"], grant)
        elif flight is not None and flight.sink is not None:
            for data in message["events"]:
                flight.sink(_EVENTS.decode(data))

    def _decide(self, flight: Flight | None, address: str) -> Grant:
        """Decide whether a task may start its notebook."""
        if flight is None or flight.settled or flight.withdrawn or self.stopped:
            return Grant(allowed=False)
        worker = self.workers.usable.get(address)
        if worker is None:
            # It left meanwhile, or it is not known yet: the notebook is placed once more.
            return Grant(allowed=False)
        machine = worker.machine
        # dask repeats a task only after it lost the worker that ran it.
        if flight.machine is not None:
            self._count_loss(flight)
            others = placement.elsewhere(
                flight.losses, flight.waiting.needs, self.workers.usable.values()
            )
            if placement.is_given_up(flight.losses) or (machine in flight.losses and others):
                return Grant(allowed=False)
        flight.machine, flight.address = machine, address
        notebook, attempt = flight.waiting.task.notebook, flight.waiting.attempt
        self.context.journal.started(
            notebook.path, attempt=attempt, run_id=flight.name, machine=machine
        )
        flight.sink = self.listener.sink(notebook.path, attempt, machine)
        neighbours = self.workers.threads_of(machine)
        return Grant(allowed=True, losses=tuple(flight.losses), neighbours=max(neighbours, 1))

    def _count_loss(self, flight: Flight) -> None:
        # A worker that was lost before the notebook started did it no harm.
        if flight.machine is not None:
            flight.losses.append(flight.machine)
            path = one_line(flight.waiting.task.notebook.path)
            self.listener.note(f"worker lost on {flight.machine}: {path} runs again")
            flight.machine = flight.address = None

    async def _answer(self, question: str, address: str, grant: Grant) -> None:
        from safe_exec.batch.cluster.task import answer

        # If the worker is gone, dask repeats the task, which asks again.
        with contextlib.suppress(OSError, asyncio.TimeoutError):
            await self.client.run(answer, question, grant, workers=[address], on_error="ignore")

    async def _withdraw(self, flight: Flight) -> None:
        """Withdraw from dask a notebook that has not started, or whose worker is gone."""
        if not flight.withdrawn and flight.future is not None:
            self._count_loss(flight)
            flight.withdrawn = True
            # If the scheduler is gone, so is the task; _watch_workers reports it.
            with contextlib.suppress(OSError, asyncio.TimeoutError):
                await flight.future.cancel()

    async def _release(self, flight: Flight) -> None:
        """Make dask forget the task, so that nothing repeats it."""
        if flight.future is not None:
            flight.future.release()

    async def _stop(self) -> None:
        """Withdraw the notebooks that have not started, and pass signals on to those that run."""
        from safe_exec.batch.cluster.task import forward_signal

        for flight in tuple(self.flights.values()):
            if flight.machine is None:
                await self._withdraw(flight)
        numbers = self.broadcast.signals[self.forwarded :]
        self.forwarded += len(numbers)
        for number in numbers:
            with contextlib.suppress(OSError, asyncio.TimeoutError):
                await self.client.run(forward_signal, self.batch, number, on_error="ignore")
        if numbers and self.stop_deadline is None:
            self.stop_deadline = time.monotonic() + SIGNAL_SECONDS
        # A worker that cannot be reached must not keep the user waiting for ever.
        if self.stop_deadline is not None and time.monotonic() > self.stop_deadline:
            for flight in tuple(self.flights.values()):
                flight.machine = None
                await self._withdraw(flight)
