"""Drives a pure search, written as a generator, with a function that answers its queries.

A search yields a query and expects the answer from ``send``. It returns its result. Because it does
no work of its own, unit tests can answer from a table, and the number of queries can be asserted.
Pure; imports no other module of safe-exec.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator
from typing import TypeVar

_Query = TypeVar("_Query")
_Answer = TypeVar("_Answer")
_Result = TypeVar("_Result")


async def drive(
    search: Generator[_Query, _Answer, _Result],
    answer: Callable[[_Query], Awaitable[_Answer]],
    *,
    cancellation: Callable[[], BaseException | None] = lambda: None,
) -> _Result:
    """Answer the queries of ``search`` until it returns its result.

    After each answer ``cancellation`` is called. If it returns an exception, the answer is dropped
    and the exception is thrown into the search, which then returns the best result so far.
    """
    try:
        query = next(search)
        while True:
            reply = await answer(query)
            # A run that a signal cut short says nothing about the query: discard its answer.
            interruption = cancellation()
            query = search.send(reply) if interruption is None else search.throw(interruption)
    except StopIteration as stop:
        result: _Result = stop.value
        return result
