"""The fork server: forks keepers where many are needed, for a batch or a search.

Standard library only.

Starting an interpreter with the modules of a keeper takes 25 ms of processor time, a fork of this
process takes 1 ms. A forked keeper is like any other: it has a session and a control socket of its
own, and it outlives this process and the runner.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import traceback

from safe_exec.keeper import keeper

REQUEST_BYTES = 8192


def main(control_fd: int) -> None:
    """Fork a keeper for each request, which holds a descriptor, a run's name and its directory."""
    os.set_inheritable(control_fd, False)
    control = socket.socket(fileno=control_fd)
    # Linux reaps the keepers for us; the runner waits for them by pidfd.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    # Objects outside the collector's reach are not touched by it, so their pages stay shared.
    gc.freeze()
    while True:
        try:
            request, fds, _, _ = socket.recv_fds(control, REQUEST_BYTES, 1)
        except ConnectionError:
            return
        if not request:
            return
        if os.fork() == 0:
            control.close()
            _run_keeper(fds[0], *request.decode("utf-8", "surrogateescape").split("\0"))
        for fd in fds:
            os.close(fd)


def _run_keeper(control_fd: int, run_id: str, directory: str) -> None:
    """Run a keeper in the fork.

    Never returns, because a fork must not continue as a fork server.
    """
    try:
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        keeper.main(control_fd, directory, run_id)
        os._exit(0)
    except BaseException:  # noqa: BLE001 - printed; this process must not go on
        traceback.print_exc()
    os._exit(1)
