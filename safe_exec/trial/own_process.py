"""What the notebook did to the kernel's own process, as far as it bears on the end of a trial. May import kernel, state, model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from safe_exec.model.evidence import OwnAction
from safe_exec.trial.kill_command import kill_command

if TYPE_CHECKING:
    from safe_exec.trial.state import TrialState


def actions(state: TrialState) -> tuple[OwnAction, ...]:
    """What the notebook did to its process; after a timeout only what came before our interrupt."""
    facts = state.session.agent_facts
    actions = facts.own_actions.all(facts.index_of, facts.frames)
    return tuple(
        action
        for action in actions
        if state.observed_at is None or action.time <= state.observed_at
    )


def command(state: TrialState) -> tuple[int, str] | None:
    """The line of the cell that a dead kernel ran, if it sends a signal and is no Python."""
    if state.current is None or not state.session.died.is_set():
        return None
    return kill_command(
        state.request.node.cells[state.current].source, python=state.session.instrumented
    )


def memory_maps(pid: int) -> tuple[int, int] | None:
    """The memory maps that a process has, and how many the system allows each process (vm.max_map_count)."""
    try:
        allowed = int(Path("/proc/sys/vm/max_map_count").read_text())
        with open(f"/proc/{pid}/maps", "rb") as maps:
            return sum(1 for _ in maps), allowed
    except (OSError, ValueError):
        return None


def overcommit() -> int | None:
    """How the system grants memory (vm.overcommit_memory): 0 by a rule of thumb, 1 always, 2 as much as there is."""
    try:
        return int(Path("/proc/sys/vm/overcommit_memory").read_text())
    except (OSError, ValueError):
        return None
