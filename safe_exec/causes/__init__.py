"""From evidence to cause: pure rules, one file per family, asked in order. A new rule is a function and one line in the list here."""

from __future__ import annotations

from safe_exec.causes import crashes, errors, exits, isolation, limits, memory, network, start, time
from safe_exec.causes.context import Context, Rule
from safe_exec.model import Cancelled, Cause, Passed

__all__ = ["RULES", "Context", "Rule", "find_cause"]

RULES: tuple[Rule, ...] = (
    start.start_failed,
    start.internal,
    # What we did ourselves, and what the system counted, before what a signal may mean.
    memory.watchdog_kill,
    memory.worker_kill,
    time.cpu_time,
    memory.oom_kill,
    memory.oomd_kill,
    limits.output_flood,
    limits.processes_watched,
    limits.disk_watched,
    limits.file_too_large_signal,
    limits.bad_system_call,
    limits.aborted_for_descriptors,
    # Deaths.
    crashes.stack_overflow,
    crashes.fault,
    exits.supervisor_killed,
    exits.asked_to_exit,
    exits.exited,
    exits.signalled,
    # Time.
    time.flood,
    time.replaced,
    time.waits_for_input,
    time.mute,
    time.timed_out,
    # Errors of cells.
    memory.refused,
    network.blocked,
    isolation.taken_away,
    limits.raised,
    errors.stdin,
    errors.exception,
    errors.unknown,
)
"""The first rule that knows the answer gives it."""


def find_cause(context: Context) -> Cause | None:
    """The cause of a trial's ending; ``None`` for one that passed or was cancelled."""
    if isinstance(context.ending, Passed | Cancelled):
        return None
    for rule in RULES:
        cause = rule(context)
        if cause is not None:
            return cause
    return None
