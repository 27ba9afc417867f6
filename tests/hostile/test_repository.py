"""Notebooks of a repository, which they may write, that look for what lies beside it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from safe_exec.model.verdict import Status
from safe_exec.sandbox.planner import CHOOSABLE
from tests.hostile.arena import Arena, Who
from tests.hostile.test_walls import REFUSED
from tests.support import NOBODY, make_notebook

WITHOUT_BUBBLEWRAP = ("--mechanisms", ",".join(name for name in CHOOSABLE if name != "bubblewrap"))
PLACES = [
    pytest.param("tmp", (), id="tmp-bubblewrap"),
    pytest.param("home", (), id="home-bubblewrap"),
    # /tmp is the machine's own to Landlock.
    pytest.param("home", WITHOUT_BUBBLEWRAP, id="home-landlock", marks=pytest.mark.bed("landlock")),
]

BESIDE = (
    REFUSED
    + """
from pathlib import Path
repo = Path("@REPO@")
(repo / "made.txt").write_text("x")
outside = [repo.parent, repo.parent.parent]
for top in outside:
    for name in ("new.csv", "other/new.csv", "beside.txt"):
        refused(os.open, top / name, os.O_WRONLY | os.O_CREAT)
        refused(os.open, top / name, os.O_RDONLY)
    refused(os.mkdir, top / "made")
    refused(os.symlink, "/", top / "made")
    refused(os.mknod, top / "made")
for path in (repo, repo / "nb"):
    refused(os.rename, path, repo.parent / "moved")
refused(os.rename, repo / "made.txt", repo.parent / "moved")
refused(os.link, repo / "made.txt", repo.parent / "linked")
refused(os.rmdir, repo.parent / "other")

# Links, descriptors and mounts that lead out of it
for number, target in enumerate(("../other/key", "../../beside.txt", "@SECRET@", "/proc/1/root@SECRET@")):
    link = repo / f"link{number}"
    link.symlink_to(target)
    refused(os.open, link, os.O_RDONLY)
    refused(os.open, link, os.O_WRONLY | os.O_CREAT)
up = os.open(repo, os.O_RDONLY | os.O_DIRECTORY)
for name in ("../other/key", "../new.csv", "../../beside.txt"):
    refused(os.open, name, os.O_RDWR | os.O_CREAT, dir_fd=up)
assert "key" not in os.listdir(repo)
print("all held")
"""
)


@pytest.mark.hostile
@pytest.mark.parametrize(("place", "mechanism"), PLACES)
@pytest.mark.parametrize("who", ["root", "user"])
def test_nothing_beside_a_repository_is_reached(
    who: Who, place: str, mechanism: tuple[str, ...]
) -> None:
    directory = "/tmp" if place == "tmp" else "/var/lib"
    with (
        Arena(who, "ci") as arena,
        tempfile.TemporaryDirectory(dir=directory, prefix="h-repo-") as name,
    ):
        home, code = Path(name), Path(name) / "code"
        outer = code / "outer"
        repo = outer / "repo"
        (repo / "nb").mkdir(parents=True)
        (repo / ".git").mkdir()
        (outer / "other").mkdir()
        (outer / "other" / "key").write_text("untouched")
        secret = home / ".ssh" / "id" if place == "home" else arena.home / ".ssh" / "id_test"
        secret.parent.mkdir(exist_ok=True)
        if place == "home":
            secret.write_text("untouched")
        attack = BESIDE.replace("@REPO@", str(repo)).replace("@SECRET@", str(secret))
        path = make_notebook(repo / "nb" / "a.ipynb", attack)
        if who == "user":
            own([home, *home.rglob("*")])
        env = {"HOME": name} if place == "home" else {}
        fight = arena.run_notebook(path, options=("--cell-timeout", "30", *mechanism), env=env)
        assert fight.status == Status.PASSED and "all held" in fight.text, fight
        assert {entry.name for entry in outer.iterdir()} == {"repo", "other"}
        assert (outer / "other" / "key").read_text() == "untouched"
        assert (repo / "made.txt").exists(), "the repository itself may be written"


@pytest.mark.hostile
@pytest.mark.parametrize("who", ["root", "user"])
def test_a_tree_made_to_hold_up_the_list_of_discarded_files_does_not(who: Who) -> None:
    cell = r"""
import os
home = os.path.expanduser("~")
for n in range(30000):
    os.close(os.open(f"{home}/flood{n}", os.O_WRONLY | os.O_CREAT, 0o644))
os.chdir("/tmp")
for n in range(300):
    os.mkdir("d")
    os.chdir("d")
open("/tmp/\x1b]0;owned\x07\x1b[31m\n<b>", "w").write("x" * 5000)
os.symlink("/etc/passwd", "/tmp/passwd")
os.mkfifo("/tmp/pipe")
os.mkdir("/tmp/closed")
open("/tmp/closed/inner", "w").write("x")
os.chmod("/tmp/closed", 0)
"""
    with Arena(who, "ci") as arena:
        fight = arena.run(cell, options=("--cell-timeout", "60"))
        assert fight.status == Status.PASSED, fight
        warnings = [
            words
            for words in fight.verdict["warnings"]
            if words.startswith("files that were not kept")
        ]
        assert len(warnings) == 1 and len(warnings[0]) < 1000 and warnings[0].isprintable(), fight
        assert "passwd" not in warnings[0]
        assert not any(code < " " and code != "\n" for code in fight.stdout)


def own(paths: list[Path]) -> None:
    """Give paths to the ordinary user."""
    for path in paths:
        os.chown(path, NOBODY, NOBODY)
