"""The answers of the tools: short forms of a verdict, and the results of cells.

Pure. Cells count from 1 among the code cells, as in all reports for people.
"""

# Dataclasses, because the mcp package derives each tool's schema from the types with pydantic.

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from safe_exec.model.verdict import CellStatus, Culprits, Verdict
from safe_exec.reports.text import common, culprits

MOST_FACTS = 5
MOST_FRAMES = 20

# Characters of one cell's output in an answer. An agent reads all of it, so long output would push
# other things out of its context.
MOST_OUTPUT = 8000
STDERR_CHARACTERS = 2000
_ESCAPE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


@dataclass(frozen=True, kw_only=True)
class CulpritCell:
    """A cell that is needed for the failure; ``cell`` counts from 1 among the code cells."""

    cell: int
    role: str
    note: str
    source_line: str | None


@dataclass(frozen=True, kw_only=True)
class ShortVerdict:
    """The outcome of a run in a few lines; the document ``verdict`` has the rest.

    ``cause``, ``cell`` and ``line`` are null if unknown, ``culprits`` if nothing was searched for.
    ``line`` counts from 1 within the cell.
    """

    status: str
    headline: str
    cause: str | None
    summary: str | None
    confidence: str | None
    cell: int | None
    line: int | None
    source_line: str | None
    evidence: list[str]
    advice: str | None
    culprits: list[CulpritCell] | None
    culprits_summary: str | None
    look_first: int | None
    warnings: list[str]
    documents: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class CellFigures:
    """The result and the usage of a code cell: wall time in seconds, peak memory in bytes."""

    cell: int
    status: str
    seconds: float | None
    memory_peak: int | None


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """A verdict with the details that help to understand it."""

    verdict: ShortVerdict
    stack: list[str]
    cells: list[CellFigures]
    limits: dict[str, str]
    stderr: str


@dataclass(frozen=True, kw_only=True)
class CellResult:
    """The result of one cell in the sandbox.

    ``output`` is its text, with a placeholder for each output of another type.
    """

    status: Literal["ok", "error", "not_run"]
    output: str
    error: str | None


@dataclass(frozen=True, kw_only=True)
class SandboxAnswer:
    """The results of cells. After ``kernel_died`` all variables of the sandbox are lost."""

    cells: list[CellResult]
    kernel_died: bool
    verdict: ShortVerdict | None


def short_verdict(verdict: Verdict) -> ShortVerdict:
    """Shorten a verdict."""
    cause, crash, search = verdict.cause, verdict.crash_cell, verdict.culprits
    first = culprits.look_first(verdict)
    return ShortVerdict(
        status=verdict.status.value,
        headline=common.headline(verdict),
        cause=cause.kind.value if cause is not None else None,
        summary=common.single_line(cause.summary) if cause is not None else None,
        confidence=cause.confidence.value if cause is not None else None,
        cell=crash.code_index + 1 if crash is not None else None,
        line=crash.line if crash is not None else None,
        source_line=_code(crash.source_line) if crash is not None else None,
        evidence=common.evidence_lines(verdict, MOST_FACTS),
        advice=common.single_line(cause.advice) or None if cause is not None else None,
        culprits=_culprit_cells(search) if search is not None else None,
        culprits_summary=_search_summary(search) if search is not None else None,
        look_first=first.code_index + 1 if first is not None else None,
        warnings=[common.single_line(warning) for warning in verdict.warnings],
        documents=dict(verdict.outputs),
    )


def _culprit_cells(search: Culprits) -> list[CulpritCell]:
    return [
        CulpritCell(
            cell=culprit.code_index + 1,
            role=culprit.role.value,
            note=culprits.note(culprit),
            source_line=_code(culprit.source_line),
        )
        for culprit in search.cells
    ]


def _search_summary(search: Culprits) -> str:
    parts = (culprits.names(search) if search.cells else "", culprits.outcome(search))
    return "; ".join(part for part in (*parts, culprits.figures(search)) if part)


def _code(line: str | None) -> str | None:
    return None if line is None else common.code_line(line)


def explanation(verdict: Verdict) -> Explanation:
    """Return a verdict with its stack, figures and limits."""
    frames = verdict.crash_cell.stack if verdict.crash_cell is not None else ()
    return Explanation(
        verdict=short_verdict(verdict),
        stack=[common.frame_line(frame, verdict) for frame in frames[:MOST_FRAMES]],
        cells=[
            CellFigures(
                cell=record.code_index + 1,
                status=record.status.value,
                seconds=None if record.seconds is None else round(record.seconds, 3),
                memory_peak=record.memory_peak,
            )
            for record in verdict.cells
            if record.status is not CellStatus.SKIPPED
        ],
        limits={
            name.value: common.quantity(name, amount)
            for name in verdict.enforcement
            if (amount := verdict.limits.of(name)) is not None
        },
        stderr=verdict.stderr_tail[-STDERR_CHARACTERS:],
    )


# --- cells --------------------------------------------------------------------------------------


def cell_result(outputs: Sequence[Mapping[str, Any]]) -> CellResult:
    """Return the result of a cell that ran, from the outputs of its notebook node."""
    error = next((o for o in outputs if o.get("output_type") == "error"), None)
    text = "".join(_texts(outputs))
    return CellResult(
        status="ok" if error is None else "error",
        output=shorten(_ESCAPE.sub("", text)),
        error=None if error is None else shorten(_error_text(error)),
    )


def _texts(outputs: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    for output in outputs:
        if output.get("output_type") == "stream":
            yield str(output.get("text", ""))
        elif "data" in output:
            data = output["data"]
            # An agent cannot use a widget or an image without further calls: their types are named.
            others = ", ".join(kind for kind in data if kind != "text/plain")
            yield f"{data.get('text/plain', '')}{f' [{others}]' if others else ''}\n"


def _error_text(error: Mapping[str, Any]) -> str:
    return _ESCAPE.sub("", "\n".join(str(line) for line in error.get("traceback") or ())) or (
        f"{error.get('ename')}: {error.get('evalue')}"
    )


def shorten(text: str) -> str:
    """Cut the middle out of a long text."""
    if len(text) <= MOST_OUTPUT:
        return text
    half = MOST_OUTPUT // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters left out ...]\n{text[-half:]}"
