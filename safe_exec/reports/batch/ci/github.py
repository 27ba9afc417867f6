"""Report a batch to GitHub Actions: annotations on standard output, and a summary in markdown.

GitHub shows about ten annotations per step, so each failed notebook gets one, and the summary lists
all of them. A summary of more than a megabyte is rejected, so this one stops before.
"""

import html
from collections.abc import Iterator, Sequence
from pathlib import Path

from safe_exec.model.verdict import Verdict
from safe_exec.reports.batch import text as batch_text
from safe_exec.reports.batch.results import BatchResult, NotebookResult
from safe_exec.reports.batch.source_map import file_line
from safe_exec.reports.batch.text import NotebookReport, Outcome
from safe_exec.reports.text import common, culprits
from safe_exec.reports.text.markdown import code_span, fenced, inert
from safe_exec.units import format_seconds, format_size

SHOWN_PER_STEP = 10
MOST_BYTES = 1000 * 1000
"""The largest summary; GitHub accepts 1 MiB per step, and other commands may add to it."""

_SIGNS = {Outcome.PASSED: "✅", Outcome.FAILED: "❌", Outcome.ERROR: "⛔", Outcome.SKIPPED: "⏭️"}
_ORDER = (Outcome.FAILED, Outcome.ERROR, Outcome.PASSED, Outcome.SKIPPED)
_BAD = (Outcome.FAILED, Outcome.ERROR)


def bad(batch: BatchResult) -> list[NotebookResult]:
    """Return the notebooks that failed, in order."""
    return [result for result in batch.results if batch_text.outcome(result) in _BAD]


# --- annotations ----------------------------------------------------------------------------


def annotations(batch: BatchResult, base: Path | None = None) -> Iterator[str]:
    """Yield an error for each failed notebook and a warning for each flaky one.

    Paths are relative to ``base``, the checkout.
    """
    root = base or batch.root
    failed = bad(batch)
    count = 0
    for result in failed:
        for report in batch_text.each_failure(NotebookReport.of(result)):
            count += 1
            yield _error(report, batch, root)
    # Flaky notebooks passed, so they are warnings, after all errors.
    for result in batch.results:
        if result.flaky:
            path = batch_text.relative(result.source, root)
            yield command(
                "warning", batch_text.flaky_words(result), file=path, title="safe-exec: flaky"
            )
    if count > SHOWN_PER_STEP:
        counted = common.counted(len(failed), "notebook")
        failures = "" if count == len(failed) else f", with {count} failures"
        notice = f"{counted} failed{failures}. GitHub shows some {SHOWN_PER_STEP} annotations a step; the summary of the job has them all."
        yield command("notice", notice, title="safe-exec")


def _error(report: NotebookReport, batch: BatchResult, root: Path) -> str:
    headline, *details = batch_text.lines(report, batch)
    message = "\n".join(
        [headline, *(line for line in details if not line.startswith("evidence: "))]
    )
    file, line = batch_text.relative(report.result.source, root), file_line(report) or 1
    cause = batch_text.cause_words(report) or batch_text.status_words(report.result.status)
    return command("error", message, file=file, line=line, title=f"{report.result.path}: {cause}")


def command(name: str, message: str, **properties: str | int) -> str:
    """Return a workflow command, ``::error file=a.ipynb,line=3::message``, on one line."""
    attributes = ",".join(f"{key}={_property(str(value))}" for key, value in properties.items())
    # The format is documented in "Workflow commands for GitHub Actions".
    return f"::{name} {attributes}::{_data(common.printable(message))}"


def _data(text: str) -> str:
    # A line break would end the command, so it is percent-encoded.
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(common.printable(text)).replace(":", "%3A").replace(",", "%2C")


# --- the job summary ------------------------------------------------------------------------


def summary(batch: BatchResult) -> str:
    """Return the batch in GitHub's markdown: a table, and details of each failed notebook."""
    head = f"### {_sign(batch)} safe-exec: {inert(batch_text.tally(batch))}\n\n"
    parts, room = (
        [head],
        MOST_BYTES - len(head.encode()) - 200,
    )  # for the two lines that say what was left out
    for pieces, section in ((_table(batch), "notebooks"), (_details(batch), "details")):
        left_out = 0
        for piece in pieces:
            # Whole entries are left out: cut markdown could swallow the rest of the summary.
            room -= len(piece.encode())
            if room < 0:
                left_out += 1
            else:
                parts.append(piece)
        parts.append(
            f"\n*{left_out} more {section} did not fit here; the HTML report has them all.*\n\n"
            if left_out
            else "\n"
        )
    return "".join(parts)


