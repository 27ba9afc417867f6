"""``safe-exec kernel --restore``: a real kernel dies, and a snapshot of it goes on with its variables."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from jupyter_client.kernelspec import KernelSpec

from tests.integration.test_interactive import (
    EATER,
    READY_SECONDS,
    SEGFAULT,
    Kernel,
    Manager,
    kernel,
    mark,
)
from tests.support import EXECUTABLE, NOBODY, marked_processes, ordinary_user, wait_until

__all__ = ["mark"]
pytestmark = pytest.mark.kills
GOES_ON = "the kernel goes on; its variables are as they were before this cell"
NOTHING = "nothing could be restored: "
EXIT = "import os\nos._exit(9)"
HANG = (
    "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    "while True:\n    time.sleep(1)"
)
# How a cell kills its kernel, and the beginning of the name of its error.
DEATHS = {
    "segfault": (SEGFAULT, "SafeExec: segfault"),
    "exit": (EXIT, "SafeExec: "),
    "abort": ("import os\nos.abort()", "SafeExec: abort"),
    "kill": ("import os\nos.kill(os.getpid(), 9)", "SafeExec: "),
    "memory": (EATER, "SafeExec: out_of_memory"),
    "timeout": (HANG, "SafeExec: "),
    "stack": ("import sys\nsys.setrecursionlimit(10**8)\nf = lambda: f()\nf()", "SafeExec: "),
}
FIGURES = (
    "import inspect, os\nprint(len(os.listdir('/proc/self/fd')), len(os.listdir('/proc/self/task')),"
    " len(inspect.stack()))"
)


@pytest.fixture(autouse=True)
def history(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """IPython's history is a file, as in a user's kernel."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))


async def dies(k: Kernel, death: str) -> None:
    """Run a cell that kills the kernel, and check its diagnosis."""
    source, name = DEATHS[death]
    reply = await k.run(source)
    assert reply["status"] == "error" and reply["ename"].startswith(name), reply


async def value(k: Kernel, expression: str) -> str:
    """The displayed value of an expression; nothing else may be printed."""
    assert (await k.run(expression))["status"] == "ok", k.messages
    assert not k.text
    text: str = k.outputs("execute_result")[-1]["data"]["text/plain"]
    return text


@pytest.mark.parametrize("limits", ["default", "untrusted"])
def test_every_death_is_undone_and_explained(tmp_path: Path, mark: str, limits: str) -> None:
    async def main() -> None:
        options = ("--restore", "--memory", "500M", "--cell-timeout", "8s")
        async with kernel(tmp_path, *options, limits=limits) as k:
            await k.run("x = [0]")
            for number, death in enumerate(DEATHS, 1):
                await k.run("x.append(len(x))")
                await dies(k, death)
                assert GOES_ON in k.diagnosis, k.diagnosis
                assert await value(k, "x") == str([*range(number + 1)])

    asyncio.run(main())


def test_the_second_diagnosis_is_as_exact_as_the_first(tmp_path: Path, mark: str) -> None:
    def facts(diagnosis: str) -> list[str]:
        # All evidence with its source; the paths and addresses are the same in both.
        return [line for line in diagnosis.splitlines() if " · " in line and ": " in line]

    async def main() -> None:
        async with kernel(tmp_path, "--restore", "--memory", "500M") as k:
            for death in ("segfault", "memory"):
                await k.run("x = 1")
                await dies(k, death)
                first = facts(k.diagnosis)
                await k.run("y = 2")
                await dies(k, death)
                kinds = [
                    [line.partition(":")[0] for line in f] for f in (first, facts(k.diagnosis))
                ]
                assert kinds[0] == kinds[1] and kinds[0], kinds
                if death == "segfault":
                    assert facts(k.diagnosis) == first

    asyncio.run(main())


