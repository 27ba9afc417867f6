"""Exceptions without any further cause, and endings that no other rule explains."""

from __future__ import annotations

from safe_exec.diagnosis.context import Context, alive, exit_facts, inside, make
from safe_exec.model.ending import CellFailed
from safe_exec.model.verdict import Cause, CauseKind, Confidence, Fact


def stdin(context: Context) -> Cause | None:
    """A cell asked for input: ``input()``, ``getpass()`` and debuggers are refused."""
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
        "Take the value from a file, an environment variable or a parameter instead of "
        "input() or getpass()."
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
    """A cell raised an exception. The kernel is alive, since an exception does not kill it."""
    error = context.evidence.error
    if not isinstance(context.ending, CellFailed) or error is None:
        return None
    # The traceback is in the notebook; a summary holds one line.
    first = error.evalue.strip().split("\n", 1)[0][:200]
    summary = (
        ": ".join(part for part in (error.ename, first) if part)
        or "the cell raised an error without a name"
    )
    # Bash says its exit status and nothing else.
    if not error.ename:
        summary = f"the cell failed: {first}" if first else "the cell failed"
    # Certain is that a reply was an error and that the kernel lived; what the error says is the
    # kernel's word.
    raised_fact = inside("raised", f"{error.ename}: {error.evalue}"[:300], "the cell's error")
    facts = (raised_fact, alive("after the error"), *_printed(context))
    advice = (
        "The kernel is fine; fix the cell, tag it raises-exception if the error is meant, "
        "or pass --allow-errors."
    )
    return make(context, CauseKind.EXCEPTION, summary, Confidence.CERTAIN, facts, advice)


def _printed(context: Context) -> tuple[Fact, ...]:
    """Return the last line that a failed program printed; its exit status alone says nothing."""
    error = context.evidence.error
    if error is None or error.ename != "CalledProcessError":
        return ()
    lines = [line.strip() for line in context.evidence.last_words.splitlines() if line.strip()]
    return (inside("printed last", lines[-1][:300], "the cell's output"),) if lines else ()


def unknown(context: Context) -> Cause | None:
    """No other rule explains the ending."""
    summary = "no rule explains how the run ended; only the evidence is known"
    return make(context, CauseKind.UNKNOWN, summary, Confidence.GUESS, exit_facts(context.evidence))
