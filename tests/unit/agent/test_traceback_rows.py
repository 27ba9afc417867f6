"""The frames of an error as the agent tells them."""

from __future__ import annotations

import sys
from types import CodeType, FrameType, SimpleNamespace
from typing import Any

import pytest

from safe_exec.agent import cells

AGENT: Any = cells
INSIDE = SimpleNamespace(row=lambda code, line: (name_of(code), line))


def name_of(code: CodeType) -> str:
    return code.co_name


def names(error: BaseException) -> list[str]:
    rows: list[tuple[str, int]] = AGENT.traceback_rows(INSIDE, error.__traceback__)
    return [name for name, _line in rows]


def test_a_frame_that_a_trace_function_fails_in_is_told_once() -> None:
    def fails(frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line" and frame.f_code.co_name == "traced":
            raise ValueError(event)
        return fails

    def traced() -> int:
        return 1

    before = sys.gettrace()
    sys.settrace(fails)
    try:
        with pytest.raises(ValueError, match="line") as caught:
            traced()
    finally:
        sys.settrace(before)
    assert names(caught.value).count("traced") == 1


def test_each_call_of_a_recursion_is_told() -> None:
    def walk(steps: int) -> None:
        if steps == 0:
            raise ValueError(steps)
        walk(steps - 1)

    with pytest.raises(ValueError, match="0") as caught:
        walk(3)
    assert names(caught.value).count("walk") == 4
