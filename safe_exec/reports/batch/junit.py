"""Report a batch as JUnit XML.

Readers follow one of two schemas: Apache Ant's, as published by Windy Road, and that of Jenkins'
xunit plugin. Neither allows properties on a test case, and the first no output either. So each
notebook is a test suite with one test case, which satisfies both. The file is written suite by
suite.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from safe_exec.files import write_pieces_atomically
from safe_exec.model.verdict import Verdict
from safe_exec.reports.batch import text as batch_text
from safe_exec.reports.batch.results import BatchResult
from safe_exec.reports.batch.text import NotebookReport, Outcome
from safe_exec.reports.text import common, culprits, memory

if TYPE_CHECKING:
    from junitparser import TestCase, TestSuite

TOP_FOLDER = "(root)"
"""The class name of notebooks in the top folder, as Jenkins names the default package."""

STDERR_WIDTH = 8192
"""The characters of the end of stderr that are included; the verdict contains more."""

# XML 1.0 (section 2.2) allows no other characters, not even as references, and parsers turn a lone
# CR into LF.
_FORBIDDEN = re.compile("[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def write(batch: BatchResult, path: Path) -> None:
    """Write the batch as JUnit XML to ``path``, atomically. Raises OSError."""
    write_pieces_atomically(path, _document(batch))


def _document(batch: BatchResult) -> Iterator[bytes]:
    yield b"<?xml version='1.0' encoding='utf-8'?>\n<testsuites>"
    # Ant's schema requires a host name that is not empty.
    host = socket.gethostname() or "localhost"
    for number, result in enumerate(batch.results):
        suite = _suite(NotebookReport.of(result), batch)
        suite.hostname = host
        # Ant's schema requires a running number and a package for each suite.
        _set(suite, {"id": str(number), "package": clean(_folder(result.path))})
        yield b"\n"
        # Written suite by suite: the verdicts of a large batch do not fit into memory.
        yield suite.tostring()
    yield b"\n</testsuites>\n"


def _set(suite: TestSuite, attributes: dict[str, str]) -> None:
    for name, value in attributes.items():
        suite._elem.set(name, value)  # noqa: SLF001 - the attributes of an aggregate, which junitparser has no names for


def _suite(report: NotebookReport, batch: BatchResult) -> TestSuite:
    from junitparser import SystemErr, SystemOut, TestSuite

    suite = TestSuite(clean(report.result.path))
    suite.timestamp = _moment(report.verdict, batch)
    properties = dict(_properties(report, batch))
    for name, value in properties.items():
        suite.add_property(name, clean(value))
    suite.add_testcase(_case(report, batch))
    for other in batch_text.each_failure(report)[1:]:
        suite.add_testcase(_further_case(other))
    suite.append(SystemOut(clean(batch_text.headline(report))))
    suite.append(SystemErr(clean(_stderr(report.verdict))))
    return suite


def _moment(verdict: Verdict | None, batch: BatchResult) -> str:
    """Return the start time; the schema allows neither fractions of a second nor a time zone."""
    return (
        verdict.started[:19] if verdict is not None else batch.started.strftime("%Y-%m-%dT%H:%M:%S")
    )


def _folder(path: str) -> str:
    folder = str(PurePosixPath(path).parent)
    return TOP_FOLDER if folder == "." else folder


def _case(report: NotebookReport, batch: BatchResult) -> TestCase:
    from junitparser import Error, Failure, Skipped, TestCase

    result = report.result
    case = TestCase(clean(PurePosixPath(result.path).name), clean(_folder(result.path)))
    # Seconds with three decimals, as Ant writes them.
    case.time = round(result.seconds or 0.0, 3)
    if report.outcome is Outcome.SKIPPED:
        # Ant's schema has no type attribute for skipped tests.
        case.result = [Skipped(clean(_message(report)))]
    elif report.outcome is not Outcome.PASSED:
        # A failure is the notebook's own, an error is not: CI systems count them separately.
        failure = (Failure if report.outcome is Outcome.FAILED else Error)(
            clean(_message(report)), batch_text.kind(report)
        )
        failure.text = clean("\n".join(batch_text.lines(report, batch)))
        case.result = [failure]
    return case


def _further_case(report: NotebookReport) -> TestCase:
    """Return the test case of a further failure; its time is part of the first one's."""
    from junitparser import Failure, TestCase

    path, crash = report.result.path, report.verdict.crash_cell if report.verdict else None
    place = f", {common.cell_name(crash.code_index)}" if crash is not None else ""
    case = TestCase(clean(f"{PurePosixPath(path).name}{place}"), clean(_folder(path)))
    case.time = 0.0
    failure = Failure(clean(_message(report)), batch_text.kind(report))
    failure.text = clean("\n".join(batch_text.failure_lines(report)))
    case.result = [failure]
    return case


def _message(report: NotebookReport) -> str:
    """Return the outcome and the culprits on one line."""
    search = report.verdict.culprits if report.verdict is not None else None
    culprit_cells = (
        f"caused by {culprits.names(search)}" if search is not None and search.cells else ""
    )
    holder = memory.largest_holder(report.verdict) if report.verdict is not None else ""
    return common.SEPARATOR.join(
        part for part in (batch_text.headline(report), culprit_cells, holder) if part
    )


def _stderr(verdict: Verdict | None) -> str:
    tail = verdict.stderr_tail if verdict is not None else ""
    # CI systems limit the size of the file.
    cut = len(tail) - STDERR_WIDTH
    return f"(the first {cut} characters are left out)\n{tail[cut:]}" if cut > 0 else tail


def _properties(report: NotebookReport, batch: BatchResult) -> Iterator[tuple[str, str]]:
    """Yield figures by name, in bytes and seconds, without those that were not measured."""
    result, verdict = report.result, report.verdict
    yield "status", result.status
    yield "attempts", str(result.attempts)
    yield "flaky", "true" if result.flaky else "false"
    for name, path in {
        "verdict": result.verdict,
        "notebook": result.notebook,
        "reproduction": result.repro,
    }.items():
        # Paths relative to the output directory stay valid in an uploaded artifact.
        if path is not None:
            yield name, batch_text.relative(path, batch.out)
    if verdict is None:
        return
    figures = {
        "exit_code": verdict.exit_code,
        "cells": verdict.notebook.cells,
        "code_cells": verdict.notebook.code_cells,
        "wall_seconds": verdict.usage.wall_seconds,
        "cpu_seconds": verdict.usage.cpu_seconds,
        "memory_peak": verdict.usage.memory_peak,
        "memory_limit": verdict.limits.memory,
        "crash_cell": verdict.crash_cell.code_index if verdict.crash_cell is not None else None,
        "crash_line": verdict.crash_cell.line if verdict.crash_cell is not None else None,
    }
    yield from ((name, str(value)) for name, value in figures.items() if value is not None)
    if verdict.cause is not None:
        yield "cause", verdict.cause.kind.value
        yield "confidence", verdict.cause.confidence.value
    if verdict.failures:
        yield "failures", str(len(verdict.failures))
    if verdict.culprits is not None:
        yield "culprits", " ".join(str(culprit.code_index) for culprit in verdict.culprits.cells)


def clean(text: str) -> str:
    r"""Return ``text`` with characters that XML cannot contain as escapes: ESC as ``\x1b``."""
    return _FORBIDDEN.sub(
        lambda match: match[0].encode("unicode_escape").decode(), text.replace("\r\n", "\n")
    )
