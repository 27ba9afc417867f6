"""What earlier searches learned: where it is kept, that nothing in it can do harm, and what is thrown away when."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import to_builtins

from safe_exec.experiments import trial_cache
from safe_exec.experiments.culprits.oracle.cached_answers import CachedAnswer
from safe_exec.experiments.culprits.protocol import Outcome
from safe_exec.experiments.trial_cache import (
    FOLDER_DAYS,
    TRIAL_DAYS,
    TrialCache,
    claim_folder,
    release_folder,
    tidy,
)
from safe_exec.keeper import procfs

DAY = 86400.0
KEY = "ab" + "0" * 62


# --- answers ------------------------------------------------------------------------------------------------------------


def test_an_answer_comes_back(tmp_path: Path) -> None:
    found = TrialCache(tmp_path)
    answer = {"answer": "fail", "seconds": 1.5, "names": ["a"], "peak": None}
    assert found.get(KEY, dict) is None
    found.put(KEY, answer)
    assert TrialCache(tmp_path).get(KEY, dict) == answer
    assert found.get("ab" + "1" * 62, dict) is None
    found.put(KEY, {"answer": "pass"})
    assert found.get(KEY, dict) == {"answer": "pass"}
    assert os.listdir(tmp_path / "trials" / "ab") == [f"{KEY}.json"]


ANSWER = CachedAnswer(
    answer=Outcome.UNRESOLVED,
    seconds=1.5,
    stopped_at=3,
    names=("a", "b"),
    peak=None,
    another_form=False,
    ended="exception",
    line=3,
    exact_line=True,
)


def test_the_answer_of_a_trial_comes_back(tmp_path: Path) -> None:
    TrialCache(tmp_path).put(KEY, ANSWER)
    assert TrialCache(tmp_path).get(KEY, CachedAnswer) == ANSWER


@pytest.mark.parametrize(
    "change",
    [{"answer": "maybe"}, {"seconds": "long"}, {"names": "ab"}, {"mood": "bad"}, {"ended": ...}],
)
def test_an_answer_in_another_format_is_none(tmp_path: Path, change: dict[str, Any]) -> None:
    """A version of safe-exec with other fields wrote it: the trial runs again."""
    entry = to_builtins(ANSWER) | change
    found = TrialCache(tmp_path)
    found.put(KEY, {key: value for key, value in entry.items() if value is not ...})
    assert found.get(KEY, dict) is not None and found.get(KEY, CachedAnswer) is None


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
    assert found.get(KEY, dict) is None
    found.put(KEY, {"answer": "pass"})
    assert found.get(KEY, dict) == {"answer": "pass"}


def test_a_cache_that_cannot_be_used_is_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "trials").write_text("a file")
    found = TrialCache(tmp_path)
    found.put(KEY, {"answer": "fail"})
    assert found.get(KEY, dict) is None
    assert (tmp_path / "trials").read_text() == "a file"
    found = TrialCache(tmp_path / "nowhere" / "\0")
    assert found.get(KEY, dict) is None


def test_an_entry_that_is_a_folder_is_none(tmp_path: Path) -> None:
    found = TrialCache(tmp_path)
    (tmp_path / "trials" / "ab" / f"{KEY}.json").mkdir(parents=True)
    found.put(KEY, {"answer": "fail"})
    assert found.get(KEY, dict) is None


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
    assert [days for days, key in keys.items() if found.get(key, dict)] == [0.0, TRIAL_DAYS - 0.1]


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
