"""The kernel just before a failure: its state, a death in the user's hands, and nothing that stays."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.blocking.client import BlockingKernelClient

from tests.support import (
    EXECUTABLE,
    MARK,
    kept_folders,
    make_notebook,
    marked_processes,
    orphaned_groups,
    run_notebook,
    wait_until,
)

SEGFAULT = (
    "import ctypes\nbase = 41",
    "print('between')",
    "address = base - 41",
    "ctypes.string_at(address)",
)
FILE = re.compile(r"connection file +(\S+)")


class Session:
    """A ``safe-exec debug`` without a terminal, and a client of its kernel."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.mark = f"debug-{os.getpid()}-{id(self)}"
        self.runtime = folder / "runtime"
        own = {"XDG_CACHE_HOME": str(folder / "cache"), "JUPYTER_RUNTIME_DIR": str(self.runtime)}
        self.cache = folder / "cache"
        self.process = subprocess.Popen(
            [str(EXECUTABLE), "debug", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | own | {MARK: self.mark},
            cwd=folder,
        )
        self.lines: list[str] = []

    def file(self) -> Path:
        """Wait for the connection file that it prints."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if match := FILE.search(line):
                return Path(match[1])
        raise AssertionError("".join(self.lines))

    @contextmanager
    def client(self) -> Iterator[Any]:
        client: Any = BlockingKernelClient(connection_file=str(self.file()))
        client.load_connection_file()
        client.start_channels()
        try:
            client.wait_for_ready(timeout=60)
            yield client
        finally:
            client.stop_channels()

    def end(self, *, interrupt: bool = True) -> tuple[int, str]:
        if interrupt:
            self.process.send_signal(signal.SIGINT)
        rest = self.process.communicate(timeout=60)[0]
        return self.process.returncode, "".join(self.lines) + rest

    def left(self) -> list[str]:
        found = [*map(str, marked_processes(self.mark)), *map(str, orphaned_groups())]
        return [*found, *map(str, self.runtime.glob("safe-exec-*")), *kept_folders(self.cache)]


def value(client: Any, expression: str) -> str:
    reply = client.execute_interactive(
        "", user_expressions={"x": expression}, store_history=False, timeout=60
    )
    return str(reply["content"]["user_expressions"]["x"]["data"]["text/plain"])


@pytest.mark.kills
def test_the_state_before_a_death_and_the_death_itself(tmp_path: Path) -> None:
    path = make_notebook(tmp_path / "nb.ipynb", *SEGFAULT)
    verdict = run_notebook(path).verdict
    assert verdict["cause"]["kind"] == "segfault"
    before = sorted(tmp_path.iterdir())
    session = Session(tmp_path, str(path.with_suffix(".verdict.json")))
    with session.client() as client:
        assert session.left() != []
        assert value(client, "(base, address)") == "(41, 0)"
        client.execute_interactive("open('new.txt', 'w').write('x')", timeout=60)
        reply = client.execute_interactive("ctypes.string_at(address)", timeout=60)
        assert reply["content"]["ename"] == "SafeExec: segfault"
    code, text = session.end(interrupt=False)
    assert code == 3
    assert "Next is code cell 4:\n    ctypes.string_at(address)" in text
    # The user's cells go on counting behind those of the notebook.
    assert "✗ kernel died in code cell 6 · segfault · SIGSEGV" in text
    wait_until(lambda: session.left() == [], 10, "nothing is left")
    assert sorted(p for p in tmp_path.iterdir() if p.name not in ("runtime", "cache")) == before


@pytest.mark.kills
def test_culprits_alone_and_other_places(tmp_path: Path) -> None:
    path = make_notebook(tmp_path / "nb.ipynb", *SEGFAULT)
    run_notebook(path)
    session = Session(tmp_path, str(path), "--culprits")
    with session.client() as client:
        assert value(client, "address") == "0"
        assert value(client, "len([s for s in In if s])") == "2"
    assert session.end()[0] == 0
    session = Session(tmp_path, str(path), "--at", "3", "--before")
    with session.client() as client:
        assert value(client, "'address' in globals(), base") == "(False, 41)"
    # Killed, it leaves nothing either: its keeper cleans up.
    session.process.kill()
    session.process.communicate()
    wait_until(lambda: session.left() == [], 10, "nothing is left")


@pytest.mark.kills
def test_a_notebook_that_fails_on_the_way(tmp_path: Path) -> None:
    path = make_notebook(tmp_path / "nb.ipynb", "import os", "os._exit(5)", "x = 1")
    session = Session(tmp_path, str(path), "--at", "3")
    code, text = session.end(interrupt=False)
    assert code == 3
    assert "the notebook did not get there" in text
    assert "✗ kernel died in code cell 2 · exit · exit status 5" in text
    wait_until(lambda: session.left() == [], 10, "nothing is left")


@pytest.mark.kills
def test_post_mortem(tmp_path: Path) -> None:
    path = make_notebook(
        tmp_path / "nb.ipynb",
        "values = [1, 0]",
        "def ratio(a, b):\n    return a / b",
        "ratio(*values)",
    )
    run_notebook(path)
    done = subprocess.run(
        [str(EXECUTABLE), "debug", str(path), "--python"],
        input="p ('args', a, b)\nup\np values\n",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "('args', 1, 0)" in done.stdout
    assert "[1, 0]" in done.stdout


@pytest.mark.kills
@pytest.mark.bed("bash")
def test_another_language(tmp_path: Path) -> None:
    path = make_notebook(
        tmp_path / "nb.ipynb", "answer=42", "kill -9 $PPID", kernel="bash", language="bash"
    )
    run_notebook(path, "--no-bisect")
    session = Session(tmp_path, str(path))
    with session.client() as client:
        texts: list[str] = []
        client.execute_interactive(
            "echo answer $answer",
            timeout=60,
            output_hook=lambda message: texts.append(message["content"].get("text", "")),
        )
        assert "".join(texts).strip() == "answer 42"
    assert session.end()[0] == 0
    wait_until(lambda: session.left() == [], 10, "nothing is left")
