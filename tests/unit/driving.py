"""Drives a search with a function that answers at once, without an event loop."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TypeVar

from safe_exec.experiments.driver import drive

_Query = TypeVar("_Query")
_Answer = TypeVar("_Answer")
_Result = TypeVar("_Result")


def drive_sync(
    search: Generator[_Query, _Answer, _Result], answer: Callable[[_Query], _Answer]
) -> _Result:
    """The result of a search whose queries ``answer`` answers."""

    async def answer_at_once(query: _Query) -> _Answer:
        return answer(query)

    # Nothing in the coroutine ever waits, so one step runs it to its end.
    coroutine = drive(search, answer_at_once)
    try:
        coroutine.send(None)
    except StopIteration as stop:
        result: _Result = stop.value
        return result
    coroutine.close()
    raise AssertionError("the driver waited for something")
