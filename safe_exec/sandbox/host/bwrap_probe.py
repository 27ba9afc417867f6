"""Probes whether bubblewrap works here: it may be installed and not allowed to make namespaces.

Docker's default filter and Ubuntu's AppArmor profiles forbid them.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import Self

from safe_exec.sandbox.mechanisms.bubblewrap import OLDEST

BUBBLEWRAP_SECONDS = 10
INSTALL_BUBBLEWRAP = "install the package bubblewrap"
NOT_INSTALLED = f"it is not installed ({INSTALL_BUBBLEWRAP})"
# What bubblewrap is asked to do to see whether it can.
PROBE_ARGUMENTS = (
    *(
        "--ro-bind",
        "/",
        "/",
        "--dev",
        "/dev",
        "--proc",
        "/proc",
        "--unshare-pid",
        "--unshare-net",
        "--die-with-parent",
    ),
    *("--perms", "0755", "--size", "4096", "--tmpfs", "/tmp", "true"),  # noqa: S108
)


class BwrapProbe:
    """A trial run of bubblewrap, in the background from the start.

    A version that is too old fails for an option that it does not know. A context manager, which
    leaves no process behind.
    """

    def __init__(self) -> None:
        """Start the trial run."""
        self.path = shutil.which("bwrap")
        self._process: subprocess.Popen[str] | None = None
        self._trouble = "" if self.path is not None else NOT_INSTALLED
        if self.path is None:
            return
        try:
            # It runs while the notebook is read: a probe takes 6 ms of wall time that nobody waits
            # for.
            self._process = subprocess.Popen(
                [self.path, *PROBE_ARGUMENTS],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
            )
        except OSError as error:
            self._trouble = str(error)

    def outcome(self) -> str:
        """Wait for the end. Why bubblewrap does not do what is needed; empty when it does."""
        if self._process is None:
            return self._trouble
        try:
            _, errors = self._process.communicate(timeout=BUBBLEWRAP_SECONDS)
        except subprocess.TimeoutExpired as error:
            return str(error)
        return (
            (errors.strip().splitlines() or ["it failed without a word"])[-1]
            if self._process.returncode
            else ""
        )

    def close(self) -> None:
        """Wait for its end, whether anybody asked for its outcome or not."""
        # It is not killed: bubblewrap's inner process waits for a word of the outer one, and would
        # for ever.
        if self._process is None:
            return
        with self._process as process:
            try:
                process.communicate(timeout=BUBBLEWRAP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def version_of(path: str) -> str | None:
    """The last word of ``bubblewrap 0.8.0``; ``None`` where it does not say."""
    try:
        output = subprocess.run(
            [path, "--version"],
            capture_output=True,
            text=True,
            timeout=BUBBLEWRAP_SECONDS,
            check=True,
        ).stdout
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return output.split()[-1] if output.split() else None


def too_old(version: str | None) -> str:
    """Whether a version that failed is too old.

    Empty where it is not, and where it says nothing.
    """
    numbers = tuple(map(int, re.findall(r"\d+", version or "")[: len(OLDEST)]))
    if not numbers or numbers >= OLDEST:
        return ""
    return f"version {version} is too old ({'.'.join(map(str, OLDEST))} is the oldest that will do)"
