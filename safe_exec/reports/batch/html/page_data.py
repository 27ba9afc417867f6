"""The data of the HTML page: a row for its table and the details of each notebook.

All wording comes from here, shared with the other reports; the page only lays it out. All texts
have a maximum length, and the page says where something was cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from safe_exec.model.limits import LimitName, Mechanism
from safe_exec.model.verdict import CellRecord, CrashCell, Culprit, Status, Timeline, Verdict
from safe_exec.notebook.text_formats import is_text_format
from safe_exec.reports.batch import text as batch_text
from safe_exec.reports.batch.results import BatchResult
from safe_exec.reports.batch.source_map import Placed, placed, read_as_run
from safe_exec.reports.batch.text import NotebookReport, Outcome
from safe_exec.reports.text import common, culprits, memory, native, profile
from safe_exec.units import format_seconds, format_size

MOST_LINES = 300
"""The most lines of the crash cell on the page; of a culprit a fifth of that."""
LINE_WIDTH = 300
USUAL_WIDTH = 60
"""Cells with a larger average line length are cut to fewer lines."""
MOST_CULPRITS = 20
# The page has this many colours for holders.
MOST_STACKED = 4
MOST_HOLDERS = 8
MOST_CELLS = 300
MOST_FRAMES = 50
STDERR_WIDTH = 6000
MOST_POINTS, LEAST_POINTS = 400, 80
ALL_POINTS = 60_000
"""The most points of all timelines of a page together, about 2 MiB."""


def row(report: NotebookReport) -> dict[str, Any]:
    """Return a row of the table; numbers are in bytes and seconds, or null."""
    result, verdict = report.result, report.verdict
    peak = verdict.usage.memory_peak if verdict is not None else None
    limit = verdict.limits.memory if verdict is not None else None
    return {
        "path": common.single_line(result.path),
        "outcome": report.outcome.value,
        "status": batch_text.status_words(result.status),
        "what": common.clip(batch_text.in_short(report), common.HEADLINE_WIDTH),
        "cause": batch_text.kind(report).replace("_", " ")
        if report.outcome in (Outcome.FAILED, Outcome.ERROR)
        else "",
        "flaky": result.flaky,
        "attempts": result.attempts,
        "seconds": result.seconds,
        "time": _seconds(result.seconds),
        "memory": peak,
        "peak": _size(peak),
        "limit": _size(limit),
        "machine": common.single_line(verdict.environment.machine or "")
        if verdict is not None
        else "",
        "losses": f"worker lost on {', '.join(map(common.single_line, result.losses))}"
        if result.losses
        else "",
        # Seconds since 1970; the search for culprits is included.
        "start": _moment(verdict.started) if verdict is not None else None,
        "end": _moment(verdict.finished) if verdict is not None else None,
        "share": round(min(peak / limit, 1.0), 4) if peak is not None and limit else None,
    }


def _moment(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def detail(report: NotebookReport, batch: BatchResult, base: Path) -> dict[str, Any]:
    """Return the details of a notebook; ``base`` is the folder of the page."""
    verdict = report.verdict
    data: dict[str, Any] = {
        "headline": batch_text.headline(report),
        "flaky": batch_text.flaky_words(report.result),
        "files": list(_files(report, base)),
    }
    if verdict is not None:
        data |= _run(verdict, len(batch.results))
        if verdict.status is not Status.PASSED:
            data |= _failure(report, verdict) | {
                "command": batch_text.reproduce_command(report, batch),
                "others": [_other_failure(report, other) for other in verdict.each_failure()[1:]],
                "skipped": common.skipped_reasons(verdict),
            }
    return data


def _files(report: NotebookReport, base: Path) -> Iterator[dict[str, str]]:
    """Yield links to the documents below the page's folder."""
    # A link starts with "./", so that no file name can act as a URL scheme.
    written = {
        "annotated notebook": report.result.notebook,
        "verdict": report.result.verdict,
        "reproduction": report.result.repro,
    }
    for name, path in written.items():
        href = batch_text.relative(path, base) if path is not None else "/"
        if not href.startswith("/"):
            yield {"name": name, "href": f"./{quote(href, errors='surrogateescape')}"}


