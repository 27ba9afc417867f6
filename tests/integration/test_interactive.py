"""``safe-exec kernel``, started by its command as JupyterLab and VS Code do, with plain jupyter_client on the other side."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import stat
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager

from safe_exec.interactive.recording import sources
from tests.support import MARK, marked_processes, safe_exec, wait_until

READY_SECONDS = 90
SEGFAULT = "import ctypes\nprint('before')\nctypes.string_at(0)"
EATER = "rows = []\nfor _ in range(1000):\n    rows.append(bytearray(b'x') * (10 << 20))"
pytestmark = pytest.mark.kills


class Manager(AsyncKernelManager):  # type: ignore[misc]
    """A manager whose kernelspec is the command alone."""

    def use(self, *options: str) -> Manager:
        argv = [sys.executable, "-P", "-m", "safe_exec", "kernel", "-f", "{connection_file}"]
        self._kernel_spec = KernelSpec(argv=[*argv, *options], language="python")
        return self


class Kernel:
    """A kernel that is up, and what its iopub socket said."""

    def __init__(self, manager: Manager, client: Any) -> None:
        self.manager, self.client = manager, client
        self.messages: list[dict[str, Any]] = []

    async def run(self, code: str, seconds: float = 60, **options: Any) -> dict[str, Any]:
        """Execute; the reply's content. ``messages`` are those of this cell."""
        self.messages = []
        reply = await self.client.execute_interactive(
            code, timeout=seconds, output_hook=self.messages.append, **options
        )
        content: dict[str, Any] = reply["content"]
        return content

    async def reply(self, msg_id: str) -> dict[str, Any]:
        """The reply to a request; replies to requests of before are left out."""
        while True:
            message = await self.client.get_shell_msg(timeout=60)
            if message["parent_header"]["msg_id"] == msg_id:
                content: dict[str, Any] = message["content"]
                return content

    def outputs(self, kind: str) -> list[dict[str, Any]]:
        return [m["content"] for m in self.messages if m["msg_type"] == kind]

    @property
    def text(self) -> str:
        return "".join(content["text"] for content in self.outputs("stream"))

    @property
    def diagnosis(self) -> str:
        return "\n".join(self.outputs("error")[-1]["traceback"])

    async def gone(self) -> int:
        """Wait for the end of the process; its exit code."""
        deadline = time.monotonic() + 20
        while (code := await self.manager.provisioner.poll()) is None:
            assert time.monotonic() < deadline, "the process did not end"
            await asyncio.sleep(0.01)
        return int(code)


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """Every process of a test is known by this, and all of them have to go."""
    mark = secrets.token_hex(8)
    monkeypatch.setenv(MARK, mark)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    yield mark
    wait_until(lambda: marked_processes(mark) == [], 20, "no process is left")


@contextlib.asynccontextmanager
async def kernel(folder: Path, *options: str, limits: str = "default") -> AsyncIterator[Kernel]:
    manager = Manager(connection_file=str(folder / "c.json")).use("--limits", limits, *options)
    await manager.start_kernel(cwd=str(folder))
    client = manager.client()
    try:
        client.start_channels()
        await client.wait_for_ready(timeout=READY_SECONDS)
        yield Kernel(manager, client)
    finally:
        client.stop_channels()
        await manager.shutdown_kernel()


