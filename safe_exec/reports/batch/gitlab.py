"""The batch as GitLab's code quality report: what a merge request shows beside the lines it is about.

Imports ``files`` and the shared texts. The format is a list of objects with ``description``, ``check_name``,
``fingerprint``, ``severity`` and ``location``; a fingerprint is the same as long as the problem is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safe_exec.files import write_pieces_atomically
from safe_exec.model.verdict import Status
from safe_exec.reports.batch import text as batch_text
from safe_exec.reports.batch.results import Batch
from safe_exec.reports.batch.source_map import file_line
from safe_exec.reports.batch.text import Outcome, Told
from safe_exec.reports.text import common

_SEVERITIES = {
    Status.CELL_ERROR: "major",
    Status.TIMEOUT: "major",
    Status.LIMIT_EXCEEDED: "major",
    Status.KERNEL_DIED: "critical",
}
_OTHER_SEVERITY = "blocker"  # nothing could be said of the notebook at all


def write(batch: Batch, path: Path, base: Path | None = None) -> None:
    """Writes the report to ``path``, atomically; paths in it are seen from ``base``, the checkout. Raises OSError."""
    write_pieces_atomically(path, _document(batch, base or batch.root))


def _document(batch: Batch, base: Path) -> Iterator[bytes]:
    before = b"[\n"
    for entry in batch.entries:
        if batch_text.outcome(entry) in (Outcome.FAILED, Outcome.ERROR):
            yield before + json.dumps(_problem(Told.of(entry), base), ensure_ascii=True).encode()
            before = b",\n"
    yield b"[]\n" if before == b"[\n" else b"\n]\n"


def _problem(told: Told, base: Path) -> dict[str, Any]:
    path = common.printable(batch_text.relative(told.entry.source, base))
    who = batch_text.culprits_words(told.verdict) if told.verdict is not None else ""
    return {
        "description": common.SEPARATOR.join(
            part for part in (batch_text.headline(told), who) if part
        ),
        "check_name": f"safe-exec/{batch_text.kind(told)}",
        "fingerprint": _fingerprint(told, path),
        "severity": _SEVERITIES.get(Status(told.entry.status), _OTHER_SEVERITY)
        if told.verdict is not None
        else _OTHER_SEVERITY,
        "location": {"path": path, "lines": {"begin": file_line(told) or 1}},
    }


def _fingerprint(told: Told, path: str) -> str:
    """Of the file, the cause and the line of source; not of numbers, which shift when somebody adds a cell above."""
    crash = told.verdict.crash_cell if told.verdict is not None else None
    source = (crash.source_line or "").strip() if crash is not None else ""
    return hashlib.sha256(
        "\0".join(("safe-exec", path, batch_text.kind(told), source)).encode("utf-8", "replace")
    ).hexdigest()
