"""Failing shell commands and answers to input(), with real kernels: in run, batch, the plugin and from Python."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import safe_exec
from tests.support import make_notebook, run_notebook
from tests.support import safe_exec as command

COMMANDS = """x = 1
!exit 3
listing = !ls /nonexistent
def local():
    word = 'inner'
    !echo {word} && kill -9 $$
local()
!true"""
HINT = "--strict-shell makes this an error"
QUESTIONS = "import getpass\nname = input('name? ')\nprint(name, getpass.getpass())"


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    path = tmp_path / "answers.txt"
    path.write_text("Änn\nsecret\n")
    return path


def test_failing_commands_are_warnings_with_line_and_status(tmp_path: Path) -> None:
    path = make_notebook(tmp_path / "nb.ipynb", "'first'", COMMANDS)
    run = run_notebook(path)
    assert (run.code, run.verdict["warnings"]) == (
        0,
        [
            "code cell 2, line 2: !exit 3 failed with status 3",
            "code cell 2, line 3: !ls /nonexistent failed with status 2",
            f"code cell 2, line 6: !echo inner && kill -9 $$ was ended by SIGKILL ({HINT})",
        ],
    )


@pytest.mark.parametrize(
    ("source", "line"), [(COMMANDS, 2), ("1\nx = !exit 4", 2), ("%pip install ./nowhere", 1)]
)
def test_strict_shell_fails_the_cell_at_the_command(tmp_path: Path, source: str, line: int) -> None:
    path = make_notebook(tmp_path / "nb.ipynb", source, "print('never')")
    run = run_notebook(path, "--strict-shell", "--no-bisect")
    assert (run.code, run.verdict["crash_cell"]["line"]) == (1, line)
    assert run.verdict["cause"]["summary"].startswith("CalledProcessError")
    assert run.verdict["notebook"]["strict_shell"] and not run.verdict["warnings"]


def test_lines_of_a_file_answer_input(tmp_path: Path, answers: Path) -> None:
    path = make_notebook(
        tmp_path / "nb.ipynb", QUESTIONS, "try: input()\nexcept EOFError: print('end')"
    )
    run = run_notebook(path, "--stdin", str(answers), "--limits", "ci")
    assert (run.code, run.verdict["warnings"]) == (0, [])
    assert [cell.outputs[0].text for cell in run.notebook.cells] == ["Änn secret\n", "end\n"]
    assert run.verdict["notebook"]["stdin"] == str(answers)
    assert "secret" not in json.dumps(run.verdict)


def test_a_search_and_a_replay_answer_again(tmp_path: Path, answers: Path) -> None:
    path = make_notebook(
        tmp_path / "nb.ipynb", "1", QUESTIONS, "import os\nif name == 'Änn': os.abort()"
    )
    run = run_notebook(path, "--stdin", str(answers), "--bisect", "always")
    assert [cell["code_index"] for cell in run.verdict["culprits"]["cells"]] == [1, 2]
    replayed = command("replay", tmp_path / "nb.verdict.json")
    assert replayed.returncode == 0, replayed.stdout + replayed.stderr


def test_too_few_lines_are_named(tmp_path: Path, answers: Path) -> None:
    path = make_notebook(tmp_path / "nb.ipynb", QUESTIONS, "input('more? ')")
    run = run_notebook(path, "--stdin", str(answers), "--no-bisect")
    assert run.verdict["cause"]["summary"].startswith("EOFError")
    assert "asked for input 3 times, and --stdin has 2 lines" in run.verdict["warnings"][0]


@pytest.mark.bed("R")
def test_a_kernel_of_another_language_is_answered_and_ignores_strict_shell(
    tmp_path: Path, answers: Path
) -> None:
    path = make_notebook(
        tmp_path / "nb.ipynb", "cat(readline('name? '))", kernel="ir", language="R"
    )
    run = run_notebook(path, "--stdin", str(answers), "--strict-shell")
    assert run.notebook.cells[0].outputs[0].text == "Änn"
    assert "--strict-shell has no effect" in run.verdict["warnings"][0]


def test_batch_plugin_and_python_take_the_same(tmp_path: Path, answers: Path) -> None:
    folder = tmp_path / "notebooks"
    folder.mkdir()
    make_notebook(folder / "asks.ipynb", QUESTIONS)
    make_notebook(folder / "fails.ipynb", "!exit 5")
    done = command("batch", folder, "--out", tmp_path / "out", "--stdin", answers, "--strict-shell")
    assert done.returncode == 1 and "1 passed" in done.stdout, done.stdout + done.stderr
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--safe-exec",
            "--safe-exec-stdin", answers.name, "--safe-exec-strict-shell", str(folder),
        ],
        cwd=tmp_path, capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    verdict = safe_exec.run(folder / "asks.ipynb", stdin=answers, strict_shell=True)
    assert verdict.status == "passed" and verdict.notebook.strict_shell
