"""A trial that runs while the search goes on."""

from __future__ import annotations

import asyncio

from msgspec import Struct

from safe_exec.trial.request import Cancellation, TrialRequest, TrialResult

# How often a signal to us is looked for.
LOOK_SECONDS = 0.1


class RunningTrial(Struct, frozen=True, kw_only=True):
    """A trial as a task.

    ``crash`` is the index of the crash cell if the trial runs a notebook other than the original.
    """

    task: asyncio.Task[TrialResult]
    request: TrialRequest
    crash: int | None = None

    async def is_done(self, cancellation: Cancellation) -> bool:
        """Wait until the trial is over; false if a signal ended it."""
        try:
            # Signals are told to the trial that began last.
            while not self.task.done() and not cancellation.signals:
                await asyncio.wait({self.task}, timeout=LOOK_SECONDS)
        finally:
            if not self.task.done():
                await self.end()
        return not self.task.cancelled()

    async def end(self) -> None:
        """Cancel the trial: it kills its processes."""
        self.task.cancel()
        await asyncio.wait({self.task})