def _sign(batch: BatchResult) -> str:
    return _SIGNS[Outcome.FAILED if bad(batch) else Outcome.PASSED]


def _table(batch: BatchResult) -> Iterator[str]:
    yield "| | notebook | what happened | time | memory peak |\n| --- | --- | --- | ---: | ---: |\n"
    for result in sorted(
        batch.results, key=lambda result: _ORDER.index(batch_text.outcome(result))
    ):
        report = NotebookReport.of(result)
        peak = report.verdict.usage.memory_peak if report.verdict is not None else None
        cells = (
            _SIGNS[report.outcome],
            inert(result.path),
            inert(
                common.SEPARATOR.join(
                    part
                    for part in (
                        batch_text.status_words(result.status),
                        batch_text.in_short(report),
                    )
                    if part
                )
            ),
            format_seconds(result.seconds) if result.seconds is not None else "",
            format_size(peak) if peak is not None else "",
        )
        yield f"| {' | '.join(cells)} |\n"


def _details(batch: BatchResult) -> Iterator[str]:
    for result in bad(batch):
        report = NotebookReport.of(result)
        if report.verdict is not None:
            yield "\n\n".join([*_detail(report, report.verdict, batch), "</details>\n\n"])


def _detail(report: NotebookReport, verdict: Verdict, batch: BatchResult) -> Iterator[str]:
    # The blank line after it makes the following text markdown again (CommonMark 4.6).
    # HTML here, because markdown is not interpreted inside a summary element.
    title = f"{report.result.path}: {batch_text.headline(report)}"
    yield f"<details><summary>{_SIGNS[report.outcome]} {html.escape(common.single_line(title))}</summary>"
    yield from _cells(verdict)
    if verdict.cause is not None:
        yield f"**Why:** {inert(verdict.cause.summary)}"
        yield "\n".join(f"- {inert(line)}" for line in common.evidence_lines(verdict))
        yield f"**Next:** {inert(verdict.cause.advice)}" if verdict.cause.advice else ""
    yield f"**Reproduce:** {code_span(batch_text.reproduce_command(report, batch))}"
    for other in verdict.each_failure()[1:]:
        yield from _other_failure(other)
    yield "\n".join(f"- {inert(line)}" for line in common.skipped_reasons(verdict))


def _cells(verdict: Verdict) -> Iterator[str]:
    """Yield the crash cell and the culprits."""
    if verdict.crash_cell is not None:
        yield f"**Where:** {inert(batch_text.place(verdict))}"
        yield from _block([verdict.crash_cell.source_line or ""])
    if verdict.culprits is not None:
        yield f"**Culprits:** {inert(batch_text.culprits_words(verdict))}"
        yield "\n".join(_culprits(verdict))


def _other_failure(verdict: Verdict) -> Iterator[str]:
    yield f"**Also: {inert(common.headline(verdict))}**"
    yield from _cells(verdict)
    if verdict.cause is not None:
        yield f"**Why:** {inert(verdict.cause.summary)}"


def _block(lines: Sequence[str]) -> Iterator[str]:
    code = "\n".join(
        common.clip(common.code_line(line), batch_text.SOURCE_WIDTH) for line in lines if line
    )
    if code:
        yield fenced(code)


def _culprits(verdict: Verdict) -> Iterator[str]:
    others = culprits.others(verdict)
    for culprit in others[: culprits.MOST_SHOWN]:
        code = common.clip(common.code_line(culprit.source_line or ""), batch_text.SOURCE_WIDTH)
        source = f": {code_span(code)}" if code else ""
        yield f"- {common.cell_name(culprit.code_index)} ({culprit.role.value}), {inert(culprits.note(culprit))}{source}"
    if len(others) > culprits.MOST_SHOWN:
        yield f"- and {len(others) - culprits.MOST_SHOWN} more"
