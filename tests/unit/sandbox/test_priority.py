"""A crowd of runnable threads gets a nice value when it keeps us waiting, and nobody else ever does."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safe_exec.sandbox import priority
from safe_exec.sandbox.priority import (
    ALL_WEIGH,
    CROWD,
    LATE_LOOKS,
    LATE_SECONDS,
    MOST_NICE,
    PriorityGuard,
    nice_for,
)
from tests.support import wait_until

CROWDED = """
import os, sys
children = [os.fork() or exec("while True: pass") for _ in range(6)]
print(*children, flush=True)
sys.stdin.read()
for child in children:
    os.kill(child, 9)
"""


SESSIONS = """
import os, sys
children = []
for _ in range(6):
    child = os.fork()
    if child == 0:
        os.setsid()
        while True: pass
    children.append(child)
print(*children, flush=True)
sys.stdin.read()
for child in children:
    os.kill(child, 9)
"""


@given(st.integers(0, 5000), st.integers(1, 128))
def test_a_crowd_weighs_no_more_than_a_few_threads(runnable: int, processors: int) -> None:
    value = nice_for(runnable, processors)
    assert (value > 0) == (runnable > CROWD * processors)
    if 0 < value < MOST_NICE:
        assert runnable / 1.25**value <= ALL_WEIGH * processors < runnable / 1.25 ** (value - 1)


@pytest.mark.parametrize(
    ("delays", "asked"),
    [
        ([0.0] * 9, 0),
        ([LATE_SECONDS * 2, 0.0] * 9, 0),
        ([LATE_SECONDS * 2] * LATE_LOOKS, 1),
        ([LATE_SECONDS * 2] * (3 * LATE_LOOKS), 3),
    ],
    ids=["in time", "now and then", "late", "still late"],
)
def test_it_looks_for_a_crowd_only_when_it_is_late(
    delays: list[float], asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []

    def nobody(root: int) -> list[int]:
        looks.append(root)
        return []

    monkeypatch.setattr(priority, "runnable_threads", nobody)
    guard = PriorityGuard(7, processors=1)
    assert [guard.looked(delay) for delay in delays] == [0] * len(delays)
    assert looks == [7] * asked


def test_real_threads_get_a_nice_value_once_and_nobody_else() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", CROWDED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None and parent.stdin is not None
        children = [int(pid) for pid in parent.stdout.readline().split()]
        nice = os.getpriority(os.PRIO_PROCESS, 0)
        wait_until(
            lambda: set(children) <= set(priority.runnable_threads(os.getpid())),
            30,
            "all of them run",
        )
        guard = PriorityGuard(os.getpid(), processors=1)
        guard.looked(1.0)
        raised = guard.looked(1.0)
        value = nice_for(len(children), 1)
        # Tests that were started with nice(1) have children that are nice enough.
        assert raised >= len(children) if nice < value else raised == 0
        assert {os.getpriority(os.PRIO_PROCESS, pid) for pid in children} == {max(nice, value)}
        assert (
            os.getpriority(os.PRIO_PROCESS, parent.pid)
            == os.getpriority(os.PRIO_PROCESS, 0)
            == nice
        )
        guard.looked(1.0)
        assert guard.looked(1.0) == 0, "they have it already"
        parent.stdin.close()


@pytest.mark.parametrize("autogroups", [True, False])
def test_many_sessions_leave_one_processor_where_each_has_its_own_group(
    autogroups: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(priority, "has_autogroups", lambda: autogroups)
    ours = os.sched_getaffinity(0)
    with subprocess.Popen(
        [sys.executable, "-c", SESSIONS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None and parent.stdin is not None
        children = [int(pid) for pid in parent.stdout.readline().split()]
        wait_until(
            lambda: set(children) <= set(priority.runnable_threads(os.getpid())),
            30,
            "all of them run",
        )
        PriorityGuard(os.getpid(), processors=1).hold_back()
        left = {frozenset(os.sched_getaffinity(child)) for child in children}
        # With one processor there is none to leave.
        others = ours - {min(ours)} or ours
        assert left == {frozenset(others if autogroups else ours)}
        assert os.sched_getaffinity(0) == ours
        parent.stdin.close()


@pytest.mark.parametrize(
    ("runnable", "seconds", "cpu_seconds", "crowd"),
    [
        (90, 0.15, 0.005, 90),
        (90, 0.01, 0.01, None),
        (90, 0.05, 0.02, None),
        (3, 0.5, 0.001, None),
        (90, 1.0, 0.9, None),
    ],
    ids=["starved", "quick", "half of the time", "others took the time", "much to read"],
)
def test_a_crowd_is_told_by_the_time_that_it_leaves_us(
    runnable: int,
    seconds: float,
    cpu_seconds: float,
    crowd: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """``seconds`` and ``cpu_seconds`` are those of one look at the threads."""
    for name, step in (("monotonic", seconds), ("thread_time", cpu_seconds)):
        clock = itertools.count(5.0, step)
        monkeypatch.setattr(time, name, lambda clock=clock: next(clock))
    monkeypatch.setattr(priority, "runnable_threads", lambda _root: list(range(runnable)))
    assert PriorityGuard(7, processors=2).crowd() == crowd
