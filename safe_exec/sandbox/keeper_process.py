"""The process of a keeper is started here, before anything else of ours is imported where a run is sure to come.

Its interpreter takes as long to start as ours does to read the command line. Where many are needed they are forked from one process that has
imported all that they need (keeper/forkserver.py). Imports the standard library alone, and as little of it as can be.
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

BOOT = "import os, sys; sys.path.append(sys.argv[2]); from safe_exec.keeper.{module} import main; main(int(sys.argv[1]), *sys.argv[3:]); os._exit(0)"
"""All is put away by then: to take an interpreter apart takes as long as to remove a sandbox, and the runner waits for both."""
LONGEST_BASE = 60
SIGKILL = 9


class Born:
    """A keeper's process, our end of the socket to it, and the directory that it makes."""

    def __init__(
        self,
        run_id: str,
        *,
        directory: str,
        born: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start it. ``born`` is the command by which it must be born in a place of its own. Raises OSError."""
        self.run_id, self.directory = run_id, directory
        self.control, theirs = socket.socketpair()
        self._process: subprocess.Popen[bytes] | None = None
        self._pidfd = -1
        with theirs:
            if born or environment or not _fork_one(theirs, run_id, directory):
                self._process = _start(
                    "keeper", theirs, directory, run_id, born=born, environment=environment
                )

    def is_known_as(self, pid: int) -> None:
        """The keeper has said who it is, and waits for us: from now on its end can be seen."""
        if self._process is None and self._pidfd < 0:
            try:
                self._pidfd = os.pidfd_open(pid)
            except OSError:
                return  # it is gone already, or no descriptor is left; its socket tells of its end as well

    def kill(self) -> None:
        """Kill it."""
        if self._process is not None:
            self._process.kill()
        elif self._pidfd >= 0:
            import signal

            try:
                signal.pidfd_send_signal(self._pidfd, SIGKILL)
            except ProcessLookupError:
                return

    def wait(self) -> None:
        """Wait until it is gone. One that never said who it is ends with its socket."""
        if self._process is not None:
            self._process.wait()
        elif self._pidfd >= 0:
            poll = select.poll()  # pidfd_open(2): readable when the process has ended
            poll.register(self._pidfd, select.POLLIN)
            poll.poll()
            os.close(self._pidfd)
            self._pidfd = -1


def _start(
    module: str,
    theirs: socket.socket,
    *words: str,
    born: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    return subprocess.Popen(
        [
            *born,
            sys.executable,
            "-I",
            "-S",
            "-c",
            BOOT.format(module=module),
            str(theirs.fileno()),
            root,
            *words,
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()],
        start_new_session=True,
        env={**os.environ, **(environment or {})},
    )


class Nursery:
    """Within it keepers are forked and not started, where nothing says how they must be born. A context manager; one may stand in another.

    It does nothing where a process cannot be waited for by a descriptor (pidfd_open(2), Linux 5.3): a forked keeper is no child of ours.
    """

    def __enter__(self) -> Self:
        global _depth  # noqa: PLW0603 - one for the process
        with _turn:
            _depth += 1
        return self

    def __exit__(self, *_: object) -> None:
        global _depth, _nursery  # noqa: PLW0603
        with _turn:
            _depth -= 1
            if _depth == 0 and _nursery is not None:
                control, process = _nursery
                _nursery = None
                control.close()
                process.wait()


_depth = 0
_nursery: tuple[socket.socket, subprocess.Popen[bytes]] | None = None
"""Our end of the socket to it, and its process: there is none before the first keeper is wanted."""
_turn = threading.Lock()


def _knows_pidfds() -> bool:
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (OSError, AttributeError):
        return False
    return True


def _fork_one(theirs: socket.socket, run_id: str, directory: str) -> bool:
    """Have a keeper forked for the other end of a socket; ``False`` where there is nobody to do so."""
    global _nursery  # noqa: PLW0603
    with _turn:
        try:
            if _nursery is None and _depth and _knows_pidfds():
                _nursery = _open_nursery()
            if _nursery is None:
                return False
            socket.send_fds(
                _nursery[0],
                [f"{run_id}\0{directory}".encode("utf-8", "surrogateescape")],
                [theirs.fileno()],
            )
        except OSError:  # it was killed: a keeper can be started as well
            return False
    return True


def _open_nursery() -> tuple[socket.socket, subprocess.Popen[bytes]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        try:
            return ours, _start("forkserver", theirs)
        except OSError:
            ours.close()
            raise


def new_run_id() -> str:
    """Twelve hexadecimal digits."""
    return os.urandom(6).hex()


def runtime_directory(run_id: str) -> str:
    """A path, short since a socket's may have 108 bytes (unix(7)), for the directory that the keeper makes."""
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    usable = base and len(base) < LONGEST_BASE and os.access(base, os.W_OK)
    return f"{base if usable else '/tmp'}/safe-exec-{run_id}"  # noqa: S108


def systemd_is_booted() -> bool:
    """Whether systemd is the init here (sd_booted(3))."""
    return os.path.isdir("/run/systemd/system")


_begun: Born | None = None


def begin() -> None:
    """Start a keeper now: the command line may ask for it in a moment. Not where systemd is: there it may have to be born in a scope."""
    global _begun  # noqa: PLW0603 - one process, one command line
    if systemd_is_booted():
        return
    run_id = new_run_id()
    try:
        _begun = Born(run_id, directory=runtime_directory(run_id))
    except OSError:
        return  # whoever starts one later meets the same, where it can be told


def take() -> Born | None:
    """The keeper that was begun."""
    global _begun
    found, _begun = _begun, None
    return found
