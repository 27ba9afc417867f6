"""Longer cell timeouts that a project allows for a path, under every profile: in run, batch, the plugin and from Python."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

import safe_exec
from tests.support import make_notebook, run_notebook
from tests.support import safe_exec as command

PROJECT = """limits:
  - path: "slow/*.ipynb"
    cell_timeout: 1
    longest_cell_timeout: 30
"""


@pytest.fixture
def slow(tmp_path: Path) -> Path:
    (tmp_path / ".git").mkdir()
    (tmp_path / "slow").mkdir()
    (tmp_path / "safe-exec.yaml").write_text(PROJECT)
    path = make_notebook(tmp_path / "slow" / "nb.ipynb", "import time\ntime.sleep(1.5)")
    node = nbformat.read(path, 4)
    node.cells[0].metadata["safe_exec"] = {"limits": {"cell_timeout": 20}}
    nbformat.write(node, path)
    return path


def test_a_cell_may_take_longer_where_the_project_says_so(slow: Path) -> None:
    assert run_notebook(slow, "--limits", "strict").code == 0
    # An option applies to every cell.
    run = run_notebook(slow, "--cell-timeout", "1", "--no-bisect")
    assert run.verdict["cause"]["kind"] == "cell_timeout"
    (slow.parents[1] / "safe-exec.yaml").write_text(PROJECT.replace("30", "10"))
    run = run_notebook(slow, "--limits", "strict", "--no-bisect")
    assert run.verdict["cause"]["kind"] == "cell_timeout"
    assert "cell_timeout" in run.verdict["warnings"][0]


def test_batch_plugin_and_python_allow_it_too(slow: Path) -> None:
    root = slow.parents[1]
    done = command("batch", slow, "--out", root / "out", "--limits", "strict")
    assert done.returncode == 0, done.stdout + done.stderr
    (written,) = (root / "out").rglob("nb.verdict.json")
    assert json.loads(written.read_text())["limits"]["cell_timeout"] == 1
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--safe-exec",
            "--safe-exec-limits=strict", str(slow),
        ],
        cwd=root, capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert safe_exec.run(slow, limits="strict").status == "passed"


def test_a_bound_that_is_wrong_is_one_line(slow: Path) -> None:
    for word in ("none", "soon"):
        (slow.parents[1] / "safe-exec.yaml").write_text(PROJECT.replace("30", word))
        done = command("run", slow)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert "safe-exec.yaml:4" in done.stderr
