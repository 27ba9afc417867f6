"""Recordings of interactive sessions: the executed code in order, kept for a week.

A recording is a file of JSON lines in ``$XDG_STATE_HOME/safe-exec/sessions``, readable by its owner
only. When a kernel dies, a notebook of the session and the verdict are written next to it, so that
``safe-exec bisect`` can find the culprits. Imports model, notebook, reports.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from msgspec import Struct
from msgspec.structs import replace
from nbformat.notebooknode import NotebookNode

from safe_exec.errors import OutputPathError, UsageError
from safe_exec.files import write_atomically
from safe_exec.model.verdict import Verdict
from safe_exec.reports import verdict_json

SCHEMA = "safe-exec/session/1"
KEPT_SECONDS = 7 * 86400.0

# The largest recording; cells executed after that are not recorded.
MOST_BYTES = 64 << 20

# Files of a session: the recording, its notebook and verdict, and the outputs of a search.
SUFFIXES = (".jsonl", ".ipynb", ".verdict.json", ".out.ipynb", ".repro.ipynb")
_ID = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{6}")


def sessions_directory() -> Path:
    """Return ``$XDG_STATE_HOME/safe-exec/sessions``, with ``~/.local/state`` as the default."""
    state = os.environ.get("XDG_STATE_HOME", "")
    base = Path(state) if os.path.isabs(state) else Path.home() / ".local" / "state"
    return base / "safe-exec" / "sessions"


class Recording:
    """The recording of one session. ``open`` raises OSError; later errors end the recording."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor
        self._size = 0

    @classmethod
    def open(cls, facts: Mapping[str, str]) -> Recording:
        """Begin a recording and remove old ones.

        ``facts`` (kernel, cwd, limits, connection) go into its first line, with the id of this
        process.
        """
        directory = sessions_directory()
        # Cells may contain passwords: no other user can read the directory or its files.
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        remove_old(directory)
        name = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{os.urandom(3).hex()}.jsonl"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        recording = cls(directory / name, os.open(directory / name, flags, 0o600))
        recording._write({"schema": SCHEMA, "started": _now(), "process": os.getpid(), **facts})
        return recording

    def add(self, source: str, cell_id: str | None) -> None:
        """Record a cell that begins to run."""
        self._write({"executed": source, "id": cell_id, "at": _now()})

    def drop_last(self) -> None:
        """Record that the kernel refused the last cell, because an earlier one had failed."""
        self._write({"aborted": True, "at": _now()})

    def restarted(self) -> None:
        """Record a restart; the new kernel has none of the earlier cells' state."""
        self._write({"restarted": True, "at": _now()})

    def _write(self, line: Mapping[str, Any]) -> None:
        data = json.dumps(line, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        if self._descriptor < 0 or self._size + len(data) > MOST_BYTES:
            return
        try:
            os.write(self._descriptor, data)
            self._size += len(data)
        except OSError:
            # The disk is full, say. The session goes on without its recording.
            self.close()

    def write_notebook(
        self, verdict: Verdict, node: Any, *, survived: bool, is_shown: bool = True
    ) -> Path | None:
        """Write the session's notebook and verdict.

        Return the notebook's path, ``None`` on an error. ``survived`` is true if an interrupt ended
        the cell and the kernel lives on, ``is_shown`` if a cell shows the diagnosis.
        """
        cause = verdict.cause.summary if verdict.cause else None
        line = {"ended": cause, "survived": survived, "shown": is_shown, "at": _now()}
        self._write(line)
        path = self.path.with_suffix(".ipynb")
        data = notebook_of(node)
        # `safe-exec bisect` checks that a verdict belongs to its notebook by this hash.
        own = replace(
            verdict,
            notebook=replace(
                verdict.notebook, path=str(path), sha256=hashlib.sha256(data).hexdigest()
            ),
            outputs={
                "notebook": str(path.with_suffix(".out.ipynb")),
                "verdict": str(path.with_suffix(".verdict.json")),
            },
        )
        try:
            _write_private(path, data)
            _write_private(path.with_suffix(".verdict.json"), verdict_json.dumps(own))
        except OSError:
            return None
        return path

    def close(self) -> None:
        """Close the file. Can be called again."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def notebook_of(node: Any) -> bytes:
    """Return a notebook of the session's cells, without outputs."""
    cells = []
    for number, cell in enumerate(node.cells):
        cell_document: dict[str, Any] = {
            "cell_type": cell.cell_type,
            "id": f"cell-{number + 1}",
            "metadata": {},
            "source": cell.source,
        }
        if cell.cell_type == "code":
            cell_document |= {"outputs": [], "execution_count": cell.get("execution_count")}
        cells.append(cell_document)
    metadata = json.loads(json.dumps(node.metadata, default=str))
    document = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(document, indent=1, ensure_ascii=False).encode("utf-8", "replace")


def write_cells(path: Path, cells: list[str], kernel: str) -> None:
    """Write cells to a notebook. Raises OutputPathError."""
    node = NotebookNode(
        cells=[NotebookNode(cell_type="code", source=cell) for cell in cells],
        metadata={"kernelspec": {"name": kernel, "display_name": kernel}},
    )
    try:
        write_atomically(path, notebook_of(node))
    except OSError as error:
        raise OutputPathError(f"{path}: cannot be written: {error.strerror}") from None


class SessionFacts(Struct, frozen=True, kw_only=True):
    """One recording in the list of ``safe-exec sessions``.

    ``cells`` and ``diagnoses`` are counts. ``ended`` is the last diagnosis: of the kernel's death, or
    of a cell's timeout that the kernel ``survived``. ``notebook`` exists after a diagnosis only.
    """

    id: str
    path: Path
    process: int | None
    started: str
    kernel: str
    cwd: str
    limits: str
    cells: int
    diagnoses: int
    ended: str | None
    survived: bool
    notebook: Path | None


def sessions() -> Iterator[SessionFacts]:
    """Yield all recordings, newest first."""
    with contextlib.suppress(FileNotFoundError):
        for path in sorted(sessions_directory().glob("*.jsonl"), reverse=True):
            if _ID.fullmatch(path.stem):
                yield facts_of(path)


def facts_of(path: Path) -> SessionFacts:
    """Read the facts of a recording."""
    lines = list(_lines(path))
    first = lines[0] if lines else {}
    diagnoses = [line for line in lines if "ended" in line]
    last = diagnoses[-1] if diagnoses else {}
    process = first.get("process")
    notebook = path.with_suffix(".ipynb")
    return SessionFacts(
        id=path.stem,
        path=path,
        process=process if isinstance(process, int) else None,
        started=str(first.get("started", "")),
        kernel=str(first.get("kernel", "")),
        cwd=str(first.get("cwd", "")),
        limits=str(first.get("limits", "")),
        cells=sum(("executed" in line) - ("aborted" in line) for line in lines),
        diagnoses=len(diagnoses),
        ended=str(last["ended"]) if last else None,
        survived=last.get("survived") is True,
        notebook=notebook if notebook.exists() else None,
    )


def unseen_death(connection: str) -> str | None:
    """Return why the last kernel of a connection file died, if no cell has shown it yet."""
    # A client restarts a kernel with the same connection file.
    for facts in sessions():
        lines = list(_lines(facts.path))
        if lines and lines[0].get("connection") == connection:
            unseen = [line for line in lines if line.get("shown") is False]
            return str(unseen[-1].get("ended")) if unseen else None
    return None


def find(name: str) -> SessionFacts:
    """Return the recording whose id begins with ``name``. Raises UsageError."""
    matches = [facts for facts in sessions() if facts.id.startswith(name)]
    if len(matches) != 1:
        raise UsageError(
            f"{name}: {'no recording begins' if not matches else 'several recordings begin'} with"
            " that; `safe-exec sessions` lists them"
        )
    return matches[0]


def of_process(process: int) -> SessionFacts | None:
    """Return the newest recording that a process has made, or ``None``."""
    return next((facts for facts in sessions() if facts.process == process), None)


def sources(path: Path) -> list[str]:
    """Return the cells that the last kernel of a recording executed, in order."""
    cells: list[str] = []
    for line in _lines(path):
        if "restarted" in line:
            cells.clear()
        elif "aborted" in line:
            del cells[-1:]
        elif "executed" in line:
            cells.append(str(line["executed"]))
    return cells


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    # A recorder that was killed while it wrote leaves half a line at the end; skip it.
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            with contextlib.suppress(ValueError):
                line = json.loads(text)
                if isinstance(line, dict):
                    yield line


def remove_old(directory: Path) -> None:
    """Remove session files that were last written more than a week ago."""
    oldest = time.time() - KEPT_SECONDS
    for entry in os.scandir(directory):
        if _ID.match(entry.name) and entry.name.endswith(SUFFIXES):
            with contextlib.suppress(OSError):
                if entry.stat(follow_symlinks=False).st_mtime < oldest:
                    os.unlink(entry.path)


def _write_private(path: Path, data: bytes) -> None:
    # Create the file with its final mode: chmod after the write would leave it readable meanwhile.
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        temporary.rename(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
