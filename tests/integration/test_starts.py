"""Runs under another umask, locale and home than those of a terminal: the same answers, and the files where they belong."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from tests.support import make_notebook, run_notebook

UMASK = ("sh", "-c", 'umask 077; exec "$@"', "sh")
TEXT = "grüße ✓"
CELLS = (f"text = {TEXT!r}\nprint(text)", "import os\nprint(os.getcwd(), os.listdir())", "1 / 0")
"""Each run ends in an error, so that its report is long."""


def check(
    path: Path, *options: str, env: dict[str, str] | None = None, prefix: tuple[str, ...] = ()
) -> None:
    outcome = run_notebook(path, *options, env=env, prefix=prefix)
    assert outcome.code == 1, outcome.stdout + outcome.stderr
    code = [cell for cell in outcome.notebook.cells if cell.cell_type == "code"]
    first, second = (cell.outputs[0]["text"] for cell in code[:2])
    assert first == f"{TEXT}\n"
    assert str(path.parent) in second and path.name in second
    assert "code cell 3" in outcome.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for parent in (tmp_path, *tmp_path.parents):  # pytest's own are for its user alone
        if parent.stat().st_uid == os.getuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o011)
    return tmp_path


@pytest.mark.kills
@pytest.mark.parametrize(
    "env",
    [
        {"LC_ALL": "C"},
        {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"LC_ALL": "de_DE"},
        {"LC_ALL": "C.UTF-8"},
        {"HOME": "/nonexistent"},
        {"PYTHONDONTWRITEBYTECODE": "1"},
    ],
    ids=["C", "ascii", "de", "utf-8", "no home", "no bytecode"],
)
@pytest.mark.parametrize(
    "profile", ["default", pytest.param("strict", marks=pytest.mark.bed("bubblewrap"))]
)
def test_environment(env: dict[str, str], profile: str, folder: Path) -> None:
    check(make_notebook(folder / "nb.ipynb", *CELLS), "--limits", profile, env=env)


@pytest.mark.kills
@pytest.mark.bed("root", "bubblewrap")
def test_a_private_folder_under_a_private_umask_with_a_kernel_of_another_user(folder: Path) -> None:
    """The kernel's user works in a copy of a folder that only root may enter."""
    work = folder / "work"
    work.mkdir(mode=0o700)
    path = make_notebook(work / "nb.ipynb", *CELLS)
    path.chmod(0o600)
    check(path, "--limits", "untrusted", prefix=UMASK)


@pytest.mark.kills
@pytest.mark.bed("root", "bubblewrap")
def test_a_folder_in_a_closed_one_is_refused_with_the_remedy() -> None:
    # Behind these walls /tmp is another one, with folders that everybody may enter.
    with tempfile.TemporaryDirectory(prefix="safe-exec-", dir="/srv") as closed:
        work = Path(closed) / "work"
        work.mkdir()
        outcome = run_notebook(make_notebook(work / "nb.ipynb", *CELLS), "--limits", "untrusted")
    assert outcome.code == 7
    summary = outcome.verdict["cause"]["summary"]
    assert f"may not enter the notebook's folder {work}" in summary and "chmod o+x" in summary