def test_a_cell_and_its_outputs(tmp_path: Path, mark: str) -> None:
    async def main() -> None:
        async with kernel(tmp_path) as k:
            assert (await k.run("x = 6"))["status"] == "ok"
            assert (await k.run("print(x * 7)"))["status"] == "ok"
            assert k.text == "42\n"
            content = await k.run("1 / 0")
            assert (content["ename"], content["execution_count"]) == ("ZeroDivisionError", 3)
            await k.run("x + 1")
            assert k.outputs("execute_result")[0]["data"] == {"text/plain": "7"}
            reply = await k.client.complete("x.bit_le", reply=True, timeout=30)
            assert "bit_length" in str(reply["content"]["matches"])
            assert stat.S_IMODE((tmp_path / "c.json").stat().st_mode) == 0o600

    asyncio.run(main())


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        (SEGFAULT, "segfault", "----> 3 ctypes.string_at(0)"),
        (EATER, "out_of_memory", "----> 3     rows.append"),
        ("import os\nprint('before')\nos._exit(5)", "exit", "----> 3 os._exit(5)"),
    ],
)
def test_the_running_cell_says_why_the_kernel_died(
    tmp_path: Path, mark: str, code: str, kind: str, words: str
) -> None:
    async def main() -> None:
        async with kernel(tmp_path, "--memory", "300M") as k:
            await k.run("import ctypes")
            content = await k.run(code)
            assert content["ename"] == f"SafeExec: {kind}"
            assert words in k.diagnosis and "Code cell 2, line 3" in k.diagnosis
            if "before" in code:
                assert k.text == "before\n", "what the kernel had not sent"
            assert await k.gone() == 3

    asyncio.run(main())


def test_a_fresh_kernel_follows_where_that_is_wanted(tmp_path: Path, mark: str) -> None:
    async def main() -> None:
        async with kernel(tmp_path, "--on-death", "restart") as k:
            await k.run("x = 1")
            assert (await k.run(SEGFAULT))["ename"] == "SafeExec: segfault"
            states: list[str | None] = []
            # jupyter console waits for this idle.
            while "restarting" not in states or states[-1] != "idle":
                message = await k.client.get_iopub_msg(timeout=30)
                states.append(message["content"].get("execution_state"))
            content = await k.run("print('x' in dir())")
            assert content["status"] == "ok"
            assert "all variables" in k.text and k.text.endswith("False\n")
            await k.run("print(1)")
            assert k.text == "1\n", "said once"

    asyncio.run(main())


def test_a_cell_that_takes_too_long_is_interrupted_and_the_kernel_lives(
    tmp_path: Path, mark: str
) -> None:
    async def main() -> None:
        async with kernel(tmp_path, "--cell-timeout", "1") as k:
            await k.run("x = 1")
            content = await k.run("while True:\n    pass")
            assert content["ename"] == "SafeExec: cell_timeout"
            assert "----> 2     pass" in k.diagnosis
            await k.run("print(x)")
            assert k.text == "1\n"
            content = await k.run("while True:\n    print('x' * 1000)")
            assert content["ename"] == "SafeExec: output_flood"
            content = await k.run("sum(range(10 ** 18))")
            assert content["ename"] == "SafeExec: cell_timeout"
            assert await k.gone() == 4

    asyncio.run(main())


def test_requests_behind_a_dying_cell_are_answered(tmp_path: Path, mark: str) -> None:
    async def main() -> None:
        async with kernel(tmp_path) as k:
            ids = [k.client.execute("import time; time.sleep(0.5)\n" + SEGFAULT)]
            ids += [k.client.execute("print(2)"), k.client.kernel_info()]
            replies = [await k.reply(msg_id) for msg_id in ids]
            assert [reply["status"] for reply in replies] == ["error", "aborted", "error"]

    asyncio.run(main())


def test_the_cell_that_died_among_some_that_were_queued(tmp_path: Path, mark: str) -> None:
    # As with "Run All": quick cells end while their replies are on the way over another socket, and
    # the dying kernel loses what its threads have not sent.
    async def main() -> None:
        async with kernel(tmp_path, "--on-death", "restart") as k:
            for _ in range(8):
                ids = [k.client.execute(code) for code in ("x = 1", "x", SEGFAULT, "x")]
                replies = [await k.reply(msg_id) for msg_id in ids]
                states = [reply["status"] for reply in replies]
                assert states == ["ok", "ok", "error", "aborted"]
                assert replies[2]["ename"] == "SafeExec: segfault"
                assert "Code cell 3, line 3" in "\n".join(replies[2]["traceback"])

    asyncio.run(main())


IDLE_DEATH = "import os, threading\nthreading.Timer(0.5, os._exit, [7]).start()"


