"""What a batch has done, on disk while it does it: a batch that was killed goes on from here. Imports errors and what plain JSON takes.

``journal.jsonl`` in the output directory: one line an event, only ever appended to. The line of a finished notebook is on the disk (fsync)
before anything else is done for it, and after its documents are: what the journal calls finished is finished. A line that was cut short by
a kill is none; the next one begins on a line of its own. The journal is locked (flock(2)) as long as a batch writes to it, by the
system, so that no kill leaves a lock behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from msgspec import Struct
from msgspec.structs import asdict

from safe_exec.errors import UsageError
from safe_exec.files import one_line
from safe_exec.reports.verdict_json import plain

NAME = "journal.jsonl"
STARTED, FINISHED, BATCH_STARTED, BATCH_FINISHED = (
    "started",
    "finished",
    "batch_started",
    "batch_finished",
)
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC


class JournalRecord(Struct, frozen=True, kw_only=True):
    """What is on record of a notebook that was run to its end. Documents are paths below the output directory.

    ``key`` stands for all that the run depended on (:func:`fingerprint.key_of_run`). ``headline`` is the verdict in one line.
    """

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


class PreviousBatch(Struct, frozen=True, kw_only=True):
    """What a journal says: notebooks that were finished, the last word on each; whether the batch came to its end."""

    finished: Mapping[str, JournalRecord]
    complete: bool
    empty: bool


def read(path: Path) -> PreviousBatch:
    """The journal in ``path``; an empty past where there is none. Lines that are none are left out: a kill may cut one short."""
    finished: dict[str, JournalRecord] = {}
    complete, empty = False, True
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        lines = []
    for line in lines:
        event = _event_of(line)
        kind = event.get("event")
        empty = empty and kind is None
        if kind == FINISHED:
            with contextlib.suppress(TypeError):  # of a version that knew other fields: run again
                record = JournalRecord(
                    **{key: value for key, value in event.items() if key not in ("event", "time")}
                )
                finished[record.path] = record
        elif kind == STARTED:
            finished.pop(
                str(event.get("path")), None
            )  # begun once more, for a change: it is finished when that is
        complete = kind == BATCH_FINISHED if kind is not None else complete
    return PreviousBatch(finished=finished, complete=complete, empty=empty)


def _event_of(line: bytes) -> dict[str, Any]:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return event if isinstance(event, dict) else {}


class Journal:
    """The journal of a batch that runs; a context manager. Any thread may write.

    On entry ``past`` is what it says so far; without ``resume`` it is emptied then. ``trouble`` is the first error on writing: the
    batch goes on, but could not be resumed. Raises UsageError where another batch holds it, or it cannot be opened.
    """

    def __init__(self, out: Path, *, resume: bool) -> None:
        self.path = out / NAME
        self.resume = resume
        self.past = PreviousBatch(finished={}, complete=False, empty=True)
        self.trouble: OSError | None = None
        self._fd = -1
        self._turn = threading.Lock()

    def __enter__(self) -> Self:
        try:
            self._fd = os.open(self.path, _FLAGS, 0o666)
        except OSError as error:
            raise UsageError(
                f"{one_line(self.path)}: cannot be written: {error.strerror}; choose another --out"
            ) from None
        try:
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
        """Let go of it, and of the lock."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _begin_a_line(self) -> None:
        """What comes after a line that was cut short must not become a part of it."""
        size = os.fstat(self._fd).st_size
        if size and os.pread(self._fd, 1, size - 1) != b"\n":
            self._write(b"\n", sync=False)

    def batch_started(self, **facts: object) -> None:
        """A batch begins, or goes on."""
        self._put(BATCH_STARTED, facts, sync=True)

    def started(self, path: str, *, attempt: int, run_id: str) -> None:
        """A notebook is about to run."""
        self._put(STARTED, {"path": path, "attempt": attempt, "run_id": run_id}, sync=False)

    def finished(self, record: JournalRecord) -> None:
        """A notebook is finished: on the disk when this returns."""
        self._put(FINISHED, asdict(record), sync=True)

    def batch_finished(self, **facts: object) -> None:
        """All is done, reports included."""
        self._put(BATCH_FINISHED, facts, sync=True)

    def _put(self, event: str, facts: Mapping[str, object], *, sync: bool) -> None:
        line = {"event": event, "time": round(time.time(), 3), **plain(facts)}
        self._write(json.dumps(line, ensure_ascii=False).encode() + b"\n", sync=sync)

    def _write(self, data: bytes, *, sync: bool) -> None:
        with self._turn:
            try:
                while data:  # a full disk takes a part
                    data = data[os.write(self._fd, data) :]
                if sync:
                    os.fsync(self._fd)
            except OSError as error:
                self.trouble = self.trouble or error
