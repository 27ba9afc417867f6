"""Every error a user can meet: one line that says what, where and how to fix it, and the exit code it ends with.

Imports nothing of safe-exec. Only ``__main__`` exits.
"""

from __future__ import annotations

from collections.abc import Mapping


class SafeExecError(Exception):
    """Base of all errors that safe-exec raises on purpose. ``str(error)`` is one line for the user."""

    exit_code = 7


class UsageError(SafeExecError):
    """Bad usage or unreadable input: nothing has been written."""

    exit_code = 2


class NotebookError(UsageError):
    """The notebook cannot be read, or is none."""


class LimitsError(UsageError):
    """A limit, a profile or a limits file is wrong; the line names file, key and what was expected."""


class OutputPathError(UsageError):
    """An output path cannot be written; found before the run."""


class EnforcementError(SafeExecError):
    """A limit named by ``--require`` cannot be held by the operating system's kernel on this machine."""

    exit_code = 7


class SandboxError(SafeExecError):
    """The sandbox could not be built, or the keeper failed."""

    exit_code = 7


class PlatformError(SafeExecError):
    """There is no sandbox for this operating system; nothing was run or written."""

    exit_code = 7


class KernelStartError(SafeExecError):
    """The kernel never became ready."""

    exit_code = 6


class KernelMissingError(KernelStartError):
    """No kernel of that name is installed; ``installed`` are those that are, each with its language."""

    def __init__(self, name: str, installed: Mapping[str, str]) -> None:
        names = ", ".join(sorted(installed)) or "none"
        super().__init__(f"no kernel named {name!r} is installed; installed: {names}")
        self.installed = installed
