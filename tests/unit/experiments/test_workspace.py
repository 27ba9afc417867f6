"""The folder of a run: what is kept of it, what trials are given, and what is said where that cannot be had. Nothing is mounted here."""

from __future__ import annotations

import errno
import inspect
import os
import shutil
import socket
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from safe_exec.experiments import workspace as folders
from safe_exec.experiments.workspace import (
    Snapshot,
    Workspace,
    WorkspaceFactory,
    WorkspaceUnavailable,
    added,
    reopen,
    take,
    workspace_factory,
)
from safe_exec.keeper import file_tree, mounts
from safe_exec.keeper.file_tree import copy_tree, now, walk
from tests.support import wait_until

NONE: frozenset[Path] = frozenset()
SHM = {"kind": "tmpfs", "target": "/dev/shm", "options": "mode=1777"}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a little of everything, beside it a place for what is kept and a /tmp."""
    for name in ("work", "scratch", "tmp"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(folders, "TMP", tmp_path / "tmp")
    fill(tmp_path / "work")
    return tmp_path


def fill(work: Path) -> None:
    (work / "data").mkdir()
    (work / "data" / "deep").mkdir()
    (work / "data" / "deep" / "a.csv").write_text("1,2\n")
    (work / "notes.txt").write_text("notes")
    (work / "run.sh").write_text("#!/bin/sh\n")
    (work / "run.sh").chmod(0o755)
    (work / "link").symlink_to("notes.txt")
    (work / "dangling").symlink_to("/nowhere/at/all")
    (work / "to_data").symlink_to("data")


NAMES = [
    "dangling",
    "data",
    "data/deep",
    "data/deep/a.csv",
    "link",
    "notes.txt",
    "run.sh",
    "to_data",
]


def names_below(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path, _ in walk(folder)]


def way(
    monkeypatch: pytest.MonkeyPatch, found: str | None, *, overlays: bool = True
) -> list[tuple[Any, ...]]:
    """Namespaces as they may be found on a system; the questions whether something can be overlaid."""
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(mounts, "namespaces", lambda: found)

    def tried(*about: object) -> bool:
        asked.append(about)
        return overlays

    monkeypatch.setattr(mounts, "overlays", tried)
    return asked


def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every folder is too large to copy."""
    monkeypatch.setattr(folders, "COPY_BYTES", 3)


def kept(place: Path, **options: Any) -> Snapshot:
    return take(place / "work", place / "scratch", **options)


def failing(real: Callable[..., Any], where: str, error: OSError) -> Callable[..., Any]:
    def fails(path: Any, *rest: Any, **more: Any) -> Any:
        if os.fspath(path).endswith(where):
            raise error
        return real(path, *rest, **more)

    return fails


# --- walking and copying ------------------------------------------------------------------------------------------------


def test_a_walk_has_parents_first_and_follows_no_link(place: Path) -> None:
    assert names_below(place / "work") == NAMES
    assert stat.S_ISLNK(dict(walk(place / "work"))[place / "work" / "to_data"].st_mode)


def test_a_walk_leaves_out_what_it_is_told_to(place: Path) -> None:
    work = place / "work"
    found = walk(work, but=frozenset({work / "data", work / "link", work / "nowhere"}))
    assert [path.name for path, _ in found] == ["dangling", "notes.txt", "run.sh", "to_data"]


@pytest.mark.parametrize("name", ["nowhere", "work/notes.txt", "work/dangling"])
def test_a_walk_of_what_is_no_folder_is_empty(place: Path, name: str) -> None:
    assert list(walk(place / name)) == []


