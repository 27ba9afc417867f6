"""When snapshots of an interactive kernel cost too much, and which open files are the kernel's."""

from __future__ import annotations

from typing import Any

import pytest

from safe_exec.agent import restore_points
from safe_exec.agent.restore_points import FIRST_SECONDS, MOST_SHARE, UNNOTICED_SECONDS

# The agent's code carries no types.
Cost: Any = restore_points.Cost
is_of_kernel: Any = restore_points.is_of_kernel
is_own_code: Any = restore_points.is_own_code
HISTORY = "/home/a/.ipython/profile_default/history.sqlite"


def test_short_snapshots_never_count() -> None:
    cost = Cost()
    for _ in range(1000):
        cost.add(UNNOTICED_SECONDS)
    assert not cost.is_too_high()


def test_long_snapshots_count_against_the_time_of_the_cells() -> None:
    cost = Cost()
    cost.add(UNNOTICED_SECONDS + FIRST_SECONDS + 1)
    assert cost.is_too_high()
    cost.cells = 1 / MOST_SHARE
    assert not cost.is_too_high()


def test_the_time_of_the_process_between_counts_once() -> None:
    cost = Cost()
    cost.add_child(UNNOTICED_SECONDS + FIRST_SECONDS)
    cost.add(0.0)
    cost.add(0.0)
    assert cost.snapshots == pytest.approx(FIRST_SECONDS)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (HISTORY, True),
        (HISTORY + "-journal", True),
        ("/home/a/.ipython/profile_default", True),
        ("anon_inode:[eventfd]", True),
        ("anon_inode:[eventpoll]", False),
        ("/home/a/.ipython/profile_default/startup", False),
        ("/home/a/data.csv", False),
    ],
)
def test_files_of_the_kernel(target: str, expected: bool) -> None:
    assert is_of_kernel(target, HISTORY) is expected


def test_without_a_history_no_file_is_its() -> None:
    assert not is_of_kernel("/home/a/data.csv", "")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/usr/lib/python3/site-packages/ipykernel/kernelbase.py", True),
        ("/usr/lib/python3/site-packages/zmq/eventloop/zmqstream.py", True),
        ("/tmp/ipykernel_123/456.py", False),
        ("/usr/lib/python3/asyncio/tasks.py", False),
    ],
)
def test_tasks_of_the_kernel(path: str, expected: bool) -> None:
    assert is_own_code(path) is expected
