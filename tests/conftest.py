"""For all tests: the beds they lie in, the seed by which cases are drawn, and the table of what the search for their culprits took."""

from __future__ import annotations

import os
import signal
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import settings

from tests import beds, versions
from tests.cases.table import PROPERTY, Row, render, write

SEED = "SAFE_EXEC_CASES_SEED"

UNIT = Path(__file__).parent / "unit"
"""A test outside of it watches a dozen processes on a machine that others use too: one that fails is run once more, and listed as such."""

# On a busy machine any example may take long. CI, which pins its beds, draws the same examples each time: a new one
# that fails is for who works on it, not for a landing that has nothing to do with it.
settings.register_profile("safe-exec", deadline=None, derandomize="SAFE_EXEC_BEDS" in os.environ)
settings.load_profile("safe-exec")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--culprit-table",
        type=Path,
        metavar="FILE",
        help="write the table of culprits into this document",
    )
    parser.addoption(
        "--versions-table",
        type=Path,
        metavar="FILE",
        help="write versions that passed into this document",
    )
    parser.addoption(
        "--bed",
        action="append",
        default=[],
        metavar="NAME",
        help="only tests that need this bed (tests/beds.py)",
    )


def pytest_configure(config: pytest.Config) -> None:
    default_signals_for_children()
    # Modes of files that tests make are compared; tests/integration/test_starts.py runs under another.
    os.umask(0o022)
    beds.register(config)
    # Workers inherit it: all of them draw the same, at midnight too.
    os.environ.setdefault(SEED, datetime.now(UTC).date().isoformat())


def default_signals_for_children() -> None:
    """Start programs with the same signals under nohup or in the background as on a terminal.

    An ignored signal stays ignored in each program that is started, a handler does not; and with a
    handler that does nothing pytest survives the signal as before.
    """
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if UNIT not in item.path.parents:
            item.add_marker(pytest.mark.flaky(reruns=1))


@pytest.fixture(autouse=True)
def no_start_up_files_of_bash(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """A shell reads what stands in the user's home: what is tested shall not depend on it, nor on who else uses it."""
    if any("bash" in mark.args for mark in request.node.iter_markers("bed")):
        monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))


def pytest_report_header() -> str:
    return f"cases for the culprit search drawn by {SEED}={os.environ[SEED]}"


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    path = config.getoption("--versions-table")
    if path is not None:
        passed = terminalreporter.stats.get("passed", [])
        lines = [
            dict(report.user_properties).get(versions.PROPERTY)
            for report in passed
            if report.when == "call"
        ]
        versions.write(path, [line for line in lines if line])
    reports = [
        report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])
    ]
    found = [
        dict(report.user_properties).get(PROPERTY) for report in reports if report.when == "call"
    ]
    rows = [Row(**row | {"culprits": tuple(row["culprits"])}) for row in found if row is not None]
    if rows:
        if config.get_verbosity() < 0:  # there was no header
            terminalreporter.write_line(pytest_report_header())
        terminalreporter.section("culprits")
        terminalreporter.write_line(render(rows))
        path = config.getoption("--culprit-table")
        if path is not None:
            write(path, rows)
            terminalreporter.write_line(f"written into {path}")
