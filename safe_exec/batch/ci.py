"""Detect the CI system that runs a batch, read its environment, and add the reports it expects.

The formats are in ``reports.batch.ci``, which does not read the environment.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from safe_exec.batch.report_registry import BatchReport
from safe_exec.reports.batch.results import BatchResult

CODE_QUALITY = "codequality.json"
SUMMARY_VARIABLE = "GITHUB_STEP_SUMMARY"


def on_github() -> bool:
    """Return whether this process is part of a GitHub Actions job."""
    return os.environ.get("GITHUB_ACTIONS") == "true"


def on_gitlab() -> bool:
    """Return whether this process is part of a GitLab CI job."""
    return bool(os.environ.get("GITLAB_CI"))


def reports(*, github: bool, gitlab: bool) -> tuple[BatchReport, ...]:
    """Return the reports that the CI system reads, in addition to those of every batch."""
    summary = os.environ.get(SUMMARY_VARIABLE, "") if github else ""
    return (
        *(
            [BatchReport(file=summary, writer="safe_exec.batch.ci:append_summary")]
            if summary
            else []
        ),
        *(
            [BatchReport(file=CODE_QUALITY, writer="safe_exec.batch.ci:write_code_quality")]
            if gitlab
            else []
        ),
    )


def append_summary(batch: BatchResult, path: Path) -> None:
    """Append the batch's summary to the summary of the GitHub Actions job. Raises OSError."""
    from safe_exec.reports.batch.ci import github

    # GitHub gives all steps of a job one summary file, so it is appended to, never replaced.
    with path.open("a", encoding="utf-8") as file:
        file.write(github.summary(batch))


def write_code_quality(batch: BatchResult, path: Path) -> None:
    """Write GitLab's code quality report, with paths relative to the checkout. Raises OSError."""
    from safe_exec.reports.batch.ci import gitlab

    gitlab.write(batch, path, _checkout("CI_PROJECT_DIR"))


def github_lines(batch: BatchResult) -> Iterator[str]:
    """Return the lines that GitHub reads from standard output; paths start at the checkout."""
    from safe_exec.reports.batch.ci import github

    return github.annotations(batch, _checkout("GITHUB_WORKSPACE"))


def _checkout(variable: str) -> Path | None:
    value = os.environ.get(variable)
    return Path(value) if value else None
