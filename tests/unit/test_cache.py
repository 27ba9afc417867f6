"""The user's cache: where it is, and the names of its entries."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import platformdirs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from safe_exec.cache import cache_root, key_of


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path


def fallback(home: Path) -> Path:
    return home / "tmp" / f"safe-exec-cache-{os.geteuid()}"


def test_the_cache_is_where_the_user_wants_it(home: Path) -> None:
    assert cache_root() == home / "xdg" / "safe-exec" == cache_root()
    assert cache_root().stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("value", [None, "", "cache", "./cache"])
def test_what_is_no_absolute_path_does_not_count(
    home: Path, monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    """As the XDG Base Directory Specification has it."""
    monkeypatch.delenv("XDG_CACHE_HOME")
    if value is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert cache_root() == home / "home" / ".cache" / "safe-exec"
    assert not (home / "cache").exists()


def test_a_user_without_a_home_has_one_in_tmp(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        platformdirs, "user_cache_path", lambda *_, **__: Path("~/.cache/safe-exec")
    )
    assert cache_root() == fallback(home)
    assert not (home / "~").exists()


def in_the_way(home: Path) -> None:
    (home / "xdg").mkdir()
    (home / "xdg" / "safe-exec").write_text("a file")


def a_link(home: Path) -> None:
    (home / "xdg").mkdir()
    (home / "elsewhere").mkdir()
    (home / "xdg" / "safe-exec").symlink_to(home / "elsewhere")


def a_dangling_link(home: Path) -> None:
    (home / "xdg").mkdir()
    (home / "xdg" / "safe-exec").symlink_to(home / "nowhere")


def no_folder(home: Path) -> None:
    (home / "xdg").write_text("a file")


@pytest.mark.parametrize("trouble", [in_the_way, a_link, a_dangling_link, no_folder])
def test_without_it_there_is_one_in_tmp(home: Path, trouble: Callable[[Path], None]) -> None:
    trouble(home)
    assert cache_root() == fallback(home)
    assert fallback(home).stat().st_mode & 0o777 == 0o700


def test_a_cache_that_cannot_be_written_is_none(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may write anywhere: the answer is made up."""
    monkeypatch.setattr(os, "access", lambda path, mode: "xdg" not in str(path))
    assert cache_root() == fallback(home)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(
        OSError,
        match=f"no place for a cache: neither {home}/xdg nor {fallback(home)} can be written",
    ):
        cache_root()


def test_a_full_disk_is_none(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(OSError, match="no place for a cache"):
        cache_root()


@pytest.mark.bed("root")  # who alone can make what belongs to another user
def test_one_in_tmp_that_belongs_to_somebody_else_is_not_ours(home: Path) -> None:
    no_folder(home)
    fallback(home).mkdir(mode=0o777)
    os.chown(fallback(home), 65534, 65534)
    with pytest.raises(OSError, match="no place for a cache"):
        cache_root()


PARTS: dict[str, Any] = {
    "cells": [(1, "x = 1", [], None)],
    "limits": {"memory": 1},
    "failure": "segfault",
    "folder": "f",
}


def test_a_key_is_the_same_for_the_same_parts() -> None:
    key = key_of(PARTS)
    assert key == key_of(dict(reversed(PARTS.items())))
    assert len(key) == 64 and int(key, 16)


@pytest.mark.parametrize(
    "changes",
    [
        {"cells": [(1, "x = 2", [], None)]},
        {"cells": [(2, "x = 1", [], None)]},
        {"cells": [(1, "x = 1", ["raises-exception"], None)]},
        {"cells": []},
        {"limits": {"memory": 2}},
        {"limits": {"memory": None}},
        {"folder": "g"},
        {"more": None},
        {"failure": "segfault\ud800"},
        {"failure": Path("/a")},
    ],
)
def test_any_other_part_makes_another_key(changes: dict[str, Any]) -> None:
    assert key_of(PARTS | changes) != key_of(PARTS)
    assert key_of(PARTS | changes) == key_of(PARTS | changes)


@given(
    st.dictionaries(
        st.text(), st.none() | st.integers() | st.text() | st.floats() | st.lists(st.text())
    )
)
def test_any_parts_have_a_key(parts: dict[str, Any]) -> None:
    assert key_of(parts) == key_of(dict(parts))
