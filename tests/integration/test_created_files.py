"""Files of a run in the verdict, and files kept from a private copy: in run, batch, the plugin and from Python."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import safe_exec
from tests.support import make_notebook, run_notebook
from tests.support import safe_exec as command

WRITES = """import os
os.makedirs('sub', exist_ok=True)
open('sub/plot.png', 'w').write('x' * 1000)
open('table.csv', 'w').write('new')
os.symlink('/etc/passwd', 'link.png')
os.makedirs('.cache', exist_ok=True); open('.cache/c.png', 'w')"""


def test_new_and_changed_files_are_listed(tmp_path: Path) -> None:
    path = make_notebook(tmp_path / "nb.ipynb", WRITES)
    (tmp_path / "table.csv").write_text("")
    (tmp_path / "old.csv").write_text("old")
    run = run_notebook(path)
    assert run.verdict["files"] == [
        {"path": "sub/plot.png", "bytes": 1000, "from_copy": False},
        {"path": "table.csv", "bytes": 3, "from_copy": False},
    ]
    assert run.verdict["more_files"] is False


@pytest.mark.bed("bubblewrap")
def test_files_of_a_private_copy_are_kept_by_pattern(tmp_path: Path) -> None:
    path = make_notebook(tmp_path / "nb.ipynb", WRITES)
    outside = tmp_path.with_name(f"{tmp_path.name}-outside")
    outside.mkdir()
    run = run_notebook(path, "--limits", "untrusted", "--keep-files", "*.png")
    assert run.verdict["files"] == [{"path": "sub/plot.png", "bytes": 1000, "from_copy": True}]
    assert (tmp_path / "sub" / "plot.png").read_text() == "x" * 1000
    assert not (tmp_path / "table.csv").exists() and not (tmp_path / "link.png").exists()
    assert "table.csv" in run.verdict["warnings"][0]
    assert "--keep-files" in run.verdict["warnings"][0]
    # A link in the real folder does not lead a file elsewhere.
    (tmp_path / "sub" / "plot.png").unlink()
    (tmp_path / "sub").rmdir()
    (tmp_path / "sub").symlink_to(outside)
    make_notebook(path, WRITES.replace("'sub'", "'sub2'").replace("sub/", "sub2/"))
    (tmp_path / "sub2").symlink_to(outside)
    run = run_notebook(path, "--limits", "untrusted", "--keep-files", "sub2/*.png")
    assert list(outside.iterdir()) == []


@pytest.mark.bed("bubblewrap")
def test_batch_plugin_and_python_keep_files_too(tmp_path: Path) -> None:
    folder = tmp_path / "notebooks"
    folder.mkdir()
    path = make_notebook(folder / "nb.ipynb", WRITES)
    kept = folder / "sub" / "plot.png"
    options = ("--limits", "strict", "--keep-files", "sub/*")
    done = command("batch", folder, "--out", tmp_path / "out", *options)
    assert done.returncode == 0 and kept.exists(), done.stdout + done.stderr
    (written,) = (tmp_path / "out").rglob("nb.verdict.json")
    assert [file["path"] for file in json.loads(written.read_text())["files"]] == ["sub/plot.png"]
    kept.unlink()
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--safe-exec",
            *(f"--safe-exec-{option}" for option in ("limits=strict", "keep-files=sub/*")),
            str(path),
        ],
        cwd=tmp_path, capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and kept.exists(), done.stdout + done.stderr
    kept.unlink()
    verdict = safe_exec.run(path, limits="strict", keep_files=["plot.png"])
    assert verdict.files is not None and [file.path for file in verdict.files] == ["sub/plot.png"]
