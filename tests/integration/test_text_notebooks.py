"""Notebooks that are kept as text: in run, batch, the plugin and from Python."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import safe_exec
from tests.support import safe_exec as command

SCRIPT = """# %% tags=["parameters"]
x = 1

# %%
print(x)
assert x == 2
"""
MARKDOWN = "# T\n\n```{code-cell} python3\nprint('text')\n```\n"

pytestmark = pytest.mark.bed("jupytext")


def test_a_script_runs_and_its_failure_names_the_line_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_text(SCRIPT)
    done = command("run", path, "--no-bisect")
    assert done.returncode == 1 and "line 2 (a.py:6)" in done.stdout, done.stdout + done.stderr
    verdict = json.loads((tmp_path / "a.py.verdict.json").read_text())
    assert verdict["crash_cell"]["file_line"] == 6
    done = command("run", path, "-p", "x", "2")
    assert done.returncode == 0 and path.read_text() == SCRIPT
    # The cell that sets the parameters moves the others, but not their lines.
    done = command("run", path, "-p", "x", "3", "--bisect", "always")
    assert "line 2 (a.py:6)" in done.stdout, done.stdout + done.stderr
    replayed = command("replay", tmp_path / "a.py.verdict.json")
    assert replayed.returncode == 0, replayed.stdout + replayed.stderr


def test_batch_plugin_and_python_run_texts_that_are_named(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.py").write_text(SCRIPT)
    (tmp_path / "docs" / "b.md").write_text(MARKDOWN)
    (tmp_path / "docs" / "c.md").write_text("# nothing\n")
    done = command(
        "batch", "docs/a.py", "docs/b.md", "--no-bisect", "--github",
        cwd=tmp_path, env={"GITHUB_STEP_SUMMARY": ""},
    )  # fmt: skip
    assert done.returncode == 1 and "1 passed" in done.stdout, done.stdout + done.stderr
    assert "::error file=docs/a.py,line=6" in done.stdout, done.stdout
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--safe-exec"]
    done = subprocess.run(
        [*argv, "--safe-exec-no-bisect", "docs/a.py", "docs/b.md"],
        cwd=tmp_path, capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    assert "FAILED docs/a.py" in done.stdout
    verdict = safe_exec.run(tmp_path / "docs" / "b.md")
    assert verdict.status == "passed" and verdict.outputs["notebook"].endswith("b.md.out.ipynb")
