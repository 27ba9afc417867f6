"""The code that runs inside dask workers: the task of a notebook, and calls from the runner.

A task holds a thread of its worker while its notebook runs in a process of its own. It asks the
runner before it starts: dask repeats a task whenever it loses a worker or a result, and only the
runner knows whether the notebook has finished.
"""

from __future__ import annotations

import contextlib
import platform
import select
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from distributed import Status, get_worker

from safe_exec._version import __version__
from safe_exec.batch.cluster import files
from safe_exec.batch.cluster.channel import receive, send
from safe_exec.batch.cluster.messages import (
    Grant,
    MissingFiles,
    NotebookRequest,
    NotStarted,
    RefusedNotebook,
    Reply,
    WorkerFacts,
)
from safe_exec.batch.cluster.placement import offers

if TYPE_CHECKING:
    from distributed import Worker

    from safe_exec.model.limits import Enforcement

POLL_SECONDS = 0.1
IDLE_SECONDS = 5.0
"""The time after which a fork server without notebooks ends, in case the runner is gone."""
_RUNNING = (Status.running, Status.paused, Status.closing_gracefully)
# States of a task that nobody waits for any more (dask's worker state machine).
_ABANDONED = ("cancelled", "released", "forgotten")


class _LocalState:
    """The state of this worker's process: its fork server, its notebooks, and pending grants."""

    def __init__(self) -> None:
        self.lock = threading.Condition()
        self.grants: dict[str, Grant] = {}
        self.notebooks: dict[str, tuple[str, socket.socket]] = {}
        self._fork_server: tuple[socket.socket, subprocess.Popen[bytes]] | None = None
        self._users = 0
        self._idle_since = 0.0

    @contextlib.contextmanager
    def notebook(self, request: NotebookRequest, grant: Grant) -> Iterator[socket.socket]:
        """Fork a process that runs a notebook, and yield the socket to it. Raises OSError."""
        with self.lock:
            self._users += 1
        try:
            ours, child_end = socket.socketpair()
            with ours:
                with child_end:
                    self._fork(child_end)
                # Sent before a signal can be: the process expects its request first.
                send(ours, (request, grant))
                with self.lock:
                    self.notebooks[request.flight] = (request.batch, ours)
                try:
                    yield ours
                finally:
                    with self.lock:
                        del self.notebooks[request.flight]
        finally:
            with self.lock:
                self._users -= 1
                self._idle_since = time.monotonic()
            timer = threading.Timer(IDLE_SECONDS, self._end_if_idle)
            timer.daemon = True
            timer.start()

    def _fork(self, child_end: socket.socket) -> None:
        with self.lock:
            if self._fork_server is not None and self._fork_server[1].poll() is not None:
                # It was killed: the next one removes its directory.
                self._fork_server[0].close()
                self._fork_server = None
            if self._fork_server is None:
                self._fork_server = _start_fork_server()
            socket.send_fds(self._fork_server[0], [b"1"], [child_end.fileno()])

    def _end_if_idle(self) -> None:
        with self.lock:
            if self._users or time.monotonic() - self._idle_since < IDLE_SECONDS * 0.9:
                return
            if self._fork_server is not None:
                control, process = self._fork_server
                self._fork_server = None
                control.close()
                process.wait()


_state = _LocalState()


def _start_fork_server() -> tuple[socket.socket, subprocess.Popen[bytes]]:
    ours, server_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with server_end:
        process = subprocess.Popen(
            # -P: a file beside the worker's start must not shadow a module.
            [
                sys.executable,
                "-P",
                "-m",
                "safe_exec.batch.cluster.fork_server",
                str(server_end.fileno()),
            ],
            stdin=subprocess.DEVNULL,
            pass_fds=[server_end.fileno()],
            # A signal for the worker's process group must not end notebooks without their verdict.
            start_new_session=True,
        )
    return ours, process


# --- the task -----------------------------------------------------------------------------------


def run_notebook(request: NotebookRequest) -> Reply:
    """Run a notebook in a process of its own: the dask task. Never raises."""
    worker = get_worker()

    def is_abandoned() -> bool:
        # A closing worker, or a runner that has cancelled the task or has died.
        task = worker.state.tasks.get(request.flight)
        return worker.status not in _RUNNING or task is None or task.state in _ABANDONED

    try:
        if not files.is_shared(request.source) and not _has_archive(request):
            return MissingFiles(address=worker.address)
        grant = _ask(worker, request, is_abandoned)
        if grant is None or not grant.allowed:
            return NotStarted()
        with _state.notebook(request, grant) as connection:
            return _attend(worker, request, connection, is_abandoned)
    # The error belongs to one notebook; dask would repeat a task that raises nowhere.
    except Exception as error:  # noqa: BLE001
        return RefusedNotebook(message=f"{type(error).__name__}: {error}", usage=False)


