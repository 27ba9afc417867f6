"""docs/batch.md says what the code does."""

from __future__ import annotations

import re

import click
import pytest

from safe_exec.batch.admission import RESERVE_BYTES
from safe_exec.batch.outcome import SEVERITY, STATUSES
from safe_exec.batch.report_registry import BATCH_REPORTS
from safe_exec.cli.batch import command
from safe_exec.cli.options.reports import DEFAULT_OUT
from safe_exec.cli.run import command as run
from safe_exec.model.verdict import CauseKind
from safe_exec.workflows.retry import ALWAYS, TIMES, WAITING
from tests.unit.test_docs import CODE, OPTION, page, rows, section

TEXT = page("docs/batch.md")


def test_the_order_of_exit_codes() -> None:
    table = list(rows(section(TEXT, "Exit code")))
    assert tuple(int(row[0]) for row in table) == SEVERITY
    assert [name for row in table for name in CODE.findall(row[1])] == [
        "passed", "unchanged", "cell_error", "limit_exceeded", "timeout", "kernel_died", "start_failed", "refused", "internal_error",
        "cancelled",
    ]  # fmt: skip
    assert {name for row in table for name in CODE.findall(row[1])} | {"not_run"} == set(STATUSES)


def test_the_order_in_help_is_the_same() -> None:
    said = re.sub(r"\s+", " ", command.help or "")
    assert (
        tuple(
            int(code)
            for code in re.findall(r"\b(\d+) [a-z]", said.partition("from good to bad:")[2])
        )
        == SEVERITY
    )


def test_the_causes_that_are_tried_again() -> None:
    table = list(rows(section(TEXT, "Stopping early, and retries")))
    named = [set(CODE.findall(row[0])) for row in table]
    assert named == [
        set(ALWAYS),
        {CauseKind.KERNEL_START_FAILED},
        set(TIMES),
        {CauseKind.OUT_OF_MEMORY},
        set(),
    ]
    assert set(CODE.findall(table[2][1])) == set(WAITING)


def test_what_it_writes() -> None:
    files = {name for row in rows(section(TEXT, "Output files")) for name in CODE.findall(row[0])}
    assert {report.file for report in BATCH_REPORTS} | {"journal.jsonl"} <= files
    assert f"(`{DEFAULT_OUT}`)" in TEXT


def test_figures() -> None:
    assert f"less {RESERVE_BYTES >> 20} MiB" in re.sub(r"\s+", " ", TEXT)


@pytest.mark.parametrize(
    "option",
    [found for found in command.params if isinstance(found, click.Option)],
    ids=lambda found: str(found.name),
)
def test_every_option_is_described(option: click.Option) -> None:
    shared = {name for parameter in run.params for name in parameter.opts}
    names = [name for name in option.opts if name.startswith("--")] or option.opts
    if not set(names) <= shared and names != ["--jobs"]:
        assert set(names) & set(OPTION.findall(TEXT)), names
