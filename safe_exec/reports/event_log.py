"""Write the events of a run as JSON lines while it happens.

Each line is one ``write(2)``, so a runner that is killed leaves complete lines. Only the last one
may be cut short, because the system ends a write at a page boundary when SIGKILL is pending. The
file is flushed to disk after each cell and after each trial of a search.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import TracebackType
from typing import Self

from safe_exec.errors import OutputPathError
from safe_exec.model.events import (
    CellFinished,
    Event,
    KernelEnded,
    Killed,
    RunFinished,
    SearchTrialFinished,
)
from safe_exec.reports import json_text
from safe_exec.reports.text.common import single_line

# After these events the log is flushed: they are the ones that explain a later death.
_CHECKPOINTS = (CellFinished, Killed, KernelEnded, SearchTrialFinished, RunFinished)
# O_NONBLOCK: a pipe without a reader must block neither the start nor, once full, the run.
_FLAGS = (
    os.O_NONBLOCK
    | os.O_WRONLY
    | os.O_CREAT
    | os.O_TRUNC
    | os.O_APPEND
    | os.O_NOFOLLOW
    | os.O_CLOEXEC
)


class EventLog:
    """An event sink that writes to ``path`` and replaces an existing file; a context manager.

    Raises OutputPathError on entry if the file cannot be written or is a symlink. A later error,
    such as a full disk, ends the log but not the run; ``error`` is the first one.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.error: OSError | None = None
        self._descriptor: int | None = None

    def __enter__(self) -> Self:
        try:
            self._descriptor = os.open(self.path, _FLAGS, 0o666)
        # os.open raises ValueError for a NUL character in the name.
        except (OSError, ValueError) as error:
            raise OutputPathError(_refusal(self.path, error)) from None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __call__(self, event: Event) -> None:
        """Write one line. Never raises."""
        if self._descriptor is None or self.error is not None:
            return
        try:
            _write(self._descriptor, line_of(event))
            if isinstance(event, _CHECKPOINTS):
                _checkpoint(self._descriptor)
        except OSError as error:
            # A full disk must not end the run that the log is about.
            self.error = error


def line_of(event: Event) -> bytes:
    """Return an event as a line: ``{"event": "cell_started", "time": 0.42, ...}`` and a newline."""
    return json_text.line(event)


def _refusal(path: Path, error: OSError | ValueError) -> str:
    name = single_line(str(path))
    if not isinstance(error, OSError):
        return f"{name}: the event log cannot be written ({error}); name another file"
    if error.errno == errno.ELOOP:
        return f"{name}: is a symbolic link; name the file itself for the event log"
    return f"{name}: the event log cannot be written ({error.strerror}); name another file"


def _write(descriptor: int, line: bytes) -> None:
    # A pipe or a full disk may accept only a part of the line.
    while line:
        line = line[os.write(descriptor, line) :]


def _checkpoint(descriptor: int) -> None:
    try:
        os.fdatasync(descriptor)
    except OSError as error:
        if error.errno not in (
            errno.EINVAL,
            # A pipe or a terminal has nothing to flush.
            errno.EROFS,
        ):
            raise
