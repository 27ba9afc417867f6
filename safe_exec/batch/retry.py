"""Which failures are worth another try. Pure; imports model only.

Another try is for what may have come from around the notebook: the machine was busy, somebody sent a signal, a server kept it waiting. What the
notebook does by itself it does again: an exception, a crash, its own limit, a loop.
"""

from __future__ import annotations

from safe_exec.model.verdict import Activity, CauseKind, Status, Verdict

ALWAYS = frozenset({CauseKind.KILLED, CauseKind.TERMINATED})
"""A signal from outside, with no limit of ours behind it."""

NEARLY = 0.95
"""The runner's clock and the kernel's wait begin a moment apart."""

TIMES = frozenset({CauseKind.CELL_TIMEOUT, CauseKind.NOTEBOOK_TIMEOUT, CauseKind.UNRESPONSIVE})
WAITING = frozenset(
    {Activity.SLEEPING, Activity.WAITING_IO, Activity.WAITING_LOCK, Activity.WAITING_CHILD}
)
"""Out of time while it waited for something: what it waited for may come the next time. What computes does not get faster."""

ELSEWHERE = frozenset({"ran out in", "marked by"})
"""Facts that say of a kill for memory that it was the machine, or a group above the sandbox, that had none left."""


def is_transient(verdict: Verdict) -> bool:
    """Whether a failure can be one that another run does not have."""
    cause = verdict.cause
    if cause is None or verdict.status in (
        Status.PASSED,
        Status.CANCELLED,
        Status.INTERNAL_ERROR,
        Status.CELL_ERROR,
    ):
        return False
    if cause.kind is CauseKind.KERNEL_START_FAILED:
        return _ran_out_of_time_to_start(verdict)
    if cause.kind in TIMES:
        return cause.activity in WAITING
    if cause.kind is CauseKind.OUT_OF_MEMORY:
        return any(fact.fact in ELSEWHERE for fact in cause.evidence)
    return cause.kind in ALWAYS


def _ran_out_of_time_to_start(verdict: Verdict) -> bool:
    """A kernel that is not installed, or that ended by itself while it started, does so again."""
    facts = (
        {fact.fact: fact.value for fact in verdict.cause.evidence}
        if verdict.cause is not None
        else {}
    )
    waited, allowed = facts.get("seconds waited"), verdict.limits.start_timeout
    in_time = not isinstance(waited, int | float) or allowed is None or waited < NEARLY * allowed
    return not in_time and "ended with" not in facts
