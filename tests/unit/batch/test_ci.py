"""What is told to a CI system: where it is found out, what is written for it, and what happens where that cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from safe_exec.batch import ci
from safe_exec.batch.report_registry import write_all
from tests.unit.batches import make_batch, make_entry
from tests.unit.builders import make_verdict

VARIABLES = (
    "GITHUB_ACTIONS",
    "GITHUB_STEP_SUMMARY",
    "GITHUB_WORKSPACE",
    "GITLAB_CI",
    "CI_PROJECT_DIR",
)


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_where_we_are(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not ci.on_github() and not ci.on_gitlab()
    monkeypatch.setenv("GITHUB_ACTIONS", "false")
    assert not ci.on_github()
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITLAB_CI", "true")
    assert ci.on_github() and ci.on_gitlab()


def test_what_is_written_for_whom(monkeypatch: pytest.MonkeyPatch) -> None:
    def files(*, github: bool, gitlab: bool) -> list[str]:
        return [report.file for report in ci.reports(github=github, gitlab=gitlab)]

    assert files(github=True, gitlab=False) == [], "asked for, and no summary to add to"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "/some/where")
    assert files(github=True, gitlab=True) == ["/some/where", "codequality.json"]
    assert files(github=False, gitlab=False) == []


def test_a_summary_is_added_to_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = tmp_path / "summary.md"
    summary.write_text("of an earlier command\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    batch = make_batch(tmp_path, [make_entry(tmp_path, "a.ipynb", make_verdict())], exit_code=3)
    assert write_all(batch, ci.reports(github=True, gitlab=False)) == 3
    assert summary.read_text().startswith("of an earlier command\n### ")
    assert {path.name for path in batch.out.glob("*.*")} >= {
        "summary.json",
        "junit.xml",
        "report.html",
    }


def test_paths_are_those_of_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "below"
    root.mkdir()
    monkeypatch.setenv("GITHUB_WORKSPACE", str(tmp_path))
    monkeypatch.setenv("CI_PROJECT_DIR", str(tmp_path))
    batch = make_batch(root, [make_entry(root, "a.ipynb", make_verdict())])
    assert "file=below/a.ipynb," in next(ci.github_lines(batch))
    write_all(batch, ci.reports(github=False, gitlab=True))
    assert (
        json.loads((batch.out / "codequality.json").read_text())[0]["location"]["path"]
        == "below/a.ipynb"
    )
    monkeypatch.delenv("GITHUB_WORKSPACE")
    assert "file=a.ipynb," in next(ci.github_lines(batch))


def test_a_report_that_cannot_be_written_shows_in_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "no" / "such" / "folder"))
    batch = make_batch(tmp_path, [make_entry(tmp_path, "a.ipynb", make_verdict())], exit_code=3)
    assert write_all(batch, ci.reports(github=True, gitlab=True)) == 7
    assert "could not be written" in caplog.text
    assert (batch.out / "codequality.json").exists(), "the others are"
