"""Copies of folders, made and taken back: what a hostile program leaves in one is data, and never a way to somewhere else."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from safe_exec.keeper import file_tree
from safe_exec.keeper.file_tree import copy_tree, remove_tree, walk, write_back
from tests.support import wait_until

IS_ROOT = os.geteuid() == 0
DEEP = 3000


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("trees")
    yield path
    remove_tree(path)  # pytest's own removal cannot get at what lies too deep


def fresh(place: Path) -> tuple[Path, Path, Path]:
    """A folder, its copy to be, and a folder outside that nobody may touch."""
    base = place / f"t{len(list(place.iterdir()))}"
    folder, outside = base / "folder", base / "outside"
    folder.mkdir(parents=True)
    outside.mkdir()
    (outside / "canary").write_text("alive")
    return folder, base / "copy", outside


def look(folder: Path) -> dict[str, tuple[object, ...]]:
    """What is in a folder: kind, mode and content of everything."""
    found: dict[str, tuple[object, ...]] = {}
    for path, status in walk(folder):
        mode = status.st_mode
        content: object = None
        if stat.S_ISLNK(mode):
            mode, content = stat.S_IFLNK, os.readlink(path)
        elif stat.S_ISREG(mode):
            content = path.read_bytes()
        found[str(path.relative_to(folder))] = (mode, content)
    return found


def copied(place: Path) -> tuple[Path, Path, Path]:
    folder, copy, outside = fresh(place)
    (folder / "a").mkdir()
    (folder / "a" / "b").write_text("b")
    (folder / "c").write_text("c")
    copy_tree(folder, copy)
    return folder, copy, outside


# --- any tree ---------------------------------------------------------------------------------------------------

names = st.sampled_from(["a", "b", "c", "dd", "é", "\udce9", "-x", " "])
files = st.tuples(
    st.just("file"), st.binary(max_size=40), st.sampled_from([0o644, 0o600, 0o755, 0o444])
)
links = st.tuples(
    st.just("link"),
    st.sampled_from(["a", "../outside", "../outside/canary", "/etc/passwd", "nowhere", "."]),
)
tree = st.recursive(
    files | links,
    lambda inner: st.tuples(
        st.just("folder"),
        st.dictionaries(names, inner, max_size=3),
        st.sampled_from([0o755, 0o700]),
    ),
    max_leaves=10,
)
top = st.dictionaries(names, tree, max_size=4)


def make(folder: Path, content: dict[str, tuple[object, ...]]) -> None:
    for name, entry in content.items():
        path = folder / name
        if entry[0] == "file":
            assert isinstance(entry[1], bytes) and isinstance(entry[2], int)
            path.write_bytes(entry[1])
            path.chmod(entry[2])
        elif entry[0] == "link":
            path.symlink_to(str(entry[1]))
        else:
            assert isinstance(entry[1], dict) and isinstance(entry[2], int)
            path.mkdir()
            make(path, entry[1])
            path.chmod(entry[2])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(top)
def test_a_copy_is_the_folder(place: Path, content: dict[str, tuple[object, ...]]) -> None:
    folder, copy, outside = fresh(place)
    make(folder, content)
    copy_tree(folder, copy)
    assert look(copy) == look(folder)
    assert {str(p): s.st_mtime_ns for p, s in walk(copy) if not stat.S_ISLNK(s.st_mode)} == {
        str(copy / p.relative_to(folder)): s.st_mtime_ns
        for p, s in walk(folder)
        if not stat.S_ISLNK(s.st_mode)
    }
    assert (outside / "canary").read_text() == "alive"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(top, top)
def test_what_is_taken_back_is_what_the_copy_became(
    place: Path, before: dict[str, tuple[object, ...]], after: dict[str, tuple[object, ...]]
) -> None:
    """Whatever a program makes of the copy: files to links, links to folders, all of it to nothing."""
    folder, copy, outside = fresh(place)
    make(folder, before)
    make_over(copy, after)
    write_back(copy, folder)
    assert look(folder) == look(copy)
    assert look(outside) == {"canary": (stat.S_IFREG | 0o644, b"alive")}
    assert not [path for path, _ in walk(folder) if ".safe-exec" in path.name]


def make_over(copy: Path, content: dict[str, tuple[object, ...]]) -> None:
    copy.mkdir()
    make(copy, content)


@settings(max_examples=30, deadline=None)
@given(top)
def test_taking_back_what_did_not_change_touches_nothing(
    place: Path, content: dict[str, tuple[object, ...]]
) -> None:
    folder, copy, _ = fresh(place)
    make(folder, content)
    copy_tree(folder, copy)
    before = {str(path): (status.st_ino, status.st_ctime_ns) for path, status in walk(folder)}
    write_back(copy, folder)
    assert {
        str(path): (status.st_ino, status.st_ctime_ns) for path, status in walk(folder)
    } == before


def test_a_walk_leaves_out_what_it_is_told_to_and_gives_parents_first(place: Path) -> None:
    folder, copy, _ = copied(place)
    assert [str(path.relative_to(folder)) for path, _ in walk(folder)] == ["a", "a/b", "c"]
    assert [
        str(path.relative_to(folder)) for path, _ in walk(folder, but=frozenset({folder / "a"}))
    ] == ["c"]
    assert list(walk(copy / "nonesuch")) == list(walk(copy / "c")) == []


# --- links ------------------------------------------------------------------------------------------------------


def test_a_folder_that_became_a_link_is_not_written_through(place: Path) -> None:
    folder, copy, outside = copied(place)
    shutil.rmtree(copy / "a")
    (copy / "a").symlink_to(outside)
    write_back(copy, folder)
    assert os.readlink(folder / "a") == str(outside)
    assert sorted(os.listdir(outside)) == ["canary"]


def test_a_link_that_became_a_folder_is_not_followed(place: Path) -> None:
    folder, copy, outside = fresh(place)
    (folder / "way").symlink_to(outside)
    copy_tree(folder, copy)
    (copy / "way").unlink()
    (copy / "way").mkdir()
    (copy / "way" / "canary").write_text("dead")
    write_back(copy, folder)
    assert (outside / "canary").read_text() == "alive"
    assert not (folder / "way").is_symlink() and (folder / "way" / "canary").read_text() == "dead"


def test_a_link_that_cannot_be_removed_is_not_written_through(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, copy, outside = fresh(place)
    (folder / "way").symlink_to(outside)
    (copy / "way").mkdir(parents=True)
    (copy / "way" / "canary").write_text("dead")
    (copy / "other").write_text("taken")
    unlink = Path.unlink

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path == folder / "way":
            raise PermissionError(errno.EPERM, "immutable", str(path))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(OSError, match="immutable"):
        write_back(copy, folder)
    assert (outside / "canary").read_text() == "alive"
    assert (folder / "other").read_text() == "taken", "the rest is taken all the same"


def test_a_file_that_is_a_link_by_the_time_it_is_read_is_not_followed(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, copy, outside = copied(place)
    (copy / "c").write_text("changed")
    seen = file_tree._status

    def swap(path: Path) -> os.stat_result | None:
        if path == folder / "c":
            (copy / "c").unlink()
            (copy / "c").symlink_to(outside / "canary")
        return seen(path)

    monkeypatch.setattr(file_tree, "_status", swap)
    with pytest.raises(OSError, match="links"):
        write_back(copy, folder)
    assert (folder / "c").read_text() == "c"


def test_a_second_name_of_a_file_outside_is_not_written_through(place: Path) -> None:
    folder, copy, outside = copied(place)
    (folder / "c").unlink()
    os.link(outside / "canary", folder / "c")
    (copy / "c").write_text("dead")
    write_back(copy, folder)
    assert (outside / "canary").read_text() == "alive" and (folder / "c").read_text() == "dead"


# --- what others change meanwhile -------------------------------------------------------------------------------


def both(place: Path, layered: bool) -> tuple[Path, Path, file_tree.ConcurrentChanges]:
    """A folder of files, what a program works in, and what tells what others did; their names say who will change them."""
    folder, copy, _ = fresh(place)
    (folder / "in").mkdir()
    for name in (
        "program",
        "others",
        "both",
        "nobody",
        "in/program",
        "in/both",
        "taken-away",
        "taken-away-both",
    ):
        (folder / name).write_text("as it was")
    marks = copy_tree(folder, copy)
    since = max(status.st_ctime_ns for _, status in walk(folder))
    wait_until(lambda: file_tree.now() > since, 5, "another tick of the system's clock")
    return (
        folder,
        copy,
        file_tree.ConcurrentChanges(since=since)
        if layered
        else file_tree.ConcurrentChanges(copies=marks),
    )


@pytest.mark.parametrize("layered", [False, True], ids=["copy", "layer"])
def test_what_others_changed_meanwhile_stays(place: Path, layered: bool) -> None:
    folder, copy, meanwhile = both(place, layered)
    for name in ("program", "both", "in/program", "in/both", "new"):
        (copy / name).write_text("by the program")
    for name in ("taken-away", "taken-away-both"):
        (copy / name).unlink()
    for name in ("others", "both", "in/both", "taken-away-both"):
        (folder / name).write_text("by others")
    if layered:  # through a layer it is seen at once
        shutil.copy2(folder / "others", copy / "others")
    assert write_back(copy, folder, meanwhile) == ["both", "in/both", "taken-away-both"]
    assert {
        str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()
    } == {
        **dict.fromkeys(("program", "in/program", "new"), "by the program"),
        **dict.fromkeys(("others", "both", "in/both", "taken-away-both"), "by others"),
        "nobody": "as it was",
    }


def test_what_others_made_or_took_away_meanwhile_stays_so(place: Path) -> None:
    folder, copy, meanwhile = both(place, layered=False)
    (folder / "made").write_text("by others")
    (folder / "others").unlink()
    (folder / "both").unlink()
    (folder / "nobody").unlink()
    (folder / "nobody").mkdir()
    (folder / "in" / "both").unlink()
    (folder / "in" / "program").unlink()
    (folder / "in").rmdir()
    (copy / "both").write_text("by the program")
    (copy / "in" / "program").write_text("by the program")
    assert write_back(copy, folder, meanwhile) == []
    assert (folder / "made").read_text() == "by others" and (folder / "nobody").is_dir()
    assert not (folder / "others").exists() and not (folder / "in" / "both").exists()
    assert (
        (folder / "both").read_text() == (folder / "in" / "program").read_text() == "by the program"
    ), "nothing is lost by that"


def test_a_folder_that_others_made_a_link_meanwhile_is_not_followed(place: Path) -> None:
    folder, copy, meanwhile = both(place, layered=False)
    shutil.rmtree(folder / "in")
    (folder / "in").symlink_to(folder.parent / "outside")
    (copy / "in" / "program").write_text("by the program")
    assert write_back(copy, folder, meanwhile) == ["in"]
    assert (folder / "in").is_symlink() and sorted(os.listdir(folder.parent / "outside")) == [
        "canary"
    ]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(top, top)
def test_where_nobody_else_changes_anything_all_comes_back(
    place: Path, before: dict[str, tuple[object, ...]], after: dict[str, tuple[object, ...]]
) -> None:
    folder, copy, _ = fresh(place)
    make(folder, before)
    meanwhile = file_tree.ConcurrentChanges(copies=copy_tree(folder, copy))
    remove_tree(copy)
    make_over(copy, after)
    assert write_back(copy, folder, meanwhile) == []
    assert look(folder) == look(copy)


# --- rights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o4755, 0o2755, 0o6755, 0o6777])
def test_special_rights_are_dropped(place: Path, mode: int) -> None:
    folder, copy, _ = copied(place)
    (copy / "program").write_text("#!/bin/sh")
    (copy / "program").chmod(mode)
    (copy / "c").write_text("changed")
    (copy / "c").chmod(mode)
    (copy / "a").chmod(mode)
    (copy / "new").mkdir()
    (copy / "new").chmod(mode)
    write_back(copy, folder)
    assert {
        stat.S_IMODE((folder / name).stat().st_mode) for name in ("program", "c", "a", "new")
    } == {mode & 0o777}


def test_at_no_time_is_a_copy_set_user_id(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, copy, _ = copied(place)
    (copy / "program").write_text("#!/bin/sh")
    (copy / "program").chmod(0o4755)
    modes: list[int] = []
    monkeypatch.setattr(os, "fchmod", lambda fd, mode: modes.append(mode))
    monkeypatch.setattr(Path, "chmod", lambda _, mode: modes.append(mode))
    write_back(copy, folder)
    assert modes and not [mode for mode in modes if mode & (stat.S_ISUID | stat.S_ISGID)]


def test_special_rights_that_the_user_gave_stay(place: Path) -> None:
    folder, copy, _ = fresh(place)
    (folder / "shared").mkdir()
    (folder / "shared").chmod(0o2775)
    (folder / "tool").write_text("x")
    (folder / "tool").chmod(0o4755)
    copy_tree(folder, copy)
    (copy / "shared" / "new").write_text("x")
    write_back(copy, folder)
    assert stat.S_IMODE((folder / "shared").stat().st_mode) == 0o2775
    assert stat.S_IMODE((folder / "tool").stat().st_mode) == 0o4755


@pytest.fixture
def given_away(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[int, int]]:
    """To whom root gave which file, without doing it; links are never followed."""
    found: dict[str, tuple[int, int]] = {}

    def chown(path: Path, uid: int, gid: int, *, follow_symlinks: bool) -> None:
        assert not follow_symlinks
        found[Path(path).name] = (uid, gid)

    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(os, "chown", chown)
    return found


def test_what_is_taken_back_belongs_to_whom_the_folder_does(
    place: Path, given_away: dict[str, tuple[int, int]]
) -> None:
    folder, copy, _ = copied(place)
    given_away.clear()
    (copy / "new").mkdir()
    (copy / "new" / "file").write_text("x")
    (copy / "link").symlink_to("c")
    write_back(copy, folder)
    names = {name if not name.startswith(".safe-exec") else "made" for name in given_away}
    assert names == {"new", "made"}, "what did not change stays whose it was"
    assert set(given_away.values()) == {(folder.stat().st_uid, folder.stat().st_gid)}


def test_a_copy_for_another_user_is_all_his(
    place: Path, given_away: dict[str, tuple[int, int]]
) -> None:
    folder, copy, _ = copied(place)
    remove_tree(copy)
    given_away.clear()
    (folder / "link").symlink_to("/etc/passwd")
    copy_tree(folder, copy, owner=1_060_660)
    assert given_away == dict.fromkeys(("a", "b", "c", "link", "copy"), (1_060_660, 1_060_660))


# --- what is no file --------------------------------------------------------------------------------------------


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path) -> None:
    here = os.open(path.parent, os.O_PATH)  # a socket's path may have 108 bytes
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(f"/proc/self/fd/{here}/{path.name}")
    finally:
        os.close(here)


def a_device(path: Path) -> None:
    os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))


SPECIAL = [a_pipe, a_socket, *([a_device] if IS_ROOT else [])]


@pytest.mark.parametrize("special", SPECIAL)
def test_pipes_sockets_and_devices_do_not_come_back(
    place: Path, special: Callable[[Path], None]
) -> None:
    folder, copy, _ = copied(place)
    special(copy / "special")
    (copy / "c").unlink()
    special(copy / "c")
    write_back(copy, folder)
    assert sorted(os.listdir(folder)) == ["a"]


@pytest.mark.parametrize("special", SPECIAL)
def test_those_of_the_user_are_neither_copied_nor_removed(
    place: Path, special: Callable[[Path], None]
) -> None:
    folder, copy, _ = fresh(place)
    special(folder / "special")
    (folder / "file").write_text("x")
    copy_tree(folder, copy)
    assert os.listdir(copy) == ["file"]
    (copy / "file").unlink()
    write_back(copy, folder)
    assert os.listdir(folder) == ["special"]


def test_what_is_not_readable_counts_as_not_copied(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, copy, _ = copied(place)
    (folder / "closed").write_text("x")
    (folder / "gone").write_text("x")
    monkeypatch.setattr(os, "access", lambda path, *_, **__: Path(path).name != "closed")
    write_back(copy, folder)
    assert sorted(os.listdir(folder)) == ["a", "c", "closed"]


# --- too long, too deep, too full -------------------------------------------------------------------------------


def test_a_file_that_grows_while_it_is_copied_is_copied_as_long_as_it_was(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A log that somebody writes on: to copy up to its end would never end."""
    log = place / "folder" / "log"
    log.parent.mkdir()
    log.write_bytes(b"x" * 1000)
    send = os.sendfile

    def growing(target: int, source: int, at: int, size: int) -> int:
        with open(log, "ab") as file:
            file.write(b"y" * 500)
        return send(target, source, at, size)

    monkeypatch.setattr(os, "sendfile", growing)
    file_tree.copy_tree(log.parent, place / "copy")
    assert (place / "copy" / "log").read_bytes() == b"x" * 1000


