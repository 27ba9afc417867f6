"""Record the progress of a batch on disk, so that a batch that was killed can resume.

``journal.jsonl`` in the output directory has one line per event and is only appended to. The line
of a finished notebook is written after its documents and flushed with fsync, so a notebook that the
journal calls finished is finished. A kill may leave a partial last line, which is ignored; the next
event starts a new line. The writing batch holds a lock (flock(2)), which the system releases
whatever ends the batch.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Self, TypeVar

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from safe_exec.errors import UsageError
from safe_exec.files import one_line
from safe_exec.reports import json_text

NAME = "journal.jsonl"
_STARTED, _FINISHED = "started", "finished"
_BATCH_STARTED, _BATCH_FINISHED = "batch_started", "batch_finished"
T = TypeVar("T")
# O_APPEND: threads write whole lines. O_NOFOLLOW: a notebook may put a link in the journal's place.
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC


class JournalRecord(
    Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="event",
    tag=_FINISHED,
):
    """The record of a notebook that ran to its end.

    ``time`` is the end, in seconds since 1970. ``key`` is the fingerprint of the run
    (``fingerprint.key_of_run``); ``headline`` is its verdict in one line. Documents are paths
    relative to the output directory. ``machine`` is the worker's host name, and ``losses`` has the
    host name of each worker that was lost while running the notebook; both only for a cluster.
    """

    time: float = 0.0
    path: str
    status: str
    exit_code: int
    seconds: float | None
    attempts: int
    flaky: bool
    key: str
    headline: str = ""
    error: str | None = None
    verdict: str | None = None
    notebook: str | None = None
    repro: str | None = None
    machine: str | None = None
    losses: tuple[str, ...] = ()


class PreviousBatch(Struct, frozen=True, kw_only=True):
    """The content of a journal: the last record of each finished notebook.

    ``complete`` is true if the batch ran to its end. ``started`` is the start of its last run, in
    seconds since 1970; ``root`` is the directory that paths are relative to, ``shard`` is (K, N).
    """

    finished: Mapping[str, JournalRecord]
    complete: bool
    empty: bool
    started: float | None = None
    root: str = ""
    shard: tuple[int, int] | None = None


class _Line(Struct, frozen=True, kw_only=True):
    """The fields that ``read`` needs of a line: its event, and the facts of a batch's start."""

    event: str
    path: str = ""
    time: float | None = None
    root: str = ""
    shard: tuple[int, int] | None = None


def read(path: Path) -> PreviousBatch:
    """Read a journal; a missing file gives an empty result."""
    # A line that is not JSON was cut short by a kill.
    finished: dict[str, JournalRecord] = {}
    complete, empty = False, True
    start = _Line(event=_BATCH_STARTED)
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        lines = []
    for text in lines:
        event = _decoded(text, _Line)
        if event is None:
            continue
        complete, empty = event.event == _BATCH_FINISHED, False
        if event.event == _BATCH_STARTED:
            start = event
        elif event.event == _FINISHED:
            # A version of safe-exec with other fields wrote a line that is not a record: the
            # notebook runs again.
            record = _decoded(text, JournalRecord)
            if record is not None:
                finished[record.path] = record
        elif event.event == _STARTED:
            # The notebook started again, after a change, and is finished when that run is.
            finished.pop(event.path, None)
    return PreviousBatch(
        finished=finished,
        complete=complete,
        empty=empty,
        started=start.time,
        root=start.root,
        shard=start.shard,
    )


def _decoded(text: bytes, kind: type[T]) -> T | None:
    try:
        return msgspec.json.decode(text, type=kind)
    except (ValueError, RecursionError):
        return None


class Journal:
    """The journal of a running batch; a context manager. Safe to use from any thread.

    ``past`` is the content on entry; without ``resume`` the file is emptied after reading it.
    ``trouble`` is the first error on writing: the batch continues, but cannot be resumed. Raises
    UsageError if another batch holds the lock or the file cannot be opened.
    """

    def __init__(self, out: Path, *, resume: bool) -> None:
        self.path = out / NAME
        self.resume = resume
        self.past = PreviousBatch(finished={}, complete=False, empty=True)
        self.trouble: OSError | None = None
        self._fd = -1
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        try:
            self._fd = os.open(self.path, _FLAGS, 0o666)
        except OSError as error:
            raise UsageError(
                f"{one_line(self.path)}: cannot be written: {error.strerror}; choose another --out"
            ) from None
        try:
            # The lock belongs to the open file: it disappears with the process, even after SIGKILL.
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.close()
            directory = one_line(self.path.parent)
            raise UsageError(
                f"{directory}: another batch writes there now; wait for it or choose another --out"
            ) from None
        self.past = read(self.path)
        if self.resume:
            self._begin_a_line()
        else:
            os.ftruncate(self._fd, 0)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file, which releases the lock."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _begin_a_line(self) -> None:
        # A kill may have cut the last line short: without a line break the next event would be lost
        # too.
        size = os.fstat(self._fd).st_size
        if size and os.pread(self._fd, 1, size - 1) != b"\n":
            self._write(b"\n", sync=False)

    def batch_started(self, **facts: object) -> None:
        """Record the start of a batch, or of its continuation."""
        self._put(_BATCH_STARTED, facts, sync=True)

    def started(self, path: str, *, attempt: int, run_id: str, machine: str | None = None) -> None:
        """Record the start of a notebook, on ``machine`` of a cluster."""
        facts = {"path": path, "attempt": attempt, "run_id": run_id}
        place = {} if machine is None else {"machine": machine}
        self._put(_STARTED, {**facts, **place}, sync=False)

    def finished(self, record: JournalRecord, *, time: float | None = None) -> None:
        """Record a notebook that finished at ``time`` (default: now); it is on disk on return."""
        ended = _now() if time is None else time
        self._write(json_text.line(replace(record, time=ended)), sync=True)

    def batch_finished(self, **facts: object) -> None:
        """Record the end of a batch, after its reports were written."""
        self._put(_BATCH_FINISHED, facts, sync=True)

    def _put(self, event: str, facts: Mapping[str, object], *, sync: bool) -> None:
        self._write(json_text.line({"event": event, "time": _now(), **facts}), sync=sync)

    def _write(self, data: bytes, *, sync: bool) -> None:
        with self._lock:
            try:
                # A disk that is almost full accepts a part of the data.
                while data:
                    data = data[os.write(self._fd, data) :]
                # Without fsync a power failure may lose a record of a notebook that is finished.
                if sync:
                    os.fsync(self._fd)
            except OSError as error:
                self.trouble = self.trouble or error


def _now() -> float:
    return round(time.time(), 3)
