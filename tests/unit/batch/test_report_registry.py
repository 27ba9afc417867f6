"""What is shown and written of a batch: the summary and its schema, lines and the live table, reports that cannot be written."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from msgspec.structs import replace

from safe_exec.batch import report_registry
from safe_exec.batch.outcome import STATUSES
from safe_exec.batch.report_registry import BATCH_REPORTS, BatchReport, write_all
from safe_exec.model import events
from safe_exec.model.verdict import Status
from safe_exec.reports import json_text, verdict_json
from safe_exec.reports.batch import summary_json
from safe_exec.reports.batch.progress import BatchProgress, line_of
from safe_exec.reports.batch.results import BatchResult, NotebookResult
from tests.unit.builders import make_verdict


def entry(out: Path, status: str = "passed", name: str = "a", **changes: Any) -> NotebookResult:
    found = NotebookResult(
        path=f"docs/{name}.ipynb",
        status=status,
        exit_code=0,
        seconds=1.0,
        attempts=1,
        flaky=False,
        error=None,
        verdict=out / f"{name}.verdict.json",
        notebook=out / f"{name}.out.ipynb",
        repro=None,
        source=Path(f"docs/{name}.ipynb"),
    )
    return replace(found, **changes)


def batch(out: Path, *entries: NotebookResult, **changes: Any) -> BatchResult:
    found = BatchResult(
        results=entries,
        root=out.parent,
        out=out,
        started=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        seconds=12.3456,
        exit_code=3,
        command=("safe-exec", "batch", "\udcff"),
        safe_exec_version="0.1.0",
        shard=(1, 2),
    )
    return replace(found, **changes)


def test_the_schema_is_one_and_knows_every_status_and_code() -> None:
    schema = summary_json.load_schema()
    Draft202012Validator.check_schema(schema)
    assert (
        schema["properties"]["counts"]["propertyNames"]["enum"]
        == [*map(str, Status), "refused", "unchanged", "not_run"]
        == list(STATUSES)
    )
    codes = sorted({*(status.exit_code for status in Status), 2})
    assert schema["properties"]["exit_code"]["enum"] == codes
    assert schema["$defs"]["NotebookSummary"]["properties"]["exit_code"]["enum"] == [*codes, None]


def test_the_summary_says_what_the_verdicts_say(tmp_path: Path) -> None:
    verdict = make_verdict(status=Status.KERNEL_DIED)
    (tmp_path / "a.verdict.json").write_bytes(verdict_json.dumps(verdict))
    rows = (
        entry(tmp_path, "kernel_died", exit_code=3),
        entry(
            tmp_path,
            "refused",
            "b",
            exit_code=2,
            seconds=None,
            attempts=0,
            verdict=None,
            notebook=None,
            error="no notebook",
        ),
    )
    summary_json.write(batch(tmp_path, *rows), tmp_path / "summary.json")
    document = json.loads((tmp_path / "summary.json").read_text())
    Draft202012Validator(summary_json.load_schema()).validate(document)
    first, second = document["notebooks"]
    assert verdict.cause is not None and verdict.crash_cell is not None
    assert (first["cause"], first["summary"]) == (verdict.cause.kind, verdict.cause.summary)
    assert (first["crash_cell"], first["line"]) == (
        verdict.crash_cell.code_index,
        verdict.crash_cell.line,
    )
    assert (first["verdict"], first["notebook"]) == ("a.verdict.json", "a.out.ipynb")
    assert second["cause"] is None and second["error"] == "no notebook"
    assert document["counts"] == {"kernel_died": 1, "refused": 1} and document["shard"] == [1, 2]
    assert document["command"][-1] == "\\udcff"


@pytest.mark.parametrize("text", ["{}", '{"cause": 1, "culprits": []}', "torn {"])
def test_a_verdict_that_was_spoilt_since_costs_its_row_only_the_details(
    tmp_path: Path, text: str
) -> None:
    (tmp_path / "a.verdict.json").write_text(text)
    document = json_text.plain(
        summary_json.summary_of(batch(tmp_path, entry(tmp_path, "timeout", exit_code=4)))
    )
    Draft202012Validator(summary_json.load_schema()).validate(document)
    assert (
        document["notebooks"][0]["cause"] is None
        and document["notebooks"][0]["status"] == "timeout"
    )


# --- the list of reports ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("report", BATCH_REPORTS, ids=[report.file for report in BATCH_REPORTS])
def test_each_report_has_its_function_and_a_file_of_its_own(
    report: BatchReport, tmp_path: Path
) -> None:
    assert [other.file for other in BATCH_REPORTS].count(report.file) == 1
    report.function()(batch(tmp_path), tmp_path / report.file)
    assert (tmp_path / report.file).is_file()


def test_a_report_that_cannot_be_written_is_said_and_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    written = []

    def take(kind: str) -> Callable[[BatchResult, Path], None]:
        def write(_batch: BatchResult, path: Path) -> None:
            if kind == "full":
                raise OSError(28, "No space left on device")
            written.append(path.name)

        return write

    monkeypatch.setattr(
        report_registry,
        "BATCH_REPORTS",
        (BatchReport(file="a", writer="full"), BatchReport(file="b", writer="fine")),
    )
    monkeypatch.setattr(BatchReport, "function", lambda report: take(report.writer))
    with caplog.at_level(logging.ERROR):
        assert write_all(batch(tmp_path)) == 7
        assert write_all(batch(tmp_path, exit_code=130)) == 130
    assert written == ["b", "b"] and "No space left" in caplog.text


# --- what is shown ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "headline", "line"),
    [
        ({}, "passed · 2 code cells", "✓ docs/a.ipynb: passed · 2 code cells"),
        ({"flaky": True, "attempts": 2}, "passed", "✓ docs/a.ipynb: passed · flaky: attempt 2"),
        (
            {"status": "kernel_died", "attempts": 3},
            "kernel died",
            "✗ docs/a.ipynb: kernel died · the same in 3 attempts",
        ),
        (
            {"status": "refused", "error": "no\x1b[1m notebook"},
            "",
            "✗ docs/a.ipynb: no\\x1b[1m notebook",
        ),
        ({"status": "unchanged"}, "", "✓ docs/a.ipynb: unchanged"),
        ({"path": "d\n/\u202ea.ipynb"}, "passed", "✓ d /\\u202ea.ipynb: passed"),
    ],
)
def test_a_notebook_in_one_line(
    tmp_path: Path, changes: dict[str, Any], headline: str, line: str
) -> None:
    assert line_of(entry(tmp_path, **changes), headline) == line


def test_plain_lines_without_a_terminal(tmp_path: Path) -> None:
    stream = io.StringIO()
    with BatchProgress(stream) as progress:
        progress.note("of\x07 interest")
        progress.begin(12, 2)
        sink = progress.sink("docs/a.ipynb", 1)
        sink(events.KernelReady(time=0.5))
        progress.draw()
        progress.finished(entry(tmp_path), "passed")
        progress.finished(entry(tmp_path, "timeout", "b"), "timed out")
    assert (
        stream.getvalue()
        == "note: of\\x07 interest\n12 notebooks, 2 at a time\n[ 1/12] ✓ docs/a.ipynb: passed\n[ 2/12] ✗ docs/b.ipynb: timed out\n"
    )


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_live_table_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = Terminal()
    with BatchProgress(stream, clock=lambda: 5.0) as progress:
        progress.begin(2, 2)
        sink = progress.sink("docs/[red]a.ipynb", 2)
        sink(events.KernelReady(time=0.5))
        sink(events.CellStarted(time=1.0, index=0, code_index=0, source="answer = [1]"))
        progress.draw()
        shown = plain(stream)
        assert (
            "docs/[red]a.ipynb (attempt 2)" in shown
            and "answer = [1]" in shown
            and "0 of 2 done" in shown
        )
        progress.finished(entry(tmp_path, "timeout", "b"), "timed out")
        progress.draw()
    assert "[1/2] ✗ docs/b.ipynb: timed out" in plain(
        stream
    ) and "1 of 2 done, 1 not passed" in plain(stream)
    assert "\x1b[1;31m" in stream.getvalue()


def test_no_colour_where_none_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    with BatchProgress(stream) as progress:
        progress.begin(1, 1)
        progress.finished(entry(tmp_path, "timeout"), "timed out")
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", stream.getvalue())


def plain(stream: io.StringIO) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())


def test_quiet_says_nothing(tmp_path: Path) -> None:
    stream = Terminal()
    with BatchProgress(stream, quiet=True) as progress:
        progress.begin(1, 1)
        progress.draw()
        progress.finished(entry(tmp_path), "passed")
    assert stream.getvalue() == ""


def test_a_stream_that_is_gone_costs_nothing(tmp_path: Path) -> None:
    stream = io.StringIO()
    with BatchProgress(stream) as progress:
        stream.close()
        progress.begin(1, 1)
        progress.finished(entry(tmp_path), "passed")
        progress.draw()
