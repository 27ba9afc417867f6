"""Retries after transient errors: in run, batch, the plugin and from Python."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import safe_exec
from tests.support import make_notebook, run_notebook
from tests.support import safe_exec as command

# Fails until it has run twice.
FLAKY = """from pathlib import Path
seen = Path('seen')
if not seen.exists():
    seen.touch()
    raise ConnectionError('HTTP 503')"""
FAILURE = "error in code cell 1 · ConnectionError: HTTP 503"


def flaky(folder: Path) -> Path:
    (folder / "seen").unlink(missing_ok=True)
    return make_notebook(folder / "nb.ipynb", FLAKY)


def test_an_error_that_matches_is_tried_again_and_reported(tmp_path: Path) -> None:
    run = run_notebook(flaky(tmp_path), "--retry-on", "HTTP 5..")
    assert (run.code, run.verdict["attempts"]) == (0, 2)
    assert run.verdict["warnings"] == [f"flaky: attempt 1 failed: {FAILURE}"]
    assert f"trying again: {FAILURE}" in run.stderr


def test_another_error_and_a_last_attempt_are_not(tmp_path: Path) -> None:
    run = run_notebook(flaky(tmp_path), "--retry-on", "Timeout", "--no-bisect")
    assert (run.code, run.verdict["attempts"], run.verdict["warnings"]) == (1, 1, [])
    path = make_notebook(tmp_path / "nb.ipynb", "raise OSError('no')")
    run = run_notebook(path, "--retry-on", "OSError", "--retries", "1", "--no-bisect")
    assert (run.code, run.verdict["attempts"]) == (1, 2)


def test_a_pattern_that_is_wrong_is_one_line(tmp_path: Path) -> None:
    done = command("run", flaky(tmp_path), "--retry-on", "(")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "--retry-on (: not a regular expression" in done.stderr


def test_batch_plugin_and_python_try_again_too(tmp_path: Path) -> None:
    path = flaky(tmp_path)
    done = command("batch", path, "--out", tmp_path / "out", "--retry-on", "ConnectionError")
    assert done.returncode == 0 and "flaky: attempt 2" in done.stdout, done.stdout + done.stderr
    (written,) = (tmp_path / "out").rglob("nb.verdict.json")
    assert json.loads(written.read_text())["attempts"] == 2
    flaky(tmp_path)
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--safe-exec",
            "--safe-exec-retry-on=ConnectionError", str(path),
        ],
        cwd=tmp_path, capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    flaky(tmp_path)
    assert safe_exec.run(path, retry_on="Connection.*").attempts == 2
