"""Trials that go on after their hang was recognised, with tasks in place of trials."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from safe_exec.experiments.culprits.oracle.hang_runs import HangRuns
from safe_exec.experiments.culprits.oracle.running_trial import RunningTrial
from safe_exec.trial.request import Cancellation


def run_of(task: asyncio.Task[Any]) -> RunningTrial:
    """A run whose request is not looked at."""
    return RunningTrial(task=task, request=cast("Any", None))


async def forever() -> None:
    await asyncio.Event().wait()


async def result() -> str:
    return "the end"


def test_the_end_of_a_run_is_awaited_once() -> None:
    async def main() -> None:
        runs = HangRuns(Cancellation())
        await runs.add("cells", 1, run_of(asyncio.create_task(result())))
        assert runs.has(1) and not runs.has(2)
        assert await runs.end_of(2) is None
        run = await runs.end_of(1)
        assert run is not None and run.task.result() == cast("Any", "the end")
        assert await runs.end_of(1) is None and not runs.has(1)

    asyncio.run(main())


def test_a_later_run_of_its_kind_replaces_one() -> None:
    async def main() -> None:
        runs = HangRuns(Cancellation())
        tasks = [asyncio.create_task(forever()) for _ in range(3)]
        await runs.add("cells", 1, run_of(tasks[0]))
        await runs.add("statements", 2, run_of(tasks[1]))
        await runs.add("cells", 3, run_of(tasks[2]))
        assert [task.cancelled() for task in tasks] == [True, False, False]
        assert [runs.has(key) for key in (1, 2, 3)] == [False, True, True]
        await runs.close()
        assert all(task.cancelled() for task in tasks)

    asyncio.run(main())


def test_a_signal_ends_a_run_that_is_awaited() -> None:
    async def main() -> None:
        cancellation = Cancellation()
        runs = HangRuns(cancellation)
        task = asyncio.create_task(forever())
        await runs.add("cells", 1, run_of(task))
        asyncio.get_running_loop().call_soon(cancellation.arrive, 2)
        assert await runs.end_of(1) is None
        assert task.cancelled()

    asyncio.run(main())
