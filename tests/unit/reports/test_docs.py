"""docs/reports.md says what the reports do."""

from __future__ import annotations

import re
from pathlib import Path

from safe_exec.batch.ci import CODE_QUALITY
from safe_exec.batch.outcome import STATUSES
from safe_exec.batch.report_registry import BATCH_REPORTS
from safe_exec.reports.batch import junit, source_map
from safe_exec.reports.batch.ci import gitlab
from safe_exec.reports.batch.text import Outcome, outcome
from tests.unit.batches import every_entry, make_batch
from tests.unit.reports.batch.test_junit import properties, written
from tests.unit.test_docs import CODE, first_column, page, rows, section

TEXT = page("docs/reports.md")


def test_the_files() -> None:
    files = {
        name for row in rows(TEXT.partition("Statuses come")[0]) for name in CODE.findall(row[1])
    }
    assert {report.file for report in BATCH_REPORTS} - {"summary.json"} | {CODE_QUALITY} <= files


def test_what_statuses_come_to(tmp_path: Path) -> None:
    table = {row[0]: set(CODE.findall(row[1])) for row in rows(TEXT) if row[0] in set(Outcome)}
    assert set(table) == set(Outcome) and set().union(*table.values()) == set(STATUSES)
    for entry in every_entry(tmp_path):
        assert entry.status in table[outcome(entry)]


def test_properties_of_junit(tmp_path: Path) -> None:
    batch = make_batch(tmp_path, every_entry(tmp_path))
    found = {name for suite in written(batch) for name in properties(suite)}
    assert set(first_column(section(TEXT, "JUnit XML"))) == found | {"notebook"}
    assert f"`{junit.TOP_FOLDER}`" in section(TEXT, "JUnit XML")


def test_severities() -> None:
    said = set(CODE.findall(section(TEXT, "GitLab")))
    assert {*gitlab._SEVERITIES.values(), gitlab._OTHER_SEVERITY} <= said


def test_figures() -> None:
    assert f"up to {source_map.MOST_BYTES >> 20} MiB" in re.sub(r"\s+", " ", TEXT)
