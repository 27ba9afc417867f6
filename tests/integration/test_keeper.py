"""A keeper waits when there is nothing to do, in whatever order it hears of a death."""

from __future__ import annotations

import select
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest

import safe_exec
from safe_exec.keeper import protocol
from safe_exec.model import events
from safe_exec.model.verdict import Status
from safe_exec.sandbox.sandbox import Sandbox
from tests.support import wait_until

SECONDS = 30
LOOKS = 50

# A keeper to whom the end of its kernel is told together with the end of all that the kernel wrote to: as on a busy machine.
ALL_AT_ONCE = """
import os, signal, socket, sys
from safe_exec.keeper.child import KernelCommand
from safe_exec.keeper.keeper import Keeper
from safe_exec.keeper.protocol import Spawn

keeper = Keeper(socket.socket(fileno=int(sys.argv[1])), directory=None)
keeper.plan = Spawn(command=KernelCommand(argv=(), env={}, cwd="/"))
stderr, fault = keeper.crash_output.open(None)
keeper.pid = os.fork()
if keeper.pid == 0:
    os.write(stderr, b"last words")
    os._exit(3)
os.close(stderr)
fault.close()
os.waitid(os.P_PID, keeper.pid, os.WEXITED | os.WNOWAIT)
os.write(keeper.wake_w, bytes([signal.SIGCHLD]))
keeper.run()
keeper.shutdown()
"""


@pytest.mark.kills
def test_a_keeper_that_hears_of_all_at_once_waits_afterwards() -> None:
    ours, theirs = socket.socketpair()
    with (
        ours,
        subprocess.Popen(
            [sys.executable, "-c", ALL_AT_ONCE, str(theirs.fileno())], pass_fds=(theirs.fileno(),)
        ) as process,
    ):
        theirs.close()
        try:
            assert select.select([ours], [], [], SECONDS)[0]
            line = ours.recv(1 << 16).split(b"\n")[0]
            exited = protocol.decode(line, protocol.TO_RUNNER)
            assert isinstance(exited, protocol.Exited)
            assert (exited.status, exited.stderr) == (3 << 8, "last words")
            keeper = psutil.Process(process.pid)
            # One that looks at a closed descriptor again and again is running at nearly every look.
            wait_until(
                lambda: all(keeper.status() == psutil.STATUS_SLEEPING for _ in range(LOOKS)),
                SECONDS,
                f"the keeper sleeps at {LOOKS} looks in a row",
            )
            ours.sendall(protocol.encode(protocol.Finish()))
            assert process.wait(SECONDS) == 0
        finally:
            process.kill()


@pytest.mark.kills
def test_a_failure_of_the_keeper_is_not_a_death_of_the_notebook(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandboxes: list[Sandbox] = []
    open_sandbox = Sandbox.__init__

    def record(self: Sandbox, *args: Any, **options: Any) -> None:
        open_sandbox(self, *args, **options)
        sandboxes.append(self)

    def confuse(event: events.Event) -> None:
        if isinstance(event, events.CellStarted) and event.code_index == 1:
            sandboxes[0]._control.sendall(b"rubbish\n")

    monkeypatch.setattr(Sandbox, "__init__", record)
    notebook = tmp_path / "nb.ipynb"
    cells = ["kept = 1\nprint('kept')", "import time\ntime.sleep(600)"]
    node = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbformat.write(node, notebook)
    verdict = safe_exec.run(notebook, limits="ci", on_event=confuse)
    assert verdict.status is Status.INTERNAL_ERROR
    assert verdict.cause is not None and "keeper failed" in verdict.cause.summary
    assert verdict.culprits is None
    assert "kept" in (tmp_path / "nb.out.ipynb").read_text()
    assert not psutil.pid_exists(sandboxes[0].kernel_pid or 0)
