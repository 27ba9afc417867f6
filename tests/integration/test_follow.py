"""Output of cells while they run: in run, batch, the plugin and from Python."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import safe_exec
from tests.support import EXECUTABLE, make_notebook
from tests.support import safe_exec as command

WAITS = """import os, time
print('waiting', flush=True)
while not os.path.exists('go'):
    time.sleep(0.02)
print('gone on')"""


def test_output_is_shown_while_the_cell_runs(tmp_path: Path) -> None:
    make_notebook(tmp_path / "nb.ipynb", "1", WAITS)
    argv = [str(EXECUTABLE), "run", "nb.ipynb", "--follow", "-q", "--cell-timeout", "60"]
    with subprocess.Popen(argv, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "--- code cell 2/2 ---\n"
        assert process.stderr.readline() == "waiting\n"
        # The cell ends only now: its output was here before.
        (tmp_path / "go").touch()
        assert process.stderr.read() == "gone on\n"
    assert process.returncode == 0


def test_the_last_output_of_a_dying_kernel_is_shown_and_a_search_is_not(tmp_path: Path) -> None:
    path = make_notebook(tmp_path / "nb.ipynb", "print('last', end='')\nimport os\nos.abort()")
    done = command("run", path, "--follow", "--bisect", "always", env={"GITHUB_ACTIONS": "true"})
    assert done.returncode == 3
    assert done.stderr.count("::group::code cell 1/1\n| last\n") == 1, done.stderr
    assert done.stderr.count("last") == 1 and "::endgroup::" in done.stderr


def test_batch_plugin_and_python_follow_too(tmp_path: Path) -> None:
    folder = tmp_path / "notebooks"
    folder.mkdir()
    for name in "ab":
        make_notebook(folder / f"{name}.ipynb", f"print('text of {name}')")
    done = command("batch", "notebooks", "--follow", cwd=tmp_path, env={"GITHUB_ACTIONS": ""})
    assert done.returncode == 0, done.stdout + done.stderr
    for name in "ab":
        assert f"notebooks/{name}.ipynb [1]: text of {name}\n" in done.stderr
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "--safe-exec",
            "--safe-exec-follow", str(folder / "a.ipynb"),
        ],
        cwd=tmp_path, capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert "--- code cell 1/1 ---\ntext of a\n" in done.stdout, done.stdout + done.stderr
    texts: list[tuple[int, str, str]] = []
    safe_exec.run(folder / "a.ipynb", on_output=lambda *text: texts.append(text))
    assert texts == [(0, "stdout", "text of a\n")]
