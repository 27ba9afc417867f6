"""Walls that must stand: where one of them does not, nothing is run, by whatever command.

bubblewrap is taken away by a PATH on which it is not: what is left is what Landlock and the filter of system calls can do.
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.support import make_notebook, ordinary_user, private_directory, run_notebook, safe_exec

NO_BUBBLEWRAP = {"PATH": "/nowhere"}


@pytest.fixture
def marker() -> Iterator[Path]:
    """A file that is there once any cell has run outside of walls."""
    path = Path("/tmp") / f"safe-exec-test-{secrets.token_hex(6)}"
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture
def notebook(marker: Path) -> Iterator[Path]:
    with private_directory() as folder:
        yield make_notebook(folder / "nb.ipynb", f"open({str(marker)!r}, 'w').write('ran')\n1 / 0")


def options(*more: str) -> Sequence[str]:
    return ("--no-bisect", *more)


@pytest.mark.parametrize(
    ("asked", "names"),
    [
        (("--limits", "untrusted"), "network, processes"),
        (("--limits", "strict", "--require", "walls"), "network, processes"),
        (("--limits", "ci", "--require", "memory,own-processes"), "--require processes"),
        (("--no-network", "--require", "network"), "--require network"),
    ],
)
@pytest.mark.parametrize(
    "who",
    [
        pytest.param("root", marks=pytest.mark.bed("root")),
        pytest.param("user", marks=pytest.mark.bed("ordinary-user")),
    ],
)
@pytest.mark.bed("landlock", "cgroup-v1-root")
def test_nothing_runs(
    asked: tuple[str, ...], names: str, who: str, notebook: Path, marker: Path
) -> None:
    if who == "user" and "memory" in asked[-1]:
        asked = (*asked[:-1], "own-processes")
    prefix = ordinary_user() if who == "user" else []
    prefix = [shutil.which(part) or part if part in ("setpriv", "env") else part for part in prefix]
    done = run_notebook(notebook, *options(*asked), env=NO_BUBBLEWRAP, prefix=prefix)
    assert (done.code, done.verdict["status"]) == (7, "internal_error"), done.stdout
    assert names in done.verdict["cause"]["summary"], done.verdict["cause"]
    assert [cell["status"] for cell in done.verdict["cells"]] == ["not_run"]
    assert not marker.exists()


@pytest.mark.bed("landlock")
def test_what_holds_as_well_will_do(notebook: Path, marker: Path) -> None:
    done = run_notebook(
        notebook, *options("--limits", "ci", "--require", "home,system"), env=NO_BUBBLEWRAP
    )
    assert (done.code, done.verdict["environment"]["isolation"]["home"]["by"]) == (1, "landlock"), (
        done.stdout
    )
    assert marker.exists(), "there is no /tmp of its own without bubblewrap: a test of the marker"


def test_who_says_so_runs_all_the_same(notebook: Path) -> None:
    done = run_notebook(
        notebook, *options("--limits", "untrusted", "--require", "none"), env=NO_BUBBLEWRAP
    )
    assert done.code == 1 and "weak wall" in done.stdout, done.stdout
    assert done.verdict["isolation"]["required"] is False
    assert [cell["status"] for cell in done.verdict["cells"]] == ["failed"]


@pytest.mark.bed("bubblewrap")
def test_where_they_stand_it_runs_and_what_comes_after_it_must_have_them_too(
    notebook: Path, marker: Path
) -> None:
    done = run_notebook(notebook, *options("--limits", "untrusted"))
    assert done.code == 1 and done.verdict["isolation"]["required"] is True, done.stdout
    verdict = notebook.with_suffix(".verdict.json")
    for command in (
        ("replay", verdict),
        ("probe", notebook, "memory", "--limits", "untrusted"),
        ("bisect", notebook),
    ):
        asked = safe_exec(*command, env=NO_BUBBLEWRAP)
        assert asked.returncode == 7, (
            f"{command}: {asked.returncode}\n{asked.stdout}\n{asked.stderr}"
        )
        assert "walls are required" in asked.stdout + asked.stderr, (
            f"{command}\n{asked.stdout}\n{asked.stderr}"
        )
        assert not marker.exists(), command
    assert safe_exec("bisect", notebook).returncode in (0, 1)
    assert not marker.exists(), "a search has the walls of the run"
    assert json.loads(verdict.read_text())["run_id"] == done.run_id, "none of them wrote another"


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (("--require", "walls"), "no wall is requested"),
        (("--require", "network"), "this wall is not requested"),
        (("--require", "wall"), "own_processes"),
    ],
)
def test_what_is_not_asked_for_cannot_be_required(
    asked: tuple[str, ...], words: str, notebook: Path
) -> None:
    done = safe_exec("run", notebook, *asked)
    assert done.returncode == 2 and words in done.stderr, done.stderr
