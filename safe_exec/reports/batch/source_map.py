"""Find the line of a notebook's file that holds a line of a cell, for annotations on commits.

JSON parsers discard positions, so this module reads the file again, token by token, and decodes
only the requested cells. It accepts nbformat 4 and 3 in any layout.
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
from safe_exec.model.verdict import Verdict
from safe_exec.notebook.notebook import METADATA_KEY, is_banner
from safe_exec.notebook.text_formats import is_text_format
from safe_exec.reports.batch.text import NotebookReport

MOST_BYTES = 16 << 20
"""In larger files no lines are located: reports must not need more memory than the runs did."""

_BLANK = re.compile(r"[ \t\n\r]*")
# Possessive quantifiers: a long string with many escapes must not backtrack.
_TOKEN = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{}]', re.DOTALL)
_SCALAR = re.compile(r"[^\s,\]}]+")


class Placed(Struct, frozen=True, kw_only=True):
    """The source of a cell, and for each of its lines the line number in the file, from 1."""

    source: str
    lines: tuple[int, ...]


def read_as_run(path: Path, sha256: str | None) -> str | None:
    """Return the text of the notebook if its hash is still ``sha256``, that of the run."""
    try:
        data = read_regular(path, most=MOST_BYTES, error=NotebookError)
    # Deleted or too large: its annotations point at line 1.
    except NotebookError:
        return None
    # Some editors write a byte order mark, which json.loads rejects.
    return data.decode("utf-8-sig") if hashlib.sha256(data).hexdigest() == sha256 else None


def file_line(report: NotebookReport) -> int | None:
    """Return the line of a notebook's file at which it failed, from 1; see ``crash_line``.

    A notebook without a verdict gives ``None`` too.
    """
    return None if report.verdict is None else crash_line(report.result.source, report.verdict)


def crash_line(path: Path, verdict: Verdict) -> int | None:
    """Return the line of the notebook's file at which it failed, from 1.

    It is the line that failed, or if that is unknown the first line of its cell. ``None`` if the
    verdict names no cell, or if the file has changed since the run.
    """
    crash = verdict.crash_cell
    text = read_as_run(path, verdict.notebook.sha256) if crash is not None else None
    if crash is None or text is None:
        return None
    if is_text_format(path):
        return crash.file_line
    cell = placed(text, {crash.index}).get(crash.index)
    if cell is None:
        return None
    # Without a known line the first line of the cell counts.
    line = (crash.line or 1) - 1
    return cell.lines[line if line < len(cell.lines) else 0]


def placed(text: str, indexes: Collection[int]) -> dict[int, Placed]:
    """Locate cells in the text of a notebook.

    ``indexes`` count all cells but those that safe-exec added. Cells without a source are left out.
    """
    sources = {}
    for index, at in enumerate(_own_cells(text)):
        if index in indexes:
            cell = _members(text, at)
            # Code cells of nbformat 3 call their source "input".
            source = cell.get("source", cell.get("input"))
            if source is not None:
                sources[index] = _placed(text, source)
    return sources


def _own_cells(text: str) -> Iterator[int]:
    """Yield the position of each cell except the banner."""
    top = _members(text, _after_blank(text, 0))
    sheets = (
        # Only nbformat 3 has worksheets; each has cells of its own.
        _items(text, top["worksheets"]) if "worksheets" in top else iter((_after_blank(text, 0),))
    )
    for sheet in sheets:
        cells = _members(text, sheet).get("cells")
        for at in _items(text, cells) if cells is not None else ():
            if not _is_banner(text, at):
                yield at


def _is_banner(text: str, at: int) -> bool:
    metadata = _members(text, at).get("metadata")
    # A text search first: decoding every cell of a large notebook would be slow.
    if metadata is None or f'"{METADATA_KEY}"' not in text[metadata : _end(text, metadata)]:
        return False
    return is_banner(_decoded(text, at))


# --- one cell -------------------------------------------------------------------------------


def _placed(text: str, at: int) -> Placed:
    """Decode a cell's source: one string, or a list of strings, each on a line of its own."""
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
            # The next string continues this line.
            lines[-1] = 0
    lines[-1] = lines[-1] or line
    return Placed(source="".join(pieces), lines=tuple(lines))


# --- JSON -----------------------------------------------------------------------------------


def _after_blank(text: str, at: int) -> int:
    match = _BLANK.match(text, at)
    # The pattern also matches the empty string, so there is always a match.
    assert match is not None
    return match.end()


def _end(text: str, at: int) -> int:
    """Return the end of the value at ``at``."""
    # Numbers, true, false and null end at the next delimiter.
    if text[at] not in '"[{':
        return _ended(_SCALAR.match(text, at))
    depth = 0
    for token in _TOKEN.finditer(text, at):
        # A string is a single token, so brackets inside strings are not counted.
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
    """Return the position of each value in the object at ``at``."""
    # If a name occurs twice, the last value counts, as in Python's json module.
    members: dict[str, int] = {}
    at = _after_blank(text, at + 1)
    while text[at] != "}":
        end = _end(text, at)
        name = json.loads(text[at:end])
        members[name] = at = _after_blank(text, _after_blank(text, end) + 1)
        at = _past(text, at)
    return members


def _items(text: str, at: int) -> Iterator[int]:
    """Yield the position of each item of the array at ``at``."""
    at = _after_blank(text, at + 1)
    while text[at] != "]":
        yield at
        at = _past(text, at)


def _past(text: str, at: int) -> int:
    """Return the position of the next member or item, or of the closing bracket."""
    at = _after_blank(text, _end(text, at))
    return _after_blank(text, at + 1) if text[at] == "," else at


def _decoded(text: str, at: int) -> Any:
    return json.loads(text[at : _end(text, at)])
