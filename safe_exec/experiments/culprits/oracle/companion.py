"""A trial from scratch that runs beside the forks of a search, so that forks need not wait for it.

Until a run has failed in a fork, it is unknown whether forks can show the failure, and a trial from
scratch decides. At the end of the search, such a trial confirms the culprits. The companion is this
trial. It starts with the first query to the forks. It pauses after the cells that take long, until
the search has decided which other cells to run: the long ones need not run again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence

from msgspec.structs import replace

from safe_exec.experiments.culprits.oracle.running_trial import RunningTrial
from safe_exec.experiments.culprits.oracle.spare_kernel import SpareKernel
from safe_exec.experiments.culprits.oracle.subject import Subject
from safe_exec.experiments.culprits.oracle.trial_requests import request_of
from safe_exec.experiments.culprits.protocol import Query

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
    """The cells of a companion, and the decision that it waits for."""

    def __init__(self, cells: Sequence[int], seconds: Mapping[int, float]) -> None:
        self._cells = frozenset(cells)
        self._first_to_wait = first_to_wait(cells, seconds)
        self._decided = asyncio.Event()

    async def is_wanted(self, index: int) -> bool:
        """Wait until a cell has been decided; return whether to run it."""
        if index >= self._first_to_wait:
            await self._decided.wait()
        return index in self._cells

    def fits(self, cells: Collection[int]) -> bool:
        """Tell whether ``cells`` and this trial's cells agree up to the first one that waits."""
        first = self._first_to_wait
        return {c for c in cells if c < first} == {c for c in self._cells if c < first}

    def decide(self, cells: Collection[int]) -> None:
        """Let the waiting run continue with these cells, for which ``fits`` must hold."""
        self._cells = frozenset(cells)
        self._decided.set()


class Companions:
    """The companions of a search, one at a time. ``close()`` ends the last one."""

    def __init__(self, subject: Subject, spare: SpareKernel) -> None:
        self._subject, self._spare = subject, spare
        self._current: tuple[Companion, RunningTrial] | None = None

    @property
    def is_running(self) -> bool:
        """Whether a companion runs."""
        return self._current is not None

    async def accompany(self, query: Query, *, is_needed: bool) -> None:
        """Begin to run the query's cells from scratch, if the forks' answer may need it."""
        current = self._current
        if current is not None and query.best and not current[0].fits(query.best):
            # The result will be another set.
            await self.close()
        if not is_needed or (current is not None and current[0].fits(query.cells)):
            return
        await self.close()
        if self._spare.has_room():
            self._current = self._begin(query)

    async def take(self, cells: Collection[int]) -> RunningTrial | None:
        """Let the companion run these cells to the end; ``None`` if there is none that can."""
        current, self._current = self._current, None
        if current is None:
            return None
        companion, run = current
        if not companion.fits(cells):
            await run.end()
            return None
        companion.decide(cells)
        return run

    async def close(self) -> None:
        """End the companion."""
        current, self._current = self._current, None
        if current is not None:
            await current[1].end()

    def _begin(self, query: Query) -> tuple[Companion, RunningTrial]:
        started = self._spare.take()
        companion = Companion(query.cells, self._subject.seconds)
        request = replace(
            request_of(self._subject, started.request, query, None),
            cells=None,
            is_wanted=companion.is_wanted,
            before_cells=None,
        )
        task = asyncio.create_task(started.trial.run(request))
        return companion, RunningTrial(task=task, request=request)
