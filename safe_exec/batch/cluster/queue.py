"""The queue of a batch on a cluster: makes its entries, and records the replies to requests.

The scheduler decides when a notebook is requested, and from which workers.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping

from msgspec.structs import replace

from safe_exec.batch.cluster import files, placement
from safe_exec.batch.cluster.flights import Flight, WaitingNotebook
from safe_exec.batch.cluster.messages import (
    FinishedNotebook,
    MissingFiles,
    NotebookRequest,
    RefusedNotebook,
    Reply,
)
from safe_exec.batch.cluster.placement import NotebookNeeds
from safe_exec.batch.cluster.transfers import FileTransfers
from safe_exec.batch.cluster.workers import ClusterWorkers
from safe_exec.batch.fingerprint import key_of_run, pass_key
from safe_exec.batch.history import RunHistory
from safe_exec.batch.journal import JournalRecord
from safe_exec.batch.outcome import REFUSED_CODE
from safe_exec.batch.queue import NotebookQueue
from safe_exec.batch.worker import NotebookTask, record_of, record_without_verdict
from safe_exec.errors import UsageError
from safe_exec.files import OutputDirectory, one_line
from safe_exec.model.limits import Wall
from safe_exec.model.verdict import Status, Verdict
from safe_exec.reports.batch.results import REFUSED
from safe_exec.sandbox.planner import requirable_name
from safe_exec.workflows.job import PreparedJob
from safe_exec.workflows.prepare import prepare
from safe_exec.workflows.run import abandon_job


class ClusterQueue(NotebookQueue[WaitingNotebook]):
    """The notebooks of a batch on a cluster.

    Its scheduler connects ``workers`` before it runs them. ``batch`` is the name of the batch, and
    of its topic of events.
    """

    batch: str
    loop: asyncio.AbstractEventLoop
    workers: ClusterWorkers
    transfers: FileTransfers

    # --- entries --------------------------------------------------------------------------------

    def enqueue(
        self, task: NotebookTask, prepared: PreparedJob, inputs: Mapping[str, str | None]
    ) -> WaitingNotebook | JournalRecord:
        """Return the queue's entry for a notebook."""
        limits, isolation = prepared.limits.values, prepared.limits.isolation
        enforced = {requirable_name(name) for name in prepared.limits.required}
        if isolation.required:
            walls = prepared.plan().walls
            # As in require_walls: only root can run the kernel as another user.
            enforced |= {requirable_name(wall) for wall in walls if wall is not Wall.USER}
        return WaitingNotebook(
            task=replace(task, job=replace(task.job, resolved=prepared.limits.resolved)),
            cwd=prepared.paths.cwd,
            kernel=prepared.kernel_name,
            needs=NotebookNeeds(
                memory=limits.memory,
                cpus=max(limits.cpus or 1.0, 1.0),
                enforced=frozenset(enforced),
            ),
            source=files.describe(task.job.path, prepared.notebook.sha256),
            key=key_of_run(prepared),
            inputs=inputs,
        )

    def kernel_environment(self, name: str) -> str | None:
        """Describe a kernel and its packages on the workers."""
        environment = self.workers.environment(name)
        return asyncio.run_coroutine_threadsafe(environment, self.loop).result()

    def request(self, flight: Flight) -> NotebookRequest:
        """Return the request to run a notebook on a worker."""
        waiting = flight.waiting
        job, notebook = waiting.task.job, waiting.task.notebook
        # The worker provides the environment; only variables that the user set travel.
        variables = {
            name: value for name, value in (job.env or {}).items() if os.environ.get(name) != value
        }
        return NotebookRequest(
            flight=flight.name,
            batch=self.batch,
            job=replace(job, machine=None, tree=None, sinks=(), env=None),
            variables=variables,
            cwd=os.getcwd(),
            out=str(self.plan.out),
            documents=notebook.documents,
            path=notebook.path,
            source=waiting.source,
            key=waiting.key,
            attempt=waiting.attempt,
            last_attempt=waiting.attempt > self.plan.retry.retries,
        )

    # --- replies --------------------------------------------------------------------------------

    async def settle(self, flight: Flight, reply: Reply) -> None:
        """Record the reply to a request, or queue its notebook again."""
        waiting = replace(flight.waiting, losses=tuple(flight.losses))
        if isinstance(reply, FinishedNotebook):
            retried = reply.transient and waiting.attempt <= self.plan.retry.retries
            if retried and not self.broadcast.signals:
                self.waiting.insert(0, replace(waiting, attempt=waiting.attempt + 1))
                return
            record = replace(reply.record, machine=flight.machine, losses=waiting.losses)
            try:
                await asyncio.to_thread(self._write, reply.documents)
            except OSError as error:
                message = f"its documents could not be written: {error}"
                self.finish_without_verdict(
                    waiting,
                    str(Status.INTERNAL_ERROR),
                    Status.INTERNAL_ERROR.exit_code,
                    message,
                )
                return
            # A cancelled notebook is not recorded, so --resume runs it again.
            if record.status != Status.CANCELLED:
                await asyncio.to_thread(self.context.journal.finished, record)
                await self._remember(waiting, record)
            self.finish(waiting.task.notebook, record)
        elif isinstance(reply, RefusedNotebook):
            status = REFUSED if reply.usage else str(Status.INTERNAL_ERROR)
            code = REFUSED_CODE if reply.usage else Status.INTERNAL_ERROR.exit_code
            self.finish_without_verdict(waiting, status, code, reply.message)
        elif isinstance(reply, MissingFiles):
            await self._send_files(waiting, reply.address)
        elif placement.is_given_up(flight.losses):
            await self._give_up(waiting)
        else:
            self.waiting.insert(0, waiting)

    def _write(self, documents: Mapping[str, bytes]) -> None:
        """Write the documents of a notebook. Raises OSError."""
        for name, data in documents.items():
            folder = OutputDirectory(self.plan.out / name, self.tree)
            try:
                folder.write(data)
            finally:
                folder.close()

    def finish_without_verdict(
        self, waiting: WaitingNotebook, status: str, code: int, message: str
    ) -> None:
        """Record a notebook that has no verdict, with the reason."""
        record = record_without_verdict(waiting.task, status, code, message)
        self.finish(waiting.task.notebook, replace(record, losses=waiting.losses))

    async def _remember(self, waiting: WaitingNotebook, record: JournalRecord) -> None:
        """Store duration and fingerprint for later batches."""
        passed = None
        # A flaky notebook is not skipped next time: its pass was luck.
        if record.status == Status.PASSED and not record.flaky:
            environment = await self.workers.environment(waiting.kernel)
            if environment is not None:
                passed = pass_key(waiting.key, waiting.cwd, environment, waiting.inputs)
        history = RunHistory(seconds=record.seconds, passed=passed)
        await asyncio.to_thread(self.history.put, waiting.task.notebook.source, history)

    async def _give_up(self, waiting: WaitingNotebook) -> None:
        machines = " and ".join(dict.fromkeys(waiting.losses))
        count = len(waiting.losses)
        message = (
            f"worker lost {count} times, on {machines}: the notebook did not run to its end; "
            "see the logs of the workers"
        )
        verdict = await asyncio.to_thread(self._write_lost_verdict, waiting, message)
        record = record_of(waiting.task, verdict, waiting.attempt, waiting.key, self.tree.path)
        record = replace(record, losses=waiting.losses, error=message)
        await asyncio.to_thread(self.context.journal.finished, record)
        self.finish(waiting.task.notebook, record)

    def _write_lost_verdict(self, waiting: WaitingNotebook, message: str) -> Verdict:
        return abandon_job(prepare(waiting.task.job), message)

    async def _send_files(self, waiting: WaitingNotebook, address: str) -> None:
        """Send the notebook's folder to a machine that lacks it, and queue the notebook again."""
        try:
            source = await self.transfers.pack(waiting.source)
        except (UsageError, OSError) as error:
            self.finish_without_verdict(waiting, REFUSED, REFUSED_CODE, str(error))
            return
        assert source.archive is not None
        worker = self.workers.usable.get(address)
        machine = worker.machine if worker is not None else address
        try:
            await self.transfers.send(source.archive, address, machine)
        except Exception as error:  # noqa: BLE001 - the worker may be gone, or its disk full
            if address in self.workers.usable:
                self.finish_without_verdict(
                    waiting,
                    str(Status.INTERNAL_ERROR),
                    Status.INTERNAL_ERROR.exit_code,
                    f"its files could not be sent to {machine}: {one_line(error)}",
                )
                return
        self.waiting.insert(0, replace(waiting, source=source))
