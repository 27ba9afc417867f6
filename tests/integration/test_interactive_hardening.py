"""``safe-exec kernel`` started as VS Code does, by its command alone: strangers, floods, and every way to kill it."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.blocking import BlockingKernelClient
from jupyter_client.connect import write_connection_file

from tests.support import MARK, marked_processes, wait_until

pytestmark = pytest.mark.kills
MOST_MEMORY_KB = 80 << 10


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    mark = secrets.token_hex(8)
    monkeypatch.setenv(MARK, mark)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("PYTEST_CURRENT_TEST", raising=False)
    yield mark
    wait_until(lambda: marked_processes(mark) == [], 20, "no process is left")


class Raw:
    """A process that was started by its command, with a connection file of the client's."""

    def __init__(self, folder: Path, *options: str) -> None:
        folder.mkdir(exist_ok=True)
        self.path = folder / "connection.json"
        _, self.info = write_connection_file(str(self.path), key=b"a key")
        argv = [sys.executable, "-P", "-m", "safe_exec", "kernel", "-f", str(self.path), *options]
        self.process = subprocess.Popen(argv, cwd=folder, stderr=subprocess.DEVNULL)

    def client(self) -> Any:
        """A client of a kernel that is up: without a manager it takes a kernel that does not beat for dead."""
        wait_until(self.listens, 90, "the kernel listens")
        client = BlockingKernelClient(connection_file=str(self.path))
        client.load_connection_file()
        client.start_channels()
        client.wait_for_ready(timeout=90)
        return client

    def listens(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.info["hb_port"]), timeout=5).close()
        except OSError:
            return False
        return True

    def memory_peak_kb(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0])

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def test_a_client_that_starts_the_command_itself(tmp_path: Path, mark: str) -> None:
    raw = Raw(tmp_path)
    try:
        client = raw.client()
        assert client.execute_interactive("1", timeout=60)["content"]["status"] == "ok"
        errors: list[Any] = []
        reply = client.execute_interactive(
            "import ctypes\nctypes.string_at(0)",
            timeout=60,
            output_hook=lambda m: errors.append(m) if m["msg_type"] == "error" else None,
        )
        assert reply["content"]["ename"] == errors[0]["content"]["ename"] == "SafeExec: segfault"
        assert raw.process.wait(20) == 3
        client.stop_channels()
    finally:
        raw.end()


def test_strangers_and_floods_do_no_harm(tmp_path: Path, mark: str) -> None:
    raw = Raw(tmp_path, "--cell-output", "none")
    try:
        client = raw.client()
        strangers = []
        for name in ("shell", "iopub", "control", "stdin", "hb"):
            for data in (b"", b"\xff" * 5, b"GET / HTTP/1.0\r\n\r\n", os.urandom(1 << 16)):
                sock = socket.create_connection(("127.0.0.1", raw.info[f"{name}_port"]))
                sock.setblocking(False)
                sock.send(data)
                strangers.append(sock)
        other = BlockingKernelClient(connection_file=str(raw.path))
        other.load_connection_file()
        other.session.key = b"another"
        other.start_channels()
        for _ in range(200):
            other.shutdown()
            other.execute("x" * 200_000)
        # A subscriber that takes nothing: it is stopped, as a suspended process is.
        script = (
            "import sys, time, zmq; s = zmq.Context().socket(zmq.SUB); s.rcvhwm = 1;"
            "s.subscribe(b''); s.connect(sys.argv[1]); s.recv(); print('on', flush=True);"
            "time.sleep(600)"
        )
        address = f"tcp://127.0.0.1:{raw.info['iopub_port']}"
        reader = subprocess.Popen(
            [sys.executable, "-c", script, address], stdout=subprocess.PIPE, text=True
        )
        assert reader.stdout is not None and reader.stdout.readline() == "on\n"
        reader.send_signal(signal.SIGSTOP)
        size = 0

        def count(message: dict[str, Any]) -> None:
            nonlocal size
            size += len(message["content"].get("text", ""))

        code = "import sys\nfor _ in range(1000):\n    sys.stdout.write('x' * 100_000)"
        reply = client.execute_interactive(code, timeout=120, output_hook=count)
        assert reply["content"]["status"] == "ok" and size == 100_000_000
        assert raw.memory_peak_kb() < MOST_MEMORY_KB
        client.execute_interactive("pass", timeout=60)
        reader.kill()
        reader.wait()
        reader.stdout.close()
        for sock in strangers:
            sock.close()
        for end in (client, other):
            end.stop_channels()
    finally:
        raw.end()


@pytest.mark.parametrize("way", ["kill", "terminate", "kernel", "keeper", "shutdown", "early"])
def test_nothing_is_left_however_it_ends(tmp_path: Path, mark: str, way: str) -> None:
    raws = [Raw(tmp_path / str(number)) for number in range(2)]
    try:
        for raw in raws:
            if way == "early":
                raw.process.terminate()
                continue
            client = raw.client()
            client.execute_interactive(
                "import os, subprocess\n"
                "child = subprocess.Popen(['sleep', '600'], start_new_session=True)",
                timeout=60,
            )
            if way == "kill":
                raw.process.kill()
            elif way == "terminate":
                raw.process.terminate()
            elif way == "shutdown":
                client.shutdown()
            elif way == "kernel":
                client.execute("os.kill(os.getpid(), 9)")
            else:
                client.execute("os.kill(os.getppid(), 9)")
            client.stop_channels()
        for raw in raws:
            raw.process.wait(30)
        wait_until(lambda: marked_processes(mark) == [], 20, "no process is left")
    finally:
        for raw in raws:
            raw.end()


def test_a_kernel_in_another_language(tmp_path: Path, mark: str) -> None:
    raw = Raw(tmp_path, "--kernel", "bash")
    try:
        client = raw.client()
        texts: list[str] = []
        reply = client.execute_interactive(
            "x=6; echo $((x * 7))",
            timeout=60,
            output_hook=lambda m: texts.append(m["content"].get("text", "")),
        )
        assert reply["content"]["status"] == "ok" and "42" in "".join(texts)
        reply = client.execute_interactive("kill -9 $PPID", timeout=60)
        assert reply["content"]["ename"].startswith("SafeExec: ")
        assert raw.process.wait(20) == 3
        client.stop_channels()
    finally:
        raw.end()


def test_the_connection_file_gets_ports_where_it_has_none(tmp_path: Path, mark: str) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"key": "k", "ip": "127.0.0.1"}))
    argv = [sys.executable, "-P", "-m", "safe_exec", "kernel", "-f", str(path)]
    process = subprocess.Popen(argv, cwd=tmp_path)
    try:
        wait_until(lambda: "hb_port" in path.read_text(), 90, "the ports are told")
        client = BlockingKernelClient(connection_file=str(path))
        client.load_connection_file()
        client.start_channels()
        client.wait_for_ready(timeout=90)
        client.stop_channels()
    finally:
        process.terminate()
        assert process.wait(20) == 0
