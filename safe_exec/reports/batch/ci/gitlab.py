"""Report a batch as GitLab code quality, which a merge request shows beside the lines.

The format is a list of objects with ``description``, ``check_name``, ``fingerprint``, ``severity``
and ``location``. A fingerprint stays the same as long as the problem does.
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
from safe_exec.reports.batch.results import BatchResult
from safe_exec.reports.batch.source_map import file_line
from safe_exec.reports.batch.text import NotebookReport, Outcome
from safe_exec.reports.text import common

_SEVERITIES = {
    Status.CELL_ERROR: "major",
    Status.TIMEOUT: "major",
    Status.LIMIT_EXCEEDED: "major",
    Status.KERNEL_DIED: "critical",
}
# Notebooks without a verdict: they could not be read or run.
_OTHER_SEVERITY = "blocker"


def write(batch: BatchResult, path: Path, base: Path | None = None) -> None:
    """Write the report to ``path``; its paths are relative to ``base``. Raises OSError."""
    write_pieces_atomically(path, _document(batch, base or batch.root))


def _document(batch: BatchResult, base: Path) -> Iterator[bytes]:
    separator = b"[\n"
    for result in batch.results:
        if batch_text.outcome(result) in (Outcome.FAILED, Outcome.ERROR):
            for report in batch_text.each_failure(NotebookReport.of(result)):
                problem = json.dumps(_problem(report, base), ensure_ascii=True)
                yield separator + problem.encode()
                separator = b",\n"
    yield b"[]\n" if separator == b"[\n" else b"\n]\n"


def _problem(report: NotebookReport, base: Path) -> dict[str, Any]:
    path = common.printable(batch_text.relative(report.result.source, base))
    culprits = batch_text.culprits_words(report.verdict) if report.verdict is not None else ""
    return {
        "description": common.SEPARATOR.join(
            part for part in (batch_text.headline(report), culprits) if part
        ),
        "check_name": f"safe-exec/{batch_text.kind(report)}",
        "fingerprint": _fingerprint(report, path),
        "severity": _SEVERITIES.get(report.verdict.status, _OTHER_SEVERITY)
        if report.verdict is not None
        else _OTHER_SEVERITY,
        # GitLab requires a line; without a known one it is the first.
        "location": {"path": path, "lines": {"begin": file_line(report) or 1}},
    }


def _fingerprint(report: NotebookReport, path: str) -> str:
    """Hash the file, the cause and the line of source."""
    # Cell and line numbers are left out: they change when somebody adds a cell above.
    crash = report.verdict.crash_cell if report.verdict is not None else None
    source = (crash.source_line or "").strip() if crash is not None else ""
    return hashlib.sha256(
        "\0".join(("safe-exec", path, batch_text.kind(report), source)).encode("utf-8", "replace")
    ).hexdigest()
