"""Notebooks executed in place and cleaned for version control: in run, batch, the plugin and from Python."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

import safe_exec
from tests.support import make_notebook
from tests.support import safe_exec as command


def test_a_notebook_that_passes_is_replaced_and_a_link_to_it_stays(tmp_path: Path) -> None:
    path = make_notebook(tmp_path / "nb.ipynb", "print(6 * 7)")
    path.chmod(0o640)
    link = tmp_path / "link.ipynb"
    link.symlink_to(path.name)
    done = command("run", link, "--in-place", "--clean-metadata")
    assert done.returncode == 0 and "wrote       nb.ipynb" in done.stdout, done.stdout
    assert link.is_symlink() and path.stat().st_mode & 0o777 == 0o640
    node = nbformat.read(path, 4)
    assert node.cells[0].outputs[0].text == "42\n" and node.cells[0].metadata == {}
    assert node.metadata["language_info"] == {"name": "python"}, "without its version"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "link.ipynb",
        "link.verdict.json",
        "nb.ipynb",
    ]
    first = path.read_bytes()
    assert command("run", path, "--in-place", "--clean-metadata", "-q").returncode == 0
    assert path.read_bytes() == first, "the same outputs are the same bytes"


def test_a_failure_is_kept_out_of_the_notebook_unless_it_is_wanted(tmp_path: Path) -> None:
    path = make_notebook(tmp_path / "nb.ipynb", "1 / 0")
    before = path.read_bytes()
    assert command("run", path, "--in-place", "--no-bisect").returncode == 1
    assert path.read_bytes() == before
    assert nbformat.read(tmp_path / "nb.out.ipynb", 4).cells[0].cell_type == "markdown"
    (tmp_path / "nb.out.ipynb").unlink()
    options = ("--in-place", "--on-failure", "write", "--no-output", "--no-bisect")
    assert command("run", path, *options).returncode == 1
    banner, cell = nbformat.read(path, 4).cells
    assert "ZeroDivisionError" in banner.source and cell.outputs == []
    assert not (tmp_path / "nb.out.ipynb").exists()


def test_a_notebook_saved_during_the_run_is_not_overwritten(tmp_path: Path) -> None:
    path = make_notebook(tmp_path / "nb.ipynb", "open('nb.ipynb', 'a').write(' ')")
    done = command("run", path, "--in-place")
    assert done.returncode == 0 and "nb.ipynb was not written in place" in done.stdout
    assert path.read_bytes().endswith(b" ") and (tmp_path / "nb.out.ipynb").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--on-failure", "write"), "--on-failure: the notebook itself is not written"),
        (("-o", "nb.ipynb"), "or use --in-place"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, options: tuple[str, ...], words: str) -> None:
    make_notebook(tmp_path / "nb.ipynb", "1")
    done = command("run", "nb.ipynb", *options, cwd=tmp_path)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1


def test_batch_plugin_and_python_take_the_same(tmp_path: Path) -> None:
    (tmp_path / "notebooks").mkdir()
    path = make_notebook(tmp_path / "notebooks" / "nb.ipynb", "print(1)")
    done = command("batch", path.parent, "--out", tmp_path / "out", "--in-place")
    assert done.returncode == 0, done.stdout + done.stderr
    cell = nbformat.read(path, 4).cells[0]
    assert cell.outputs and "safe_exec" in cell.metadata
    (written,) = (tmp_path / "out").rglob("nb.out.ipynb")
    assert nbformat.read(written, 4).cells[0].outputs
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--safe-exec",
            "--safe-exec-in-place", "--safe-exec-clean-metadata", str(path),
        ],
        cwd=tmp_path, capture_output=True, text=True, timeout=180, check=False,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    cell = nbformat.read(path, 4).cells[0]
    assert cell.outputs and cell.metadata == {}
    verdict = safe_exec.run(path, in_place=True, no_output=True)
    assert verdict.outputs["notebook"] == str(path)
    assert json.loads(path.read_text())["cells"][0]["outputs"] == []
