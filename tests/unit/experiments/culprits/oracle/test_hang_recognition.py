"""The look for a known hang while a trial runs, with tasks in place of trials."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from safe_exec.experiments.culprits.oracle.hang import SAME_SECONDS, HangPicture
from safe_exec.experiments.culprits.oracle.hang_recognition import (
    HangWatch,
    recognition_seconds,
)
from safe_exec.experiments.culprits.oracle.running_trial import RunningTrial
from safe_exec.experiments.culprits.oracle.subject import Subject
from safe_exec.model.evidence import ActivityObservation, Frame
from safe_exec.model.limits import Limits
from safe_exec.model.verdict import CauseKind
from safe_exec.trial.request import HangRecognition
from tests.unit.experiments.culprits.oracle.subjects import CRASH, subject

STACK = (Frame(file="", line=1, function="<module>", cell=CRASH),)
OBSERVATION = ActivityObservation(stack=STACK, state="S", cpu_share=0.0, syscall="futex")


def hanging(timeout: float | None = 600.0) -> Subject:
    """A subject whose crash cell hangs as ``OBSERVATION`` shows."""
    limits = Limits(cell_timeout=timeout)
    one = subject(CauseKind.CELL_TIMEOUT, limits=limits)
    picture = HangPicture.of_observation(OBSERVATION, STACK, CRASH, one.node)
    return subject(CauseKind.CELL_TIMEOUT, limits=limits, hang=picture)


def recognition(watch: HangWatch) -> HangRecognition:
    known = watch.recognition(hanging())
    assert known is not None
    return known


def run_of(task: asyncio.Task[Any]) -> RunningTrial:
    return RunningTrial(task=task, request=cast("Any", None))


@pytest.mark.parametrize(
    ("one", "seconds"),
    [(hanging(), SAME_SECONDS), (hanging(1.0), None), (hanging(None), None), (subject(), None)],
)
def test_the_hangs_that_can_be_recognised(one: Subject, seconds: float | None) -> None:
    assert recognition_seconds(one) == seconds
    assert (HangWatch(CRASH, lambda: True).recognition(one) is None) == (seconds is None)


def test_another_picture_is_not_known() -> None:
    known = recognition(HangWatch(CRASH, lambda: True))
    node = hanging().node
    assert known.is_known(OBSERVATION, node)
    node.cells[CRASH].source = "another"
    assert not known.is_known(OBSERVATION, node)


def test_a_trial_continues_if_there_is_room() -> None:
    async def main() -> None:
        watch = HangWatch(CRASH, lambda: True)
        run = run_of(asyncio.create_task(asyncio.Event().wait()))
        goes_on = recognition(watch).goes_on
        asyncio.get_running_loop().call_soon(goes_on, OBSERVATION)
        assert await watch.is_continuing(run)
        assert watch.line() == 1
        await run.end()

    asyncio.run(main())


def test_a_trial_ends_if_there_is_no_room() -> None:
    async def main() -> None:
        watch = HangWatch(CRASH, lambda: False)

        async def trial() -> None:
            assert not recognition(watch).goes_on(OBSERVATION)

        run = run_of(asyncio.create_task(trial()))
        assert not await watch.is_continuing(run)
        run.task.result()
        assert watch.line() is None

    asyncio.run(main())


def test_a_search_that_is_cancelled_ends_its_trial() -> None:
    async def main() -> None:
        trial = run_of(asyncio.create_task(asyncio.Event().wait()))
        watching = asyncio.create_task(HangWatch(CRASH, lambda: True).is_continuing(trial))
        await asyncio.sleep(0)
        watching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await watching
        assert trial.task.cancelled()

    asyncio.run(main())
