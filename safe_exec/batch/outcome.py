"""What a batch comes to: the worst exit code, and one line for scripts. Pure; imports model and the entries of reports."""

from __future__ import annotations

from collections.abc import Iterable

from safe_exec.model.verdict import Status
from safe_exec.reports.batch.results import NOT_RUN, REFUSED, UNCHANGED, Batch, Entry

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


def exit_code(entries: Iterable[Entry], *, cancelled: bool) -> int:
    """The exit code of a batch. What was not run, or needed not be, has none."""
    if cancelled:
        return Status.CANCELLED.exit_code
    return worst(entry.exit_code for entry in entries if entry.exit_code is not None)


def counts_in_order(entries: Iterable[Entry]) -> dict[str, int]:
    """How many of each status, in the order of :data:`STATUSES`, without those that do not occur."""
    every = [entry.status for entry in entries]
    return {status: every.count(status) for status in STATUSES if status in every}


def summary_line(batch: Batch) -> str:
    """``batch: 40 notebooks: 38 passed (1 flaky), 1 cell_error, 1 kernel_died in 12.3 s; exit code 3``."""
    flaky = sum(entry.flaky for entry in batch.entries)
    parts = []
    for status, count in counts_in_order(batch.entries).items():
        note = f" ({flaky} flaky)" if flaky and status == Status.PASSED else ""
        parts.append(f"{count} {status}{note}")
    count = len(batch.entries)
    what = f"{count} notebook{'' if count == 1 else 's'}"
    said = f": {', '.join(parts)}" if parts else ""
    return f"batch: {what}{said} in {batch.seconds:.1f} s; exit code {batch.exit_code}"