def test_a_death_between_cells_is_told_in_the_next_one(tmp_path: Path, mark: str) -> None:
    async def main() -> None:
        async with kernel(tmp_path, "--on-death", "restart") as k:
            await k.run(IDLE_DEATH)
            while (await k.client.get_iopub_msg(timeout=30))["content"].get(
                "execution_state"
            ) != "restarting":
                pass
            await k.run("print(1)")
            assert "died while no cell ran" in k.text and "exit status 7" in k.text
            assert "all variables" in k.text and k.text.endswith("1\n")
        async with kernel(tmp_path) as k:
            await k.run(IDLE_DEATH)
            assert await k.gone() == 3
            await k.manager.restart_kernel(now=True)
            await k.client.wait_for_ready(timeout=READY_SECONDS)
            await k.run("print(1)")
            assert "died while no cell ran" in k.text and "exit status 7" in k.text
            await k.run("print(1)")
            assert k.text == "1\n", "said once"

    asyncio.run(main())


def test_cells_that_the_kernel_refused_after_an_error_are_no_part_of_the_session(
    tmp_path: Path, mark: str
) -> None:
    async def main() -> None:
        async with kernel(tmp_path) as k:
            ids = [
                k.client.execute(code) for code in ("import time; time.sleep(0.3); 1 / 0", "y", "z")
            ]
            assert [(await k.reply(msg_id))["status"] for msg_id in ids] == ["error"] + 2 * [
                "aborted"
            ]
            await k.reply(k.client.kernel_info())  # ipykernel refuses for a moment
            await k.run(SEGFAULT)
            assert "Code cell 2, line 3" in k.diagnosis

    asyncio.run(main())
    (path,) = (tmp_path / "state" / "safe-exec" / "sessions").glob("*.jsonl")
    assert [source[:6] for source in sources(path)] == ["import", "import"]


def test_input_reaches_the_client_that_asked(tmp_path: Path, mark: str) -> None:
    async def main() -> None:
        async with kernel(tmp_path, "--cell-timeout", "2") as k:

            async def answer(_message: dict[str, Any]) -> None:
                await asyncio.sleep(2.5)  # longer than a cell may take
                k.client.input("typed")

            content = await k.run("print(input('?'))", allow_stdin=True, stdin_hook=answer)
            assert content["status"] == "ok" and k.text == "typed\n"

    asyncio.run(main())


def test_interrupts_by_signal_and_by_message(tmp_path: Path, mark: str) -> None:
    async def main() -> None:
        async with kernel(tmp_path) as k:
            for by_message in (False, True):
                msg_id = k.client.execute("print('on', flush=True)\nimport time; time.sleep(60)")
                while True:
                    message = await k.client.get_iopub_msg(timeout=30)
                    if message["content"].get("text") == "on\n":
                        break
                if by_message:
                    request = k.client.session.msg("interrupt_request", {})
                    k.client.control_channel.send(request)
                else:
                    await k.manager.interrupt_kernel()
                assert (await k.reply(msg_id))["ename"] == "KeyboardInterrupt"

    asyncio.run(main())


def test_a_kernel_without_network_and_with_a_hidden_home(tmp_path: Path, mark: str) -> None:
    async def main() -> None:
        async with kernel(tmp_path, limits="strict") as k:
            content = await k.run(
                "import socket\n"
                "try:\n    socket.create_connection(('192.0.2.1', 9), 1)\n"
                "except OSError as error:\n    print(error)"
            )
            assert content["status"] == "ok" and "unreachable" in k.text
            assert (await k.run(SEGFAULT))["ename"] == "SafeExec: segfault"

    asyncio.run(main())


