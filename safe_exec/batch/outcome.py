"""Compute the outcome of a batch: the worst exit code, and one line for scripts."""

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
"""Exit codes from good to bad.

First come the outcomes of notebooks, then input that could not be run, then failures of safe-exec
itself, then an interruption by the user.
"""

STATUSES = (*(str(status) for status in Status), REFUSED, UNCHANGED, NOT_RUN)
"""Every status that a notebook of a batch can have."""


def worst(codes: Iterable[int]) -> int:
    """Return the worst exit code, or 0 if there are none."""
    # The position in SEVERITY counts: the codes themselves are not in order of severity.
    return max(codes, key=SEVERITY.index, default=0)


def exit_code(results: Iterable[NotebookResult], *, cancelled: bool) -> int:
    """Return the exit code of a batch; notebooks that did not run are not considered."""
    # A batch that the user stopped says nothing about the notebooks that did not run.
    if cancelled:
        return Status.CANCELLED.exit_code
    return worst(result.exit_code for result in results if result.exit_code is not None)


def counts_in_order(results: Iterable[NotebookResult]) -> dict[str, int]:
    """Count the statuses that occur, in the order of ``STATUSES``."""
    every = [result.status for result in results]
    return {status: every.count(status) for status in STATUSES if status in every}


def summary_line(batch: BatchResult) -> str:
    """Return the last line of output, which scripts read.

    ``batch: 40 notebooks: 38 passed (1 flaky), 1 cell_error, 1 kernel_died in 12.3 s; exit code 3``
    """
    flaky = sum(result.flaky for result in batch.results)
    parts = []
    for status, count in counts_in_order(batch.results).items():
        note = f" ({flaky} flaky)" if flaky and status == Status.PASSED else ""
        parts.append(f"{count} {status}{note}")
    count = len(batch.results)
    total = f"{count} notebook{'' if count == 1 else 's'}"
    breakdown = f": {', '.join(parts)}" if parts else ""
    return f"batch: {total}{breakdown} in {batch.seconds:.1f} s; exit code {batch.exit_code}"
