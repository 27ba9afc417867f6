"""Decide which failures are tried again.

A retry helps if the failure may have come from outside the notebook: a busy machine, a signal, a
slow server. Exceptions, crashes, endless loops and the notebook's own limits happen again, unless
the user names an error as transient (``--retry-on``).
"""

from __future__ import annotations

import re
from functools import partial

from msgspec import Struct
from msgspec.structs import replace

from safe_exec.errors import UsageError
from safe_exec.files import one_line
from safe_exec.model.events import EventSink
from safe_exec.model.verdict import Activity, CauseKind, Status, Verdict
from safe_exec.reports.text.common import headline
from safe_exec.workflows.job import Job
from safe_exec.workflows.prepare import prepare
from safe_exec.workflows.run import OutputListener, run_job

# The number of retries if only a pattern is given.
RETRIES_ON_PATTERN = 2

ALWAYS = frozenset({CauseKind.KILLED, CauseKind.TERMINATED})
"""Causes that are signals from outside and do not result from a limit of the run."""

# The runner's clock starts a moment before the kernel does, so the measured wait is a little
# shorter than the limit.
NEARLY = 0.95
"""A start that took at least this share of its timeout counts as timed out."""

TIMES = frozenset({CauseKind.CELL_TIMEOUT, CauseKind.NOTEBOOK_TIMEOUT, CauseKind.UNRESPONSIVE})
# A resource that kept the notebook waiting may answer next time. A computation does not get faster.
WAITING = frozenset(
    {Activity.SLEEPING, Activity.WAITING_IO, Activity.WAITING_LOCK, Activity.WAITING_CHILD}
)
"""Activities that may end in time on the next run, after a timeout in this one."""

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


# --- the policy of a run --------------------------------------------------------------------------


class RetryPolicy(Struct, frozen=True, kw_only=True):
    """Decides whether a failed notebook runs again: at most ``retries`` times.

    ``pattern`` is searched in the error that failed the notebook (``--retry-on``).
    """

    retries: int = 0
    pattern: re.Pattern[str] | None = None

    def allows(self, verdict: Verdict, attempt: int) -> bool:
        """Tell whether another attempt follows this one; attempts count from 1."""
        return attempt <= self.retries and (is_transient(verdict) or self._matches(verdict))

    def _matches(self, verdict: Verdict) -> bool:
        cause = verdict.cause
        if self.pattern is None or cause is None or verdict.status is Status.CANCELLED:
            return False
        texts = (cause.summary, *(fact.value for fact in cause.evidence))
        return any(isinstance(text, str) and self.pattern.search(text) for text in texts)


def retry_policy(retries: int | None, pattern: str | None, option: str) -> RetryPolicy:
    """Build a policy; with a pattern alone there are two retries. Raises UsageError.

    ``option`` is the name of the pattern's option in errors.
    """
    if pattern is None:
        return RetryPolicy(retries=retries or 0)
    try:
        compiled_pattern = re.compile(pattern)
    except re.error as error:
        raise UsageError(
            f"{option} {one_line(pattern)}: not a regular expression: {error}"
        ) from None
    return RetryPolicy(
        retries=RETRIES_ON_PATTERN if retries is None else retries, pattern=compiled_pattern
    )


async def run_with_retries(
    job: Job,
    policy: RetryPolicy,
    sinks: tuple[EventSink, ...] = (),
    *,
    on_output: OutputListener | None = None,
) -> Verdict:
    """Run a notebook, and again as long as the policy allows it; return the last verdict.

    The job of a further attempt lists the attempts before it. Raises UsageError.
    """
    while True:
        attempt = len(job.earlier_attempts) + 1
        verdict = await run_job(
            prepare(job),
            sinks,
            on_output=on_output,
            worth_a_search=partial(is_last_attempt, policy, attempt),
        )
        if is_last_attempt(policy, attempt, verdict):
            return verdict
        job = after_attempt(job, verdict)


def is_last_attempt(policy: RetryPolicy, attempt: int, verdict: Verdict) -> bool:
    """Tell whether ``attempt``, which ended with ``verdict``, is the last; they count from 1."""
    return not policy.allows(verdict, attempt)


def after_attempt(job: Job, verdict: Verdict) -> Job:
    """Return the job of the next attempt, with ``verdict`` in its list of earlier attempts."""
    return replace(job, earlier_attempts=(*job.earlier_attempts, headline(verdict)))
