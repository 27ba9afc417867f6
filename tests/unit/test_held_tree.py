"""A directory held open: what is below it is reached through no link, wherever the directory is by now."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

from safe_exec.errors import OutputPathError
from safe_exec.files import OutputDirectory, OutputRoot


@pytest.fixture
def top(tmp_path: Path) -> Path:
    path = tmp_path / "top"
    path.mkdir()
    (tmp_path / "else").mkdir()
    return path


def written(tree: OutputRoot, path: Path) -> Path:
    with contextlib.closing(OutputDirectory(path, tree)) as folder:
        folder.write(b"x")
        return folder.path


def test_folders_are_made_on_the_way(top: Path) -> None:
    with OutputRoot(top) as tree:
        assert written(tree, top / "a" / "b" / "c") == top / "a" / "b" / "c"
        assert written(tree, top / "d") == top / "d"
        assert tree.path == top
    assert (top / "a" / "b" / "c").read_bytes() == b"x" == (top / "d").read_bytes()


def test_one_that_was_moved_is_written_to_where_it_is(top: Path) -> None:
    with OutputRoot(top) as tree:
        away = top.with_name("away")
        top.rename(away)
        assert tree.path == away
        top.symlink_to(top.with_name("else"))
        assert tree.path == away
        assert written(tree, top / "a" / "b") == away / "a" / "b"
        assert tree.current_path(top / "a" / "c") == away / "a" / "c"
    assert list(top.with_name("else").iterdir()) == []


@pytest.mark.parametrize("leads_to", ["../else", "inner", ".", "nowhere"])
def test_a_link_below_is_not_followed(top: Path, leads_to: str) -> None:
    (top / "inner").mkdir()
    (top / "link").symlink_to(leads_to)
    with OutputRoot(top) as tree:
        with pytest.raises(OSError, match="link"):
            written(tree, top / "link" / "document")
        with pytest.raises(OutputPathError, match="choose another --out"):
            tree.current_path(top / "link" / "document")
    assert list(top.with_name("else").iterdir()) == list((top / "inner").iterdir()) == []


def test_the_top_is_no_link(top: Path) -> None:
    link = top.with_name("link")
    link.symlink_to(top)
    with pytest.raises(OSError, match="link"):
        OutputRoot(link)


def test_one_that_was_removed_has_no_other_place(top: Path) -> None:
    with OutputRoot(top) as tree:
        top.rmdir()
        assert tree.path == top
        with pytest.raises(OutputPathError):
            tree.current_path(top / "a" / "document")


def test_no_descriptor_is_left(top: Path) -> None:
    (top / "link").symlink_to("..")
    before = len(os.listdir("/proc/self/fd"))
    with OutputRoot(top) as tree:
        written(tree, top / "a" / "b")
        with contextlib.suppress(OSError):
            written(tree, top / "link" / "b")
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_document_is_forgotten_and_a_link_not_followed(top: Path) -> None:
    (top.with_name("else") / "kept").touch()
    (top / "document").symlink_to(top.with_name("else") / "kept")
    with (
        OutputRoot(top) as tree,
        contextlib.closing(OutputDirectory(top / "document", tree)) as folder,
    ):
        folder.remove()
        with pytest.raises(FileNotFoundError):
            folder.remove()
    assert not os.path.lexists(top / "document") and (top.with_name("else") / "kept").exists()