def test_holes_stay_holes(place: Path) -> None:
    folder, copy, _ = copied(place)
    with (copy / "large").open("wb") as file:
        file.seek(1 << 30)
        file.write(b"middle")
        file.truncate(1 << 40)
    write_back(copy, folder)
    status = (folder / "large").stat()
    assert status.st_size == 1 << 40 and status.st_blocks * 512 < 1 << 20
    with (folder / "large").open("rb") as file:
        file.seek(1 << 30)
        assert file.read(8) == b"middle\0\0"


@pytest.mark.parametrize("size", [0, 1, 4096, 100_001])
def test_content_comes_back_whole(place: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_tree, "PIECE", 4000)
    folder, copy, _ = copied(place)
    content = os.urandom(size)
    (copy / "c").write_bytes(content)
    write_back(copy, folder)
    assert (folder / "c").read_bytes() == content
    assert (folder / "c").stat().st_mtime_ns == (copy / "c").stat().st_mtime_ns


def nest(folder: Path, depth: int) -> None:
    """Folders in each other, deeper than any path may be long."""
    here = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=here)
        inner = os.open("d", os.O_RDONLY | os.O_DIRECTORY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.close(here)


@pytest.mark.parametrize("depth", [1100, DEEP])
def test_folders_may_be_nested_deeper_than_python_or_paths_go(place: Path, depth: int) -> None:
    folder, copy, outside = copied(place)
    nest(copy, depth)
    with contextlib.suppress(OSError):  # what no path leads to cannot be taken
        write_back(copy, folder)
    assert (folder / "d" / "d" / "d").is_dir()
    assert (folder / "c").read_text() == "c" and (outside / "canary").read_text() == "alive"
    assert remove_tree(copy) and remove_tree(folder)
    assert not copy.exists() and not folder.exists()


def test_a_file_that_could_not_be_written_stays_as_it_was(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, copy, _ = copied(place)
    (copy / "c").write_text("changed")
    (copy / "a" / "b").write_text("changed, too")

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "sendfile", full)
    with pytest.raises(OSError, match=r"No space left.*, and 1 more") as caught:
        write_back(copy, folder)
    assert caught.value.errno == errno.ENOSPC
    assert look(folder) == {
        "a": (stat.S_IFDIR | 0o755, None),
        "a/b": (stat.S_IFREG | 0o644, b"b"),
        "c": (stat.S_IFREG | 0o644, b"c"),
    }


def test_a_copy_of_a_part_is_an_error(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, copy, _ = copied(place)
    remove_tree(copy)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(file_tree, "_copy_file", full)
    with pytest.raises(OSError, match="No space left"):
        copy_tree(folder, copy)


# --- removing ---------------------------------------------------------------------------------------------------


def test_all_is_removed_and_no_link_is_followed(place: Path) -> None:
    folder, _, outside = copied(place)
    (folder / "way").symlink_to(outside)
    (folder / "up-0").mkdir()
    (folder / "up-0" / "up-1").mkdir()
    (folder / "up-0" / "file").write_text("x")
    (folder / "a").chmod(0)
    assert remove_tree(folder)
    assert not folder.exists() and (outside / "canary").read_text() == "alive"


def test_a_link_to_a_folder_is_not_the_folder(place: Path) -> None:
    folder, _, outside = copied(place)
    (folder / "way").symlink_to(outside)
    assert not remove_tree(folder / "way")
    assert (outside / "canary").exists()


def test_what_is_not_there_is_gone(place: Path) -> None:
    assert remove_tree(place / "nonesuch")


def test_what_cannot_be_removed_does_not_hold_up_the_rest(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _, _ = copied(place)
    unlink = os.unlink

    def refuse(path: str, **more: int) -> None:
        if str(path).endswith("/c"):
            raise PermissionError(errno.EPERM, "immutable")
        unlink(path, **more)

    monkeypatch.setattr(os, "unlink", refuse)
    assert not remove_tree(folder)
    assert os.listdir(folder) == ["c"]