def test_the_restored_kernel_is_whole(
    tmp_path: Path, mark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With it ipykernel does not redirect descriptors 1 and 2.
    monkeypatch.delenv("PYTEST_CURRENT_TEST")

    async def main() -> None:
        async with kernel(tmp_path, "--restore") as k:
            await k.run("import logging, os, sys\nx = 6\nout = sys.stdout")
            await dies(k, "segfault")
            assert (await k.run("x * 7"))["execution_count"] == 3
            assert k.outputs("execute_result")[0]["execution_count"] == 3
            reply = await k.client.complete("x.bit_le", reply=True, timeout=30)
            assert reply["content"]["matches"] == ["bit_length"]
            reply = await k.client.inspect("x", reply=True, timeout=30)
            assert reply["content"]["found"]
            # Streams that the notebook holds, output of C code, displays.
            source = "print('kept', file=out)\nprint('err', file=sys.stderr)\ndisplay('shown')"
            await k.run(f"{source}\n_ = os.system('echo below')")
            assert sorted(k.text.split()) == ["below", "err", "kept"]
            assert "shown" in str(k.outputs("display_data"))
            msg_id = k.client.execute("v = input('?')")
            await k.client.get_stdin_msg(timeout=30)
            k.client.input("typed")
            assert (await k.reply(msg_id))["status"] == "ok"
            assert await value(k, "v") == "'typed'"
            assert "ctypes.string_at(0)" in await value(k, "In[2]")
            assert "UNIQUE" not in k.text and "History" not in k.text
            assert (await k.run("1 / 0"))["ename"] == "ZeroDivisionError"

    asyncio.run(main())


def test_an_interrupt_reaches_a_restored_kernel(tmp_path: Path, mark: str) -> None:
    async def main() -> None:
        async with kernel(tmp_path, "--restore") as k:
            await k.run("x = 6")
            await dies(k, "exit")
            msg_id = k.client.execute("import time\nprint('in', flush=True)\ntime.sleep(600)")
            while True:
                message = await k.client.get_iopub_msg(timeout=30)
                if message["msg_type"] == "stream":
                    break
            await k.manager.interrupt_kernel()
            assert (await k.reply(msg_id))["ename"] == "KeyboardInterrupt"
            assert await value(k, "x") == "6"

    asyncio.run(main())


def test_twenty_deaths_in_a_row_leave_nothing(
    tmp_path: Path, mark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTEST_CURRENT_TEST")

    async def main() -> None:
        async with kernel(tmp_path, "--restore") as k:
            await k.run("x = 0")
            figures = []
            for number in range(20):
                await k.run("x += 1")
                await dies(k, "exit" if number % 2 else "segfault")
                assert GOES_ON in k.diagnosis, (number, k.diagnosis)
                await k.run(FIGURES)
                figures.append([int(word) for word in k.text.split()])
            assert await value(k, "x") == "20"
            # The first restored kernel is compared with the last: descriptors, threads, the stack.
            for first, last in zip(figures[0], figures[-1], strict=True):
                assert last <= first + 4, figures
            # Launcher, keeper, kernel and its only snapshot.
            wait_until(lambda: len(marked_processes(mark)) <= 4, 20, "only one snapshot is kept")

    asyncio.run(main())


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (
            "from threading import Event, Thread\nThread(target=Event().wait, daemon=True).start()",
            "threads",
        ),
        ("import socket\ns = socket.socket()", "an open socket"),
        ("f = open('own.txt', 'w')", "an open file (own.txt)"),
        ("import subprocess\np = subprocess.Popen(['sleep', '600'])", "child processes"),
        ("import asyncio\nt = asyncio.ensure_future(asyncio.sleep(600))", "asyncio tasks"),
    ],
)
def test_a_state_that_no_fork_survives_is_not_restored(
    tmp_path: Path, mark: str, source: str, reason: str
) -> None:
    async def main() -> None:
        async with kernel(tmp_path, "--restore", "--on-death", "restart") as k:
            await k.run("x = 6")
            await k.run(source)
            await dies(k, "segfault")
            assert NOTHING + reason in k.diagnosis, k.diagnosis
            # A fresh kernel, as without --restore; it is restored again.
            await k.run("y = 1")
            assert "all variables, imports and open files of before are lost" in k.text
            assert (await k.run("x"))["ename"] == "NameError"
            await dies(k, "segfault")
            assert GOES_ON in k.diagnosis
            assert await value(k, "y") == "1"

    asyncio.run(main())


def test_a_death_between_two_cells(tmp_path: Path, mark: str) -> None:
    async def main() -> None:
        async with kernel(tmp_path, "--restore") as k:
            await k.run("import os, threading, time\nx = 6")
            # The thread ends with the kernel; the snapshot is from before it.
            await k.run("x = 7\nthreading.Timer(0.2, os._exit, (9,)).start()")
            pids = set(marked_processes(mark))
            wait_until(lambda: set(marked_processes(mark)) != pids, 30, "the kernel has died")
            assert (await k.run("x"))["status"] == "ok"
            assert "exit status 9" in k.text and "before the last cell" in k.text
            assert k.outputs("execute_result")[-1]["data"]["text/plain"] == "6"

    asyncio.run(main())


def test_exit_is_no_death(tmp_path: Path, mark: str) -> None:
    async def main() -> None:
        async with kernel(tmp_path, "--restore") as k:
            await k.run("x = 6")
            assert (await k.run("exit()"))["status"] == "ok"
            # As without --restore: the client asked for no end.
            assert await k.gone() == 3

    asyncio.run(main())


def test_a_snapshot_is_never_the_reason_of_a_memory_kill(tmp_path: Path, mark: str) -> None:
    async def main() -> None:
        async with kernel(tmp_path, "--restore", "--memory", "500M") as k:
            await k.run("a = bytearray(b'x') * (150 << 20)")
            # Each page is changed, so a snapshot and the kernel need 150 MB each.
            change = "for i in range(0, len(a), 4096):\n    a[i] = {}\n"
            reply = await k.run(change.format(1) + "b = bytearray(b'y') * (190 << 20)")
            assert reply["status"] == "ok", k.diagnosis
            assert await value(k, "len(a) + len(b)") == str(340 << 20)
            await k.run("del b")
            await k.run(change.format(2) + EATER)
            assert k.outputs("error")[-1]["ename"] == "SafeExec: out_of_memory"
            assert NOTHING + "the snapshot was ended before the kernel" in k.diagnosis

    asyncio.run(main())


