"""Keeps trials running after their hang was recognised, so that their end can confirm it.

A hang is confirmed by a run up to the cell's timeout. A trial that is left running when its hang is
recognised is such a run, and the search need not wait for another one from the beginning.
"""

from __future__ import annotations

import asyncio
from collections.abc import Hashable

from msgspec import Struct

from safe_exec.trial.request import Cancellation, TrialRequest, TrialResult

# How often a signal to us is looked for.
LOOK_SECONDS = 0.1


class HangRun(Struct, frozen=True, kw_only=True):
    """A trial that continues.

    ``crash`` is the index of the crash cell if the trial runs a notebook other than the original.
    """

    task: asyncio.Task[TrialResult]
    request: TrialRequest
    crash: int | None


class HangRuns:
    """The trials that continue: at most one of each kind. ``close()`` ends them."""

    def __init__(self, cancellation: Cancellation) -> None:
        self._cancellation = cancellation
        self._runs: dict[str, tuple[Hashable, HangRun]] = {}

    def has(self, key: Hashable) -> bool:
        """Tell whether a trial of these cells was left running."""
        return any(key == other for other, _ in self._runs.values())

    async def add(self, kind: str, key: Hashable, run: HangRun) -> None:
        """Leave a trial running, and end the previous one of its kind."""
        replaced_run = self._runs.pop(kind, None)
        self._runs[kind] = key, run
        if replaced_run is not None:
            await end(replaced_run[1].task)

    async def end_of(self, key: Hashable) -> HangRun | None:
        """Wait until the trial of these cells ends.

        Returns ``None`` if there is no such trial, or after a signal.
        """
        kind = next((kind for kind, (other, _) in self._runs.items() if other == key), None)
        if kind is None:
            return None
        _, run = self._runs.pop(kind)
        return run if await is_done(run.task, self._cancellation) else None

    async def close(self) -> None:
        """End all trials."""
        runs = [run for _, run in self._runs.values()]
        self._runs.clear()
        for run in runs:
            await end(run.task)


async def is_done(task: asyncio.Task[TrialResult], cancellation: Cancellation) -> bool:
    """Wait until a trial is over; false if a signal ended it."""
    try:
        # Signals are told to the trial that began last.
        while not task.done() and not cancellation.signals:
            await asyncio.wait({task}, timeout=LOOK_SECONDS)
    finally:
        if not task.done():
            await end(task)
    return not task.cancelled()


async def end(task: asyncio.Task[TrialResult]) -> None:
    """Cancel a trial: it kills its processes."""
    task.cancel()
    await asyncio.wait({task})
