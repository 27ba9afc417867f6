"""The init: our first process inside bubblewrap, which starts the kernel and reaps it.

bubblewrap reports SIGKILL as 137, the same as ``os._exit(137)``. So this process is the kernel's
parent inside, and reports its raw wait status and processor time on the status socket. Linux puts
the sender's credentials on each message (unix(7), SCM_CREDENTIALS), so a kernel that got hold of
the socket would speak in its own name. It cannot get hold of it: this process is not dumpable, so
no other process of the same user may open its descriptors in /proc (prctl(2), PR_SET_DUMPABLE).

In a pid namespace of its own this is process 1: it reaps orphans, everything inside dies with it,
and no signal from inside reaches it, not even SIGKILL and SIGSTOP (pid_namespaces(7)).

The kernel's process waits until the keeper has moved it to its cgroups. Neither this process nor
bubblewrap is in them: they do not count against the notebook's limits and are not killed for them.
Standard library only.
"""

from __future__ import annotations

# Every kernel behind walls waits for this process, so it imports modules written in C: json, signal
# and socket need enum and re, which take longer to import than the interpreter takes to start.
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


def main(status_fd: int, release_fd: int, config_fd: int) -> None:
    """Start the kernel as the configuration says, wait for its end, report it."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl(PR_SET_DUMPABLE, 0)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for fd in (status_fd, release_fd, config_fd):
        os.set_inheritable(fd, False)
    with os.fdopen(config_fd, "rb") as file:
        file.seek(0)
        config = marshal.load(file)  # noqa: S302 - the keeper wrote it, and nobody else has it
    command = config["command"]
    status = socket.socket(fileno=status_fd)
    # These directories exist only in our view of the file system: the one of the kernel's sockets,
    # and those whose files disappear with us. The keeper lists the latter after everything in here
    # is dead: a file system stays until its last descriptor is closed.
    directories = [
        os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        for path in (config["sockets"], *config["discarded"])
    ]
    rights = b"".join(fd.to_bytes(4, sys.byteorder) for fd in directories)
    status.sendmsg([b'{"who":"init"}'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
    for fd in directories:
        os.close(fd)
    init_pid = os.getpid()
    error_r, error_w = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        _run_child(command, status, release_fd, error_w, init_pid)
    os.close(release_fd)
    os.close(error_w)
    if command["walls"] is not None and command["walls"]["drop_capabilities"]:
        from safe_exec.keeper import capabilities

        # Only the child needed them, to become another user.
        capabilities.give_up(for_uid=None)
    with os.fdopen(error_r, "rb") as pipe:
        # The descriptor is closed on execution, so this ends when the child executes.
        error = pipe.read()
    status.send(_failure(error) if error else b'{"executed":true}')
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    _reap(pid, status, restores=config["restorable"])


def _run_child(
    command: dict[str, Any], status: socket.socket, release_fd: int, error_fd: int, init_pid: int
) -> None:
    """Wait until the keeper releases this process, then become the kernel. Never returns."""
    from safe_exec.keeper import child

    try:
        os.setsid()
        status.send(b'{"who":"kernel"}')
        status.close()
        # The end of the pipe means that the keeper is dead, or that the cgroups could not be
        # joined.
        if not os.read(release_fd, 1):
            os._exit(1)
        os.close(release_fd)
        kernel_command = child.command_from(command)
    except BaseException as error:  # noqa: BLE001 - reported to the keeper
        child.report_failure(error_fd, "sandbox", error)
    child.run(kernel_command, init_pid, error_fd)


def _reap(pid: int, status: socket.socket, *, restores: bool) -> None:
    """Reap processes until the kernel has ended, then report it.

    All others inside die with this process. With ``restores`` the keeper then names the process
    that is the kernel from now on.
    """
    orphans_peak = 0
    while True:
        try:
            # Look first and reap afterwards: only a zombie still shows which signals it caught.
            dead = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
            caught = _caught_signals(pid) if dead is not None and dead.si_pid == pid else b"null"
            reaped, raw, usage = os.wait4(-1 if dead is None else dead.si_pid, 0)
        except ChildProcessError:
            return
        if reaped == pid:
            cpu = usage.ru_utime + usage.ru_stime
            resident = usage.ru_maxrss * 1024
            ending = b'{"status":%d,"cpu":%.6f,"resident":%d,"orphans":%d,"caught":%b}'
            status.send(ending % (raw, cpu, resident, orphans_peak, caught))
            successor = status.recv(MESSAGE_BYTES) if restores else b""
            if not successor:
                return
            # It may have ended meanwhile; then it is a zombie, and reaped below.
            pid = int(successor)
        else:
            orphans_peak = max(orphans_peak, usage.ru_maxrss * 1024)


def _caught_signals(pid: int) -> bytes:
    """Return the mask of signals with a handler as a JSON number (SigCgt in /proc/PID/status)."""
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            line = next(line for line in file if line.startswith(b"SigCgt:"))
            return b"%d" % int(line.split()[1], 16)
    except (OSError, ValueError, IndexError, StopIteration):
        return b"null"


def _failure(error: bytes) -> bytes:
    import json

    return json.dumps({"failed": error.decode("utf-8", "replace")[:MESSAGE_BYTES]}).encode()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
