"""Probes whether bubblewrap works here."""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import Self

from safe_exec.sandbox.mechanisms.bubblewrap import OLDEST

BUBBLEWRAP_SECONDS = 10
INSTALL_BUBBLEWRAP = "install the package bubblewrap"
NOT_INSTALLED = f"it is not installed ({INSTALL_BUBBLEWRAP})"
# Docker's default seccomp filter and Ubuntu's AppArmor profiles forbid namespaces, although
# bubblewrap is installed. So run it once with the options that matter. A version that is too old
# fails because of an unknown option.
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
    """A test run of bubblewrap in the background. As a context manager it waits for its end."""

    def __init__(self) -> None:
        """Start the test run."""
        self.path = shutil.which("bwrap")
        self._process: subprocess.Popen[str] | None = None
        self._trouble = "" if self.path is not None else NOT_INSTALLED
        if self.path is None:
            return
        try:
            # The run takes 6 ms. In the background it costs no time, since the notebook is read
            # meanwhile.
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
        """Wait for the end; return why bubblewrap does not work, "" if it does."""
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
        """Wait for the end of the test run."""
        # Do not kill it: bubblewrap's inner process waits for a message from the outer one, and
        # would wait forever.
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
    """Return the version of bubblewrap, ``None`` if it prints none."""
    # bubblewrap prints "bubblewrap 0.8.0".
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
    """Return a message if a version is too old, "" otherwise or if it is unknown."""
    numbers = tuple(map(int, re.findall(r"\d+", version or "")[: len(OLDEST)]))
    if not numbers or numbers >= OLDEST:
        return ""
    return f"version {version} is too old ({'.'.join(map(str, OLDEST))} is the oldest that will do)"