def test_what_cannot_be_read_is_left_out(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = place / "work"
    denied = PermissionError(errno.EACCES, "no")
    monkeypatch.setattr(os, "scandir", failing(os.scandir, "deep", denied))
    monkeypatch.setattr(file_tree, "_copy_file", failing(file_tree._copy_file, "notes.txt", denied))
    left = [name for name in NAMES if name != "data/deep/a.csv"]
    assert names_below(work) == left
    snapshot = kept(place)
    assert snapshot.entries is not None and snapshot.copy is not None
    assert list(snapshot.entries) == left
    assert names_below(snapshot.copy) == [name for name in left if name != "notes.txt"]


def test_what_goes_meanwhile_is_left_out(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program removes a file, and a folder, after they were listed."""
    work = place / "work"

    def vanishing(folder: Path, *, but: frozenset[Path]) -> Iterator[tuple[Path, os.stat_result]]:
        found = list(walk(folder, but=but))
        (work / "notes.txt").unlink()
        shutil.rmtree(work / "data")
        yield from found

    monkeypatch.setattr(file_tree, "walk", vanishing)
    copy_tree(work, place / "made")
    left = [name for name in NAMES if name not in ("notes.txt", "data/deep/a.csv")]
    assert [str(path.relative_to(place / "made")) for path, _ in walk(place / "made")] == left


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_no_half_of_a_folder(
    place: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(
        file_tree, "_copy_file", failing(file_tree._copy_file, "run.sh", OSError(number, "full"))
    )
    with pytest.raises(OSError, match="full"):
        kept(place)


def test_a_copy_is_the_same_in_all_that_shows(place: Path) -> None:
    work, made = place / "work", place / "made"
    (work / "data").chmod(0o750)
    for name in ("notes.txt", "data/deep/a.csv", "data/deep", "data"):
        os.utime(work / name, ns=(10**18, 10**18 + 7))
    work.chmod(0o751)
    copy_tree(work, made)
    assert names_below(made) == NAMES
    for name in (".", *NAMES):
        of, copied = (work / name).lstat(), (made / name).lstat()
        assert (copied.st_mode, copied.st_uid, copied.st_gid) == (
            of.st_mode,
            of.st_uid,
            of.st_gid,
        ), name
        assert stat.S_ISLNK(of.st_mode) or copied.st_mtime_ns == of.st_mtime_ns, name
    assert (made / "data" / "deep" / "a.csv").read_text() == "1,2\n"
    assert os.readlink(made / "dangling") == "/nowhere/at/all"
    assert os.readlink(made / "to_data") == "data"


def test_a_folder_that_cannot_be_written_is_copied_with_what_is_in_it(place: Path) -> None:
    (place / "work" / "data").chmod(0o555)
    copy_tree(place / "work", place / "made")
    assert names_below(place / "made") == NAMES
    assert stat.S_IMODE((place / "made" / "data").stat().st_mode) == 0o555
    (place / "made" / "data").chmod(0o755)


def test_sockets_and_pipes_are_left_out(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are noted: should they change, that is a change. Nobody waits for a pipe."""
    work = place / "work"
    monkeypatch.chdir(work)  # a socket's path is short
    os.mkfifo("pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
        snapshot = kept(place)
    assert snapshot.copy is not None and snapshot.entries is not None
    assert names_below(snapshot.copy) == NAMES
    assert {"pipe", "socket"} <= snapshot.entries.keys()


def test_names_that_are_no_text_are_kept(place: Path) -> None:
    name = os.fsdecode(b"caf\xe9\n")
    (place / "work" / name).write_text("x")
    snapshot = kept(place)
    assert snapshot.copy is not None
    assert (snapshot.copy / name).read_text() == "x"
    assert len(snapshot.fingerprint()) == 64


def test_a_folder_deeper_than_python_can_call_is_walked(tmp_path: Path) -> None:
    os.makedirs(str(tmp_path) + "/d" * 200)
    was = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 100)
    try:
        assert len(list(walk(tmp_path))) == 200
    finally:
        sys.setrecursionlimit(was)


# --- what is kept -------------------------------------------------------------------------------------------------------


def test_a_small_folder_is_noted_and_copied(place: Path) -> None:
    snapshot = kept(place)
    assert snapshot.folder == (place / "work").resolve()
    assert snapshot.copy == place / "scratch" / "before"
    assert list(snapshot.entries or ()) == NAMES == names_below(snapshot.copy)
    assert (snapshot.entries or {})["notes.txt"].size == 5


def test_a_folder_behind_a_link_is_itself(place: Path) -> None:
    (place / "behind").symlink_to("work")
    snapshot = take(place / "behind", place / "scratch")
    assert (snapshot.folder, list(snapshot.entries or ())) == (place / "work", NAMES)


def test_our_own_documents_are_no_part_of_it(place: Path) -> None:
    work = place / "work"
    ours = frozenset({work / "nb.out.ipynb", work / "nb.verdict.json"})
    for path in ours:
        path.write_text("of an earlier run")
    (work / "nb.ipynb").write_text("{}")
    snapshot = kept(place, ours=ours)
    assert snapshot.copy is not None
    assert (
        list(snapshot.entries or ()) == names_below(snapshot.copy) == sorted([*NAMES, "nb.ipynb"])
    )


@pytest.mark.parametrize("behind_a_link", [False, True])
def test_where_the_copy_goes_is_no_part_of_it(place: Path, behind_a_link: bool) -> None:
    """The notebook lies in the home directory, and so does the cache."""
    work = place / "work"
    (work / "cache").mkdir()
    (place / "home").symlink_to("work")
    snapshot = take(work, (place / "home" if behind_a_link else work) / "cache")
    assert snapshot.copy is not None
    assert list(snapshot.entries or ()) == names_below(snapshot.copy) == NAMES
    assert "cache" not in added(snapshot)


@pytest.mark.parametrize(
    ("constant", "value", "copied", "noted"),
    [
        ("COPY_BYTES", 4 + 5 + 10, True, True),
        ("COPY_BYTES", 4 + 5 + 9, False, True),
        ("COPY_ENTRIES", len(NAMES), True, True),
        ("COPY_ENTRIES", len(NAMES) - 1, False, True),
        ("NOTE_ENTRIES", len(NAMES), True, True),
        ("NOTE_ENTRIES", len(NAMES) - 1, False, False),
    ],
)
def test_how_much_is_kept(
    *,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    constant: str,
    value: int,
    copied: bool,
    noted: bool,
) -> None:
    """By the bytes of its files and by the number of entries."""
    monkeypatch.setattr(folders, constant, value)
    snapshot = kept(place)
    assert (snapshot.copy is not None, snapshot.entries is not None) == (copied, noted)
    assert (place / "scratch" / "before").exists() is copied


def test_the_names_in_tmp(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kept(place).tmp == frozenset()
    shutil.rmtree(place / "scratch" / "before")
    for name in "abc":
        (place / "tmp" / name).touch()
    monkeypatch.setattr(folders, "TMP_ENTRIES", 3)
    assert kept(place).tmp == frozenset("abc")
    shutil.rmtree(place / "scratch" / "before")
    monkeypatch.setattr(folders, "TMP_ENTRIES", 2)
    assert kept(place).tmp is None
    shutil.rmtree(place / "scratch" / "before")
    monkeypatch.setattr(folders, "TMP", place / "nowhere")
    assert kept(place).tmp is None


def there(place: Path, name: str) -> Path:
    (place / name).mkdir()
    return place / name


def aged(*paths: Path) -> None:
    """Wait until the files are older than the grain of their times."""
    newest = max(path.stat().st_ctime_ns for path in paths)
    wait_until(lambda: now() > newest + folders.TICK_NS, 5, "the clock of files goes on")


def test_what_did_not_change_is_copied_once(place: Path) -> None:
    work, names = place / "work", ("same", "edited", "replaced", "touched")
    for name in names:
        (work / name).write_text("before")
    aged(*(work / name for name in names))
    first = take(work, there(place, "one"))
    times = (work / "edited").stat()
    (work / "edited").write_text("behind")
    os.utime(work / "edited", ns=(times.st_atime_ns, times.st_mtime_ns))
    (place / "other").write_text("behind")
    (place / "other").replace(work / "replaced")
    (work / "touched").chmod(0o600)
    second = take(work, there(place, "two"))
    assert first.copy is not None and second.copy is not None
    shared = {name for name in names if (first.copy / name).samefile(second.copy / name)}
    assert shared == {"same"}
    assert [(second.copy / name).read_text() for name in names] == [
        "before",
        "behind",
        "behind",
        "before",
    ]
    assert (second.copy / "touched").stat().st_mode & 0o777 == 0o600
    file_tree.remove_tree(first.copy)
    assert (second.copy / "same").read_text() == "before"
    third = take(work, there(place, "three"))
    assert third.copy is not None and (third.copy / "same").read_text() == "before"


def test_what_changed_just_before_a_copy_is_copied_again(place: Path) -> None:
    """It could change once more in the same tick of the clock, and would look the same."""
    (place / "work" / "fresh").write_text("a")
    first, second = (
        take(place / "work", there(place, "one")),
        take(place / "work", there(place, "two")),
    )
    assert first.copy is not None and second.copy is not None
    assert not (first.copy / "fresh").samefile(second.copy / "fresh")


def test_a_copy_whose_twin_is_gone_is_a_copy_all_the_same(place: Path) -> None:
    (place / "work" / "old").write_text("a")
    aged(place / "work" / "old")
    first = take(place / "work", there(place, "one"))
    assert first.copy is not None
    file_tree.remove_tree(first.copy)
    second = take(place / "work", there(place, "two"))
    assert second.copy is not None and (second.copy / "old").read_text() == "a"


def test_an_earlier_copy_is_opened_again(place: Path) -> None:
    assert reopen(place / "work", place / "scratch") is None
    first = kept(place)
    shutil.rmtree(place / "work" / "data")
    again = reopen(place / "work", place / "scratch")
    assert again is not None
    assert (again.folder, again.copy, again.entries, again.tmp) == (
        first.folder,
        first.copy,
        None,
        None,
    )
    assert again.fingerprint() == first.fingerprint()


# --- whether it is still the same ---------------------------------------------------------------------------------------


def relink(link: Path, target: str) -> None:
    link.unlink()
    link.symlink_to(target)


CHANGES: dict[str, Callable[[Path], object]] = {
    "another content of the same length": lambda work: (work / "notes.txt").write_text("seton"),
    "another length": lambda work: (work / "notes.txt").write_text("more notes"),
    "another mode": lambda work: (work / "run.sh").chmod(0o700),
    "another target of the same length": lambda work: relink(work / "link", "notes.md_"),
    "a new file": lambda work: (work / "new").touch(),
    "a new folder": lambda work: (work / "data" / "new").mkdir(),
    "one file less": lambda work: (work / "data" / "deep" / "a.csv").unlink(),
    "another name": lambda work: (work / "notes.txt").rename(work / "notes.md"),
}


def mark(place: Path) -> str:
    shutil.rmtree(place / "scratch")
    (place / "scratch").mkdir()
    return kept(place).fingerprint()


@pytest.mark.parametrize("change", CHANGES)
def test_a_fingerprint_of_a_copy_tells_all(place: Path, change: str) -> None:
    before = mark(place)
    os.utime(place / "work" / "notes.txt", ns=(1, 1))
    assert mark(place) == before, "the same contents are the same, whenever they were written"
    CHANGES[change](place / "work")
    assert mark(place) != before


@pytest.mark.parametrize("change", [name for name in CHANGES if name != "another mode"])
def test_a_fingerprint_of_a_large_folder_goes_by_names_sizes_and_times(
    place: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    large(monkeypatch)
    os.utime(place / "work" / "notes.txt", ns=(1, 1))
    before = mark(place)
    assert mark(place) == before
    CHANGES[change](place / "work")
    assert mark(place) != before


def test_a_fingerprint_of_what_could_not_be_noted(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "NOTE_ENTRIES", 2)
    assert mark(place) == mark(place)


def changed_by(
    place: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], object]
) -> tuple[Snapshot, str | None]:
    """What a first run has changed, in the words of the refusal."""
    large(monkeypatch)
    way(monkeypatch, "root")
    snapshot = kept(place)
    change(place / "work")
    try:
        workspace_factory(snapshot, ours=frozenset({place / "work" / "ours.json"}))
    except WorkspaceUnavailable as reason:
        return snapshot, str(reason)
    return snapshot, None


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (CHANGES["another content of the same length"], "notes.txt"),
        (CHANGES["another mode"], "run.sh"),
        (CHANGES["another target of the same length"], "link"),
        (CHANGES["one file less"], "data/deep/a.csv"),
        (CHANGES["another name"], "notes.txt"),
        (lambda work: shutil.rmtree(work / "data"), "data"),
        (lambda work: os.utime(work / "notes.txt", ns=(1, 1)), "notes.txt"),
        (lambda work: (work / "link").replace(work / "moved"), "link"),
        (CHANGES["a new file"], None),
        (CHANGES["a new folder"], None),
        (lambda work: (work / "ours.json").write_text("x"), None),
        (lambda work: (work / "data").chmod(0o700), None),
    ],
)
def test_changes_of_a_large_folder(
    place: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], object], name: str | None
) -> None:
    """What is new can be hidden; what is changed cannot be had back."""
    _, reason = changed_by(place, monkeypatch, change)
    assert (reason is None) is (name is None)
    assert name is None or reason == (
        f"it is too large to copy (0 MiB, {folders.COPY_ENTRIES} files), and the first run changed {name} in it"
    )


