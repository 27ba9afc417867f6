"""Every error that a user can see: one line with problem, place and fix, and an exit code.

Only ``__main__`` exits.
"""

from __future__ import annotations

from collections.abc import Mapping


class SafeExecError(Exception):
    """The base of all errors that safe-exec raises; ``str(error)`` is one line for the user."""

    exit_code = 7


# Click exits with 2 for wrong options, and so do all other errors of usage.
class UsageError(SafeExecError):
    """Bad usage or unreadable input. Nothing has been written."""

    exit_code = 2


class NotebookError(UsageError):
    """The notebook cannot be read, or the file is not a notebook."""


class LimitsError(UsageError):
    """A wrong limit or limits file; the line names the file, the key and the expected value."""


class OutputPathError(UsageError):
    """An output path cannot be written; reported before the run."""


class EnforcementError(SafeExecError):
    """The operating system here cannot enforce a limit that ``--require`` names."""

    exit_code = 7


class SandboxError(SafeExecError):
    """The sandbox could not be built, or the keeper failed."""

    exit_code = 7


class IsolationError(SandboxError):
    """The requested isolation does not fit the notebook's folder or a path. Nothing was run."""


class ClusterError(SafeExecError):
    """The cluster of ``--cluster`` cannot be reached or started. Nothing was run."""

    exit_code = 7


class PlatformError(SafeExecError):
    """safe-exec does not support this platform. Nothing was run or written."""

    exit_code = 7


class KernelStartError(SafeExecError):
    """The kernel did not become ready."""

    exit_code = 6


class KernelMissingError(KernelStartError):
    """The named kernel is not installed; ``installed`` maps installed kernels to languages."""

    def __init__(self, name: str, installed: Mapping[str, str]) -> None:
        names = ", ".join(sorted(installed)) or "none"
        super().__init__(f"no kernel named {name!r} is installed; installed: {names}")
        # Tools may offer another kernel of the same language.
        self.installed = installed
