"""How a trial ended: observed, not interpreted."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from enum import StrEnum

from msgspec import Struct

from safe_exec.model.limits import LimitName
from safe_exec.model.patterns import lazy_pattern


def signal_name(number: int) -> str:
    """Return ``SIGKILL`` for 9 and for -9, and ``signal 40`` for a signal without a name."""
    try:
        return signal.Signals(abs(number)).name
    # Real-time signals have no names.
    except ValueError:
        return f"signal {abs(number)}"


class ExitStatus(Struct, frozen=True):
    """The raw wait status of a process (``waitpid(2)``): an exit code or a signal, never both."""

    raw: int

    @property
    def signal(self) -> int | None:
        """The number of the signal that ended the process, positive, or ``None``."""
        return os.WTERMSIG(self.raw) if os.WIFSIGNALED(self.raw) else None

    @property
    def exit_code(self) -> int | None:
        """The exit code, ``None`` if a signal ended the process."""
        return os.WEXITSTATUS(self.raw) if os.WIFEXITED(self.raw) else None

    def __str__(self) -> str:
        if self.signal is None:
            return f"exit status {self.exit_code}"
        return signal_name(self.signal)


class TerminationReason(StrEnum):
    """The reason for which safe-exec ended the kernel; recorded before the signal is sent.

    The first reason is kept.
    """

    MEMORY = "memory"
    CPU_TIME = "cpu_time"
    CELL_TIMEOUT = "cell_timeout"
    NOTEBOOK_TIMEOUT = "notebook_timeout"
    START_TIMEOUT = "start_timeout"
    PROCESSES = "processes"
    DISK = "disk"
    OUTPUT = "output"
    CANCELLED = "cancelled"
    INTERNAL = "internal"
    SHUTDOWN = "shutdown"


# Frames of a debugger in a traceback, as IPython 7 to 9 print them.
_DEBUGGER = lazy_pattern(r"\b(?:pdb|debugger|bdb)\.py\b|\bdebugger\(|\.set_trace\(")
_COLOURS = lazy_pattern(r"\x1b\[[0-9;]*m")


class CellError(Struct, frozen=True, kw_only=True):
    """An exception that a cell raised, as the kernel reported it."""

    ename: str
    evalue: str
    traceback: tuple[str, ...] = ()

    @property
    def in_debugger(self) -> bool:
        """Whether the traceback contains a debugger's frames."""
        return _DEBUGGER.search(_COLOURS.sub("", "\n".join(self.traceback))) is not None


class Passed(Struct, frozen=True, kw_only=True):
    """Every cell ran, and the kernel was alive at the end."""


class CellFailed(Struct, frozen=True, kw_only=True):
    """A cell raised an error, and the kernel was alive. ``cell`` is an index over all cells."""

    cell: int
    error: CellError


class OutputDifference(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A kind of output (a MIME type, a stream) in which a cell differs from the stored notebook."""

    index: int
    code_index: int
    kind: str
    summary: str
    # As in a unified diff: `-` stored, `+` new.
    lines: tuple[str, ...] = ()


class OutputsDiffer(Struct, frozen=True, kw_only=True):
    """Every cell ran, but outputs differ from those stored in the notebook."""

    # The first cell that differs, an index over all cells.
    cell: int
    differences: tuple[OutputDifference, ...]


class Died(Struct, frozen=True, kw_only=True):
    """The kernel ended, or asked to end, before safe-exec's shutdown request."""

    # The cell that was running, or the cell that asked the kernel to end.
    cell: int | None
    # None if the status is unknown (the keeper was killed as well) or the kernel only asked to end.
    exit: ExitStatus | None
    asked_to_exit: bool = False


class TimedOut(Struct, frozen=True, kw_only=True):
    """safe-exec ended a cell or the whole notebook after ``allowed`` seconds."""

    cell: int | None
    # Whether the limit applied to the whole notebook rather than to one cell.
    whole_notebook: bool
    allowed: float
    # Whether the cell ended at the interrupt; None if none was sent, or the kernel itself ended.
    answered: bool | None = None
    # The exception that the cell raised at the interrupt.
    error: CellError | None = None
    # In a trial: the cell showed the picture of a known hang, and was ended before its time was up.
    recognised: bool = False


class LimitHit(Struct, frozen=True, kw_only=True):
    """safe-exec ended the run because of ``limit``."""

    limit: LimitName
    cell: int | None


class StartFailed(Struct, frozen=True, kw_only=True):
    """The kernel never became ready."""

    reason: str
    exit: ExitStatus | None = None
    waited: float | None = None
    # Only if no kernel of that name is installed: the installed ones, each with its language.
    installed: Mapping[str, str] | None = None


class Cancelled(Struct, frozen=True, kw_only=True):
    """The user or the system stopped us with ``signal``."""

    signal: int
    cell: int | None


class InternalError(Struct, frozen=True, kw_only=True):
    """The sandbox could not be built as requested, or safe-exec itself failed."""

    message: str
    cell: int | None = None
    # Nothing failed: this machine cannot enforce a limit that was required.
    refused: bool = False
    # Nothing failed: the requested isolation does not fit the notebook's folder or a path.
    unfit: bool = False


Ending = (
    Passed
    | CellFailed
    | OutputsDiffer
    | Died
    | TimedOut
    | LimitHit
    | StartFailed
    | Cancelled
    | InternalError
)