def _has_archive(request: NotebookRequest) -> bool:
    digest = request.source.archive
    return digest is not None and files.has_archive(digest)


def _ask(
    worker: Worker, request: NotebookRequest, is_abandoned: Callable[[], bool]
) -> Grant | None:
    """Ask the runner for permission to start.

    ``None`` if the runner no longer waits for the notebook.
    """
    question = uuid.uuid4().hex
    message = {
        "kind": "start",
        "flight": request.flight,
        "question": question,
        "worker": worker.address,
    }
    worker.log_event(request.batch, message)
    with _state.lock:
        while question not in _state.grants:
            _state.lock.wait(POLL_SECONDS)
            if is_abandoned():
                return None
        return _state.grants.pop(question)


def _attend(
    worker: Worker,
    request: NotebookRequest,
    connection: socket.socket,
    is_abandoned: Callable[[], bool],
) -> Reply:
    """Pass the events of a notebook's process on until its reply arrives."""
    while True:
        readable, _, _ = select.select([connection], [], [], POLL_SECONDS)
        if is_abandoned():
            return NotStarted()
        if not readable:
            continue
        try:
            message = receive(connection)
        except (EOFError, OSError):
            text = "the process of the notebook was killed on its worker"
            return RefusedNotebook(message=text, usage=False)
        if not isinstance(message, list):
            reply: Reply = message
            return reply
        worker.log_event(
            request.batch, {"kind": "events", "flight": request.flight, "events": message}
        )


# --- calls from the runner ----------------------------------------------------------------------


def answer(question: str, grant: Grant) -> None:
    """Deliver the runner's answer to a task that asked to start."""
    with _state.lock:
        _state.grants[question] = grant
        _state.lock.notify_all()


def forward_signal(batch: str, number: int) -> None:
    """Pass a signal on to the notebooks of a batch."""
    with _state.lock:
        connections = [socket_ for name, socket_ in _state.notebooks.values() if name == batch]
    for connection in connections:
        with contextlib.suppress(OSError):
            send(connection, number)


def put_piece(digest: str, transfer: str, data: bytes, last: bool) -> None:
    """Append a piece to an archive that arrives on this machine."""
    files.put_piece(digest, transfer, data, last=last)


def kernel_environment(name: str) -> str:
    """Describe a kernel of this machine: its command and its packages."""
    from safe_exec.batch.fingerprint import Kernels

    return Kernels().environment(name)


async def prepare_worker(
    mechanisms: tuple[str, ...] | None, memory: int | None, cpus: float | None, dask_worker: Worker
) -> WorkerFacts:
    """Collect the facts of this worker, and announce its resources to the scheduler.

    ``memory`` (bytes) and ``cpus`` override the worker's own size.
    """
    # The figures that the user gave the worker (--resources) come before everything else.
    own = dask_worker.state.total_resources
    facts = WorkerFacts(
        address=dask_worker.address,
        name=str(dask_worker.name),
        machine=platform.node(),
        threads=dask_worker.state.nthreads,
        memory=int(own.get("safe_exec_memory", memory or _memory_of(dask_worker))),
        cpus=float(own.get("safe_exec_cpus", cpus or dask_worker.state.nthreads)),
        enforced=_enforced(mechanisms),
        version=__version__,
        python=platform.python_version(),
    )
    manager = dask_worker.memory_manager
    # dask pauses a worker by its own memory use. Notebooks have their own processes and limits.
    manager.memory_pause_fraction = manager.memory_spill_fraction = False
    await dask_worker.set_resources(**offers(facts))
    return facts


def _memory_of(worker: Worker) -> int:
    from safe_exec.sandbox.host.resources import memory_available

    limit = worker.memory_manager.memory_limit
    # Without a limit of the worker, all memory that is free is its own.
    return int(limit) if limit else memory_available() or 0


def _enforced(mechanisms: tuple[str, ...] | None) -> frozenset[str]:
    """Return the limits and walls that Linux enforces on this machine."""
    from safe_exec.sandbox.host.capabilities import detect, probe_isolation
    from safe_exec.sandbox.planner import (
        ALL_LIMITS,
        ALL_WALLS,
        build_plan,
        parse_mechanisms,
        requirable_name,
    )

    machine = probe_isolation(detect(parse_mechanisms(mechanisms)))
    plan = build_plan(ALL_LIMITS, machine, "worker", ALL_WALLS)
    rows: dict[str, Enforcement] = {
        **{requirable_name(name): row for name, row in plan.enforcement.items()},
        **{requirable_name(wall): row for wall, row in plan.walls.items()},
    }
    return frozenset(name for name, enforcement in rows.items() if enforcement.hard)
