"""Collects the notebook's actions on the kernel's own process that bear on the end of a trial."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from safe_exec.model.evidence import OwnAction
from safe_exec.trial.kill_command import kill_command

if TYPE_CHECKING:
    from safe_exec.trial.state import TrialState


def actions(state: TrialState) -> tuple[OwnAction, ...]:
    """Return the notebook's own actions; after a timeout, only those before the interrupt."""
    facts = state.session.agent_facts
    actions = facts.own_actions.all(facts.index_of, facts.frames)
    return tuple(
        action
        for action in actions
        if state.observed_at is None or action.time <= state.observed_at
    )


def command(state: TrialState) -> tuple[int, str] | None:
    """Return number (from 1) and text of the running cell's first line that sends a signal.

    ``None`` if the kernel has not died, or for Python code, whose calls the agent reports.
    """
    if state.current is None or not state.session.died.is_set():
        return None
    return kill_command(
        state.request.node.cells[state.current].source, python=state.session.instrumented
    )


def memory_maps(pid: int) -> tuple[int, int] | None:
    """Return the number of the process's memory maps, and the limit (vm.max_map_count)."""
    try:
        allowed = int(Path("/proc/sys/vm/max_map_count").read_text())
        with open(f"/proc/{pid}/maps", "rb") as maps:
            return sum(1 for _ in maps), allowed
    except (OSError, ValueError):
        return None


def overcommit() -> int | None:
    """Return vm.overcommit_memory: 0 heuristic, 1 always, 2 never more than there is."""
    try:
        return int(Path("/proc/sys/vm/overcommit_memory").read_text())
    except (OSError, ValueError):
        return None