# --- every run ------------------------------------------------------------------------------


def _run(verdict: Verdict, notebooks: int) -> dict[str, Any]:
    # The more notebooks, the fewer points each: the page has to open in any browser.
    most = max(LEAST_POINTS, min(MOST_POINTS, ALL_POINTS // max(notebooks, 1)))
    return {
        "timeline": timeline(verdict.timeline, most),
        "memory_limit": verdict.limits.memory,
        "wall": verdict.usage.wall_seconds,
        # A table of ten thousand rows would make the page unusable; the verdict has all of them.
        "cells": [_cell(record) for record in verdict.cells[:MOST_CELLS]],
        "cells_cut": max(len(verdict.cells) - MOST_CELLS, 0),
        "usage": list(_usage(verdict)),
        "limits": list(_limits(verdict)),
        "weak": [*common.weak_limits(verdict), *common.weak_walls(verdict)],
        "environment": list(_environment(verdict)),
        "warnings": [common.single_line(warning) for warning in verdict.warnings],
    }


def timeline(samples: Timeline, most: int) -> dict[str, Any]:
    """Return at most ``most`` samples of memory, in bytes."""
    # The highest sample of each group is kept, so that no peak disappears.
    points = list(zip(samples.seconds, samples.memory, strict=True))
    width = -(-len(points) // most) or 1
    runs = [points[start : start + width] for start in range(0, len(points), width)]
    peaks = [max(run, key=lambda point: -1 if point[1] is None else point[1]) for run in runs]
    return {
        "seconds": [round(seconds, 3) for seconds, _ in peaks],
        "memory": [memory for _, memory in peaks],
    }


def _cell(record: CellRecord) -> dict[str, Any]:
    return {
        "n": record.code_index + 1,
        "status": record.status.value.replace("_", " "),
        # Numbers are for the chart and for sorting, texts for the table.
        "start": record.started,
        "end": record.started + record.seconds
        if record.started is not None and record.seconds is not None
        else None,
        "time": _seconds(record.seconds),
        "cpu": _seconds(record.cpu_seconds),
        "peak": _size(record.memory_peak),
        # Memory that a cell did not release, so the sign matters.
        "kept": ("+" if (record.memory_kept or 0) > 0 else "") + _size(record.memory_kept),
        "output": _size(record.output_bytes) + (" (cut)" if record.output_truncated else ""),
    }


def _usage(verdict: Verdict) -> Iterator[tuple[str, str]]:
    usage = verdict.usage
    figures = {
        "wall time": _seconds(usage.wall_seconds),
        "processor time": _seconds(usage.cpu_seconds),
        "memory peak": _size(usage.memory_peak),
        "most processes": str(usage.processes_peak) if usage.processes_peak is not None else "",
        "killed for memory": str(usage.oom_kills) if usage.oom_kills is not None else "",
        "output": _size(usage.output_bytes),
    }
    yield from ((name, value) for name, value in figures.items() if value)


def _limits(verdict: Verdict) -> Iterator[tuple[str, str, str]]:
    """Yield name, value and mechanism of each limit."""
    for name in LimitName:
        value, enforcement = verdict.limits.of(name), verdict.enforcement.get(name)
        if value is not None:
            by = (
                ""
                if enforcement is None
                else "nothing holds it"
                if enforcement.by is Mechanism.NONE
                else enforcement.by.value
            )
            note = common.single_line(enforcement.note) if enforcement is not None else ""
            yield (
                name.value.replace("_", " "),
                common.quantity(name, value),
                "; ".join(part for part in (by, note) if part),
            )


def _environment(verdict: Verdict) -> Iterator[tuple[str, str]]:
    notebook, environment = verdict.notebook, verdict.environment
    figures = {
        "kernel": notebook.kernel,
        "language": notebook.language,
        "Python": environment.python,
        "platform": environment.platform,
        "control groups": environment.cgroup,
        "started": verdict.started,
        "run": verdict.run_id,
        "safe-exec": verdict.safe_exec_version,
    }
    yield from ((name, common.single_line(value)) for name, value in figures.items() if value)


def _seconds(seconds: float | None) -> str:
    return format_seconds(seconds) if seconds is not None else ""


def _size(size: float | None) -> str:
    return format_size(size) if size is not None else ""


# --- a failure ------------------------------------------------------------------------------


def _failure(report: NotebookReport, verdict: Verdict) -> dict[str, Any]:
    cause, crash = verdict.cause, verdict.crash_cell
    sources = _sources(report, verdict)
    data: dict[str, Any] = {
        "crash": _crash(crash, verdict, sources.get(crash.index)) if crash is not None else None,
        "culprits": _culprits(verdict, sources),
        "memory_use": _memory_use(verdict),
        "stack": [common.frame_line(frame, verdict) for frame in crash.stack[:MOST_FRAMES]]
        if crash is not None
        else [],
        "native": native.summary(verdict),
        "native_stack": native.stack_lines(verdict)[:MOST_FRAMES],
        "native_gap": native.gap(verdict),
        "stderr": _tail(common.printable(verdict.stderr_tail)),
    }
    if cause is not None:
        data |= {
            "why": ""
            if common.headline_has_summary(verdict)
            else common.single_line(cause.summary),
            "confidence": cause.confidence.value,
            "advice": common.single_line(cause.advice),
            "evidence": [
                {
                    "fact": common.fact_name(fact),
                    "value": common.clip(
                        common.fact_value(fact.fact, fact.value), common.HEADLINE_WIDTH
                    ),
                    "source": common.single_line(fact.source),
                    "origin": fact.origin.value,
                }
                for fact in cause.evidence
            ],
        }
    return data


def _other_failure(report: NotebookReport, verdict: Verdict) -> dict[str, Any]:
    """Return a further failure of the run: its headline and the details below it."""
    data = _failure(report, verdict)
    return {"headline": common.headline(verdict)} | {
        key: data[key] for key in ("crash", "culprits", "why", "confidence") if key in data
    }


def _sources(report: NotebookReport, verdict: Verdict) -> dict[int, Placed]:
    """Return the sources of crash cell and culprits, if the file is unchanged since the run."""
    indexes = (
        {culprit.index for culprit in verdict.culprits.cells}
        if verdict.culprits is not None
        else set()
    )
    indexes |= {verdict.crash_cell.index} if verdict.crash_cell is not None else set()
    # A notebook edited since the run would show the wrong lines.
    read = read_as_run(report.result.source, verdict.notebook.sha256) if indexes else None
    # A text is no JSON; its page shows the cells of the annotated notebook without lines.
    is_json = read is not None and not is_text_format(report.result.source)
    return placed(read, indexes) if read is not None and is_json else {}


def _crash(crash: CrashCell, verdict: Verdict, source: Placed | None) -> dict[str, Any]:
    return {
        "n": crash.code_index + 1,
        "moment": common.moment(verdict),
        "costs": _line_costs(verdict, crash.code_index),
        "source": code(
            source.source if source is not None else None, crash.source_line, crash.line, MOST_LINES
        ),
    }


def _line_costs(verdict: Verdict, code_index: int) -> dict[int, list[str]]:
    """Return, by line number, the time of each line of a cell and the memory that it allocated."""
    times = profile.line_times(verdict, code_index)
    sizes = memory.line_sizes(verdict.memory, code_index)
    return {line: [times.get(line, ""), sizes.get(line, "")] for line in {*times, *sizes}}


def _culprits(verdict: Verdict, sources: dict[int, Placed]) -> dict[str, Any] | None:
    search = verdict.culprits
    if search is None:
        return None
    first = culprits.look_first(verdict)
    return {
        "names": culprits.names(search) if search.cells else "",
        "outcome": culprits.outcome(search),
        "figures": culprits.figures(search),
        "all": [culprit.code_index + 1 for culprit in search.cells],
        "cells": [
            _culprit(culprit, first, sources.get(culprit.index), verdict)
            # The last culprits are closest to the crash.
            for culprit in search.cells[-MOST_CULPRITS:]
        ],
        "cut": max(len(search.cells) - MOST_CULPRITS, 0),
    }


def _memory_use(verdict: Verdict) -> dict[str, Any] | None:
    """Return the bars of the holders and of the lines that allocated, each a share of the peak."""
    use = verdict.memory
    if use is None or not use.peak_bytes:
        return None
    peak = use.peak_bytes
    return {
        "holders": [
            {
                "name": memory.holder_name(holder),
                "text": memory.holder_detail(holder, exact=use.complete),
                "share": round(holder.bytes / peak, 4),
                "named": holder.name is not None,
            }
            for holder in use.holders[:MOST_HOLDERS]
        ],
        "others": memory.rest_lines(use),
        # The growth of the largest holders by cell, which the chart stacks.
        "growth": [
            {
                "name": memory.holder_name(holder),
                "cells": [[growth.code_index + 1, growth.bytes] for growth in holder.growth],
            }
            for holder in use.holders
            if holder.name is not None and holder.growth
        ][:MOST_STACKED],
        "lines": [
            {
                "name": memory.site_name(line.code_index, line.line, line.function),
                "text": common.SEPARATOR.join(
                    part for part in (_size(size), memory.caller_names(line, callers)) if part
                ),
                "share": round(size / peak, 4),
            }
            for line, size, callers in memory.by_line(use)[:MOST_HOLDERS]
        ],
    }


def _culprit(
    culprit: Culprit, first: Culprit | None, source: Placed | None, verdict: Verdict
) -> dict[str, Any]:
    return {
        "costs": _line_costs(verdict, culprit.code_index),
        "n": culprit.code_index + 1,
        "role": culprit.role.value,
        "note": culprits.note(culprit),
        "first": culprit is first,
        "source": code(
            source.source if source is not None else None,
            culprit.source_line,
            None,
            MOST_LINES // 5,
        ),
    }


def code(
    source: str | None, source_line: str | None, line: int | None, most: int
) -> dict[str, Any] | None:
    """Return at most ``most`` lines of source around the highlighted one, fewer if they are long.

    ``first`` is the number of the first line, ``marked`` that of the highlighted one, and ``cut``
    the number of lines that were left out.
    """
    if source is None:
        if not source_line:
            return None
        return {
            "first": line,
            "marked": line,
            "lines": _shown([source_line]),
            "cut": 0,
            "alone": True,
        }
    lines = source.split("\n")
    # The marked line in the middle, without going beyond either end.
    start = max(0, min((line or 1) - 1 - most // 2, len(lines) - most))
    excerpt = _shown(lines[start : start + most])
    # A cell with minified data has lines of megabytes.
    if most > 1 and sum(map(len, excerpt)) > most * USUAL_WIDTH:
        return code(source, source_line, line, most // 2)
    return {
        "first": start + 1,
        "marked": line,
        "lines": excerpt,
        "cut": len(lines) - len(excerpt),
        "alone": False,
    }


def _shown(lines: Sequence[str]) -> list[str]:
    return [common.clip(common.printable(line).replace("\n", " "), LINE_WIDTH) for line in lines]


def _tail(text: str) -> dict[str, Any]:
    # The end of stderr holds the error; the beginning is mostly warnings.
    cut = max(len(text) - STDERR_WIDTH, 0)
    return {"text": text[cut:], "cut": cut}
