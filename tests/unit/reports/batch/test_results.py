"""A batch as reports see it: verdicts are read when they are asked for, and never kept."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
from msgspec.structs import replace

from safe_exec.reports.batch.results import BatchResult, NotebookResult


def entry(folder: Path, status: str = "passed", name: str = "a.ipynb") -> NotebookResult:
    return NotebookResult(
        path=name,
        status=status,
        exit_code=0,
        seconds=1.0,
        attempts=1,
        flaky=False,
        error=None,
        verdict=folder / "a.verdict.json",
        notebook=None,
        repro=None,
        source=folder / name,
    )


def test_a_document_is_read_anew_each_time(tmp_path: Path) -> None:
    one = entry(tmp_path)
    (tmp_path / "a.verdict.json").write_text('{"status": "passed"}')
    assert one.document() == {"status": "passed"}
    (tmp_path / "a.verdict.json").write_text('{"status": "timeout"}')
    assert one.document() == {"status": "timeout"}


@pytest.mark.parametrize("text", ["", "[1]", "{torn", "\udcff"])
def test_what_is_no_verdict_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.verdict.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert entry(tmp_path).document() is None


def test_no_file_is_no_document(tmp_path: Path) -> None:
    assert entry(tmp_path).document() is None
    assert replace(entry(tmp_path), verdict=None).document() is None


def test_statuses_are_counted_the_most_frequent_first(tmp_path: Path) -> None:
    batch = BatchResult(
        results=tuple(entry(tmp_path, status) for status in ("timeout", "passed", "passed")),
        root=tmp_path,
        out=tmp_path,
        started=datetime.now(UTC),
        seconds=1.0,
        exit_code=4,
        command=(),
        safe_exec_version="1",
    )
    assert list(batch.counts().items()) == [("passed", 2), ("timeout", 1)]
