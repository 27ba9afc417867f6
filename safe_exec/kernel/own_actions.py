"""The kernel's reports of actions on its own process (agent/own_actions.py).

They are claims; their values are bounded here.
"""

from __future__ import annotations

import resource
from collections import deque
from collections.abc import Callable
from typing import Any

from msgspec.structs import replace

from safe_exec.model.evidence import Frame, OwnAction

MOST_ACTIONS = 60
LONGEST_TEXT = 300
MOST_NAMES = 8
ACTIONS = frozenset({"signal", "limit", "trace", "exec", "program", "symbol", "lock"})
TARGETS = frozenset({"process", "group", "everybody", "parent"})
# By number; RLIMIT_OFILE is an old name of RLIMIT_NOFILE.
LIMIT_NAMES = {
    getattr(resource, name): name
    for name in dir(resource)
    if name.startswith("RLIMIT_") and name != "RLIMIT_OFILE"
}

Rows = list[tuple[str, int, str, int]]


class OwnActions:
    """The last reported actions, and the trace functions active when a cell began."""

    def __init__(self) -> None:
        self._reported: deque[tuple[OwnAction, int, Rows]] = deque(maxlen=MOST_ACTIONS)
        self.tracing: tuple[str, ...] = ()

    def take(self, fact: dict[str, Any], rows: Rows) -> None:
        """Add an action. Raises KeyError, TypeError, ValueError or OverflowError if invalid."""
        # The last actions are kept, since the one before a death matters.
        if fact["action"] in ACTIONS:
            self._reported.append((_action(fact), int(fact["cell"]), rows))

    def forget(self, number: int) -> None:
        """Forget the actions of one cell, whose effects are undone."""
        others = [action for action in self._reported if action[1] != number]
        self._reported = deque(others, maxlen=MOST_ACTIONS)

    def take_tracing(self, fact: dict[str, Any]) -> None:
        """Record the active trace functions."""
        self.tracing = tuple(str(name)[:LONGEST_TEXT] for name in fact["tracing"][:MOST_NAMES])

    def all(
        self, index_of: Callable[[int], int | None], frames: Callable[[Rows], tuple[Frame, ...]]
    ) -> tuple[OwnAction, ...]:
        """Return every reported action, oldest first, with cell indexes."""
        return tuple(
            replace(action, cell=index_of(number), stack=frames(rows))
            for action, number, rows in self._reported
        )


def _action(fact: dict[str, Any]) -> OwnAction:
    """Parse an action; ``all`` adds its cell and stack."""
    kind, number, value = str(fact["action"]), _integer(fact.get("number")), fact.get("value")
    target = str(fact.get("target"))
    return OwnAction(
        kind=kind,
        call=str(fact.get("call", ""))[:LONGEST_TEXT],
        time=float(fact["at"]),
        target=target if target in TARGETS else None,
        signal=number if kind == "signal" else None,
        limit=LIMIT_NAMES.get(number) if kind == "limit" and number is not None else None,
        value=_integer(value) if kind == "limit" else None,
        text=value[:LONGEST_TEXT] if isinstance(value, str) else "",
        child=bool(fact.get("child")),
    )


def _integer(value: Any) -> int | None:
    # bool is a subclass of int. The bound excludes numbers that no system call can take.
    return (
        value
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 64
        else None
    )
