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
import signal
import socket
import threading
import time
from pathlib import Path
from typing import NoReturn

import msgspec
from msgspec.structs import replace

# Imported before the fork, so that no notebook waits for them.
from nbformat import v4

from safe_exec.batch.cluster import files
from safe_exec.batch.cluster.channel import receive, send
from safe_exec.batch.cluster.messages import (
    FinishedNotebook,
    Grant,
    NotebookRequest,
    RefusedNotebook,
    Reply,
)
from safe_exec.batch.retry import is_transient
from safe_exec.batch.selection import SelectedNotebook
from safe_exec.batch.worker import NotebookTask, record_of, reserve_for_others
from safe_exec.diagnosis import verdict as _diagnosis  # noqa: F401
from safe_exec.errors import SafeExecError, UsageError
from safe_exec.kernel.prestart import PrestartedKernel
from safe_exec.model import events
from safe_exec.model.verdict import Verdict
from safe_exec.reports import annotated_notebook, verdict_json  # noqa: F401
from safe_exec.sandbox.host.capabilities import HostCapabilities, detect, probe_isolation
from safe_exec.trial import run as _trial  # noqa: F401
from safe_exec.workflows import bisect as _bisect  # noqa: F401
from safe_exec.workflows.prepare import Job, prepare
from safe_exec.workflows.run import run_job

log = logging.getLogger("safe_exec")

EVENT_SECONDS = 0.5
"""The time between two messages with events."""
SOURCE_CHARACTERS = 200
# The events that the progress display shows.
_SHOWN = (
    events.RunStarted
    | events.KernelReady
    | events.CellStarted
    | events.UsageSampled
    | events.Killed
    | events.SearchStarted
    | events.SearchTrialStarted
    | events.SearchTrialFinished
    | events.SearchFinished
)


def detect_machine() -> HostCapabilities:
    """Detect this machine once for all notebooks, and compile what each of them needs."""
    v4.new_output("stream", text="")
    return probe_isolation(detect())


def serve(connection: socket.socket, directory: Path, machine: HostCapabilities) -> NoReturn:
    """Run the notebook of the first message; never returns."""
    # The fork must not go on as a fork server, whatever happens.
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        request, grant = receive(connection)
        threading.Thread(target=_obey, args=(connection,), daemon=True).start()
        scratch = directory / str(os.getpid())
        scratch.mkdir()
        try:
            reply = run(request, grant, scratch, machine, connection)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        send(connection, reply)
        os._exit(0)
    except (EOFError, OSError) as error:
        log.error("the worker of a notebook is gone: %s", error)  # noqa: TRY400
    except BaseException:
        log.exception("a notebook's process failed")
    os._exit(1)


def _obey(connection: socket.socket) -> NoReturn:
    """Take signals from the worker, and exit with it."""
    while True:
        try:
            number = receive(connection)
        except (EOFError, OSError):
            # The keeper notices the end of this process, kills the kernel and cleans up.
            os._exit(1)
        os.kill(os.getpid(), number)


def run(
    request: NotebookRequest,
    grant: Grant,
    scratch: Path,
    machine: HostCapabilities,
    connection: socket.socket,
) -> Reply:
    """Run a notebook with its documents below ``scratch``, and return them."""
    try:
        workspace = files.enter(request, scratch / "files")
        job = _job_here(workspace.job, request, scratch / "documents", machine)
        return _run(job, request, grant, workspace, connection)
    # The notebook was valid on the runner: it has changed since, or this machine lacks a path.
    except UsageError as error:
        return RefusedNotebook(message=str(error), usage=True)
    # One broken notebook must not end the batch: the error becomes its record.
    except Exception as error:
        log.exception("%s: safe-exec failed", request.path)
        text = (
            str(error) if isinstance(error, SafeExecError) else f"{type(error).__name__}: {error}"
        )
        return RefusedNotebook(message=text, usage=False)


def _job_here(
    job: Job, request: NotebookRequest, documents: Path, machine: HostCapabilities
) -> Job:
    base = documents / request.documents
    base.parent.mkdir(parents=True)
    return replace(
        job,
        output=base.with_name(f"{base.name}.out.ipynb"),
        verdict=base.with_name(f"{base.name}.verdict.json"),
        repro=base.with_name(f"{base.name}.repro.ipynb"),
        own_paths=(*job.own_paths, documents),
        env={**os.environ, **request.variables} if request.variables else None,
        # Mechanisms that the user excluded change what can be detected.
        machine=machine if job.mechanisms is None else None,
    )


def _run(
    job: Job,
    request: NotebookRequest,
    grant: Grant,
    workspace: files.Workspace,
    connection: socket.socket,
) -> FinishedNotebook:
    limits = job.resolved.limits if job.resolved is not None else None
    if limits is not None:
        job = reserve_for_others(job, limits, grant.neighbours)

    def is_searched(verdict: Verdict) -> bool:
        return request.last_attempt or not is_transient(verdict)

    with PrestartedKernel() as kernel:
        prepared = prepare(job, kernel)
        losses = tuple(
            f"worker lost: {machine} stopped while it ran this notebook, which ran again"
            for machine in grant.losses
        )
        prepared = replace(prepared, limits=prepared.limits.with_warnings(losses))
        verdict = asyncio.run(
            run_job(prepared, (EventSender(connection),), worth_a_search=is_searched)
        )
    assert job.output is not None
    documents = workspace.documents
    task = NotebookTask(
        notebook=SelectedNotebook(source=job.path, path=request.path, documents=request.documents),
        job=job,
    )
    record = record_of(task, verdict, request.attempt, request.key, documents)
    names = [name for name in (record.verdict, record.notebook, record.repro) if name is not None]
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
        """Take an event of the run."""
        if not isinstance(event, _SHOWN):
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