@pytest.mark.parametrize(
    ("name", "add", "connect", "die"),
    [
        pytest.param(
            "bash",
            "x=41; echo $((x + 1))",
            "(: < /dev/tcp/192.0.2.1/9) 2>&1",
            "kill -9 $PPID",
            marks=pytest.mark.bed("bash", "bubblewrap"),
        ),
        pytest.param(
            "ir",
            "x <- 41; cat(x + 1)",
            "tryCatch(socketConnection('192.0.2.1', 9, timeout = 1), warning = function(w) cat(conditionMessage(w)))",
            "tools::pskill(Sys.getpid(), 9)",
            marks=pytest.mark.bed("R", "bubblewrap"),
        ),
    ],
)
def test_a_kernel_on_tcp_without_network(
    tmp_path: Path, mark: str, *, name: str, add: str, connect: str, die: str
) -> None:
    async def main() -> None:
        async with kernel(tmp_path, "--kernel", name, limits="strict") as k:
            await k.run(add)
            assert k.text.strip() == "42"
            await k.run(connect)
            assert "unreachable" in k.text or "cannot be opened" in k.text
            await k.run(die)
            assert k.outputs("error")[-1]["ename"] == "SafeExec: killed"
            assert await k.gone() == 3

    asyncio.run(main())


COMM = """
from comm import get_comm_manager
def opened(comm, _message):
    comm.on_msg(lambda message: comm.send({"echo": message["content"]["data"]}))
get_comm_manager().register_target("echo", opened)
"""


def test_comms_in_both_directions(tmp_path: Path, mark: str) -> None:
    async def main() -> None:
        async with kernel(tmp_path) as k:
            await k.run(COMM)
            for kind, content in (
                ("comm_open", {"comm_id": "c", "target_name": "echo", "data": {}}),
                ("comm_msg", {"comm_id": "c", "data": {"value": 6}}),
            ):
                k.client.shell_channel.send(k.client.session.msg(kind, content))
            while (message := await k.client.get_iopub_msg(timeout=30))["msg_type"] != "comm_msg":
                pass
            assert message["content"]["data"] == {"echo": {"value": 6}}

    asyncio.run(main())


@pytest.mark.parametrize("options", [(), ("--limits", "strict")], ids=["default", "strict"])
def test_the_debugger_stops_at_a_breakpoint(
    tmp_path: Path, mark: str, options: tuple[str, ...]
) -> None:
    async def main() -> None:
        async with kernel(tmp_path, *options) as k:
            session = k.client.session

            async def ask(command: str, **arguments: Any) -> dict[str, Any]:
                content = {"type": "request", "command": command, "seq": 1, "arguments": arguments}
                message = session.msg("debug_request", content)
                k.client.control_channel.send(message)
                while True:
                    reply = await k.client.get_control_msg(timeout=60)
                    if reply["parent_header"]["msg_id"] == message["header"]["msg_id"]:
                        assert reply["content"]["success"], reply
                        return dict(reply["content"])

            await ask("initialize", clientID="test", adapterID="", pathFormat="path")
            await ask("attach")
            code = "y = 41\ny + 1"
            path = (await ask("dumpCell", code=code))["body"]["sourcePath"]
            await ask("setBreakpoints", source={"path": path}, breakpoints=[{"line": 2}])
            await ask("configurationDone")
            k.client.execute(code)
            events = []
            while "stopped" not in events:
                message = await k.client.get_iopub_msg(timeout=60)
                if message["msg_type"] == "debug_event":
                    events.append(message["content"]["event"])
            await ask("continue", threadId=1)
            while message["msg_type"] != "execute_result":
                message = await k.client.get_iopub_msg(timeout=60)
            assert message["content"]["data"]["text/plain"] == "42"

    asyncio.run(main())


def test_output_is_cut_at_its_cap(tmp_path: Path, mark: str) -> None:
    async def main() -> None:
        async with kernel(tmp_path, "--cell-output", "100K") as k:
            await k.run("for n in range(8):\n    print('x' * 50_000, flush=True)")
            assert 50_000 <= len(k.text) < 110_000
            assert k.text.count("output cut here; limit for this cell 100 KiB") == 1
            await k.run("print(1)")
            assert k.text == "1\n"

    asyncio.run(main())


