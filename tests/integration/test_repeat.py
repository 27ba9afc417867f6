"""Flaky cells, found by repeated runs: in run, batch, the plugin and from Python."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import safe_exec
from tests.support import make_notebook, run_notebook
from tests.support import safe_exec as command

COUNT = """from pathlib import Path
path = Path('count')
count = int(path.read_text()) + 1 if path.exists() else 1
path.write_text(str(count))"""
# Prints something else in the second run, and fails in the third.
FLAKY = "print(count == 2)\nassert count != 3"


def flaky(folder: Path) -> Path:
    (folder / "count").unlink(missing_ok=True)
    return make_notebook(folder / "nb.ipynb", COUNT, "print('same')", FLAKY)


def test_cells_that_differ_between_runs_are_named(tmp_path: Path) -> None:
    run = run_notebook(flaky(tmp_path), "--repeat", "3")
    assert (run.code, run.verdict["runs"]) == (0, 3)
    summary = "stdout differs in 1 of 2 repeats, failed instead of passed in 1 of 2 repeats"
    assert run.verdict["flaky_cells"] == [{"index": 2, "code_index": 2, "summary": summary}]
    assert f"flaky: code cell 3: {summary}" in run.verdict["warnings"]
    assert run.notebook.cells[2].outputs[0].text == "False\n", "the first run is documented"


def test_batch_plugin_and_python_repeat_too(tmp_path: Path) -> None:
    path = flaky(tmp_path)
    done = command("batch", path, "--out", tmp_path / "out", "--repeat", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    (written,) = (tmp_path / "out").rglob("nb.verdict.json")
    (cell,) = json.loads(written.read_text())["flaky_cells"]
    assert cell["summary"] == "stdout differs in 1 of 1 repeats"
    flaky(tmp_path)
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--safe-exec",
            "--safe-exec-repeat=2", str(path),
        ],
        cwd=tmp_path, capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "FlakyCells" in done.stdout, done.stdout + done.stderr
    verdict = safe_exec.run(make_notebook(path, "print('same')"), repeat=2)
    assert (verdict.runs, verdict.flaky_cells) == (2, ())
