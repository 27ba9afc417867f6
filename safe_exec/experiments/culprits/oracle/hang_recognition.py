"""Compares a running trial with the known hang (``hang.HangPicture``).

A cell that is only slow may look the same. So a trial whose hang was recognised runs on beside the
next trial, if the machine has room for both (``hang_runs.py``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from safe_exec.diagnosis.verdict import without_plumbing
from safe_exec.experiments.culprits.oracle.hang import (
    HangPicture,
    line_in,
    seconds_until_recognised,
)
from safe_exec.experiments.culprits.oracle.running_trial import RunningTrial
from safe_exec.experiments.culprits.oracle.subject import Subject
from safe_exec.model.evidence import ActivityObservation
from safe_exec.trial.request import HangRecognition


class HangWatch:
    """Recognises the known hang in one trial, and decides whether that trial continues."""

    def __init__(self, cell: int, has_room: Callable[[], bool]) -> None:
        self._cell, self._has_room = cell, has_room
        self._recognised = asyncio.Event()
        self._observation: ActivityObservation | None = None

    def recognition(self, subject: Subject) -> HangRecognition | None:
        """Return how a trial recognises the hang; ``None`` if it has to run to the end."""
        picture, seconds = subject.hang, recognition_seconds(subject)
        if picture is None or seconds is None:
            return None
        cell = self._cell

        def is_known(observation: ActivityObservation, node: Any) -> bool:
            stack = without_plumbing(observation.stack)
            return HangPicture.of_observation(observation, stack, cell, node) == picture

        return HangRecognition(cell=cell, is_known=is_known, seconds=seconds, goes_on=self._goes_on)

    async def is_continuing(self, run: RunningTrial) -> bool:
        """Wait for the end of a trial or for its hang; tell whether it hangs and continues."""
        recognised = asyncio.create_task(self._recognised.wait())
        try:
            await asyncio.wait({run.task, recognised}, return_when=asyncio.FIRST_COMPLETED)
        except BaseException:
            await run.end()
            raise
        finally:
            recognised.cancel()
        return not run.task.done() and self._observation is not None

    def line(self) -> int | None:
        """Return the line at which the cell hangs; ``None`` if the stack does not show it."""
        if self._observation is None:
            return None
        return line_in(without_plumbing(self._observation.stack), self._cell)

    def _goes_on(self, observation: ActivityObservation) -> bool:
        if not self._has_room():
            return False
        self._observation = observation
        self._recognised.set()
        return True


def recognition_seconds(subject: Subject) -> float | None:
    """Return how long a trial takes to recognise the hang; ``None`` if it cannot."""
    return None if subject.hang is None else seconds_until_recognised(subject.crash_timeout())
