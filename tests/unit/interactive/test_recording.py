"""Recordings of sessions: private, complete lines, gone after a week."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

import nbformat
import pytest

from safe_exec.errors import UsageError
from safe_exec.interactive import recording
from safe_exec.interactive.recording import Recording


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "safe-exec" / "sessions"


def recorded(*cells: str) -> Recording:
    made = Recording.open({"kernel": "python3", "cwd": "/", "limits": "ci"})
    for cell in cells:
        made.add(cell, "id-1")
    made.close()
    return made


def test_it_is_the_owners_alone(state: Path) -> None:
    path = recorded("x = 1").path
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(state.stat().st_mode) == 0o700


def test_what_is_listed_and_found(tmp_path: Path) -> None:
    path = recorded("x = 1", "é = '\ud800'").path
    with path.open("a") as file:
        file.write('{"executed": "half')
    (facts,) = recording.sessions()
    assert (facts.cells, facts.kernel, facts.limits, facts.ended) == (2, "python3", "ci", None)
    assert recording.find(path.stem[:-3]) == facts
    assert recording.sources(path)[0] == "x = 1"
    recording.write_cells(tmp_path / "o.ipynb", recording.sources(path), "python3")
    nbformat.validate(nbformat.read(tmp_path / "o.ipynb", as_version=4))
    with pytest.raises(UsageError, match="no recording begins"):
        recording.find("absent")


def test_a_restart_loses_what_was_before() -> None:
    made = Recording.open({})
    made.add("lost = 1", None)
    made.restarted()
    made.add("kept = 1", None)
    made.close()
    assert recording.sources(made.path) == ["kept = 1"]


def test_a_week_is_the_end(state: Path) -> None:
    old, other = recorded("1").path, state / "notes.txt"
    other.write_text("")
    for path in (old, other):
        os.utime(path, (0, time.time() - recording.KEPT_SECONDS - 60))
    fresh = recorded("2").path
    assert sorted(state.iterdir()) == sorted([fresh, other])


def test_a_recording_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "MOST_BYTES", 400)
    path = recorded(*["x" * 100] * 10).path
    assert 0 < len(recording.sources(path)) < 4