def test_a_restart_by_the_client_and_a_second_client(tmp_path: Path, mark: str) -> None:
    async def main() -> None:
        async with kernel(tmp_path) as k:
            await k.run("x = 1")
            other = k.manager.client()
            other.start_channels()
            await other.wait_for_ready(timeout=READY_SECONDS)
            second = Kernel(k.manager, other)
            await second.run("print(x + 1)")
            assert second.text == "2\n"
            await k.manager.restart_kernel()
            await k.client.wait_for_ready(timeout=READY_SECONDS)
            await k.run("print('x' in dir())")
            assert k.text == "False\n"
            other.stop_channels()

    asyncio.run(main())


def test_a_session_is_recorded_and_its_culprits_are_found(tmp_path: Path, mark: str) -> None:
    async def main() -> str:
        async with kernel(tmp_path, "--memory", "300M") as k:
            await k.run("size = 10 << 20")
            await k.run("unrelated = 1", silent=True)
            await k.run("unrelated = 2")
            await k.run("1 / 0")  # after which a person goes on, and the search too
            await k.run("rows = [bytearray(b'x') * size for _ in range(100)]")
            return k.diagnosis

    diagnosis = asyncio.run(main())
    (recording,) = (tmp_path / "state" / "safe-exec" / "sessions").glob("*.jsonl")
    notebook = recording.with_suffix(".ipynb")
    assert f"safe-exec bisect {notebook}" in diagnosis
    for path in (recording, notebook):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    lines = [json.loads(line) for line in recording.read_text().splitlines()]
    assert [line["executed"] for line in lines if "executed" in line][:2] == [
        "size = 10 << 20",
        "unrelated = 2",
    ]
    nbformat.validate(nbformat.read(notebook, as_version=4))
    done = safe_exec("bisect", "--json", notebook)
    assert done.returncode == 0, done.stderr
    culprits = json.loads(done.stdout)["culprits"]["cells"]
    assert [cell["code_index"] for cell in culprits] == [0, 3]
    listed = safe_exec("sessions").stdout
    assert recording.stem in listed and "out of memory" in listed


def refused(folder: Path, *options: str) -> tuple[int, str]:
    """The exit code and the stderr of a kernel that does not start."""
    (folder / "c.json").write_text(json.dumps({"key": "k", "ip": "127.0.0.1"}))
    done = safe_exec("kernel", "-f", folder / "c.json", *options, cwd=folder)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--kernel", "absent"), 6, "no kernel named 'absent'"),
        (("--limits", "absent"), 2, "unknown profile 'absent'"),
        (("--timeout", "5"), 2, "use --cell-timeout"),
        (("--mechanisms", "watchdog", "--memory", "1G", "--require", "memory"), 7, "memory"),
    ],
)
def test_a_kernel_that_cannot_start_says_so_in_one_line(
    tmp_path: Path, mark: str, options: Sequence[str], code: int, words: str
) -> None:
    found, said = refused(tmp_path, *options)
    assert found == code and words in said and len(said.splitlines()) == 1, said


def test_it_ends_with_the_client_that_started_it(tmp_path: Path, mark: str) -> None:
    script = (
        "import subprocess, sys, os\n"
        "env = {**os.environ, 'JPY_PARENT_PID': str(os.getpid())}\n"
        "subprocess.Popen(sys.argv[1:], env=env)\n"
        "input()\n"
    )

    async def main() -> None:
        (tmp_path / "c.json").write_text(json.dumps({"key": "k", "ip": "127.0.0.1"}))
        argv = [sys.executable, "-P", "-m", "safe_exec", "kernel", "-f", str(tmp_path / "c.json")]
        parent = await asyncio.create_subprocess_exec(
            sys.executable, "-c", script, *argv, stdin=asyncio.subprocess.PIPE, env=os.environ
        )
        deadline = time.monotonic() + 60
        while len(marked_processes(mark)) < 4:  # parent, proxy, keeper, kernel
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        parent.kill()
        await parent.wait()

    asyncio.run(main())
