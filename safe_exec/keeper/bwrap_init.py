"""The first process of ours inside bubblewrap: starts the kernel, keeps its raw wait status. Standard library only.

bubblewrap reports SIGKILL as 137, the same as ``os._exit(137)``. So this process is the kernel's parent in there, and says over a socket how it
ended, and what it used. The keeper knows who speaks by the credentials that the system puts on each message (unix(7), SCM_CREDENTIALS): a
kernel that got hold of the socket would speak in its own name. It cannot get hold of it either: this process is not dumpable, so that nobody
of the same user may open its descriptors in /proc (prctl(2), PR_SET_DUMPABLE).

With process ids of their own this is the first process in there: it buries orphans, and all in there dies with it. No signal from in there
reaches it, SIGKILL and SIGSTOP included (pid_namespaces(7)).

Every kernel inside walls waits for it, so it imports what is written in C: json, signal and socket are made of enum and re, which take longer than
the interpreter's own start.

The kernel's process waits until the keeper has put it into its control groups. Neither this process nor bubblewrap is in them: they do not
count against the notebook's limits, and cannot be killed for them.
"""

from __future__ import annotations

import _signal as signal  # type: ignore[import-not-found]
import _socket as socket
import ctypes
import marshal
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

PR_SET_PDEATHSIG, PR_SET_DUMPABLE = 1, 4
MESSAGE_BYTES = 2000


def main(status_fd: int, go_fd: int, config_fd: int) -> None:
    """Start the kernel as the configuration says, wait for its end, tell it."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl(PR_SET_DUMPABLE, 0)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for fd in (status_fd, go_fd, config_fd):
        os.set_inheritable(fd, False)
    with os.fdopen(config_fd, "rb") as file:
        file.seek(0)
        plan = marshal.load(file)  # noqa: S302 - the keeper wrote it, and nobody else has it
    status = socket.socket(fileno=status_fd)
    # Directories that are in no other view of the file system than ours: the one in which the kernel will bind its sockets, and those whose
    # files go with us. The keeper lists them when all in here is dead; until it closes them these file systems stay.
    directories = [
        os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        for path in (plan["sockets"], *plan["discarded"])
    ]
    rights = b"".join(fd.to_bytes(4, sys.byteorder) for fd in directories)
    status.sendmsg([b'{"who":"init"}'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
    for fd in directories:
        os.close(fd)
    parent = os.getpid()
    error_r, error_w = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        _become(plan, status, go_fd, error_w, parent)
    os.close(go_fd)
    os.close(error_w)
    if plan["walls"].get("capabilities_dropped"):
        from safe_exec.keeper import capabilities

        capabilities.give_up(for_uid=None)  # they were for the child alone
    with os.fdopen(error_r, "rb") as pipe:
        trouble = pipe.read()  # ends when the child executes: the descriptor closes with it
    status.send(_failed(trouble) if trouble else b'{"executed":true}')
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    _wait(pid, status)


def _become(
    plan: dict[str, Any], status: socket.socket, go_fd: int, error_fd: int, parent: int
) -> None:
    from safe_exec.keeper import child

    try:
        os.setsid()
        status.send(b'{"who":"kernel"}')
        status.close()
        if not os.read(go_fd, 1):  # the keeper is gone, or would not have us
            os._exit(1)
        os.close(go_fd)
    except BaseException as error:  # noqa: BLE001 - told to the keeper; nothing may run on in this process
        child.tell(error_fd, "sandbox", error)
    child.run(plan, parent, error_fd)


def _wait(pid: int, status: socket.socket) -> None:
    """Reap until the kernel has ended, then say how. Whatever else runs in here ends with us."""
    while True:
        try:
            # Looked at first and reaped afterwards: only a zombie still tells which signals it caught.
            dead = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
            caught = _caught_signals(pid) if dead is not None and dead.si_pid == pid else b"null"
            ended, raw, usage = os.wait4(-1 if dead is None else dead.si_pid, 0)
        except ChildProcessError:
            return
        if ended == pid:
            cpu = usage.ru_utime + usage.ru_stime
            status.send(
                b'{"status":%d,"cpu":%.6f,"maxrss":%d,"caught":%b}'
                % (raw, cpu, usage.ru_maxrss, caught)
            )
            return


def _caught_signals(pid: int) -> bytes:
    """The set of signals that have a handler, as a number in JSON (SigCgt in /proc/PID/status)."""
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            line = next(line for line in file if line.startswith(b"SigCgt:"))
            return b"%d" % int(line.split()[1], 16)
    except (OSError, ValueError, IndexError, StopIteration):
        return b"null"


def _failed(trouble: bytes) -> bytes:
    import json

    return json.dumps({"failed": trouble.decode("utf-8", "replace")[:MESSAGE_BYTES]}).encode()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
