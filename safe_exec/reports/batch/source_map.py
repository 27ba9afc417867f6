"""Where in the file of a notebook a line of a cell stands: what annotations on a commit point at.

A parser of JSON throws positions away, so the file is read here once more, token by token, and only the cells that are
asked for are decoded. Files of nbformat 4 and 3, however they are laid out. Imports ``files``, ``errors``, the shared
texts and how ``notebook`` knows the cells that are ours.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from msgspec import Struct

from safe_exec.errors import NotebookError
from safe_exec.files import read_regular
from safe_exec.notebook.notebook import METADATA_KEY, is_banner
from safe_exec.reports.batch.text import NotebookReport

MOST_BYTES = 16 << 20
"""Larger files are not looked into: a batch that has run is not to take more memory for its reports than for running."""

_BLANK = re.compile(r"[ \t\n\r]*")
_TOKEN = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{}]', re.DOTALL)
_SCALAR = re.compile(r"[^\s,\]}]+")


class Placed(Struct, frozen=True, kw_only=True):
    """The source of a cell, and for each of its lines, as line feeds part them, the line of the file where it stands, from 1."""

    source: str
    lines: tuple[int, ...]


def read_as_run(path: Path, sha256: str | None) -> str | None:
    """The text of the notebook in ``path`` if it is still the one that was run, whose hash is ``sha256``; else nothing."""
    try:
        data = read_regular(path, most=MOST_BYTES, error=NotebookError)
    except NotebookError:  # gone, or too large: then nothing is said of its lines
        return None
    return data.decode("utf-8-sig") if hashlib.sha256(data).hexdigest() == sha256 else None


def file_line(report: NotebookReport) -> int | None:
    """The line of the notebook's file, from 1, where the line that failed stands, or the first of its cell where that is not known.

    Nothing where no cell ran, or where the file is no longer the one that was run.
    """
    verdict = report.verdict
    crash = verdict.crash_cell if verdict is not None else None
    text = (
        read_as_run(report.result.source, verdict.notebook.sha256)
        if verdict is not None and crash is not None
        else None
    )
    if (
        crash is None
        or text is None
        or (cell := placed(text, {crash.index}).get(crash.index)) is None
    ):
        return None
    line = (crash.line or 1) - 1
    return cell.lines[line if line < len(cell.lines) else 0]


def placed(text: str, indexes: Collection[int]) -> dict[int, Placed]:
    """The cells of the notebook ``text`` with these indexes, which count all cells but those that safe-exec added.

    Cells that are not there, or have no source, are left out. ``text`` is a notebook that could be read.
    """
    sources = {}
    for index, at in enumerate(_own_cells(text)):
        if index in indexes:
            cell = _members(text, at)
            source = cell.get("source", cell.get("input"))  # the second: code cells of nbformat 3
            if source is not None:
                sources[index] = _placed(text, source)
    return sources


def _own_cells(text: str) -> Iterator[int]:
    """Where each cell starts, our banner left out."""
    top = _members(text, _after_blank(text, 0))
    sheets = (
        _items(text, top["worksheets"]) if "worksheets" in top else iter((_after_blank(text, 0),))
    )
    for sheet in sheets:
        cells = _members(text, sheet).get("cells")
        for at in _items(text, cells) if cells is not None else ():
            if not _is_banner(text, at):
                yield at


def _is_banner(text: str, at: int) -> bool:
    metadata = _members(text, at).get("metadata")
    if metadata is None or f'"{METADATA_KEY}"' not in text[metadata : _end(text, metadata)]:
        return False
    return is_banner(_decoded(text, at))


# --- one cell ---------------------------------------------------------------------------------------------------


def _placed(text: str, at: int) -> Placed:
    """A source is a text, or a list of texts that are joined; each of them stands on one line of the file, as JSON has it."""
    parts = list(_items(text, at)) if text[at] == "[" else [at]
    position, line = at, text.count("\n", 0, at) + 1
    pieces, lines = [], [0]
    for part in parts:
        line += text.count("\n", position, part)
        position = part
        piece = _decoded(text, part)
        pieces.append(piece)
        lines[-1] = lines[-1] or line
        ends = piece.count("\n")
        lines += [line] * ends
        if ends and piece.endswith("\n"):
            lines[-1] = 0  # begins with the next part
    lines[-1] = lines[-1] or line
    return Placed(source="".join(pieces), lines=tuple(lines))


# --- JSON -------------------------------------------------------------------------------------------------------


def _after_blank(text: str, at: int) -> int:
    match = _BLANK.match(text, at)
    assert match is not None  # it matches nothing, too
    return match.end()


def _end(text: str, at: int) -> int:
    """Where the value that starts at ``at`` has ended."""
    if text[at] not in '"[{':
        return _ended(_SCALAR.match(text, at))
    depth = 0
    for token in _TOKEN.finditer(text, at):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token[0], 0)
        if not depth:
            return token.end()
    raise _no_json(at)


def _ended(match: re.Match[str] | None) -> int:
    if match is None:
        raise _no_json(0)
    return match.end()


def _no_json(at: int) -> ValueError:
    return ValueError(f"no JSON at character {at}")


def _members(text: str, at: int) -> dict[str, int]:
    """Where the value of each member of the object at ``at`` starts; of two with one name the last counts, as in Python."""
    members: dict[str, int] = {}
    at = _after_blank(text, at + 1)
    while text[at] != "}":
        end = _end(text, at)
        name = json.loads(text[at:end])
        members[name] = at = _after_blank(text, _after_blank(text, end) + 1)
        at = _past(text, at)
    return members


def _items(text: str, at: int) -> Iterator[int]:
    """Where each item of the array at ``at`` starts."""
    at = _after_blank(text, at + 1)
    while text[at] != "]":
        yield at
        at = _past(text, at)


def _past(text: str, at: int) -> int:
    """Where the next member or item starts, or the bracket that ends them, after the value at ``at``."""
    at = _after_blank(text, _end(text, at))
    return _after_blank(text, at + 1) if text[at] == "," else at


def _decoded(text: str, at: int) -> Any:
    return json.loads(text[at : _end(text, at)])
