"""A trial from scratch that runs beside the forks of a search, so that forks need not wait for it.

Until a run has failed in a fork, it is unknown whether forks can show the failure, and a trial from
scratch decides. At the end of the search, such a trial confirms the culprits. The companion is this
trial. It starts with the first query to the forks. It pauses after the cells that take long, until
the search has decided which other cells to run: the long ones need not run again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence

from safe_exec.trial.request import TrialRequest, TrialResult

# Cells before the crash cell that take less time together may as well run again.
LEAST_SECONDS = 1.0
# A cell that takes this share of their time takes long.
LONG_SHARE = 0.1


def first_to_wait(cells: Sequence[int], seconds: Mapping[int, float]) -> int:
    """Return the index of the first cell that has to wait for a decision.

    ``cells`` are those of the first query, the crash cell last.
    """
    *earlier_cells, crash = cells
    total = sum(seconds.get(cell, 0.0) for cell in earlier_cells)
    if total < max(LEAST_SECONDS, seconds.get(crash, 0.0)):
        # Nothing is worth waiting: the answer to the first question is wanted soon.
        return crash + 1
    return 1 + max(c for c in earlier_cells if seconds.get(c, 0.0) >= LONG_SHARE * total)


class Companion:
    """A trial that waits for the search's decisions.

    ``task`` and ``request`` are ``None`` until it begins.
    """

    def __init__(self, cells: Sequence[int], seconds: Mapping[int, float]) -> None:
        self._cells = frozenset(cells)
        self._first_to_wait = first_to_wait(cells, seconds)
        self._decided = asyncio.Event()
        self.task: asyncio.Task[TrialResult] | None = None
        self.request: TrialRequest | None = None

    async def is_wanted(self, index: int) -> bool:
        """Wait until a cell has been decided; return whether to run it."""
        if index >= self._first_to_wait:
            await self._decided.wait()
        return index in self._cells

    def fits(self, cells: Collection[int]) -> bool:
        """Tell whether this trial, as far as it has run, also serves a run of these cells."""
        first = self._first_to_wait
        return {c for c in cells if c < first} == {c for c in self._cells if c < first}

    def decide(self, cells: Collection[int]) -> None:
        """Let the waiting run continue with these cells, for which ``fits`` must hold."""
        self._cells = frozenset(cells)
        self._decided.set()
