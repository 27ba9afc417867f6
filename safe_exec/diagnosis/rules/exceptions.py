"""Exceptions without any further cause, and endings that no other rule explains."""

from __future__ import annotations

import re

from safe_exec.diagnosis.context import Context, alive, exit_facts, inside, make, outside
from safe_exec.model.ending import CellFailed, OutputsDiffer
from safe_exec.model.verdict import Cause, CauseKind, Confidence, Fact

# Cells and kinds of output that the evidence names; the verdict lists all of them.
MOST_DIFFERENCES = 5


def stdin(context: Context) -> Cause | None:
    """Recognise a cell that asked for input.

    ``input()``, ``getpass()`` and debuggers are refused.
    """
    error = context.evidence.error
    if (
        not isinstance(context.ending, CellFailed)
        or error is None
        or error.ename != "StdinNotImplementedError"
    ):
        return None
    facts = (inside("raised", f"{error.ename}: {error.evalue}"[:300], "the cell's error"),)
    summary = "the cell asked for input, and nobody is there to type it"
    advice = (
        "Answer with the lines of a file (--stdin FILE), or take the value from a parameter or "
        "an environment variable instead."
    )
    if error.in_debugger:
        summary = (
            "the cell started a debugger, which asks for input, and nobody is there to type it"
        )
        advice = (
            "Remove set_trace(), breakpoint(), %debug or post_mortem() before the notebook "
            "runs unattended."
        )
    # Only the name of the error says so, and code of the notebook can raise one of that name.
    return make(context, CauseKind.STDIN, summary, Confidence.LIKELY, facts, advice)


def exception(context: Context) -> Cause | None:
    """Recognise a cell that raised an exception; an exception does not kill the kernel."""
    error = context.evidence.error
    if not isinstance(context.ending, CellFailed) or error is None:
        return None
    # The traceback is in the notebook; a summary holds one line.
    first = _first_words(error.evalue)[:200]
    summary = (
        ": ".join(part for part in (error.ename, first) if part)
        or "the cell raised an error without a name"
    )
    # Bash says its exit status and nothing else.
    if not error.ename:
        summary = f"the cell failed: {first}" if first else "the cell failed"
    # It is certain that the reply was an error and that the kernel lived; the text of the error is
    # only the kernel's claim.
    raised_fact = inside("raised", f"{error.ename}: {error.evalue}"[:300], "the cell's error")
    facts = (raised_fact, alive("after the error"), *_printed(context))
    advice = (
        "The kernel is fine; fix the cell, tag it raises-exception if the error is meant, "
        "or pass --allow-errors."
    )
    return make(context, CauseKind.EXCEPTION, summary, Confidence.CERTAIN, facts, advice)


def _first_words(message: str) -> str:
    """Return the first line of a message that holds a letter or digit, or else its first line."""
    # NLTK frames its messages with lines of asterisks.
    lines = message.strip().split("\n")
    return next((line.strip() for line in lines if re.search(r"\w", line)), lines[0])


def _printed(context: Context) -> tuple[Fact, ...]:
    """Return the last line that a failed program printed; its exit status alone says nothing."""
    error = context.evidence.error
    if error is None or error.ename != "CalledProcessError":
        return ()
    lines = [line.strip() for line in context.evidence.last_words.splitlines() if line.strip()]
    return (inside("printed last", lines[-1][:300], "the cell's output"),) if lines else ()


def outputs_differ(context: Context) -> Cause | None:
    """Recognise a run of all cells with outputs that differ from those stored in the notebook."""
    ending = context.ending
    if not isinstance(ending, OutputsDiffer):
        return None
    cells = sorted({difference.index for difference in ending.differences})
    first = ending.differences[0]
    summary = (
        f"the output of {context.human(ending.cell)} differs from the stored one: {first.summary}"
    )
    others = len(cells) - 1
    if others:
        summary += f"; so do {others} other cells" if others > 1 else "; so does another cell"
    facts = tuple(
        outside(
            f"{context.human(difference.index)}, {difference.kind}",
            " / ".join(line for line in difference.lines if line[:1] in "+-")[:300]
            or difference.summary,
            "new outputs against the notebook's file",
        )
        for difference in ending.differences[:MOST_DIFFERENCES]
    )
    advice = (
        "If the new output is right, save the notebook with it. If it changes from run to run, mark "
        "the cell NBVAL_IGNORE_OUTPUT, or allow for the change (--sanitize-with, "
        "--compare-tolerance)."
    )
    return make(context, CauseKind.OUTPUT_DIFFERS, summary, Confidence.CERTAIN, facts, advice)


def unknown(context: Context) -> Cause | None:
    """Return the cause ``unknown``, for an ending that no other rule explains."""
    summary = "no rule explains how the run ended; only the evidence is known"
    return make(context, CauseKind.UNKNOWN, summary, Confidence.GUESS, exit_facts(context.evidence))
