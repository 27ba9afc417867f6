"""Adds events in earlier cells that may explain a failure in a later one."""

from __future__ import annotations

from msgspec.structs import replace

from safe_exec.diagnosis.context import Context, outside
from safe_exec.model.ending import CellFailed, Died, TimedOut
from safe_exec.model.limits import LimitName
from safe_exec.model.verdict import Cause, Fact


def with_killed_workers(context: Context, cause: Cause) -> Cause:
    """Add processes that were killed for memory in earlier cells to a cause.

    They may explain a missing result, or a pool that waits forever. Whether they do is unknown, so
    neither the kind nor the confidence changes.
    """
    kills = context.evidence.oom_kills_earlier
    if not kills or not isinstance(context.ending, CellFailed | TimedOut | Died):
        return cause
    cell_names = " and ".join(context.human(cell) for cell, _ in kills)
    number = sum(count for _, count in kills)
    subject, verb, possessive = (
        ("a process", "was", "its") if number == 1 else (f"{number} processes", "were", "their")
    )
    facts: tuple[Fact, ...] = tuple(
        outside(
            f"killed by the system in {context.human(cell)}",
            count,
            "oom_kill of the sandbox's control group",
        )
        for cell, count in kills
    )
    # A limit of a container or of the machine struck, and raising our own does not move it.
    by_other_limit = context.evidence.oom_elsewhere or context.evidence.oomd_killed
    more = "" if by_other_limit else context.if_limited(LimitName.MEMORY, ", or raise --memory")
    return replace(
        cause,
        summary=f"{cause.summary}; earlier, {subject} that the notebook had started {verb} "
        f"killed for memory in {cell_names}",
        evidence=(*cause.evidence, *facts),
        advice=f"Look at {cell_names} first: {possessive} result is missing. Use fewer or "
        f"smaller workers there{more}. {cause.advice}",
    )
