"""The wording that the reports on a batch share, from one word to a few lines per notebook."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from safe_exec.model.verdict import Status, Verdict
from safe_exec.reports.batch.results import NOT_RUN, REFUSED, UNCHANGED, BatchResult, NotebookResult
from safe_exec.reports.text import common, culprits, memory, native, profile
from safe_exec.reports.verdict_json import from_document
from safe_exec.units import format_seconds

SOURCE_WIDTH = 160
MOST_DIFFERENCES = 5
SAME = "passed before, and nothing it depends on has changed"
# Another program may have overwritten the verdict since it was written.
UNREADABLE = "its verdict cannot be read any more"


class Outcome(StrEnum):
    """The outcome of a notebook in the terms of test reports.

    ``error`` means that the notebook's own code was not to blame.
    """

    PASSED = "passed"
    FAILED = "failed"
    ERROR = "error"
    SKIPPED = "skipped"


_OUTCOMES: dict[str, Outcome] = {
    Status.PASSED: Outcome.PASSED,
    Status.CELL_ERROR: Outcome.FAILED,
    Status.KERNEL_DIED: Outcome.FAILED,
    Status.TIMEOUT: Outcome.FAILED,
    Status.LIMIT_EXCEEDED: Outcome.FAILED,
    Status.START_FAILED: Outcome.ERROR,
    Status.INTERNAL_ERROR: Outcome.ERROR,
    Status.CANCELLED: Outcome.ERROR,
    REFUSED: Outcome.ERROR,
    UNCHANGED: Outcome.SKIPPED,
    NOT_RUN: Outcome.SKIPPED,
}
_WORDS = {REFUSED: "refused", UNCHANGED: "unchanged", NOT_RUN: "not run"}


class NotebookReport(Struct, frozen=True, kw_only=True):
    """The result of a notebook, with its verdict if that can be read."""

    result: NotebookResult
    verdict: Verdict | None

    @classmethod
    def of(cls, result: NotebookResult) -> NotebookReport:
        """Read the verdict of a result."""
        # Read on demand: no report needs two verdicts at once.
        document = result.document()
        try:
            verdict = None if document is None else from_document(document)
        except (
            ValueError
        ):  # of another version of safe-exec, which wrote it before a batch was resumed
            verdict = None
        return cls(result=result, verdict=verdict)

    @property
    def outcome(self) -> Outcome:
        """The outcome in the terms of test reports."""
        return outcome(self.result)


def outcome(result: NotebookResult) -> Outcome:
    """Return the outcome of a result in the terms of test reports."""
    return _OUTCOMES[result.status]


def status_words(status: str) -> str:
    """Return a status in words: ``kernel died``, ``not run``."""
    return _WORDS.get(status) or common.status_words(Status(status))


def kind(report: NotebookReport) -> str:
    """Return a name for scripts: the kind of the cause, or the status if there is no cause."""
    cause = report.verdict.cause if report.verdict is not None else None
    return cause.kind.value if cause is not None else report.result.status


def cause_words(report: NotebookReport) -> str:
    """Return the cause in a few words (``out of memory``), or ""."""
    cause = report.verdict.cause if report.verdict is not None else None
    return common.kind_words(cause) if cause is not None else ""


def headline(report: NotebookReport) -> str:
    """Return the outcome of a notebook in one line."""
    result = report.result
    if report.verdict is not None:
        return common.headline(report.verdict)
    reason = _missing_verdict_reason(result)
    return common.clip(
        common.SEPARATOR.join(
            part for part in (status_words(result.status), common.single_line(reason)) if part
        ),
        common.HEADLINE_WIDTH,
    )


def _missing_verdict_reason(result: NotebookResult) -> str:
    return result.error or (
        SAME if result.status == UNCHANGED else UNREADABLE if result.verdict is not None else ""
    )


def flaky_words(result: NotebookResult) -> str:
    """Return a note if the notebook is flaky, else ""."""
    return f"flaky: passed at attempt {result.attempts} after it had failed" if result.flaky else ""


def lines(report: NotebookReport, batch: BatchResult) -> Iterator[str]:
    """Yield the essential lines: headline, location, culprits, cause, evidence, next step."""
    yield headline(report)
    verdict = report.verdict
    if report.result.flaky:
        yield flaky_words(report.result)
    if verdict is None or report.outcome is Outcome.PASSED:
        return
    # Location before cause: most readers recognise the problem when they see the line.
    yield from _place(verdict)
    holder = memory.largest_holder(verdict)
    if holder:
        yield holder
    yield from _culprits(verdict)
    if verdict.cause is not None:
        if not common.headline_has_summary(verdict):
            yield f"why: {common.single_line(verdict.cause.summary)}"
        if time := profile.summary(verdict):
            yield f"time: {time}"
        if function := native.summary(verdict):
            yield f"native: {function}"
        for title, difference in common.difference_blocks(verdict, MOST_DIFFERENCES):
            yield f"differs: {title}"
            yield from (f"  {line}" for line in difference)
        yield from (f"evidence: {line}" for line in common.evidence_lines(verdict))
        if verdict.cause.advice:
            yield f"next: {common.single_line(verdict.cause.advice)}"
    yield from _further_failures(verdict)
    yield from (f"warning: {common.single_line(warning)}" for warning in verdict.warnings)
    yield f"reproduce: {reproduce_command(report, batch)}"


def _further_failures(verdict: Verdict) -> Iterator[str]:
    """Yield the failures after the first one, and the cells that could not run because of them."""
    for other in verdict.each_failure()[1:]:
        yield from _other_failure(other)
    yield from (f"skipped: {reason}" for reason in common.skipped_reasons(verdict))


def _other_failure(verdict: Verdict) -> Iterator[str]:
    yield f"also: {common.headline(verdict)}"
    yield from _place(verdict)
    yield from _culprits(verdict)
    if verdict.cause is not None and not common.headline_has_summary(verdict):
        yield f"why: {common.single_line(verdict.cause.summary)}"


def failure_lines(report: NotebookReport) -> Iterator[str]:
    """Yield the essential lines of a further failure."""
    if report.verdict is not None:
        yield from _other_failure(report.verdict)


def each_failure(report: NotebookReport) -> list[NotebookReport]:
    """Return one report for each failure of a run with ``--keep-going``."""
    if report.verdict is None:
        return [report]
    return [replace(report, verdict=verdict) for verdict in report.verdict.each_failure()]


def place(verdict: Verdict) -> str:
    """Describe the location: ``code cell 7, line 3, running when the kernel was killed``."""
    crash = verdict.crash_cell
    return (
        f"{common.cell_name(crash.code_index)}, {common.moment(verdict)}"
        if crash is not None
        else ""
    )


def _place(verdict: Verdict) -> Iterator[str]:
    if verdict.crash_cell is None:
        return
    yield f"{place(verdict)}{':' if verdict.crash_cell.source_line else ''}"
    yield from _code(verdict.crash_cell.source_line)


def _code(source_line: str | None) -> Iterator[str]:
    if source_line:
        yield f"    {common.clip(common.code_line(source_line), SOURCE_WIDTH)}"


def culprits_words(verdict: Verdict) -> str:
    """Name the culprits, or say that there are none; "" without a search."""
    search = verdict.culprits
    if search is None:
        return ""
    parts = (
        f"caused by {culprits.names(search)}" if search.cells else "",
        culprits.outcome(search),
        culprits.figures(search),
    )
    return common.SEPARATOR.join(part for part in parts if part)


def _culprits(verdict: Verdict) -> Iterator[str]:
    if verdict.culprits is not None:
        yield culprits_words(verdict)
    others = culprits.others(verdict)
    for culprit in others[: culprits.MOST_SHOWN]:
        yield f"  {common.cell_name(culprit.code_index)} ({culprit.role.value}): {culprits.note(culprit)}"
        yield from _code(culprit.source_line)
    if len(others) > culprits.MOST_SHOWN:
        yield f"  and {len(others) - culprits.MOST_SHOWN} more"


def reproduce_command(report: NotebookReport, batch: BatchResult) -> str:
    """Return the shell command that reproduces the failure, for the directory of the batch."""
    result = report.result
    if result.repro is None:
        return (
            f"safe-exec replay {_shell_argument(result.verdict, batch)}"
            if result.verdict is not None
            else ""
        )
    ran_in = Path(report.verdict.cwd) if report.verdict is not None else result.source.parent
    # Cells open files relative to the directory where the notebook ran.
    cwd_option = "" if result.repro.parent == ran_in else f" --cwd {_shell_argument(ran_in, batch)}"
    return f"safe-exec run {_shell_argument(result.repro, batch)}{cwd_option}"


def _shell_argument(path: Path, batch: BatchResult) -> str:
    argument = relative(path, batch.root)
    # "./" keeps a file name that starts with "-" from being an option.
    return common.code_line(shlex.quote(f"./{argument}" if argument.startswith("-") else argument))


def relative(path: Path, base: Path) -> str:
    """Return ``path`` relative to ``base`` if it lies below it, else the whole path."""
    relative_path = os.path.relpath(path, base)
    # A path with many ".." is harder to read than a whole one.
    return (
        str(path.absolute())
        if relative_path == os.pardir or relative_path.startswith(f"{os.pardir}{os.sep}")
        else relative_path
    )


def tally(batch: BatchResult) -> str:
    """Return the counts of a batch: ``3 failed · 1 error · 36 passed · 2 skipped · 1m 20s``."""
    counts = Counter(map(outcome, batch.results))
    flaky = sum(result.flaky for result in batch.results)
    parts = [
        f"{counts[Outcome.FAILED]} failed" if counts[Outcome.FAILED] else "",
        common.counted(counts[Outcome.ERROR], "error") if counts[Outcome.ERROR] else "",
        f"{counts[Outcome.PASSED]} passed" if counts[Outcome.PASSED] else "",
        f"{counts[Outcome.SKIPPED]} skipped" if counts[Outcome.SKIPPED] else "",
        f"{flaky} flaky" if flaky else "",
        "" if batch.results else "no notebooks",
        format_seconds(batch.seconds),
    ]
    return common.SEPARATOR.join(word for word in parts if word)


def in_short(report: NotebookReport) -> str:
    """Return location and cause, for a table column beside the status."""
    if report.outcome is Outcome.PASSED:
        return flaky_words(report.result)
    if report.verdict is None:
        return common.single_line(_missing_verdict_reason(report.result))
    crash = report.verdict.crash_cell
    cell = common.cell_name(crash.code_index) if crash is not None else ""
    return common.SEPARATOR.join(part for part in (cell, cause_words(report)) if part)
