"""What a batch tells the CI system that it runs under: annotations and a summary on GitHub, a report for GitLab.

Here the environment is read; the formats themselves, in ``reports``, know nothing of it.
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
    """Whether this is a job of GitHub Actions."""
    return os.environ.get("GITHUB_ACTIONS") == "true"


def on_gitlab() -> bool:
    """Whether this is a job of GitLab CI."""
    return bool(os.environ.get("GITLAB_CI"))


def reports(*, github: bool, gitlab: bool) -> tuple[BatchReport, ...]:
    """What is written for them beside the reports that every batch has."""
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
    """Adds the summary of the batch to that of the job: the file is GitHub's, and other commands write to it too. Raises OSError."""
    from safe_exec.reports.batch import github

    with path.open("a", encoding="utf-8") as file:
        file.write(github.summary(batch))


def write_code_quality(batch: BatchResult, path: Path) -> None:
    """Writes GitLab's report; its paths are those of the checkout. Raises OSError."""
    from safe_exec.reports.batch import gitlab

    gitlab.write(batch, path, _checkout("CI_PROJECT_DIR"))


def github_lines(batch: BatchResult) -> Iterator[str]:
    """The lines that GitHub reads from standard output; their paths are those of the checkout."""
    from safe_exec.reports.batch import github

    return github.annotations(batch, _checkout("GITHUB_WORKSPACE"))


def _checkout(variable: str) -> Path | None:
    value = os.environ.get(variable)
    return Path(value) if value else None
