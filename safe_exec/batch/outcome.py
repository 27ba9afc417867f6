"""What a batch comes to: the worst exit code, and one line for scripts. Pure; imports model and the entries of reports."""

from __future__ import annotations

from collections.abc import Iterable

from safe_exec.model.verdict import Status
from safe_exec.reports.batch.results import NOT_RUN, REFUSED, UNCHANGED, BatchResult, NotebookResult

REFUSED_CODE = 2
SEVERITY = (
    Status.PASSED.exit_code,
    Status.CELL_ERROR.exit_code,
    Status.LIMIT_EXCEEDED.exit_code,
    Status.TIMEOUT.exit_code,
    Status.KERNEL_DIED.exit_code,
    Status.START_FAILED.exit_code,
    REFUSED_CODE,
    Status.INTERNAL_ERROR.exit_code,
    Status.CANCELLED.exit_code,
)
"""Exit codes from good to bad: first what a notebook did, then that it could not be tried, that we failed, that we were stopped."""

STATUSES = (*(str(status) for status in Status), REFUSED, UNCHANGED, NOT_RUN)
"""The statuses of a batch's notebooks."""


def worst(codes: Iterable[int]) -> int:
    """The worst exit code; 0 for none."""
    return max(codes, key=SEVERITY.index, default=0)


def exit_code(results: Iterable[NotebookResult], *, cancelled: bool) -> int:
    """The exit code of a batch. What was not run, or needed not be, has none."""
    if cancelled:
        return Status.CANCELLED.exit_code
    return worst(result.exit_code for result in results if result.exit_code is not None)


def counts_in_order(results: Iterable[NotebookResult]) -> dict[str, int]:
    """How many of each status, in the order of :data:`STATUSES`, without those that do not occur."""
    every = [result.status for result in results]
    return {status: every.count(status) for status in STATUSES if status in every}


def summary_line(batch: BatchResult) -> str:
    """``batch: 40 notebooks: 38 passed (1 flaky), 1 cell_error, 1 kernel_died in 12.3 s; exit code 3``."""
    flaky = sum(result.flaky for result in batch.results)
    parts = []
    for status, count in counts_in_order(batch.results).items():
        note = f" ({flaky} flaky)" if flaky and status == Status.PASSED else ""
        parts.append(f"{count} {status}{note}")
    count = len(batch.results)
    total = f"{count} notebook{'' if count == 1 else 's'}"
    breakdown = f": {', '.join(parts)}" if parts else ""
    return f"batch: {total}{breakdown} in {batch.seconds:.1f} s; exit code {batch.exit_code}"
