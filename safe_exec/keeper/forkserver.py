"""Where keepers are forked when many are needed one after the other, for a batch or a search. Standard library only.

An interpreter that has imported what a keeper needs takes 25 ms of a processor until it is there, a fork of this one takes one. A keeper that
comes from here is as any other: in a session of its own, with its own end of the socket, and it outlives this process, and the runner.
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
    """Fork a keeper for each request: its descriptor, with the name of its run and its directory. Ends with the socket."""
    os.set_inheritable(control_fd, False)
    control = socket.socket(fileno=control_fd)
    signal.signal(
        signal.SIGCHLD, signal.SIG_IGN
    )  # the system buries them; who waits for one does so by a descriptor of it
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
            _be_keeper(fds[0], *request.decode("utf-8", "surrogateescape").split("\0"))
        for fd in fds:
            os.close(fd)


def _be_keeper(control_fd: int, run_id: str, directory: str) -> None:
    """Never returns."""
    try:
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        keeper.main(control_fd, directory, run_id)
        os._exit(0)
    except BaseException:  # noqa: BLE001 - nothing may run on in this process
        traceback.print_exc()
    os._exit(1)
