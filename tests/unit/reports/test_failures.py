"""Several failures of one run (``--keep-going``): each of them is in every report."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import nbformat
import pytest
from msgspec.structs import replace

from safe_exec.model.verdict import CauseKind, CellStatus, FailureRecord, Role, Status, Verdict
from safe_exec.reports import verdict_json
from safe_exec.reports.annotated_notebook import annotate
from safe_exec.reports.batch import junit
from safe_exec.reports.batch.ci import github, gitlab
from safe_exec.reports.batch.html import page_data
from safe_exec.reports.batch.text import NotebookReport
from safe_exec.reports.terminal import Style, diagnosis
from tests.unit.batches import make_batch, make_entry
from tests.unit.builders import (
    make_cause,
    make_crash,
    make_culprit,
    make_culprits,
    make_records,
    make_verdict,
)

REASON = "needs `big` of code cell 2, which failed"
HEADLINES = ("kernel died in code cell 2 · out of memory", "timed out in code cell 4")


@pytest.fixture
def verdict() -> Verdict:
    """A run that ran out of memory in code cell 2, skipped 3, and timed out in 4."""
    second = FailureRecord(
        status=Status.TIMEOUT,
        cause=make_cause(CauseKind.CELL_TIMEOUT, summary="it sleeps"),
        crash_cell=make_crash(index=4, code_index=3, id="fifth", line=1, source_line="wait()"),
        culprits=make_culprits(
            make_culprit(3, Role.CRASH, note="ran"),
            repro_notebook="/home/me/project/analysis.2.repro.ipynb",
        ),
    )
    passed, killed, skipped = CellStatus.PASSED, CellStatus.KILLED, CellStatus.SKIPPED
    records = make_records(passed, killed, skipped, killed)
    first = make_verdict(
        cells=(*records[:2], replace(records[2], reason=REASON), records[3]),
        culprits=make_culprits(),
    )
    return replace(first, failures=(FailureRecord.of(first), second))


def test_the_first_failure_is_the_verdicts_own(verdict: Verdict) -> None:
    changed = replace(verdict, culprits=None)
    assert changed.failures[0].culprits is None
    assert changed.failures[1] == verdict.failures[1]
    assert changed.exit_code == Status.KERNEL_DIED.exit_code
    assert [each.status for each in verdict.each_failure()] == [
        Status.KERNEL_DIED,
        Status.TIMEOUT,
    ]
    assert all(each.failures == () for each in verdict.each_failure())
    assert make_verdict().each_failure() == (make_verdict(),)


def test_the_document_has_them_all(verdict: Verdict) -> None:
    document = json.loads(verdict_json.dumps(verdict))
    assert [failure["cause"]["kind"] for failure in document["failures"]] == [
        "out_of_memory",
        "cell_timeout",
    ]
    assert [cell["reason"] for cell in document["cells"]] == [None, None, REASON, None]
    assert verdict_json.from_document(document) == verdict


def test_terminal(verdict: Verdict) -> None:
    lines = list(diagnosis(verdict, Style()))
    marked = [line for line in lines if line.startswith("✗")]
    assert [line[2:].startswith(head) for line, head in zip(marked, HEADLINES, strict=True)] == [
        True,
        True,
    ]
    assert any("skipped" in line and REASON in line for line in lines)
    assert any("analysis.2.repro.ipynb" in line for line in lines)


def test_annotated_notebook(verdict: Verdict) -> None:
    node = nbformat.v4.new_notebook()
    node.cells = [
        nbformat.v4.new_markdown_cell("title"),
        *(nbformat.v4.new_code_cell(f"x = {n}\ny = {n}") for n in range(4)),
    ]
    stale = nbformat.v4.new_output("stream", text="of an earlier run")
    node.cells[3].outputs = [stale]
    annotated = annotate(node, verdict)
    outputs = [cell.get("outputs", []) for cell in annotated.cells[1:]]
    errors = {n: o.ename for n, each in enumerate(outputs) for o in each if "ename" in o}
    assert errors == {2: "SafeExec: out_of_memory", 4: "SafeExec: cell_timeout"}
    (skip,) = outputs[3]
    assert skip.data["text/plain"] == f"safe-exec: skipped: {REASON}"
    banner = annotated.cells[0].source
    assert "Also: timed out in code cell 4" in banner
    assert "code cell 3 needs" in banner
    nbformat.validate(annotated)


def test_junit_has_a_case_for_each(verdict: Verdict, tmp_path: Path) -> None:
    batch = make_batch(tmp_path, [make_entry(tmp_path, "a.ipynb", verdict)])
    junit.write(batch, tmp_path / "junit.xml")
    (suite,) = ET.parse(tmp_path / "junit.xml").getroot()
    assert [case.get("name") for case in suite.iter("testcase")] == [
        "a.ipynb",
        "a.ipynb, code cell 4",
    ]
    failures = [str(failure.get("message")) for failure in suite.iter("failure")]
    assert [text.startswith(head) for text, head in zip(failures, HEADLINES, strict=True)] == [
        True,
        True,
    ]
    properties = {p.get("name"): p.get("value") for p in suite.iter("property")}
    assert properties["failures"] == "2"


def test_github_and_gitlab_have_a_problem_for_each(verdict: Verdict, tmp_path: Path) -> None:
    batch = make_batch(tmp_path, [make_entry(tmp_path, "a.ipynb", verdict)])
    errors = [line for line in github.annotations(batch) if line.startswith("::error")]
    titles = ["title=a.ipynb%3A out of memory", "title=a.ipynb%3A cell timeout"]
    assert [title in line for title, line in zip(titles, errors, strict=True)] == [True, True]
    assert "timed out in code cell 4" in errors[1]
    summary = github.summary(batch)
    assert "Also: timed out in code cell 4" in summary
    assert "code cell 3 needs" in summary
    gitlab.write(batch, tmp_path / "gitlab.json")
    problems = json.loads((tmp_path / "gitlab.json").read_text())
    assert [problem["check_name"] for problem in problems] == [
        "safe-exec/out_of_memory",
        "safe-exec/cell_timeout",
    ]
    assert len({problem["fingerprint"] for problem in problems}) == 2


def test_page(verdict: Verdict, tmp_path: Path) -> None:
    entry = make_entry(tmp_path, "a.ipynb", verdict)
    detail = page_data.detail(NotebookReport.of(entry), make_batch(tmp_path, [entry]), tmp_path)
    (other,) = detail["others"]
    assert other["headline"].startswith(HEADLINES[1])
    assert other["crash"]["n"] == 4
    assert other["culprits"]["names"] == "code cell 4 alone"
    assert detail["skipped"] == [f"code cell 3 {REASON}"]
