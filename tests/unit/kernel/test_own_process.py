"""What is read of a kernel's own process, and what it tells of itself, is parsed and bounded."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safe_exec.kernel.own_actions import OwnActions
from safe_exec.kernel.process_changes import ProcessChanges, parse
from safe_exec.trial.kill_command import kill_command

LIMITS = """Limit                     Soft Limit           Hard Limit           Units
Max cpu time              unlimited            unlimited            seconds
Max file size             1048576              unlimited            bytes
Max open files            1024                 4096                 files
Max address space         2000000000           unlimited            bytes
Max nice priority         0                    0
"""


def test_the_limits_of_a_process() -> None:
    assert parse(LIMITS) == {
        "RLIMIT_CPU": None,
        "RLIMIT_FSIZE": 1048576,
        "RLIMIT_NOFILE": 1024,
        "RLIMIT_AS": 2000000000,
    }


def test_changes_of_a_real_process() -> None:
    # os.read: a buffer would take what the other program is to read.
    code = "import os; os.write(1, b'1\\n'); os.read(0, 3); os.execvp('cat', ['cat', '-u'])"
    argv = [sys.executable, "-c", code]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None and child.stdout is not None
        child.stdout.readline()
        changes = ProcessChanges(child.pid)
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        before = resource.prlimit(child.pid, resource.RLIMIT_NOFILE, (55, hard))[0]
        changes.note()
        assert [(c.name, c.initial_value, c.current_value) for c in changes.limits()] == [
            ("RLIMIT_NOFILE", before, 55)
        ]
        executed = changes.executed
        assert executed is None
        child.stdin.write("go\n")
        child.stdin.flush()
        child.stdin.write("hello\n")
        child.stdin.flush()
        assert child.stdout.readline() == "hello\n"  # the other program answers
        changes.note()
        assert changes.executed == "cat -u"
        child.kill()
    changes.note()
    assert changes.executed == "cat -u"
    assert len(changes.limits()) == 1


def test_told_actions_have_cells_and_names() -> None:
    actions = OwnActions()
    fact = {
        "action": "limit",
        "call": "resource.setrlimit",
        "number": int(resource.RLIMIT_NOFILE),
        "value": 64,
        "at": 1.5,
        "cell": 2,
    }
    actions.take(fact, [("f", 3, "cell", 2)])
    (action,) = actions.all(lambda number: number + 10, lambda _rows: ())
    assert (action.limit, action.value, action.cell, action.time) == ("RLIMIT_NOFILE", 64, 12, 1.5)


values = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.lists(st.integers(), max_size=2)
)


@given(st.fixed_dictionaries({"action": st.sampled_from(["signal", "limit", "lock", "x"]), "at": st.floats(), "cell": st.integers()},
       optional={"call": values, "number": values, "value": values, "target": values, "child": values}))  # fmt: skip
def test_any_claim_is_bounded(fact: dict[str, Any]) -> None:
    actions = OwnActions()
    for _ in range(100):
        with contextlib.suppress(
            KeyError, TypeError, ValueError, OverflowError
        ):  # as whoever reads the facts does
            actions.take(fact, [])
    found = actions.all(lambda _number: None, lambda _rows: ())
    assert len(found) <= 60
    assert all(a.target in (None, "process", "group", "everybody", "parent") for a in found)


@pytest.mark.parametrize(
    ("source", "python", "found"),
    [
        ("%%bash\necho x\nkill -9 $PPID", True, (3, "kill -9 $PPID")),
        ("%%bash\n# kill it\necho skill", True, None),
        ("kill = 3\nprint(kill)", True, None),
        ("x=1\nkill $PPID", False, (2, "kill $PPID")),
        ("tools::pskill(Sys.getpid(), 9)", False, (1, "tools::pskill(Sys.getpid(), 9)")),
        ("", True, None),
    ],
)
def test_a_command_that_kills(source: str, python: bool, found: tuple[int, str] | None) -> None:
    assert kill_command(source, python=python) == found


def test_this_process_has_not_changed() -> None:
    changes = ProcessChanges(os.getpid())
    changes.note()
    assert (changes.limits(), changes.executed) == ((), None)
