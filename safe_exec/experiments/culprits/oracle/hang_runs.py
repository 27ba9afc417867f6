"""Keeps trials running after their hang was recognised, so that their end can confirm it.

A hang is confirmed by a run up to the cell's timeout. A trial that is left running when its hang is
recognised is such a run, and the search need not wait for another one from the beginning.
"""

from __future__ import annotations

from collections.abc import Hashable

from safe_exec.experiments.culprits.oracle.running_trial import RunningTrial
from safe_exec.trial.request import Cancellation


class HangRuns:
    """The trials that continue: at most one of each kind. ``close()`` ends them."""

    def __init__(self, cancellation: Cancellation) -> None:
        self._cancellation = cancellation
        self._runs: dict[str, tuple[Hashable, RunningTrial]] = {}

    def has(self, key: Hashable) -> bool:
        """Tell whether a trial of these cells was left running."""
        return any(key == other for other, _ in self._runs.values())

    async def add(self, kind: str, key: Hashable, run: RunningTrial) -> None:
        """Leave a trial running, and end the previous one of its kind."""
        replaced_run = self._runs.pop(kind, None)
        self._runs[kind] = key, run
        if replaced_run is not None:
            await replaced_run[1].end()

    async def end_of(self, key: Hashable) -> RunningTrial | None:
        """Wait until the trial of these cells ends.

        Returns ``None`` if there is no such trial, or after a signal.
        """
        kind = next((kind for kind, (other, _) in self._runs.items() if other == key), None)
        if kind is None:
            return None
        _, run = self._runs.pop(kind)
        return run if await run.is_done(self._cancellation) else None

    async def close(self) -> None:
        """End all trials."""
        runs = [run for _, run in self._runs.values()]
        self._runs.clear()
        for run in runs:
            await run.end()
