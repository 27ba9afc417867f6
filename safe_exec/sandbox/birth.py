"""The process of a keeper is started here, before anything else of ours is imported where a run is sure to come.

Its interpreter takes as long to start as ours does to read the command line. Imports the standard library alone, and as little of it as can be.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

BOOT = "import os, sys; sys.path.append(sys.argv[2]); from safe_exec.sandbox.keeper import main; main(int(sys.argv[1]), *sys.argv[3:]); os._exit(0)"
"""All is put away by then: to take an interpreter apart takes as long as to remove a sandbox, and the runner waits for both."""
LONGEST_BASE = 60


class Born:
    """A keeper's process, our end of the socket to it, and the directory that it makes."""

    def __init__(
        self, run_id: str, *, directory: str, born: Sequence[str] = (), environment: Mapping[str, str] | None = None
    ) -> None:
        """Start it. ``born`` is the command by which it must be born in a place of its own. Raises OSError."""
        self.run_id, self.directory = run_id, directory
        self.control, theirs = socket.socketpair()
        root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        with theirs:
            self.process = subprocess.Popen(
                [*born, sys.executable, "-I", "-S", "-c", BOOT, str(theirs.fileno()), root, directory, run_id],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env={**os.environ, **(environment or {})},
            )


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
