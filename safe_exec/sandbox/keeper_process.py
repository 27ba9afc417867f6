"""Starts keepers.

``safe-exec run`` starts its keeper before it imports any other module of safe-exec.
"""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import threading

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Self

# A keeper's interpreter takes as long to start as ours takes to parse the command line. If many are
# needed, they are forked from one process that has imported all their modules
# (keeper/forkserver.py). This module imports the standard library only, and as little of it as
# possible.

# The runner waits for the keeper's end. os._exit skips the shutdown of the interpreter, which takes
# as long as removing a sandbox; everything is cleaned up by then.
BOOT = (
    "import os, sys; sys.path.append(sys.argv[2]); from safe_exec.keeper.{module} import main; "
    "main(int(sys.argv[1]), *sys.argv[3:]); os._exit(0)"
)
# Longer paths leave no room for the names of the sockets within 108 bytes (unix(7)).
LONGEST_BASE = 60
SIGKILL = 9


class KeeperProcess:
    """A keeper's process, our end of its socket, and the directory that it makes."""

    def __init__(
        self,
        run_id: str,
        *,
        directory: str,
        launcher: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start the keeper; ``launcher`` is a command that starts it in another cgroup.

        Raises OSError.
        """
        self.run_id, self.directory = run_id, directory
        self.control, keeper_end = socket.socketpair()
        self._process: subprocess.Popen[bytes] | None = None
        self._pidfd = -1
        with keeper_end:
            # A keeper forked by the fork server would stay in the server's cgroup. So a launcher
            # must start its own process.
            if launcher or environment or not _fork_keeper(keeper_end, run_id, directory):
                self._process = _start(
                    "keeper",
                    keeper_end,
                    directory,
                    run_id,
                    launcher=launcher,
                    environment=environment,
                )

    def attach_pid(self, pid: int) -> None:
        """Record a forked keeper's pid, so that ``wait`` can await its end."""
        # The keeper waits for our next message meanwhile, so its pid cannot have been reused.
        if self._process is None and self._pidfd < 0:
            try:
                self._pidfd = os.pidfd_open(pid)
            except OSError:
                # The process has ended, or no descriptor is left. The end of its socket shows its
                # end, too.
                return

    def kill(self) -> None:
        """Send SIGKILL, if a process or pidfd is known."""
        if self._process is not None:
            self._process.kill()
        elif self._pidfd >= 0:
            import signal

            try:
                signal.pidfd_send_signal(self._pidfd, SIGKILL)
            except ProcessLookupError:
                return

    def wait(self) -> None:
        """Wait until the keeper has ended."""
        # A forked keeper without an attached pid cannot be awaited; it ends with its socket.
        if self._process is not None:
            self._process.wait()
        elif self._pidfd >= 0:
            # A pidfd is readable once the process has ended (pidfd_open(2)).
            poll = select.poll()
            poll.register(self._pidfd, select.POLLIN)
            poll.poll()
            os.close(self._pidfd)
            self._pidfd = -1


def _start(
    module: str,
    keeper_end: socket.socket,
    *arguments: str,
    launcher: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    return subprocess.Popen(
        [
            *launcher,
            sys.executable,
            "-I",
            "-S",
            "-c",
            BOOT.format(module=module),
            str(keeper_end.fileno()),
            root,
            *arguments,
        ],
        stdin=subprocess.DEVNULL,
        # The keeper inherits our stderr, where it reports why it cannot start.
        stdout=subprocess.DEVNULL,
        pass_fds=[keeper_end.fileno()],
        # Ctrl-C in a terminal signals the foreground process group. The keeper must outlive it to
        # clean up.
        start_new_session=True,
        env={**os.environ, **(environment or {})},
    )


class ForkServer:
    """A context manager; within it all keepers are forked from one process. It can be nested."""

    # Without pidfds (before Linux 5.3) it has no effect: a forked keeper is not our child, so only
    # a pidfd shows its end.
    def __enter__(self) -> Self:
        global _depth  # noqa: PLW0603 - one for the process
        with _lock:
            _depth += 1
        return self

    def open(self) -> None:
        """Start the fork server now, so that forks of the runner share it. Raises OSError."""
        global _fork_server  # noqa: PLW0603
        with _lock:
            if _fork_server is None and _has_pidfds():
                _fork_server = _open_fork_server()

    def __exit__(self, *_: object) -> None:
        global _depth, _fork_server  # noqa: PLW0603
        with _lock:
            _depth -= 1
            if _depth == 0 and _fork_server is not None:
                control, process = _fork_server
                _fork_server = None
                control.close()
                process.wait()


_depth = 0
# Our end of the fork server's socket, and its process. It is started with the first keeper.
_fork_server: tuple[socket.socket, subprocess.Popen[bytes]] | None = None
_lock = threading.Lock()


def _has_pidfds() -> bool:
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (OSError, AttributeError):
        return False
    return True


def _fork_keeper(keeper_end: socket.socket, run_id: str, directory: str) -> bool:
    """Let the fork server fork a keeper for a socket; false without a fork server."""
    global _fork_server  # noqa: PLW0603
    with _lock:
        try:
            if _fork_server is None and _depth and _has_pidfds():
                _fork_server = _open_fork_server()
            if _fork_server is None:
                return False
            socket.send_fds(
                _fork_server[0],
                [f"{run_id}\0{directory}".encode("utf-8", "surrogateescape")],
                [keeper_end.fileno()],
            )
        except OSError:
            # The fork server was killed. The caller starts the keeper as a new process instead.
            return False
    return True


def _open_fork_server() -> tuple[socket.socket, subprocess.Popen[bytes]]:
    ours, server_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with server_end:
        try:
            return ours, _start("forkserver", server_end)
        except OSError:
            ours.close()
            raise


def new_run_id() -> str:
    """Return twelve random hexadecimal digits."""
    return os.urandom(6).hex()


def runtime_directory(run_id: str) -> str:
    """Return the path of the directory that the keeper makes for a run."""
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    usable = base and len(base) < LONGEST_BASE and os.access(base, os.W_OK)
    return f"{base if usable else '/tmp'}/safe-exec-{run_id}"  # noqa: S108


def systemd_is_booted() -> bool:
    """Whether systemd is the init of this system (sd_booted(3))."""
    return os.path.isdir("/run/systemd/system")


_prestarted: KeeperProcess | None = None


def prestart() -> None:
    """Start the keeper that the command line is about to need."""
    global _prestarted  # noqa: PLW0603 - one process, one command line
    # With systemd the keeper may have to start in a scope. That depends on the plan, which does not
    # exist yet.
    if systemd_is_booted():
        return
    run_id = new_run_id()
    try:
        _prestarted = KeeperProcess(run_id, directory=runtime_directory(run_id))
    except OSError:
        # The next attempt fails in the same way, where the error can be reported.
        return


def claim() -> KeeperProcess | None:
    """Return the prestarted keeper; ``None`` if there is none, and from the second call on."""
    global _prestarted
    keeper, _prestarted = _prestarted, None
    return keeper
