"""A crowd of runnable threads gets a nice value when it keeps us waiting, and nobody else ever does."""

from __future__ import annotations

import os
import subprocess
import sys

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
