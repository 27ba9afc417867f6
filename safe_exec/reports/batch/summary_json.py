"""Report a batch as one JSON document, ``summary.json``.

``summary.schema.json`` is its JSON Schema. Verdicts are read one at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from safe_exec.files import write_atomically
from safe_exec.model.limits import Amount, Count
from safe_exec.model.verdict import Line
from safe_exec.reports import json_text
from safe_exec.reports.batch.results import BatchResult, NotebookResult

SUMMARY_SCHEMA = "safe-exec/batch/1"


class NotebookSummary(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One notebook: the main facts of its verdict, and its documents' paths relative to ``out``."""

    path: str
    status: str
    exit_code: int | None
    seconds: Amount | None
    attempts: Count
    flaky: bool
    error: str | None
    cause: str | None
    summary: str | None
    crash_cell: Count | None
    line: Line | None
    culprits: tuple[Count, ...] | None
    verdict: str | None
    notebook: str | None
    repro: str | None
    machine: str | None = None
    losses: tuple[str, ...] = ()


class Summary(
    Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="schema",
    tag=SUMMARY_SCHEMA,
):
    """The batch, with one entry for each notebook."""

    safe_exec_version: str
    started: str
    seconds: Amount
    command: tuple[str, ...]
    root: str
    out: str
    exit_code: int
    cancelled: bool
    resumed: bool
    jobs: Line
    limits: str | None
    shard: tuple[Line, Line] | None
    counts: Mapping[str, Line]
    flaky: Count
    notebooks: tuple[NotebookSummary, ...]


def write(batch: BatchResult, path: Path) -> None:
    """Write the document atomically. Raises OSError."""
    write_atomically(path, json_text.document(summary_of(batch)))


def summary_of(batch: BatchResult) -> Summary:
    """Build the document; only one verdict is in memory at a time."""
    return Summary(
        safe_exec_version=batch.safe_exec_version,
        started=batch.started.isoformat(timespec="milliseconds"),
        seconds=round(batch.seconds, 3),
        command=batch.command,
        root=str(batch.root),
        out=str(batch.out),
        exit_code=batch.exit_code,
        cancelled=batch.cancelled,
        resumed=batch.resumed,
        jobs=batch.jobs,
        limits=batch.limits,
        shard=batch.shard,
        counts=batch.counts(),
        flaky=sum(result.flaky for result in batch.results),
        notebooks=tuple(_notebook(result, batch.out) for result in batch.results),
    )


def load_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of the document."""
    text = (
        resources.files(__package__ or "safe_exec.reports.batch")
        .joinpath("summary.schema.json")
        .read_bytes()
    )
    return msgspec.json.decode(text, type=dict[str, Any])


def _notebook(result: NotebookResult, out: Path) -> NotebookSummary:
    document = result.document() or {}
    cause, crash, culprits = (_part(document, name) for name in ("cause", "crash_cell", "culprits"))
    return NotebookSummary(
        path=result.path,
        status=result.status,
        exit_code=result.exit_code,
        seconds=result.seconds,
        attempts=result.attempts,
        flaky=result.flaky,
        error=result.error,
        cause=cause.get("kind"),
        summary=cause.get("summary"),
        crash_cell=crash.get("code_index"),
        line=crash.get("line"),
        culprits=tuple(cell["code_index"] for cell in culprits["cells"])
        if "cells" in culprits
        else None,
        verdict=_below(result.verdict, out),
        notebook=_below(result.notebook, out),
        repro=_below(result.repro, out),
        machine=_part(document, "environment").get("machine"),
        losses=result.losses,
    )


def _part(document: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = document.get(name)
    return part if isinstance(part, Mapping) else {}


def _below(path: Path | None, out: Path) -> str | None:
    """Return the path of a document relative to the output directory."""
    if path is None:
        return None
    return path.relative_to(out).as_posix() if path.is_relative_to(out) else str(path)
