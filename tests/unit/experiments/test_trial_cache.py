"""What earlier searches learned: where it is kept, that nothing in it can do harm, and what is thrown away when."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safe_exec.experiments import trial_cache
from safe_exec.experiments.trial_cache import (
    FOLDER_DAYS,
    TRIAL_DAYS,
    TrialCache,
    cache_root,
    claim_folder,
    key_of,
    release_folder,
    tidy,
)
from safe_exec.keeper import procfs

DAY = 86400.0
KEY = "ab" + "0" * 62


# --- where it is --------------------------------------------------------------------------------------------------------


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
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
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


# --- answers ------------------------------------------------------------------------------------------------------------

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


def test_an_answer_comes_back(tmp_path: Path) -> None:
    found = TrialCache(tmp_path)
    answer = {"answer": "fail", "seconds": 1.5, "names": ["a"], "peak": None}
    assert found.get(KEY) is None
    found.put(KEY, answer)
    assert TrialCache(tmp_path).get(KEY) == answer
    assert found.get("ab" + "1" * 62) is None
    found.put(KEY, {"answer": "pass"})
    assert found.get(KEY) == {"answer": "pass"}
    assert os.listdir(tmp_path / "trials" / "ab") == [f"{KEY}.json"]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b'{"answer": "fa',
        b"null",
        b"[]",
        b"3",
        b'"text"',
        b"\xff\xfe",
        b"\0" * 100,
        b"[" * 100_000,
    ],
    ids=range(10),
)
def test_a_damaged_entry_is_none(tmp_path: Path, data: bytes) -> None:
    found = TrialCache(tmp_path)
    found.put(KEY, {"answer": "fail"})
    (tmp_path / "trials" / "ab" / f"{KEY}.json").write_bytes(data)
    assert found.get(KEY) is None
    found.put(KEY, {"answer": "pass"})
    assert found.get(KEY) == {"answer": "pass"}


def test_a_cache_that_cannot_be_used_is_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "trials").write_text("a file")
    found = TrialCache(tmp_path)
    found.put(KEY, {"answer": "fail"})
    assert found.get(KEY) is None
    assert (tmp_path / "trials").read_text() == "a file"
    found = TrialCache(tmp_path / "nowhere" / "\0")
    assert found.get(KEY) is None


def test_an_entry_that_is_a_folder_is_none(tmp_path: Path) -> None:
    found = TrialCache(tmp_path)
    (tmp_path / "trials" / "ab" / f"{KEY}.json").mkdir(parents=True)
    found.put(KEY, {"answer": "fail"})
    assert found.get(KEY) is None


# --- folders of runs ----------------------------------------------------------------------------------------------------


def test_a_folder_is_claimed_and_released(tmp_path: Path) -> None:
    directory = claim_folder(tmp_path, "20260101-120000-abcdef")
    assert directory == tmp_path / "folders" / "20260101-120000-abcdef"
    assert directory.stat().st_mode & 0o777 == 0o700
    (directory / "before").mkdir()
    assert claim_folder(tmp_path, directory.name) == directory, "a search that goes on finds it"
    assert (directory / "before").is_dir()
    release_folder(directory)
    assert not directory.exists()
    release_folder(directory)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "/",
        "/etc",
        "../..",
        "a/b",
        "a/../../b",
        ".hidden",
        "a\0",
        "a b",
        "a\n",
        "-",
        "é" * 99,
    ],
)
def test_a_name_that_is_no_runs_gets_nowhere(tmp_path: Path, name: str) -> None:
    """A verdict names the run, and anybody may write one: what it names is removed in the end."""
    with pytest.raises(OSError, match="not the name of a run"):
        claim_folder(tmp_path, name)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_removed_as_well() -> None:
    """A notebook's folder may hold read-only ones, and with it its copy. As an ordinary user, who may not just do it."""
    program = (
        "import os, sys; from pathlib import Path; from safe_exec.experiments.trial_cache import release_folder;"
        "path = Path(sys.argv[1]); os.setgroups([]) if os.geteuid() == 0 else None;"
        "os.setresgid(*[65534] * 3) if os.geteuid() == 0 else None; os.setresuid(*[65534] * 3) if os.geteuid() == 0 else None;"
        "(path / 'a' / 'b' / 'c').mkdir(parents=True); (path / 'a' / 'b' / 'file').touch(); (path / 'a' / 'up').symlink_to('../..');"
        "(path / 'a' / 'b' / 'c').chmod(0); (path / 'a' / 'b').chmod(0o555); (path / 'a').chmod(0);"
        "mode = path.parent.stat().st_mode; release_folder(path); assert not path.exists();"
        "assert path.parent.stat().st_mode == mode"
    )
    with tempfile.TemporaryDirectory() as open_to_all:
        os.chmod(open_to_all, 0o777)
        argv = [sys.executable, "-c", program, f"{open_to_all}/run"]
        done = subprocess.run(
            argv, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


def aged(path: Path, days: float) -> Path:
    at = time.time() - days * DAY
    os.utime(path, (at, at))
    return path


def folder(root: Path, name: str, days: float, owner: object = None) -> Path:
    directory = root / "folders" / name
    (directory / "before").mkdir(parents=True)
    if owner is not None:
        (directory / "owner.json").write_text(
            owner if isinstance(owner, str) else json.dumps(owner)
        )
    return aged(directory, days)


def me() -> dict[str, int]:
    found = procfs.stat(os.getpid())
    assert found is not None
    return {"pid": os.getpid(), "started": found.started}


def test_old_folders_of_nobody_are_removed(tmp_path: Path) -> None:
    old, young = FOLDER_DAYS + 0.1, FOLDER_DAYS - 0.1
    living, dead = me(), me() | {"started": 1}
    stay = [
        folder(tmp_path, "young", young),
        folder(tmp_path, "young-dead", young, dead),
        folder(tmp_path, "old-living", old, living),
    ]
    go = [
        folder(tmp_path, "old", old),
        folder(tmp_path, "old-dead", old, dead),
        folder(tmp_path, "old-gone", old, {"pid": 2**22 + 1, "started": 5}),
        *(
            folder(tmp_path, f"old-{n}", old, text)
            for n, text in enumerate(("", "{", "[]", "3", '{"pid": "x"}', '{"pid": 1}'))
        ),
        folder(tmp_path, "old-inf", old, '{"pid": Infinity, "started": 1}'),
    ]
    tidy(tmp_path)
    assert all(path.exists() for path in stay)
    assert not any(path.exists() for path in go)


def test_a_claimed_folder_is_ours_as_long_as_we_live(tmp_path: Path) -> None:
    directory = claim_folder(tmp_path, "abc")
    aged(directory, 100)
    tidy(tmp_path)
    assert directory.exists()


def test_old_answers_are_removed(tmp_path: Path) -> None:
    found = TrialCache(tmp_path)
    keys = {
        days: f"{n:02x}" + "0" * 62
        for n, days in enumerate((0.0, TRIAL_DAYS - 0.1, TRIAL_DAYS + 0.1, 1000.0))
    }
    for days, key in keys.items():
        found.put(key, {"days": days})
        aged(tmp_path / "trials" / key[:2] / f"{key}.json", days)
    tidy(tmp_path)
    assert [days for days, key in keys.items() if found.get(key)] == [0.0, TRIAL_DAYS - 0.1]


def test_whatever_else_is_there_stays_and_does_no_harm(tmp_path: Path) -> None:
    tidy(tmp_path)
    tidy(tmp_path / "nowhere")
    (tmp_path / "trials" / "ab" / "folder").mkdir(parents=True)
    (tmp_path / "trials" / "file").touch()
    (tmp_path / "folders").mkdir()
    (tmp_path / "folders" / "file").touch()
    (tmp_path / "folders" / "link").symlink_to(tmp_path / "kept")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").touch()
    for path in (
        tmp_path / "trials" / "ab" / "folder",
        tmp_path / "trials" / "file",
        tmp_path / "folders" / "file",
        tmp_path / "kept",
    ):
        aged(path, 1000)
    tidy(tmp_path)
    assert (tmp_path / "trials" / "ab" / "folder").is_dir()
    assert (tmp_path / "kept" / "file").exists(), "what a link leads to is not ours"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(("pid", "started", "x")), inner, max_size=3)
    ),
)


@pytest.fixture(scope="module")
def owned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("owned")


@settings(max_examples=200, deadline=None)
@given(value=VALUES)
def test_whatever_an_owner_may_say(owned: Path, value: object) -> None:
    (owned / "owner.json").write_text(json.dumps(value))
    assert not trial_cache._owned(owned) or value == me()
