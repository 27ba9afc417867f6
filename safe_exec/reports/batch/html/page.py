"""Report a batch as one self-contained HTML page.

The page is ``page.html`` with ``page.css`` and ``page.js`` in it. It loads nothing, and no text of
a notebook can become markup: the data are blocks of JSON, one for the table and one per notebook,
which the script inserts as text. They are written one at a time, so only one verdict is in memory.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import shlex
from collections.abc import Iterator
from datetime import UTC
from importlib import resources
from pathlib import Path
from typing import Any

from safe_exec.files import write_pieces_atomically
from safe_exec.reports.batch import text as batch_text
from safe_exec.reports.batch.html import page_data
from safe_exec.reports.batch.results import BatchResult
from safe_exec.reports.batch.text import NotebookReport, Outcome
from safe_exec.reports.text import common
from safe_exec.units import format_seconds

_MARK = "<!-- data -->"

# Characters that could end the script element or start another (HTML 13.1.2), and line separators
# that JSON allows and JavaScript did not.
_ESCAPED = str.maketrans(
    {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
)


def write(batch: BatchResult, path: Path) -> None:
    """Write the page to ``path``, atomically, with links relative to its folder. Raises OSError."""
    write_pieces_atomically(path, (piece.encode() for piece in _pieces(batch, path.parent)))


def _pieces(batch: BatchResult, base: Path) -> Iterator[str]:
    head, tail = _frame(batch)
    yield head
    rows = []
    for number, result in enumerate(batch.results):
        report = NotebookReport.of(result)
        # Only the row stays in memory; the details are written at once.
        rows.append(page_data.row(report))
        yield _block(f"notebook-{number}", page_data.detail(report, batch, base))
    # The table comes last in the file because its rows are complete only then.
    yield _block("batch", {**_head(batch), "rows": rows})
    yield tail


def _head(batch: BatchResult) -> dict[str, Any]:
    shard = f"shard {batch.shard[0]} of {batch.shard[1]}" if batch.shard is not None else ""
    return {
        "tally": batch_text.tally(batch),
        "started": batch.started.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "seconds": format_seconds(batch.seconds),
        "exit_code": batch.exit_code,
        "command": common.code_line(shlex.join(batch.command)),
        "version": batch.safe_exec_version,
        "remarks": [
            error
            for error in (
                f"limits {batch.limits}" if batch.limits else "",
                shard,
                _interrupted(batch),
            )
            if error
        ],
    }


def _interrupted(batch: BatchResult) -> str:
    notes = (
        "stopped before its end" if batch.cancelled else "",
        "resumed" if batch.resumed else "",
    )
    return ", ".join(word for word in notes if word)


def _block(name: str, value: object) -> str:
    return f'<script type="application/json" id="{name}">{as_data(value)}</script>\n'


def as_data(value: object) -> str:
    """Return ``value`` as ASCII JSON that is safe inside a script element."""
    # ASCII, so the page is correct even if a server declares another encoding.
    return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":")).translate(
        _ESCAPED
    )


def _frame(batch: BatchResult) -> tuple[str, str]:
    """Return the parts of the page before and after its data."""
    style, script = _file("page.css"), _file("page.js")
    bad = any(
        batch_text.outcome(result) in (Outcome.FAILED, Outcome.ERROR) for result in batch.results
    )
    # Even if a notebook could add markup, this policy would keep it from running or loading
    # anything.
    policy = f"default-src 'none'; style-src {_source(style)}; script-src {_source(script)}; img-src data:; base-uri 'none'; form-action 'none'"
    page = _file("page.html")
    for name, value in {
        "title": html.escape(f"{'✗' if bad else '✓'} safe-exec: {batch_text.tally(batch)}"),
        "policy": html.escape(policy),
        "style": style,
        "script": script,
    }.items():
        # Replaced one after another: none of the values contains another marker.
        page = page.replace(f"<!-- {name} -->", value)
    head, _, tail = page.partition(_MARK)
    return head, tail


def _source(content: str) -> str:
    """Return the hash by which the page's security policy allows this inline style or script.

    Source: Content Security Policy 3, 2.3.1.
    """
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def _file(name: str) -> str:
    return resources.files("safe_exec.reports.batch.html").joinpath(name).read_text("utf-8")
