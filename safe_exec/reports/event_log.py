"""The event log: the run as JSON lines while it happens, for a look into when something is odd.

Imports ``events`` and ``errors``. A line is written with one ``write(2)`` as soon as its event happens,
so that a runner that is killed leaves complete lines; only its very last one may be cut short, as the system gives up
a write to a file between two pages when a SIGKILL is pending. Each end of a cell, or of a trial of a search, is a
checkpoint on the disk.
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
from safe_exec.reports.text.common import one_line

_CHECKPOINTS = (CellFinished, Killed, KernelEnded, SearchTrialFinished, RunFinished)
# Not blocking: a pipe that nobody reads must hold up neither the start nor, once it is full, the run.
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
    """An event sink that writes to ``path``, which it replaces; a context manager.

    Raises :class:`OutputPathError` on entry where the file cannot be written or is a symbolic link. Later failures (a
    full disk, say) end the log and not the run; ``error`` then holds the first.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.error: OSError | None = None
        self._descriptor: int | None = None

    def __enter__(self) -> Self:
        try:
            self._descriptor = os.open(self.path, _FLAGS, 0o666)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
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
        """Writes one line; never raises."""
        if self._descriptor is None or self.error is not None:
            return
        try:
            _write(self._descriptor, line_of(event))
            if isinstance(event, _CHECKPOINTS):
                _checkpoint(self._descriptor)
        except OSError as error:
            self.error = error


def line_of(event: Event) -> bytes:
    """The line of one event: ``{"event": "cell_started", "time": 0.42, ...}`` and a newline."""
    return json_text.line(event)


def _refusal(path: Path, error: OSError | ValueError) -> str:
    name = one_line(str(path))
    if not isinstance(error, OSError):
        return f"{name}: the event log cannot be written ({error}); name another file"
    if error.errno == errno.ELOOP:
        return f"{name}: is a symbolic link; name the file itself for the event log"
    return f"{name}: the event log cannot be written ({error.strerror}); name another file"


def _write(descriptor: int, line: bytes) -> None:
    while line:  # a pipe or a full disk may take a part only
        line = line[os.write(descriptor, line) :]


def _checkpoint(descriptor: int) -> None:
    try:
        os.fdatasync(descriptor)
    except OSError as error:
        if error.errno not in (
            errno.EINVAL,
            errno.EROFS,
        ):  # a pipe or a terminal has nothing to sync
            raise
