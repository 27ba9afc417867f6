"""A plugin for pytest in the guest: a failure is told when it happens. A guest that is ended for its time would take it with it."""

from __future__ import annotations

import sys

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Print what went wrong."""
    if report.failed or report.outcome == "rerun":  # type: ignore[comparison-overlap]  # pytest-rerunfailures' own
        sys.stdout.write(f"\n{report.nodeid}\n{report.longreprtext}\n")
        sys.stdout.flush()
