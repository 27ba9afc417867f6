"""A limit that the last cell passes decides the status in every front end, though the cell itself has come to its end.

As an ordinary user without control groups, so that the watchdog holds the limit: its look may come after the cell's reply.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest

from tests.support import NOBODY, make_notebook, ordinary_user, private_directory

pytestmark = [pytest.mark.kills, pytest.mark.bed("ordinary-user")]

BIN = Path(sys.executable).parent
PAST = "kept = b'x' * (160 << 20)"
LIMIT = ("--memory", "128M")
BY_API = """
import json, safe_exec
verdict = safe_exec.run("nb.ipynb", options={"memory": "128M"}, mechanisms=["rlimit", "watchdog"], bisect="never")
print(json.dumps([str(verdict.status), str(verdict.cause.kind), verdict.crash_cell.code_index]))
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    with private_directory() as path:
        make_notebook(path / "nb.ipynb", "x = 1", PAST)
        os.chown(path / "nb.ipynb", NOBODY, NOBODY)
        yield path


def run(folder: Path, *command: str | Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "HOME": str(folder), "XDG_CACHE_HOME": str(folder / "cache")}
    env.pop("PYTEST_CURRENT_TEST", None)
    argv = [*ordinary_user(), *map(str, command)]
    return subprocess.run(
        argv, cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False
    )


def test_by_the_api(folder: Path) -> None:
    done = run(folder, sys.executable, "-c", BY_API)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == ["kernel_died", "out_of_memory", 1], (
        done.stdout + done.stderr
    )


def test_in_a_batch(folder: Path) -> None:
    done = run(
        folder,
        BIN / "safe-exec",
        "batch",
        ".",
        "--out",
        "out",
        *LIMIT,
        "--no-bisect",
        "--mechanisms",
        "rlimit,watchdog",
    )
    assert done.returncode == 3, done.stdout + done.stderr
    assert "out of memory" in done.stdout


def test_in_pytest(folder: Path) -> None:
    options = (
        "-p",
        "no:cacheprovider",
        "--safe-exec",
        "--safe-exec-memory",
        "128M",
        "--safe-exec-no-bisect",
    )
    done = run(folder, sys.executable, "-m", "pytest", *options, "nb.ipynb")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "out of memory" in done.stdout


def test_in_papermill(folder: Path) -> None:
    (folder / "safe-exec.yaml").write_text("limits:\n  - path: '*.ipynb'\n    memory: 128M\n")
    (folder / ".git").mkdir()
    done = run(
        folder,
        BIN / "papermill",
        "--engine",
        "safe-exec",
        "nb.ipynb",
        "out.ipynb",
        "--no-progress-bar",
    )
    assert done.returncode != 0, done.stdout + done.stderr
    node = nbformat.read(folder / "out.ipynb", as_version=4)
    assert node.metadata.papermill.exception is True
    assert "out of memory" in json.dumps(node)
