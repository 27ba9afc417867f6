"""The repository around a folder as trials see it: as it was, with a layer of their own to write to."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest

from safe_exec.experiments import repository_layer as layers
from safe_exec.experiments import workspace as folders
from safe_exec.experiments.repository_layer import (
    CHANGED,
    NO_LAYER,
    RepositoryLayer,
    layer_of,
    load,
    note,
)
from safe_exec.experiments.workspace import reopen, take, workspace_factory
from safe_exec.keeper import mounts

NONE: frozenset[Path] = frozenset()


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a folder ``nb`` and more; overlays can be had."""
    made = tmp_path / "repo"
    for name in (
        ".git/config",
        "nb/a.ipynb",
        "src/mod.py",
        "data/rows.csv",
        ".venv/pyvenv.cfg",
        ".venv/lib/x.py",
    ):
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_text(name)
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(mounts, "overlays", lambda *_: True)
    return made


def layer(
    root: Path, before: Any, *, ours: frozenset[Path] = NONE
) -> tuple[RepositoryLayer | None, tuple[str, ...]]:
    return layer_of(before, root.parent / "scratch", "root", ours=ours)


def test_what_is_noted_is_the_project_outside_the_folder(root: Path) -> None:
    notes = note(root, root / "nb", ours=frozenset({root / "data" / "ours.json"}))
    assert notes.entries is not None
    assert set(notes.entries) == {".venv", "src", "src/mod.py", "data", "data/rows.csv"}


def test_what_the_first_run_added_is_hidden_and_what_it_changed_is_said(root: Path) -> None:
    before = note(root, root / "nb", ours=NONE)
    assert layer(root, before) == (RepositoryLayer(root=root), ())
    (root / "results" / "deep").mkdir(parents=True)
    (root / "results" / "deep" / "t.csv").touch()
    (root / "src" / "new.py").touch()
    (root / "out.ipynb").touch()
    found, gaps = layer(root, before, ours=frozenset({root / "out.ipynb"}))
    assert found is not None and set(found.new) == {"results", "src/new.py"} and gaps == ()
    (root / "data" / "rows.csv").write_text("changed")
    assert layer(root, before)[1] == (CHANGED,)


def test_a_file_that_is_gone_was_changed(root: Path) -> None:
    before = note(root, root / "nb", ours=NONE)
    (root / "src" / "mod.py").unlink()
    assert layer(root, before)[1] == (CHANGED,)


def test_of_a_large_repository_nothing_is_known(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "MOST_ENTRIES", 2)
    before = note(root, root / "nb", ours=NONE)
    assert before.entries is None and before.fingerprint() is None
    (root / "new").touch()
    assert layer(root, before) == (RepositoryLayer(root=root), ())


@pytest.mark.parametrize(("way", "overlays"), [(None, True), ("user", False)])
def test_where_there_is_no_layer_it_is_said(
    root: Path, monkeypatch: pytest.MonkeyPatch, way: str | None, *, overlays: bool
) -> None:
    monkeypatch.setattr(mounts, "overlays", lambda *_: overlays)
    before = note(root, root / "nb", ours=NONE)
    assert layer_of(before, root.parent / "scratch", way, ours=NONE) == (None, (NO_LAYER,))


def test_the_layers_of_a_trial(root: Path, tmp_path: Path) -> None:
    (tmp_path / "trial").mkdir()
    mount = RepositoryLayer(root=root, new=("results", "src/new.py")).mount(tmp_path / "trial")
    assert mount["target"] == mount["lower"] == str(root)
    for name in ("results", "src/new.py"):
        status = (Path(mount["upper"]) / name).lstat()
        assert stat.S_ISCHR(status.st_mode) and status.st_rdev == 0, "a whiteout"


def test_notes_come_back_for_a_search_that_goes_on(root: Path) -> None:
    scratch = root.parent / "scratch"
    before = note(root, root / "nb", ours=NONE)
    before.save(scratch)
    assert load(scratch) == before
    for text in ("", "{}", "[]", '{"root": "/r", "folder": "/r/f", "entries": 5}'):
        (scratch / layers.NOTES).write_text(text)
        assert load(scratch) is None


# --- with the folder --------------------------------------------------------------------------------------------


def test_the_folder_lies_over_the_repository(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounts, "namespaces", lambda: "root")
    monkeypatch.setattr(folders, "TMP", root.parent / "tmp")
    scratch = root.parent / "scratch"
    snapshot = take(root / "nb", scratch, repository=root)
    view = workspace_factory(snapshot, ours=NONE).make("a", Path("/run/x"))
    targets = [mount["target"] for mount in view.mounts]
    assert targets.index(str(root)) < targets.index(str(root / "nb"))
    kept = reopen(root / "nb", scratch)
    assert kept is not None and kept.repository == snapshot.repository
    assert kept.fingerprint() == snapshot.fingerprint(), (
        "a search that goes on believes its own answers"
    )


def test_an_answer_depends_on_the_repository(root: Path) -> None:
    scratch = root.parent / "scratch"
    first = take(root / "nb", scratch, repository=root).fingerprint()
    os.rename(scratch, root.parent / "earlier")
    scratch.mkdir()
    (root / "src" / "mod.py").write_text("v = 42")
    assert take(root / "nb", scratch, repository=root).fingerprint() != first


def test_a_folder_that_is_the_repository_needs_no_layer(root: Path) -> None:
    assert take(root, root.parent / "scratch", repository=root).repository is None
