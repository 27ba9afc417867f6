"""Of what a notebook does to processes, the agent tells only what concerns the kernel itself."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from safe_exec.agent import line_coverage, own_actions

# The agent has no types.
OwnActions: Any = own_actions.OwnActions
NO_COVERAGE: Any = line_coverage.NoCoverage()

KERNEL, PARENT = os.getpid(), os.getppid()
GROUP = os.getpgrp()


def agent(*, child: bool = False) -> Any:
    told: list[dict[str, Any]] = []
    page = SimpleNamespace(pid=KERNEL, cell=4)
    inside = SimpleNamespace(
        child=child,
        page=page,
        told=told,
        frames=lambda _frame, _limit: [("f", 1, "cell", 4)],
        coverage=NO_COVERAGE,
    )
    inside.fact_of_any = lambda **fields: told.append(fields)
    inside.fact = inside.fact_of_any
    return inside


def told(event: str, *args: Any, child: bool = False) -> list[dict[str, Any]]:
    inside = agent(child=child)
    OwnActions(inside).note(event, args, sys._getframe())
    return list(inside.told)


@pytest.mark.parametrize(
    ("event", "args", "target"),
    [
        ("os.kill", (KERNEL, 9), "process"),
        ("os.kill", (0, 15), "group"),
        ("os.kill", (-GROUP, 15), "group"),
        ("os.kill", (-1, 15), "everybody"),
        ("os.kill", (PARENT, 9), "parent"),
        ("os.killpg", (GROUP, 15), "group"),
        ("os.killpg", (0, 15), "group"),
        ("signal.pthread_kill", (1234, 10), "process"),
        ("os.kill", (KERNEL, 0), None),  # only asks whether it is there
        ("os.kill", (1 << 22, 15), None),  # a child, say
        ("os.killpg", (1 << 22, 15), None),
    ],
)
def test_signals(event: str, args: tuple[int, int], target: str | None) -> None:
    assert [fact["target"] for fact in told(event, *args)] == ([target] if target else [])


def test_a_forked_child_tells_of_the_kernel_alone() -> None:
    (fact,) = told("os.kill", KERNEL, 15, child=True)
    assert (fact["child"], fact["target"]) == (True, "process")
    assert told("os.kill", PARENT, 15, child=True) == []
    assert told("resource.setrlimit", 7, (1, 2), child=True) == []
    assert told("os.exec", "/bin/true", ["true"], None, child=True) == []


def test_limits_are_told_with_their_soft_value() -> None:
    (fact,) = told("resource.setrlimit", 7, (64, 128))
    assert (fact["number"], fact["value"]) == (7, 64)
    assert told("resource.prlimit", 0, 7, (64, 128))
    assert told("resource.prlimit", 0, 7, None) == []
    assert told("resource.prlimit", 1 << 22, 7, (64, 128)) == []


@pytest.mark.parametrize(
    ("event", "args", "action"),
    [
        ("os.system", ("kill -9 5",), "program"),
        ("os.system", (b"pkill python",), "program"),
        ("os.system", ("echo skilled",), None),
        ("subprocess.Popen", ("kill", ["kill", "-9", "5"], None, None), "program"),
        ("subprocess.Popen", (None, ["sleep", "9"], None, None), None),
        ("os.exec", ("/bin/sleep", ["sleep", "9"], None), "exec"),
        ("ctypes.dlsym", (None, "kill"), "symbol"),
        ("ctypes.dlsym", (None, "strlen"), None),
    ],
)
def test_programs(event: str, args: tuple[Any, ...], action: str | None) -> None:
    assert [fact["action"] for fact in told(event, *args)] == ([action] if action else [])


def test_trace_functions_are_told_when_they_change() -> None:
    inside = agent()
    actions = OwnActions(inside)
    # Coverage or a debugger of the tests may have one on.
    actions.tracing = tuple(
        name
        for name, on in (("sys.settrace", sys.gettrace()), ("sys.setprofile", sys.getprofile()))
        if on
    )
    actions.begin_cell()
    assert inside.told == []
    before = sys.getprofile()
    sys.setprofile(lambda *_: None)
    try:
        actions.begin_cell()
    finally:
        sys.setprofile(before)
    assert "sys.setprofile" in inside.told[-1]["tracing"]
    for _ in range(80):
        actions.note("sys.settrace", (), sys._getframe())
    assert len(inside.told) < 60
