"""Keepers that are forked from one process: as good as those that are started, and nothing stays, whoever is killed."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from safe_exec.keeper import procfs
from safe_exec.model.limits import Isolation, Limits
from safe_exec.sandbox import keeper_process
from safe_exec.sandbox.host.capabilities import detect
from safe_exec.sandbox.keeper_process import ForkServer, new_run_id, runtime_directory
from safe_exec.sandbox.planner import build_plan
from safe_exec.sandbox.sandbox import Sandbox
from tests.support import ROOT, groups_of, wait_until

SECONDS = 30


@contextmanager
def sandbox(program: str) -> Iterator[Sandbox]:
    """A program in a sandbox, of which nothing stays."""
    run_id = new_run_id()
    made = Sandbox(run_id, directory=Path(runtime_directory(run_id)))
    try:
        plan = build_plan(Limits(memory=1 << 30), detect(), run_id, Isolation())
        made.spawn(
            plan, argv=[sys.executable, "-I", "-S", "-c", program], env={}, cwd="/", pass_fds={}
        )
        made.await_kernel()
        yield made
    finally:
        cleanup = made.shutdown()
    assert (cleanup.surviving_pids, cleanup.remaining_paths, groups_of(run_id)) == ((), (), [])
    assert not Path(runtime_directory(run_id)).exists()


def ended_with(made: Sandbox) -> int | None:
    def heard() -> bool:
        if made.exit is None and select.select([made.fileno()], [], [], 0)[0]:
            made.process_messages()
        return made.exit is not None

    wait_until(heard, SECONDS, "the program ended")
    assert made.exit is not None
    return None if made.exit.status is None else made.exit.status.raw


def parent_of(pid: int) -> int:
    found = procfs.stat(pid)
    assert found is not None
    return found.ppid


def fork_server_pid() -> int:
    assert keeper_process._fork_server is not None
    return keeper_process._fork_server[1].pid


def test_keepers_are_forked_within_it_and_started_without() -> None:
    with ForkServer():
        assert keeper_process._fork_server is None, "there is none before one is needed"
        mother = 0
        for _ in range(2):
            with sandbox("import os; os._exit(7)") as made:
                assert made.keeper_pid is not None
                assert mother in (0, fork_server_pid())
                mother = fork_server_pid()
                assert parent_of(made.keeper_pid) == mother
                assert os.getsid(made.keeper_pid) == made.keeper_pid
                assert Path(f"/proc/{made.keeper_pid}/comm").read_text() == f"se-{made.run_id}\n"
                assert ended_with(made) == 7 << 8
    assert procfs.stat(mother) is None
    with sandbox("import os; os._exit(8)") as made:
        assert made.keeper_pid is not None and parent_of(made.keeper_pid) == os.getpid()
        assert ended_with(made) == 8 << 8


def test_one_stands_in_another() -> None:
    with ForkServer():
        with ForkServer(), sandbox("import time; time.sleep(60)") as made:
            mother = fork_server_pid()
            assert made.keeper_pid is not None and parent_of(made.keeper_pid) == mother
        with sandbox("import time; time.sleep(60)") as made:
            assert made.keeper_pid is not None and parent_of(made.keeper_pid) == mother


def test_a_killed_nursery_costs_nothing() -> None:
    with ForkServer():
        with sandbox("import time; time.sleep(60)") as made:
            os.kill(fork_server_pid(), signal.SIGKILL)
            assert keeper_process._fork_server is not None
            keeper_process._fork_server[1].wait()
            made.signal(signal.SIGTERM)
            assert ended_with(made) == signal.SIGTERM
        with sandbox("import os; os._exit(9)") as made:
            assert made.keeper_pid is not None and parent_of(made.keeper_pid) == os.getpid()
            assert ended_with(made) == 9 << 8


def test_a_killed_keeper_is_noticed_and_what_it_made_is_removed() -> None:
    with ForkServer(), sandbox("import time; time.sleep(60)") as made:
        assert made.keeper_pid is not None and made.kernel_pid is not None
        os.kill(made.keeper_pid, signal.SIGKILL)
        assert ended_with(made) is None
        wait_until(
            lambda: procfs.stat(made.kernel_pid or 0) is None,
            SECONDS,
            "the program died with its keeper",
        )


def test_without_descriptors_of_processes_keepers_are_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(keeper_process, "_has_pidfds", lambda: False)
    with ForkServer(), sandbox("import os; os._exit(3)") as made:
        assert keeper_process._fork_server is None
        assert made.keeper_pid is not None and parent_of(made.keeper_pid) == os.getpid()
        assert ended_with(made) == 3 << 8


LEFT_ALONE = """
import os, sys, time
from tests.integration.test_fork_server import ForkServer, fork_server_pid, sandbox
with ForkServer(), sandbox("import time; time.sleep(600)") as made:
    print(fork_server_pid(), made.keeper_pid, made.kernel_pid, made.directory, flush=True)
    time.sleep(600)
"""


def test_all_goes_with_a_runner_that_is_killed() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", LEFT_ALONE], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as runner:
        assert runner.stdout is not None
        *pids, directory = runner.stdout.readline().split()
        assert len(pids) == 3 and Path(directory).is_dir()
        runner.kill()
    for pid in map(int, pids):
        wait_until(
            lambda pid=pid: (found := procfs.stat(pid)) is None or found.state in "ZX",  # type: ignore[misc]
            SECONDS,
            f"{pid} is gone",
        )
    wait_until(lambda: not Path(directory).exists(), SECONDS, "the directory is removed")
