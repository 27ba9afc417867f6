"""How a trial ended: observed, not interpreted."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Mapping
from enum import StrEnum

from msgspec import Struct

from safe_exec.model.limits import LimitName


class ExitStatus(Struct, frozen=True):
    """The raw wait status of a process (``waitpid(2)``): an exit code or a signal, never both."""

    raw: int

    @property
    def signal(self) -> int | None:
        """The number of the signal that ended the process, positive, or ``None``."""
        return os.WTERMSIG(self.raw) if os.WIFSIGNALED(self.raw) else None

    @property
    def exit_code(self) -> int | None:
        """The exit code, or ``None`` where a signal ended the process."""
        return os.WEXITSTATUS(self.raw) if os.WIFEXITED(self.raw) else None

    def __str__(self) -> str:
        if self.signal is None:
            return f"exit status {self.exit_code}"
        try:
            return signal.Signals(self.signal).name
        except ValueError:
            # A real-time signal has no name.
            return f"signal {self.signal}"


class TerminationReason(StrEnum):
    """What *we* did to end the kernel; recorded before the signal is sent, the first one stays."""

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
_DEBUGGER = re.compile(r"\b(?:pdb|debugger|bdb)\.py\b|\bdebugger\(|\.set_trace\(")
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class CellError(Struct, frozen=True, kw_only=True):
    """An exception that a cell raised, as the kernel reported it."""

    ename: str
    evalue: str
    traceback: tuple[str, ...] = ()

    @property
    def in_debugger(self) -> bool:
        """Whether a debugger stands in the traceback."""
        return _DEBUGGER.search(_COLOURS.sub("", "\n".join(self.traceback))) is not None


class Passed(Struct, frozen=True, kw_only=True):
    """Every cell ran and the kernel was alive at the end."""


class CellFailed(Struct, frozen=True, kw_only=True):
    """A cell raised; the kernel was alive. ``cell`` is an index over all cells."""

    cell: int
    error: CellError


class Died(Struct, frozen=True, kw_only=True):
    """The kernel ended, or asked to (``asked_to_exit``), before our shutdown request.

    ``cell`` is the cell that ran when it happened; for a kernel that only asked, the cell that did. ``exit`` is
    ``None`` where the status could not be had (the keeper itself was killed) or the kernel only asked.
    """

    cell: int | None
    exit: ExitStatus | None
    asked_to_exit: bool = False


class TimedOut(Struct, frozen=True, kw_only=True):
    """We ended a cell (``whole_notebook`` false) or the notebook (true) after ``allowed`` seconds.

    ``answered`` says whether the cell ended at the interrupt, ``None`` where none was sent or the kernel itself ended at it; ``error``
    is what the cell raised then.
    """

    cell: int | None
    whole_notebook: bool
    allowed: float
    answered: bool | None = None
    error: CellError | None = None


class LimitHit(Struct, frozen=True, kw_only=True):
    """We ended the run for ``limit``."""

    limit: LimitName
    cell: int | None


class StartFailed(Struct, frozen=True, kw_only=True):
    """The kernel never became ready.

    ``installed`` is there if no kernel of that name is: the kernels that are, by name, each with its language.
    """

    reason: str
    exit: ExitStatus | None = None
    waited: float | None = None
    installed: Mapping[str, str] | None = None


class Cancelled(Struct, frozen=True, kw_only=True):
    """The user or the system stopped us with ``signal``."""

    signal: int
    cell: int | None


class InternalError(Struct, frozen=True, kw_only=True):
    """The sandbox could not be built as asked, or safe-exec itself failed.

    ``refused``: nothing failed; the machine cannot hold a limit that was required.
    """

    message: str
    cell: int | None = None
    refused: bool = False


Ending = Passed | CellFailed | Died | TimedOut | LimitHit | StartFailed | Cancelled | InternalError
