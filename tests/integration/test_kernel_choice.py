"""Another kernel of the same language for one that is not installed: in run, batch, the plugin and from Python."""

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


def test_a_kernel_of_the_same_language_runs_the_notebook_with_a_warning(tmp_path: Path) -> None:
    path = make_notebook(tmp_path / "nb.ipynb", "print(1)", kernel="conda-env-x-py")
    run = run_notebook(path)
    assert (run.code, run.verdict["notebook"]["kernel"]) == (0, "python3")
    assert run.verdict["warnings"][0].startswith(
        "kernel conda-env-x-py is not installed: ran with python3"
    )


@pytest.mark.parametrize(
    ("options", "language"),
    [(("--kernel-fallback", "never"), "python"), (("--kernel", "mine"), "python"), ((), "cobol")],
)
def test_a_kernel_is_not_replaced_against_the_users_word_or_by_another_language(
    tmp_path: Path, options: tuple[str, ...], language: str
) -> None:
    path = make_notebook(tmp_path / "nb.ipynb", "1", kernel="mine", language=language)
    run = run_notebook(path, *options)
    assert (run.code, run.verdict["status"]) == (6, "start_failed")


@pytest.mark.bed("bash")
def test_a_notebook_without_a_kernelspec_runs_by_its_language(tmp_path: Path) -> None:
    path = make_notebook(tmp_path / "nb.ipynb", "echo $((6 * 7))", language="bash")
    node = nbformat.read(path, 4)
    del node.metadata["kernelspec"]
    nbformat.write(node, path)
    run = run_notebook(path)
    assert (run.code, run.verdict["notebook"]["kernel"]) == (0, "bash")


@pytest.mark.bed("bash")
def test_in_batch_and_plugin_a_kernel_is_for_the_notebooks_of_its_language(tmp_path: Path) -> None:
    folder = tmp_path / "notebooks"
    folder.mkdir()
    make_notebook(folder / "shell.ipynb", "test -n $BASH", kernel="bash", language="bash")
    make_notebook(folder / "python.ipynb", "import sys", kernel="gone")
    done = command("batch", folder, "--out", tmp_path / "out", "--kernel", "python3")
    assert done.returncode == 0, done.stdout + done.stderr
    kernels = [
        json.loads(path.read_text())["notebook"]["kernel"]
        for path in sorted((tmp_path / "out").rglob("*.verdict.json"))
    ]
    assert kernels == ["python3", "bash"]
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--safe-exec",
            "--safe-exec-kernel-fallback", "never", "--safe-exec-no-bisect", str(folder),
        ],
        cwd=tmp_path, capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    verdict = safe_exec.run(folder / "python.ipynb", kernel_fallback="never")
    assert verdict.status == "start_failed"
