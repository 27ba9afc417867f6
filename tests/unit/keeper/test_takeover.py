"""The keeper spares a snapshot, believes no process number from inside, and gives one up in time."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest

from safe_exec.keeper import procfs, takeover


@pytest.fixture
def sleepers() -> Iterator[list[subprocess.Popen[bytes]]]:
    processes = [subprocess.Popen(["sleep", "600"]) for _ in range(2)]
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def test_only_a_descendant_is_spared(sleepers: list[subprocess.Popen[bytes]]) -> None:
    pid = sleepers[0].pid
    assert takeover.survivors(pid, os.getpid()) == {pid}
    for number in (0, -1, 1, os.getppid()):
        assert takeover.survivors(number, os.getpid()) == frozenset()
    assert pid not in takeover.survivors(pid, sleepers[1].pid)


def test_processes_between_keeper_and_snapshot_are_spared() -> None:
    with subprocess.Popen(
        ["sh", "-c", "sleep 600 & echo $!; wait"], stdout=subprocess.PIPE
    ) as shell:
        assert shell.stdout is not None
        pid = int(shell.stdout.readline())
        try:
            assert takeover.survivors(pid, os.getpid()) == {pid, shell.pid}
        finally:
            os.kill(pid, signal.SIGKILL)


def test_a_dead_process_is_not_spared(sleepers: list[subprocess.Popen[bytes]]) -> None:
    process = sleepers[0]
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert takeover.survivors(process.pid, os.getpid()) == frozenset()


def test_all_others_are_killed(sleepers: list[subprocess.Popen[bytes]]) -> None:
    spared, other = (process.pid for process in sleepers)
    # The shells and sleeps of this test alone: pytest-xdist has no children of its own here.
    others = frozenset(procfs.descendants(os.getpid())) - {other}
    takeover.kill_all_but(others, os.getpid(), deadline=time.monotonic() + 20, reap=lambda: True)
    assert not takeover.is_alive(other) and takeover.is_alive(spared)


def test_a_snapshot_with_much_memory_of_its_own_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    limit, own = 1 << 30, {"bytes": takeover.LEAST_OWN_BYTES}
    looks: list[int] = []

    def own_bytes(pid: int) -> int:
        looks.append(pid)
        return own["bytes"]

    monkeypatch.setattr(takeover, "own_bytes", own_bytes)
    memory = takeover.OwnMemory()
    assert not memory.is_too_much(7, 0.90, limit)
    own["bytes"] = limit // 10
    # No look before the use has grown by a step; another snapshot is looked at at once.
    assert not memory.is_too_much(7, 0.90 + takeover.STEP_SHARE / 2, limit) and looks == [7]
    assert memory.is_too_much(7, 0.90 + takeover.STEP_SHARE, limit)
    assert memory.is_too_much(8, 0.90, limit)


def test_unreadable_memory_counts_as_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(takeover, "own_bytes", lambda _pid: None)
    assert takeover.OwnMemory().is_too_much(7, 0.9, 1 << 30)
    assert takeover.own_bytes(os.getpid()) is None


def test_own_memory_is_read_from_the_system() -> None:
    before = takeover.own_bytes(os.getpid())
    data = bytearray(b"x") * (64 << 20)
    after = takeover.own_bytes(os.getpid())
    assert before is not None and after is not None
    assert after - before > len(data) * 0.9
