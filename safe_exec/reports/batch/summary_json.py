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
from safe_exec.reports.batch.results import BatchResult, NotebookResult
from safe_exec.reports.verdict_json import plain

SUMMARY_SCHEMA = "safe-exec/batch/1"


def write(batch: BatchResult, path: Path) -> None:
    """Write the document, all of it or nothing. Raises OSError."""
    write_atomically(
        path,
        (
            json.dumps(to_document(batch), ensure_ascii=False, allow_nan=False, indent=2) + "\n"
        ).encode(),
    )


def to_document(batch: BatchResult) -> dict[str, Any]:
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
            "flaky": sum(result.flaky for result in batch.results),
        }
    )
    return document | {"notebooks": [plain(_row(result, batch.out)) for result in batch.results]}


def load_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) that every document obeys."""
    text = (
        resources.files(__package__ or "safe_exec.reports.batch")
        .joinpath("summary.schema.json")
        .read_text("utf-8")
    )
    schema: dict[str, Any] = json.loads(text)
    return schema


def _row(result: NotebookResult, out: Path) -> dict[str, Any]:
    document = result.document() or {}
    cause, crash, culprits = (_part(document, name) for name in ("cause", "crash_cell", "culprits"))
    return {
        "path": result.path,
        "status": result.status,
        "exit_code": result.exit_code,
        "seconds": result.seconds,
        "attempts": result.attempts,
        "flaky": result.flaky,
        "error": result.error,
        "cause": cause.get("kind"),
        "summary": cause.get("summary"),
        "crash_cell": crash.get("code_index"),
        "line": crash.get("line"),
        "culprits": [cell["code_index"] for cell in culprits["cells"]]
        if "cells" in culprits
        else None,
        "verdict": _below(result.verdict, out),
        "notebook": _below(result.notebook, out),
        "repro": _below(result.repro, out),
    }


def _part(document: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = document.get(name)
    return part if isinstance(part, Mapping) else {}


def _below(path: Path | None, out: Path) -> str | None:
    """A document's path, relative to the output directory."""
    if path is None:
        return None
    return path.relative_to(out).as_posix() if path.is_relative_to(out) else str(path)
