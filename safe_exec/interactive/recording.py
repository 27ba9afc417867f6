"""Recordings of interactive sessions: the executed code in its order, for a week, readable by nobody else.

A recording is a file of JSON lines in ``$XDG_STATE_HOME/safe-exec/sessions`` (mode 0600 in a
directory of mode 0700). When a kernel dies, a notebook of the session is made beside it, with the
verdict, so that ``safe-exec bisect`` can find the culprits. Imports model, notebook, reports.
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

# Of one recording; what is executed after that is not recorded.
MOST_BYTES = 64 << 20
SUFFIXES = (".jsonl", ".ipynb", ".verdict.json", ".out.ipynb", ".repro.ipynb")
_ID = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{6}")


def sessions_directory() -> Path:
    """``$XDG_STATE_HOME/safe-exec/sessions``, else below ``~/.local/state``."""
    state = os.environ.get("XDG_STATE_HOME", "")
    base = Path(state) if os.path.isabs(state) else Path.home() / ".local" / "state"
    return base / "safe-exec" / "sessions"


class Recording:
    """One session. ``open`` raises OSError; later a disk that is full costs the recording, not the session."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor
        self._size = 0

    @classmethod
    def open(cls, facts: Mapping[str, str]) -> Recording:
        """Begin a recording; ``facts`` (kernel, cwd, limits) stand in its first line. Removes those that are a week old."""
        directory = sessions_directory()
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        remove_old(directory)
        name = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{os.urandom(3).hex()}.jsonl"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        recording = cls(directory / name, os.open(directory / name, flags, 0o600))
        recording._write({"schema": SCHEMA, "started": _now(), **facts})
        return recording

    def add(self, source: str, cell_id: str | None) -> None:
        """A cell is executed."""
        self._write({"executed": source, "id": cell_id, "at": _now()})

    def restarted(self) -> None:
        """A fresh kernel follows: what was executed before is lost to it."""
        self._write({"restarted": True, "at": _now()})

    def _write(self, line: Mapping[str, Any]) -> None:
        data = json.dumps(line, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        if self._descriptor < 0 or self._size + len(data) > MOST_BYTES:
            return
        try:
            os.write(self._descriptor, data)
            self._size += len(data)
        except OSError:
            self.close()

    def write_notebook(self, verdict: Verdict, node: Any) -> Path | None:
        """Write the session's notebook and its verdict; the notebook's path, ``None`` where there is no room for it."""
        self._write({"ended": verdict.cause.summary if verdict.cause else None, "at": _now()})
        path = self.path.with_suffix(".ipynb")
        data = notebook_of(node)
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
        """Close the file. May be called again."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def notebook_of(node: Any) -> bytes:
    """A notebook with the cells of a session and none of their outputs."""
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
    """One recording as ``safe-exec sessions`` lists it. ``cells`` is a count; ``notebook`` is there after a death."""

    id: str
    path: Path
    started: str
    kernel: str
    cwd: str
    limits: str
    cells: int
    ended: str | None
    notebook: Path | None


def sessions() -> Iterator[SessionFacts]:
    """All recordings, the newest first."""
    with contextlib.suppress(FileNotFoundError):
        for path in sorted(sessions_directory().glob("*.jsonl"), reverse=True):
            if _ID.fullmatch(path.stem):
                yield facts_of(path)


def facts_of(path: Path) -> SessionFacts:
    """What a recording says of its session; half a line at its end is left out."""
    lines = list(_lines(path))
    first = lines[0] if lines else {}
    ended = [line["ended"] for line in lines if "ended" in line]
    notebook = path.with_suffix(".ipynb")
    return SessionFacts(
        id=path.stem,
        path=path,
        started=str(first.get("started", "")),
        kernel=str(first.get("kernel", "")),
        cwd=str(first.get("cwd", "")),
        limits=str(first.get("limits", "")),
        cells=sum("executed" in line for line in lines),
        ended=str(ended[-1]) if ended else None,
        notebook=notebook if notebook.exists() else None,
    )


def find(name: str) -> SessionFacts:
    """The recording whose id begins with ``name``. Raises UsageError."""
    matches = [facts for facts in sessions() if facts.id.startswith(name)]
    if len(matches) != 1:
        raise UsageError(
            f"{name}: {'no recording begins' if not matches else 'several recordings begin'} with"
            " that; `safe-exec sessions` lists them"
        )
    return matches[0]


def sources(path: Path) -> list[str]:
    """The cells that the last kernel of a recording executed, in order."""
    cells: list[str] = []
    for line in _lines(path):
        if "restarted" in line:
            cells.clear()
        elif "executed" in line:
            cells.append(str(line["executed"]))
    return cells


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            with contextlib.suppress(ValueError):
                line = json.loads(text)
                if isinstance(line, dict):
                    yield line


def remove_old(directory: Path) -> None:
    """Remove what was last written a week ago."""
    oldest = time.time() - KEPT_SECONDS
    for entry in os.scandir(directory):
        if _ID.match(entry.name) and entry.name.endswith(SUFFIXES):
            with contextlib.suppress(OSError):
                if entry.stat(follow_symlinks=False).st_mtime < oldest:
                    os.unlink(entry.path)


def _write_private(path: Path, data: bytes) -> None:
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
