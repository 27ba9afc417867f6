"""The process of one notebook on a worker.

It receives a request, runs the notebook as ``safe-exec run`` does, and sends events and the reply
over its socket. The other end is held by the task on the dask worker: at the end of the socket this
process exits at once, and the keeper ends the kernel and cleans up, as after any killed runner.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import socket
import threading
import time
from importlib import import_module
from pathlib import Path
from typing import NoReturn

import msgspec
from msgspec import Struct
from msgspec.structs import replace
from nbformat import v4

from safe_exec.batch.cluster import files
from safe_exec.batch.cluster.channel import receive, send
from safe_exec.batch.cluster.messages import (
    FinishedNotebook,
    Grant,
    NotebookRequest,
    RefusedNotebook,
    Reply,
    ShownEvent,
)
from safe_exec.batch.selection import SelectedNotebook
from safe_exec.batch.worker import (
    NotebookTask,
    SignalBroadcast,
    record_of,
    reserve_for_others,
    run_attempt,
)
from safe_exec.errors import SafeExecError, UsageError
from safe_exec.kernel.prestart import PrestartedKernel
from safe_exec.model import events
from safe_exec.model.verdict import Verdict
from safe_exec.sandbox.host.capabilities import HostCapabilities, detect, probe_isolation
from safe_exec.workflows.job import Job
from safe_exec.workflows.prepare import prepare
from safe_exec.workflows.retry import is_transient

log = logging.getLogger("safe_exec")

EVENT_SECONDS = 0.5
"""The time between two messages with events."""
SOURCE_CHARACTERS = 200


# Imported before the fork, so that no notebook pays for them.
_NEEDED_LATER = (
    "concurrent.futures.thread",
    "nbclient.client",
    "safe_exec.diagnosis.verdict",
    "safe_exec.experiments.workspace",
    "safe_exec.keeper.mounts",
    "safe_exec.kernel.client",
    "safe_exec.kernel.outputs",
    "safe_exec.reports.annotated_notebook",
    "safe_exec.reports.verdict_json",
    "safe_exec.sandbox.enclosure",
    "safe_exec.sandbox.isolation_facts",
    "safe_exec.trial.run",
    "safe_exec.workflows.bisect",
)


def detect_machine() -> HostCapabilities:
    """Detect this machine once for all notebooks, and import the modules that they need."""
    for name in _NEEDED_LATER:
        import_module(name)
    # Compiles the JSON schema of notebooks, which takes 30 ms.
    v4.new_output("stream", text="")
    return probe_isolation(detect())


def serve(connection: socket.socket, directory: Path, machine: HostCapabilities) -> NoReturn:
    """Run the notebook of the first message; never returns."""
    # The fork must not go on as a fork server, whatever happens.
    try:
        request, grant = receive(connection)
        broadcast = SignalBroadcast()
        threading.Thread(target=_obey, args=(connection, broadcast), daemon=True).start()
        scratch = directory / str(os.getpid())
        scratch.mkdir()
        try:
            reply = Execution(request, grant, scratch, machine, connection, broadcast).run()
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        send(connection, reply)
        os._exit(0)
    except (EOFError, OSError) as error:
        log.error("the worker of a notebook is gone: %s", error)  # noqa: TRY400
    except BaseException:
        log.exception("a notebook's process failed")
    os._exit(1)


def _obey(connection: socket.socket, broadcast: SignalBroadcast) -> NoReturn:
    """Receive signals from the worker; exit when the worker ends."""
    while True:
        try:
            number = receive(connection)
        except (EOFError, OSError):
            # The keeper notices the end of this process, kills the kernel and cleans up.
            os._exit(1)
        broadcast.receive(number)


class Execution(Struct, frozen=True):
    """One notebook on this machine, with its documents below ``scratch``."""

    request: NotebookRequest
    grant: Grant
    scratch: Path
    machine: HostCapabilities
    connection: socket.socket
    broadcast: SignalBroadcast

    def run(self) -> Reply:
        """Run the notebook, and return its documents."""
        try:
            workspace = files.enter(self.request, self.scratch / "files")
            return self._run(self._job(workspace), workspace)
        # The notebook was valid on the runner: it has changed since, or this machine lacks a path.
        except UsageError as error:
            return RefusedNotebook(message=str(error), usage=True)
        # One broken notebook must not end the batch: the error becomes its record.
        except Exception as error:
            log.exception("%s: safe-exec failed", self.request.path)
            is_ours = isinstance(error, SafeExecError)
            message = str(error) if is_ours else f"{type(error).__name__}: {error}"
            return RefusedNotebook(message=message, usage=False)

    def _job(self, workspace: files.Workspace) -> Job:
        """Return the job with the paths, capabilities and environment of this machine."""
        job, variables = workspace.job, self.request.variables
        base = workspace.documents / self.request.documents
        base.parent.mkdir(parents=True)
        job = replace(
            job,
            output=base.with_name(f"{base.name}.out.ipynb"),
            verdict=base.with_name(f"{base.name}.verdict.json"),
            repro=base.with_name(f"{base.name}.repro.ipynb"),
            own_paths=(*job.own_paths, workspace.documents),
            env={**os.environ, **variables} if variables else None,
            # Mechanisms that the user excluded change what can be detected.
            machine=self.machine if job.mechanisms is None else None,
        )
        assert job.resolved is not None
        return reserve_for_others(job, job.resolved.limits, self.grant.neighbours)

    def _is_last(self, verdict: Verdict) -> bool:
        """Tell whether this attempt is the last one."""
        return self.request.last_attempt or not is_transient(verdict)

    def _run(self, job: Job, workspace: files.Workspace) -> FinishedNotebook:
        request = self.request
        with PrestartedKernel() as kernel:
            prepared = prepare(job, kernel)
            losses = tuple(
                f"worker lost: {machine} stopped while it ran this notebook, which ran again"
                for machine in self.grant.losses
            )
            prepared = replace(prepared, limits=prepared.limits.with_warnings(losses))
            sender = EventSender(self.connection)
            verdict = asyncio.run(run_attempt(prepared, sender, self.broadcast, self._is_last))
        task = NotebookTask(
            notebook=SelectedNotebook(
                source=job.path, path=request.path, documents=request.documents
            ),
            job=job,
        )
        documents = workspace.documents
        record = record_of(task, verdict, request.attempt, request.key, documents)
        names = [name for name in (record.verdict, record.notebook, record.repro) if name]
        return FinishedNotebook(
            record=record,
            documents={
                name: files.with_original_paths((documents / name).read_bytes(), workspace)
                for name in names
            },
            transient=is_transient(verdict),
        )


class EventSender:
    """Sends the latest events to the worker, not more often than every half second."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._waiting: dict[type, events.Event] = {}
        self._sent_at = 0.0

    def __call__(self, event: events.Event) -> None:
        """Accept an event of the run for sending."""
        if not isinstance(event, ShownEvent):
            return
        if isinstance(event, events.CellStarted):
            event = replace(event, source=event.source[:SOURCE_CHARACTERS])
        # Only the latest event of each kind matters for a display.
        self._waiting.pop(type(event), None)
        self._waiting[type(event)] = event
        if time.monotonic() - self._sent_at >= EVENT_SECONDS:
            self._sent_at = time.monotonic()
            data = [msgspec.json.encode(waiting) for waiting in self._waiting.values()]
            self._waiting.clear()
            send(self._connection, data)