def test_a_later_death_is_not_explained_by_an_earlier_one(tmp_path: Path, mark: str) -> None:
    async def main() -> None:
        async with kernel(tmp_path, "--restore", "--memory", "500M") as k:
            await k.run("x = 6")
            await dies(k, "memory")
            reply = await k.run("import os\nos.kill(os.getpid(), 9)")
            assert "out_of_memory" not in reply["ename"] and "os.kill()" in reply["evalue"], reply
            assert GOES_ON in k.diagnosis
            await dies(k, "memory")

    asyncio.run(main())


def test_snapshots_that_cost_too_much_end_once(tmp_path: Path, mark: str) -> None:
    async def main() -> None:
        async with kernel(tmp_path, "--restore", "--memory", "3G") as k:
            # Every page is copied again after each snapshot; the cells do little else.
            await k.run("a = bytearray(300 << 20)")
            notices = 0
            for number in range(12):
                await k.run(f"for i in range(0, len(a), 4096):\n    a[i] = {number}")
                notices += k.text.count("--restore is off from now on")
            assert notices == 1
            await dies(k, "segfault")
            assert NOTHING + "snapshots took more than 5 % of the cells' time" in k.diagnosis

    asyncio.run(main())


def test_trivial_cells_do_not_end_the_snapshots(tmp_path: Path, mark: str) -> None:
    async def main() -> None:
        async with kernel(tmp_path, "--restore") as k:
            for number in range(60):
                await k.run(f"x = {number}")
                assert not k.text
            await dies(k, "segfault")
            assert await value(k, "x") == "59"

    asyncio.run(main())


def test_kernels_in_other_languages_say_so(tmp_path: Path, mark: str) -> None:
    async def main() -> None:
        async with kernel(tmp_path, "--restore", "--kernel", "bash") as k:
            await k.run("echo $((6 * 7))")
            assert "--restore is off from now on: only Python kernels" in k.text
            await k.run("echo again")
            assert "--restore" not in k.text
            reply = await k.run("kill -9 $PPID")
            assert reply["ename"].startswith("SafeExec: ")
            assert await k.gone() == 3

    asyncio.run(main())


@pytest.mark.parametrize("way", ["kill", "terminate", "shut down", "restart"])
def test_no_snapshot_is_left(tmp_path: Path, mark: str, way: str) -> None:
    async def main() -> None:
        async with kernel(tmp_path, "--restore") as k:
            await k.run("x = 6")
            await dies(k, "exit")
            assert await value(k, "x") == "6"
            launcher = int(k.manager.provisioner.process.pid)
            if way == "restart":
                await k.manager.restart_kernel(now=True)
                await k.client.wait_for_ready(timeout=READY_SECONDS)
            elif way != "shut down":
                number = signal.SIGKILL if way == "kill" else signal.SIGTERM
                os.kill(launcher, number)
                wait_until(lambda: marked_processes(mark) == [], 20, "no process is left")

    asyncio.run(main())


@contextlib.asynccontextmanager
async def kernel_of_ordinary_user(folder: Path, *options: str) -> AsyncIterator[Kernel]:
    manager = Manager(connection_file=str(folder / "c.json"))
    command = [*ordinary_user(), f"HOME={folder}", f"XDG_STATE_HOME={folder}", str(EXECUTABLE)]
    argv = [*command, "kernel", "-f", "{connection_file}", "--restore", *options]
    manager._kernel_spec = KernelSpec(argv=argv, language="python")
    await manager.start_kernel(cwd=str(folder))
    os.chown(manager.connection_file, NOBODY, NOBODY)
    client = manager.client()
    try:
        client.start_channels()
        await client.wait_for_ready(timeout=READY_SECONDS)
        yield Kernel(manager, client)
    finally:
        client.stop_channels()
        await manager.shutdown_kernel()


@pytest.mark.bed("ordinary-user")
def test_an_ordinary_user_without_control_groups(
    mark: str, own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IPYTHONDIR", str(own_folder / "ipython"))

    async def main() -> None:
        async with kernel_of_ordinary_user(own_folder, "--memory", "500M") as k:
            for death in ("segfault", "memory", "exit", "memory"):
                await k.run(f"x = {death!r}")
                await dies(k, death)
                assert GOES_ON in k.diagnosis, k.diagnosis
                assert await value(k, "x") == repr(death)

    asyncio.run(main())


@pytest.fixture
def own_folder() -> Iterator[Path]:
    import shutil
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="safe-exec-restore-", dir="/var/tmp"))
    os.chown(folder, NOBODY, NOBODY)
    yield folder
    shutil.rmtree(folder)
