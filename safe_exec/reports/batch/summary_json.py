"""The batch as one JSON document, ``summary.json``: what came of each notebook, and where its documents are.

Imports ``entries`` and what plain JSON takes. ``summary.schema.json`` beside this file is its JSON Schema. Verdicts are read one at a time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from safe_exec.files import write_atomically
from safe_exec.reports.batch.results import Batch, Entry
from safe_exec.reports.verdict_json import plain

SUMMARY_SCHEMA = "safe-exec/batch/1"


def write(batch: Batch, path: Path) -> None:
    """Write the document, all of it or nothing. Raises OSError."""
    write_atomically(
        path,
        (
            json.dumps(to_document(batch), ensure_ascii=False, allow_nan=False, indent=2) + "\n"
        ).encode(),
    )


def to_document(batch: Batch) -> dict[str, Any]:
    """The batch as plain JSON values."""
    document: dict[str, Any] = plain(
        {
            "schema": SUMMARY_SCHEMA,
            "safe_exec_version": batch.safe_exec_version,
            "started": batch.started.isoformat(timespec="milliseconds"),
            "seconds": round(batch.seconds, 3),
            "command": batch.command,
            "root": str(batch.root),
            "out": str(batch.out),
            "exit_code": batch.exit_code,
            "cancelled": batch.cancelled,
            "resumed": batch.resumed,
            "jobs": batch.jobs,
            "limits": batch.limits,
            "shard": batch.shard,
            "counts": batch.counts(),
            "flaky": sum(entry.flaky for entry in batch.entries),
        }
    )
    return document | {"notebooks": [plain(_row(entry, batch.out)) for entry in batch.entries]}


def load_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) that every document obeys."""
    text = (
        resources.files(__package__ or "safe_exec.reports.batch")
        .joinpath("summary.schema.json")
        .read_text("utf-8")
    )
    schema: dict[str, Any] = json.loads(text)
    return schema


def _row(entry: Entry, out: Path) -> dict[str, Any]:
    document = entry.document() or {}
    cause, crash, culprits = (_part(document, name) for name in ("cause", "crash_cell", "culprits"))
    return {
        "path": entry.path,
        "status": entry.status,
        "exit_code": entry.exit_code,
        "seconds": entry.seconds,
        "attempts": entry.attempts,
        "flaky": entry.flaky,
        "error": entry.error,
        "cause": cause.get("kind"),
        "summary": cause.get("summary"),
        "crash_cell": crash.get("code_index"),
        "line": crash.get("line"),
        "culprits": [cell["code_index"] for cell in culprits["cells"]]
        if "cells" in culprits
        else None,
        "verdict": _below(entry.verdict, out),
        "notebook": _below(entry.notebook, out),
        "repro": _below(entry.repro, out),
    }


def _part(document: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = document.get(name)
    return found if isinstance(found, Mapping) else {}


def _below(path: Path | None, out: Path) -> str | None:
    """A document's path, relative to the output directory."""
    if path is None:
        return None
    return path.relative_to(out).as_posix() if path.is_relative_to(out) else str(path)
