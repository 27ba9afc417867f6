"""The fork server of a dask worker: forks one process per notebook.

A process for each notebook keeps PDEATHSIG, signals and memory apart from dask's threads. Importing
safe-exec takes half a second of processor time, a fork of this process takes a few milliseconds.

``python -m safe_exec.batch.cluster.fork_server FD`` is started by the worker. A message on the
socket FD is a descriptor: the socket of a new notebook's process. At the end of the socket this
process waits for its notebooks, removes its directory and exits. The notebooks see the end of their
own sockets, whatever ended the worker.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from safe_exec.batch.cluster import process
from safe_exec.sandbox.keeper_process import ForkServer

PREFIX = "safe-exec-worker-"
LOCK = "lock"
END_SECONDS = 10.0
"""The time that notebooks have to end before they are killed."""
_POLL_SECONDS = 0.2


def main(control_fd: int) -> None:
    """Fork a process for each descriptor that arrives, until the socket ends."""
    os.set_inheritable(control_fd, False)
    control = socket.socket(fileno=control_fd)
    # A terminal's Ctrl-C reaches the runner, which tells the notebooks.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    remove_abandoned()
    with _own_directory() as directory, ForkServer() as keepers:
        # Opened before the first fork: all notebooks share one process that forks their keepers.
        keepers.open()
        machine = process.detect_machine()
        gc.freeze()
        children: set[int] = set()
        while True:
            readable, _, _ = select.select([control], [], [], _POLL_SECONDS)
            _reap(children, directory)
            if not readable:
                continue
            message, fds, _, _ = socket.recv_fds(control, 1, 1)
            if not message:
                break
            pid = os.fork()
            if pid == 0:
                control.close()
                process.serve(socket.socket(fileno=fds[0]), directory, machine)
            children.add(pid)
            for fd in fds:
                os.close(fd)
        _end(children, directory)


def _reap(children: set[int], directory: Path) -> None:
    for pid in tuple(children):
        with contextlib.suppress(ChildProcessError):
            if os.waitpid(pid, os.WNOHANG)[0] == 0:
                continue
        children.discard(pid)
        # A notebook's process removes its own scratch files, unless it was killed.
        shutil.rmtree(directory / str(pid), ignore_errors=True)


def _end(children: set[int], directory: Path) -> None:
    """Wait until all notebooks have ended; they end by themselves when their worker does."""
    deadline = time.monotonic() + END_SECONDS
    while children:
        _reap(children, directory)
        if time.monotonic() > deadline:
            for pid in children:
                os.kill(pid, signal.SIGKILL)
        time.sleep(_POLL_SECONDS / 10)


# --- the directory of scratch files --------------------------------------------------------------


@contextlib.contextmanager
def _own_directory() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix=PREFIX))
    # The lock is inherited by the notebooks: the directory is in use until the last one has ended.
    lock = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    # Renamed only now: another fork server never finds it unlocked.
    os.rename(directory / ".lock", directory / LOCK)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(lock)


def remove_abandoned() -> None:
    """Remove the directories of fork servers that were killed."""
    for directory in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        # Another user's directory cannot be opened, and one in use is locked.
        with contextlib.suppress(OSError):
            lock = os.open(directory / LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(directory)
            finally:
                os.close(lock)


if __name__ == "__main__":
    main(int(sys.argv[1]))
