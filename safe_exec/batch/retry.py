"""Decide which failures are tried again.

A retry helps if the failure may have come from outside the notebook: a busy machine, a signal, a
slow server. Exceptions, crashes, endless loops and the notebook's own limits happen again.
"""

from __future__ import annotations

from safe_exec.model.verdict import Activity, CauseKind, Status, Verdict

ALWAYS = frozenset({CauseKind.KILLED, CauseKind.TERMINATED})
"""Causes that are signals from outside, with no limit of this run behind them."""

# The runner's clock starts a moment before the kernel does, so the measured wait is a little
# shorter than the limit.
NEARLY = 0.95
"""The share of the start timeout from which a start counts as timed out."""

TIMES = frozenset({CauseKind.CELL_TIMEOUT, CauseKind.NOTEBOOK_TIMEOUT, CauseKind.UNRESPONSIVE})
# A resource that kept the notebook waiting may answer next time. A computation does not get faster.
WAITING = frozenset(
    {Activity.SLEEPING, Activity.WAITING_IO, Activity.WAITING_LOCK, Activity.WAITING_CHILD}
)
"""Activities whose time limit may hold on the next run."""

ELSEWHERE = frozenset({"ran out in", "marked by"})
"""Names of facts that attribute an out-of-memory kill to the machine or to a parent cgroup."""


def is_transient(verdict: Verdict) -> bool:
    """Return whether another run may succeed."""
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
        # The notebook's own limit kills it again; memory that others used may be free next time.
        return any(fact.fact in ELSEWHERE for fact in cause.evidence)
    return cause.kind in ALWAYS


def _ran_out_of_time_to_start(verdict: Verdict) -> bool:
    # A kernel that is not installed, or that exits while starting, does so on every attempt. Only a
    # start that ran out of time is tried again.
    facts = (
        {fact.fact: fact.value for fact in verdict.cause.evidence}
        if verdict.cause is not None
        else {}
    )
    waited, allowed = facts.get("seconds waited"), verdict.limits.start_timeout
    in_time = not isinstance(waited, int | float) or allowed is None or waited < NEARLY * allowed
    return not in_time and "ended with" not in facts
