"""Kernels of other tools: a kernelspec with the provisioner, used by the real `jupyter execute`, nbconvert, nbmake and a Jupyter server."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import websocket

from tests.support import EXECUTABLE, MARK, make_notebook, marked_processes, wait_until

BIN = Path(sys.executable).parent
EATER = "rows = []\nfor _ in range(1000):\n    rows.append(bytearray(b'x') * (10 << 20))"
KERNEL = "python3-safe-exec-ci"
DIED = "kernel ended with SIGKILL, 1 process(es) killed for memory in its control group at its limit of 300 MiB"


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place with a kernelspec of ours."""
    prefix = tmp_path_factory.mktemp("prefix")
    done = kernelspec(
        "install", "--provisioner", "--limits", "ci", "--memory", "300M", "--prefix", str(prefix)
    )
    assert done.returncode == 0, done.stderr
    return prefix


@pytest.fixture
def mark() -> Iterator[str]:
    mark = secrets.token_hex(8)
    yield mark
    wait_until(lambda: marked_processes(mark) == [], 10, "no process is left")


def kernelspec(
    *arguments: str, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    argv = [str(EXECUTABLE), "kernelspec", *arguments]
    return subprocess.run(
        argv,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def environment(prefix: Path, mark: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    return {**kept, "JUPYTER_PATH": str(prefix / "share" / "jupyter"), MARK: mark}


def run(folder: Path, prefix: Path, mark: str, *argv: str) -> subprocess.CompletedProcess[str]:
    command = [str(BIN / argv[0]), *argv[1:]]
    return subprocess.run(
        command,
        cwd=folder,
        env=environment(prefix, mark),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


# --- the kernelspec -----------------------------------------------------------------------------------------------


def document(prefix: Path, name: str) -> Any:
    return json.loads((prefix / "share" / "jupyter" / "kernels" / name / "kernel.json").read_text())


def test_the_kernelspec_carries_its_limits(tmp_path: Path) -> None:
    done = kernelspec("install", "--provisioner", "--limits", "ci", "--prefix", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "Python 3 (safe-exec: ci): installed as python3-safe-exec-ci" in done.stdout
    assert (
        "limits    memory 2.0 GiB, processes 512, open files 1024, file size 1.0 GiB" in done.stdout
    )
    made = document(tmp_path, KERNEL)
    assert made["display_name"] == "Python 3 (safe-exec: ci)"
    assert made["metadata"]["kernel_provisioner"] == {
        "provisioner_name": "safe-exec",
        "config": {"limits": "ci"},
    }
    assert made["metadata"]["debugger"] is True, "what the kernel said of itself stays"
    assert (tmp_path / "share" / "jupyter" / "kernels" / KERNEL / "logo-64x64.png").exists()

    # A file of one's own, from a directory that no server will start in, over bash, under a name of one's own.
    (tmp_path / "mine.yaml").write_text("limits:\n  memory: 1G\n")
    options = (
        "--limits",
        str(tmp_path / "mine.yaml"),
        "--processes",
        "50",
        "--kernel",
        "bash",
        "--name",
        "small-bash",
    )
    done = kernelspec(
        "install", "--provisioner", *options, "--display-name", "Small", "--prefix", str(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    made = document(tmp_path, "small-bash")
    assert (made["display_name"], made["language"]) == ("Small", "bash")
    assert made["metadata"]["kernel_provisioner"]["config"] == {
        "limits": str(tmp_path / "mine.yaml"),
        "processes": "50",
    }


def test_where_it_goes_and_what_it_does_not_replace(tmp_path: Path) -> None:
    home = {"JUPYTER_DATA_DIR": str(tmp_path / "data"), "JUPYTER_PATH": ""}
    done = kernelspec("install", "--user", env=home)
    assert done.returncode == 0, done.stderr
    place = tmp_path / "data" / "kernels"
    assert (place / "python3-safe-exec-default" / "kernel.json").exists()
    assert kernelspec("install", "--user", env=home).returncode == 0, "our own is replaced"
    (place / "theirs").mkdir()
    (place / "theirs" / "kernel.json").write_text('{"argv": ["x"]}')
    for arguments, said in {
        ("--user", "--name", "theirs"): "there is another kernelspec of this name",
        ("--user", "--name", "My Kernel"): "a kernel's name has",
        ("--user", "--sys-prefix"): "exclude each other",
        ("--user", "--kernel", "absent"): "no kernel named 'absent' is installed",
        ("--user", "--limits", "absent"): "unknown profile 'absent'",
        ("--user", "--memory", "much"): "memory: 'much' is not a size",
        ("--user", "--provisioner", "--cell-timeout", "5"): "it cannot enforce --cell-timeout",
    }.items():
        done = kernelspec("install", *arguments, env=home)
        assert (done.returncode, said in done.stderr) == (2, True), (arguments, done.stderr)
    assert (place / "theirs" / "kernel.json").read_text() == '{"argv": ["x"]}'
    listed = subprocess.run(
        [BIN / "jupyter", "kernelspec", "remove", "-f", "python3-safe-exec-default"],
        env={**os.environ, **home},
        check=False,
    )
    assert listed.returncode == 0 and not (place / "python3-safe-exec-default").exists()


def test_jupyter_finds_the_command(tmp_path: Path, prefix: Path, mark: str) -> None:
    make_notebook(tmp_path / "nb.ipynb", "1 / 0")
    done = run(tmp_path, prefix, mark, "jupyter", "safe-exec", "run", "nb.ipynb")
    assert done.returncode == 1 and "✗ error in code cell 1 · ZeroDivisionError" in done.stdout


# --- tools that run a notebook ------------------------------------------------------------------------------------

TOOLS: dict[str, tuple[str, ...]] = {
    "jupyter-execute": ("jupyter", "execute", f"--kernel_name={KERNEL}"),
    "nbconvert": (
        "jupyter",
        "nbconvert",
        "--to",
        "notebook",
        "--execute",
        f"--ExecutePreprocessor.kernel_name={KERNEL}",
    ),
    "nbmake": ("pytest", "-q", "-p", "no:cacheprovider", "--nbmake", f"--nbmake-kernel={KERNEL}"),
}


@pytest.mark.kills
@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_runs_kernels_inside_limits(
    tmp_path: Path, prefix: Path, mark: str, tool: str
) -> None:
    inside = "import os\nassert '/safe-exec-' in open('/proc/self/cgroup').read()\nprint('inside')"
    make_notebook(tmp_path / "good.ipynb", inside)
    done = run(tmp_path, prefix, mark, *TOOLS[tool], "good.ipynb")
    assert done.returncode == 0, done.stdout + done.stderr
    make_notebook(tmp_path / "eater.ipynb", EATER)
    done = run(tmp_path, prefix, mark, *TOOLS[tool], "eater.ipynb")
    assert done.returncode != 0
    assert DIED in done.stdout + done.stderr


# --- a Jupyter server, as JupyterLab has it -----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server on loopback; JupyterLab speaks to one in the same way."""

    url: str
    token: str
    log: Path
    sockets: list[Any] = field(default_factory=list)

    def ask(self, method: str, path: str, body: object = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Authorization": f"token {self.token}", "Content-Type": "application/json"}
        request = urllib.request.Request(
            f"{self.url}api/{path}", data=data, method=method, headers=headers
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            said = answer.read()
        return json.loads(said) if said else None

    def answers(self) -> bool:
        """Whether it listens by now: its file is written before it does."""
        try:
            self.ask("GET", "status")
        except OSError:
            return False
        return True

    def connect(self, kernel: str) -> Session:
        url = f"{self.url.replace('http', 'ws', 1)}api/kernels/{kernel}/channels?token={self.token}"
        self.sockets.append(websocket.create_connection(url, timeout=60))
        return Session(self.sockets[-1])


class Session:
    """One websocket to a kernel."""

    def __init__(self, socket: Any) -> None:
        self.socket = socket

    def send(self, code: str) -> str:
        header = {
            "msg_id": uuid.uuid4().hex,
            "msg_type": "execute_request",
            "username": "",
            "session": "s",
            "version": "5.3",
        }
        content = {
            "code": code,
            "silent": False,
            "store_history": True,
            "user_expressions": {},
            "allow_stdin": False,
        }
        message = {
            "header": header,
            "parent_header": {},
            "metadata": {},
            "content": content,
            "channel": "shell",
            "buffers": [],
        }
        self.socket.send(json.dumps(message))
        return header["msg_id"]

    def until(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            message: dict[str, Any] = json.loads(self.socket.recv())
            if wanted(message):
                return message
        raise AssertionError("the message did not come")

    def reply(self, msg_id: str) -> dict[str, Any]:
        found = self.until(
            lambda m: (
                m["msg_type"] == "execute_reply" and m["parent_header"].get("msg_id") == msg_id
            )
        )
        content: dict[str, Any] = found["content"]
        return content

    def run(self, code: str) -> dict[str, Any]:
        return self.reply(self.send(code))


@pytest.fixture
def server(tmp_path: Path, prefix: Path, mark: str) -> Iterator[Server]:
    """A server that is told to stop at the end; what it started has to be gone then."""
    (tmp_path / "root").mkdir()
    token, log = secrets.token_hex(8), tmp_path / "server.log"
    options = {
        "ServerApp.ip": "127.0.0.1", "ServerApp.port": "0", "ServerApp.root_dir": str(tmp_path / "root"), "ServerApp.open_browser": "False",
        "IdentityProvider.token": token, "AsyncIOLoopKernelRestarter.time_to_dead": "0.5",
    }  # fmt: skip
    argv = [
        str(BIN / "jupyter"),
        "server",
        "--allow-root",
        *(f"--{name}={value}" for name, value in options.items()),
    ]
    runtime = tmp_path / "runtime"
    env = {
        **environment(prefix, mark),
        "JUPYTER_RUNTIME_DIR": str(runtime),
        "JUPYTER_CONFIG_DIR": str(tmp_path / "config"),
    }
    with log.open("w") as said:
        process = subprocess.Popen(
            argv, cwd=tmp_path, env=env, stdout=said, stderr=subprocess.STDOUT
        )
    try:
        wait_until(
            lambda: list(runtime.glob("jpserver-*.json")) or process.poll() is not None,
            60,
            "the server is up",
        )
        assert process.poll() is None, log.read_text()
        wait_until(
            lambda: next(runtime.glob("jpserver-*.json")).read_text().rstrip().endswith("}"),
            10,
            "it says where",
        )
        info = json.loads(next(runtime.glob("jpserver-*.json")).read_text())
        found = Server(url=info["url"], token=token, log=log)
        wait_until(found.answers, 60, "the server answers")
        yield found
        for socket in found.sockets:
            socket.close()
        found.ask("POST", "shutdown")
        process.wait(60)
    finally:
        process.kill()
        process.wait()


@pytest.mark.kills
def test_a_kernel_of_a_server_as_jupyterlab_uses_it(server: Server, mark: str) -> None:
    listed = server.ask("GET", "kernelspecs")["kernelspecs"]
    assert listed[KERNEL]["spec"]["display_name"] == "Python 3 (safe-exec: ci, memory 300M)"
    kernel = server.ask("POST", "kernels", {"name": KERNEL})["id"]
    session = server.connect(kernel)
    assert session.run("x = 1")["status"] == "ok"

    # Interrupt: the cell ends, the kernel stays.
    asked = session.send("print('looping', flush=True)\nwhile True:\n    pass")
    session.until(lambda m: m["msg_type"] == "stream" and m["content"]["text"] == "looping\n")
    server.ask("POST", f"kernels/{kernel}/interrupt")
    assert session.reply(asked)["ename"] == "KeyboardInterrupt"
    assert session.run("assert x == 1")["status"] == "ok"

    # A death for memory: the server sees it, says why in its log, and starts the kernel anew.
    session.send(EATER)
    session.until(
        lambda m: m["msg_type"] == "status" and m["content"]["execution_state"] == "restarting"
    )
    wait_until(lambda: DIED in server.log.read_text(), 60, "the reason stands in the server's log")
    session = server.connect(kernel)
    assert session.run("x")["ename"] == "NameError"
    assert (
        session.run("assert '/safe-exec-' in open('/proc/self/cgroup').read()")["status"] == "ok"
    ), "inside limits again"

    # Restart, with a child in the background that must not outlive its kernel.
    session.run(
        "import subprocess\nchild = subprocess.Popen(['sleep', '600'], start_new_session=True)\ny = 2"
    )
    server.ask("POST", f"kernels/{kernel}/restart")
    session = server.connect(kernel)
    assert session.run("y")["ename"] == "NameError"
    assert server.log.read_text().count("kernel ended") == 1, "what was asked for is no news"

    before = len(marked_processes(mark))
    assert before > 1
    server.ask("DELETE", f"kernels/{kernel}")
    wait_until(lambda: len(marked_processes(mark)) == 1, 60, "only the server is left")
