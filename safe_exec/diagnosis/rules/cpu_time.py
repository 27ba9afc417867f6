"""Processor time that ran out: our limit, or one of the notebook."""

from __future__ import annotations

import signal

from safe_exec.diagnosis.context import Context, exit_facts, make, outside
from safe_exec.model.ending import Died, TerminationReason
from safe_exec.model.verdict import Cause, CauseKind, Confidence
from safe_exec.units import format_seconds

# RLIMIT_CPU is enforced with a granularity of about a second.
TOLERANCE_SECONDS = 1.0


def cpu_time(context: Context) -> Cause | None:
    """Recognise an exceeded limit of processor time.

    SIGXCPU, the hard limit behind it, or safe-exec's own check ended the run.
    """
    evidence = context.evidence
    if not isinstance(context.ending, Died):
        return None
    status = evidence.exit
    ours = evidence.termination is TerminationReason.CPU_TIME
    # The soft limit raises SIGXCPU, the hard limit SIGKILL (setrlimit(2)).
    soft = status is not None and status.signal == getattr(signal, "SIGXCPU", -1)
    own_hard = _own_hard_cpu(context)
    if not (ours or soft or own_hard or _hard_cpu(context)):
        return None
    facts = list(exit_facts(evidence))
    # The watchdog counts the whole tree, RLIMIT_CPU the process alone.
    used = evidence.cpu_seconds if ours else evidence.kernel_cpu_seconds
    source = "sum over the sandbox" if ours else "rusage of the kernel process"
    facts.append(outside("processor time", None if used is None else round(used, 2), source))
    limit = context.limits.cpu_time
    own = (
        limit is None
        or own_hard
        or (soft and used is not None and used < limit - TOLERANCE_SECONDS)
    )
    if own:
        summary = (
            "the processor time ran out: the notebook's own code had set a limit "
            "(RLIMIT_CPU), and it struck here"
        )
        advice = "Look for resource.setrlimit(RLIMIT_CPU, ...) in an earlier cell."
    else:
        summary = (
            f"the processor time ran out: {format_seconds(used or 0)} used of "
            f"{format_seconds(limit or 0)}"
        )
        advice = "Compute less, or raise --cpu-time."
    # Only the kernel itself reported the limit that SIGKILL enforced.
    confidence = Confidence.LIKELY if own_hard else Confidence.CERTAIN
    return make(context, CauseKind.CPU_TIME, summary, confidence, tuple(facts), advice)


def _own_hard_cpu(context: Context) -> bool:
    """Tell whether the notebook lowered RLIMIT_CPU, and SIGKILL came as soon as it was used up."""
    # If the soft limit equals the hard one, there is no SIGXCPU (setrlimit(2)).
    evidence = context.evidence
    used = evidence.kernel_cpu_seconds
    own_limits = [
        action.value
        for action in evidence.own_actions
        if action.kind == "limit" and action.limit == "RLIMIT_CPU" and not action.child
    ]
    if (
        not own_limits
        or own_limits[-1] is None
        or used is None
        or evidence.exit is None
        or evidence.exit.signal != signal.SIGKILL
        or evidence.termination is not None
        or evidence.oom_kills_cell
    ):
        return False
    # The system counts whole ticks and checks at each of them.
    return own_limits[-1] - TOLERANCE_SECONDS <= used <= own_limits[-1] + 1


def _hard_cpu(context: Context) -> bool:
    """Tell whether the hard limit of RLIMIT_CPU killed a process that ignored SIGXCPU."""
    evidence, limit = context.evidence, context.limits.cpu_time
    if (
        evidence.exit is None
        or evidence.exit.signal != signal.SIGKILL
        or limit is None
        or evidence.oom_kills_cell
    ):
        return False
    return evidence.kernel_cpu_seconds is not None and evidence.kernel_cpu_seconds >= limit
