"""The rules that find the cause from the evidence: pure functions, one file per family.

The rules are asked in order, and the first answer counts. A new cause is a word of ``CauseKind``
(``model.verdict``), a function in the file of its family, and a line in RULES.
"""

from __future__ import annotations

from safe_exec.diagnosis.context import Context, Rule
from safe_exec.diagnosis.rules import (
    cpu_time,
    crashes,
    disk,
    earlier,
    engines,
    exceptions,
    exits,
    isolation,
    limits,
    memory,
    network,
    own_actions,
    refusals,
    startup,
    timeouts,
)
from safe_exec.model.ending import Cancelled, Passed
from safe_exec.model.verdict import Cause

__all__ = ["RULES", "Context", "Rule", "find_cause"]

# The first rule that knows the answer gives it.
RULES: tuple[Rule, ...] = (
    startup.start_failed,
    startup.internal,
    # What we did ourselves, and what the system counted, before what a signal may mean.
    memory.watchdog_kill,
    memory.worker_kill,
    cpu_time.cpu_time,
    memory.oom_kill,
    memory.oomd_kill,
    limits.output_flood,
    limits.processes_watched,
    limits.disk_watched,
    limits.file_too_large_signal,
    limits.bad_system_call,
    limits.aborted_for_descriptors,
    refusals.died_without_threads,
    refusals.died_of_memory_error,
    # Deaths.
    crashes.stack_overflow,
    crashes.unreported_overflow,
    disk.bus_error,
    engines.aborted,
    crashes.fault,
    exits.supervisor_killed,
    exits.asked_to_exit,
    exits.exited,
    exits.signalled,
    # Time.
    timeouts.flood,
    timeouts.replaced,
    timeouts.processes_exhausted,
    timeouts.waits_for_input,
    timeouts.unresponsive,
    timeouts.timed_out,
    # Errors of cells.
    engines.own_limit,
    refusals.parser,
    refusals.memory_maps,
    memory.refused,
    refusals.inotify,
    # A file that the kernel itself has locked is not out of its reach.
    refusals.locked,
    network.blocked,
    isolation.refused_access,
    disk.full,
    limits.raised,
    refusals.threads,
    refusals.descriptors,
    memory.refused_to_program,
    exceptions.stdin,
    exceptions.exception,
    exceptions.outputs_differ,
    exceptions.unknown,
)


def find_cause(context: Context) -> Cause | None:
    """Return the cause of a trial's ending; ``None`` for a trial that passed or was cancelled."""
    if isinstance(context.ending, Passed | Cancelled):
        return None
    for rule in RULES:
        # The order matters: an observation of what we did ourselves precedes every interpretation.
        cause = rule(context)
        if cause is not None:
            return earlier.with_killed_workers(
                context, own_actions.with_own_actions(context, cause)
            )
    return None
