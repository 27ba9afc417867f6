"""Masks and signals of real processes: our own, and children that lead a group or do not."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from safe_exec.keeper import procfs
from tests.support import wait_until

WAITING = "import sys\nprint('ready', flush=True)\nsys.stdin.read()"


def test_an_ignored_signal_is_seen() -> None:
    code = f"import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n{WAITING}"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        assert procfs.ignores(child.pid, signal.SIGINT) is True
        assert procfs.ignores(child.pid, signal.SIGTERM) is False
        assert procfs.catches(child.pid, signal.SIGTERM) is False
        child.kill()
    assert procfs.ignores(child.pid, signal.SIGINT) is None


@pytest.mark.parametrize("leads", [True, False])
def test_a_signal_reaches_the_group_of_its_leader_only(leads: bool) -> None:
    """A process that leads no group is signalled alone: here the group would be that of the tests."""
    child = "import subprocess, sys; p = subprocess.Popen(['sleep', '60'])\nprint(p.pid, flush=True)\nsys.exit(-p.wait())"
    with subprocess.Popen(
        [sys.executable, "-c", child], start_new_session=leads, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        grandchild = int(parent.stdout.readline())
        procfs.signal_group(parent.pid, signal.SIGTERM)
        assert parent.wait(30) == -signal.SIGTERM
        if leads:
            wait_until(lambda: not lives(grandchild), 30, "the grandchild ended")
        assert lives(grandchild) is not leads
        procfs.signal_one(grandchild, signal.SIGKILL)


def lives(pid: int) -> bool:
    stat = procfs.stat(pid)
    return stat is not None and stat.state not in "ZX"


def test_the_spared_child_outlives_the_others() -> None:
    start = "[subprocess.Popen(['sleep', '60']) for _ in range(3)]"
    code = f"import subprocess\nchildren = {start}\nprint(*(c.pid for c in children), flush=True)"
    with subprocess.Popen(
        [sys.executable, "-c", f"{code}\n{WAITING}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        spared = pids[1]
        left = procfs.kill_descendants(
            parent.pid, deadline=time.monotonic() + 20, reap=lambda: True, spared=spared
        )
        states = {pid: procfs.stat(pid) for pid in pids}
        assert left == []
        assert [(s is not None and s.state not in "ZX") for s in states.values()] == [
            *(False, True, False)
        ]
        procfs.signal_one(spared, signal.SIGKILL)
        parent.kill()
