"""The frame to which the sampling thread charges time and memory."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from safe_exec.agent import sampler

# The agent has no types.
running: Any = sampler.running


def caught(call: Callable[[], int]) -> list[tuple[str, str]]:
    """The innermost function and the charged one, at the events ``call`` and ``line``."""
    pairs: list[tuple[str, str]] = []

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if event in ("call", "line"):
            charged = running(frame)
            pairs.append((f"{event} {frame.f_code.co_name}", charged.f_code.co_name))
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return pairs


def inner() -> int:
    return 1


def outer() -> int:
    return inner()


def on_one_line() -> int: return 1  # fmt: skip


def test_a_function_that_was_only_entered_ran_nothing_yet() -> None:
    pairs = caught(outer)
    assert ("call inner", "outer") in pairs
    assert ("line inner", "inner") in pairs


def test_a_body_on_the_first_line_runs() -> None:
    assert ("line on_one_line", "on_one_line") in caught(on_one_line)


def test_a_module_has_no_caller_among_the_cells() -> None:
    code = compile("frames.append(running(sys._getframe()))", "cell", "exec")
    frames: list[FrameType] = []
    exec(code, {"frames": frames, "running": running, "sys": sys})
    assert frames[0].f_code is code