def test_a_content_put_back_with_its_time_is_a_change(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program may set a file's time of modification, not that of its last change."""

    def sly(work: Path) -> None:
        was = (work / "notes.txt").stat()
        (work / "notes.txt").write_text("seton")
        os.utime(work / "notes.txt", ns=(was.st_atime_ns, was.st_mtime_ns))

    assert "notes.txt" in (changed_by(place, monkeypatch, sly)[1] or "")


def test_what_was_added(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """New folders stand for what is in them; names that begin alike are others."""
    large(monkeypatch)
    snapshot, work = kept(place), place / "work"
    assert added(snapshot) == ()
    (work / "new" / "er").mkdir(parents=True)
    for name in ("new/a", "new/er/b", "new.txt", "data/deep/b.csv", "data-new"):
        (work / name).touch()
    (work / "zlink").symlink_to("/nowhere")
    assert added(snapshot) == ("data/deep/b.csv", "data-new", "new", "new.txt", "zlink")


# --- what trials are given ----------------------------------------------------------------------------------------------

TMP_GAP = "files that an earlier trial left in /tmp"
BARE_GAP = (
    "its files in /dev/shm, and files of the folder that the notebook opens by their full path"
)


@pytest.mark.parametrize(
    ("found", "tmp", "gaps"),
    [
        ("root", True, ()),
        ("user", True, ()),
        ("root", False, (TMP_GAP,)),
        (None, True, (TMP_GAP, BARE_GAP)),
        (None, False, (TMP_GAP, BARE_GAP)),
    ],
)
def test_gaps(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    found: str | None,
    tmp: bool,
    gaps: tuple[str, ...],
) -> None:
    way(monkeypatch, found)
    snapshot = kept(place)
    workspaces = workspace_factory(snapshot if tmp else replace(snapshot, tmp=None), ours=NONE)
    assert workspaces == WorkspaceFactory(
        snapshot=workspaces.snapshot, namespace_kind=found, overlay=False, gaps=gaps
    )


def test_a_folder_in_shared_memory_keeps_it(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    way(monkeypatch, "root")
    monkeypatch.setattr(folders, "SHM", place)
    workspaces = workspace_factory(kept(place), ours=NONE)
    assert workspaces.gaps == ("its files in /dev/shm",)
    assert [mount["kind"] for mount in workspaces.make("a", Path("/run/x")).mounts] == [
        "bind",
        "bind",
    ]


REFUSED = [
    ("it holds more than 2 files", {"NOTE_ENTRIES": 2}, "root", True),
    (
        "it is too large to copy, and this system does not permit the mount namespace that an overlay needs",
        {"COPY_BYTES": 1},
        None,
        True,
    ),
    (
        "it is too large to copy, and its file system cannot be overlaid here",
        {"COPY_BYTES": 1},
        "user",
        False,
    ),
]


@pytest.mark.parametrize(("reason", "constants", "found", "overlays"), REFUSED)
def test_what_cannot_be_given(
    *,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    reason: str,
    constants: dict[str, int],
    found: str | None,
    overlays: bool,
) -> None:
    for name, value in constants.items():
        monkeypatch.setattr(folders, name, value)
    way(monkeypatch, found, overlays=overlays)
    snapshot = kept(place)
    with pytest.raises(WorkspaceUnavailable) as refused:
        workspace_factory(snapshot, ours=NONE)
    assert str(refused.value) == reason
    # Whoever insists runs in the folder as it is, and is told so.
    workspaces = workspace_factory(snapshot, ours=NONE, insist=True)
    assert (workspaces.overlay, workspaces.gaps[-1]) == (
        False,
        f"files of the folder itself: {reason}",
    )
    view = workspaces.make("a", Path("/run/x"))
    assert view.cwd == snapshot.folder
    assert str(snapshot.folder) not in [mount["target"] for mount in view.mounts]


def test_a_large_folder_is_overlaid(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large(monkeypatch)
    asked = way(monkeypatch, "user")
    snapshot = kept(place)
    (place / "work" / "new").touch()
    workspaces = workspace_factory(snapshot, ours=NONE)
    assert (workspaces.overlay, workspaces.new, workspaces.namespace_kind, workspaces.gaps) == (
        True,
        ("new",),
        "user",
        (),
    )
    assert asked == [(snapshot.folder, place / "scratch" / "probe", "user")]


@pytest.mark.parametrize("found", ["root", "user", None])
def test_a_view_of_a_copy(place: Path, monkeypatch: pytest.MonkeyPatch, found: str | None) -> None:
    way(monkeypatch, found)
    snapshot = kept(place)
    (place / "work" / "notes.txt").write_text("changed by the first run")
    view = workspace_factory(snapshot, ours=NONE).make("a", Path("/run/x"))
    directory = place / "scratch" / "trial-a"
    own = directory / "folder"
    assert names_below(own) == NAMES
    assert (own / "notes.txt").read_text() == "notes"
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    if found is None:
        assert view == Workspace(cwd=own, directory=directory)
    else:
        tmp = {"kind": "bind", "source": str(directory / "tmp"), "target": str(place / "tmp")}
        bound = {"kind": "bind", "source": str(own), "target": str(snapshot.folder)}
        assert view == Workspace(
            cwd=snapshot.folder,
            directory=directory,
            mounts=(tmp, bound, SHM),
            user_namespace=found == "user",
        ), "the folder after /tmp, which it may lie in"


def test_each_trial_has_its_own_copy(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    way(monkeypatch, None)
    workspaces = workspace_factory(kept(place), ours=NONE)
    first, second = workspaces.make("a", Path("/run/x")), workspaces.make("b", Path("/run/x"))
    (first.cwd / "notes.txt").write_text("changed by a trial")
    assert (second.cwd / "notes.txt").read_text() == "notes"
    assert workspaces.make("c", Path("/run/x")).cwd.joinpath("notes.txt").read_text() == "notes"
    with pytest.raises(FileExistsError):
        workspaces.make("a", Path("/run/x"))


def test_a_view_of_an_overlay_hides_what_is_new(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large(monkeypatch)
    way(monkeypatch, "root")
    snapshot, work = kept(place), place / "work"
    (work / "new").mkdir()
    (work / "new" / "a").touch()
    (work / "data" / "deep" / "b.csv").touch()
    (work / "out.ipynb").touch()
    view = workspace_factory(snapshot, ours=frozenset({work / "out.ipynb"})).make(
        "a", Path("/run/x")
    )
    upper = place / "scratch" / "trial-a" / "upper"
    assert names_below(upper) == ["data", "data/deep", "data/deep/b.csv", "new", "out.ipynb"]
    for name in ("data/deep/b.csv", "new", "out.ipynb"):
        white = (upper / name).lstat()
        assert (stat.S_ISCHR(white.st_mode), white.st_rdev) == (True, os.makedev(0, 0)), (
            "a whiteout is a device 0, 0"
        )
    assert view.mounts[-2] == {
        "kind": "overlay",
        "lower": str(work),
        "upper": str(upper),
        "work": str(place / "scratch" / "trial-a" / "work"),
        "target": str(work),
    }
    assert view.cwd == work
    assert names_below(upper.parent / "work") == []


# --- /tmp ---------------------------------------------------------------------------------------------------------------


def bound(mounts: tuple[Any, ...]) -> dict[str, str]:
    return {mount["target"]: mount["source"] for mount in mounts if mount["kind"] == "bind"}


def test_in_tmp_is_what_was_there_before(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    way(monkeypatch, "root")
    tmp = place / "tmp"
    (tmp / "folder").mkdir()
    (tmp / "file").write_text("x")
    (tmp / "link").symlink_to("file")
    (tmp / "gone").touch()
    os.mkfifo(tmp / "pipe")
    snapshot = kept(place)
    (tmp / "gone").unlink()
    (tmp / "left by the first run").touch()
    runtime = tmp / "safe-exec-abc"
    view = workspace_factory(snapshot, ours=NONE).make("a", runtime)
    fresh = place / "scratch" / "trial-a" / "tmp"
    assert names_below(fresh) == ["file", "folder", "link", "pipe", "safe-exec-abc"]
    assert stat.S_IMODE(fresh.stat().st_mode) == 0o1777
    assert os.readlink(fresh / "link") == "file"
    assert (fresh / "file").read_text() == "", "a place to bind to"
    assert [Path(mount["target"]).name for mount in view.mounts if "optional" in mount] == [
        "file",
        "folder",
        "pipe",
    ], "others come and go"
    assert list(bound(view.mounts).items()) == [
        (str(fresh / "file"), str(tmp / "file")),
        (str(fresh / "folder"), str(tmp / "folder")),
        (str(fresh / "pipe"), str(tmp / "pipe")),
        (str(fresh / "safe-exec-abc"), str(runtime)),
        (str(tmp), str(fresh)),
        (str(snapshot.folder), str(place / "scratch" / "trial-a" / "folder")),
    ]


def test_a_tmp_with_too_much_in_it_stays_as_it_is(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    way(monkeypatch, "root")
    view = workspace_factory(replace(kept(place), tmp=None), ours=NONE).make(
        "a", place / "tmp" / "safe-exec-abc"
    )
    assert [mount["kind"] for mount in view.mounts] == ["bind", "tmpfs"]
    assert not (place / "scratch" / "trial-a" / "tmp").exists()


@pytest.mark.parametrize("copied", [True, False])
def test_a_notebook_in_tmp_itself_keeps_its_sockets(
    place: Path, monkeypatch: pytest.MonkeyPatch, copied: bool
) -> None:
    """What is mounted over the folder would hide the directory of the runtime, which is in it."""
    way(monkeypatch, "root")
    monkeypatch.setattr(folders, "TMP", place / "work")
    if not copied:
        large(monkeypatch)
    runtime = place / "work" / "safe-exec-abc"
    view = workspace_factory(kept(place), ours=NONE).make("a", runtime)
    directory = place / "scratch" / "trial-a"
    stage = directory / ("folder/safe-exec-abc" if copied else "runtime")
    assert stage.is_dir()
    order = [(mount["kind"], mount["target"]) for mount in view.mounts]
    over = [("bind", str(stage)), ("bind" if copied else "overlay", str(place / "work"))]
    assert order == [*over, *([] if copied else [("bind", str(runtime))]), ("tmpfs", "/dev/shm")]
    assert view.mounts[0]["source"] == str(runtime)
    assert copied or view.mounts[2]["source"] == str(stage)
