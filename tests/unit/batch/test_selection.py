"""Which notebooks a batch runs: folders, patterns, lists, what is left out, each file once, and where its documents go."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safe_exec.batch.selection import Selection, document_stems, excluded, select
from safe_exec.errors import UsageError


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder as repositories have them."""
    for name in (
        "a.ipynb",
        "b.out.ipynb",
        "b.repro.ipynb",
        "notes.md",
        "docs/c.ipynb",
        "docs/deep/d.ipynb",
        "docs/.ipynb_checkpoints/c-checkpoint.ipynb",
        "node_modules/e.ipynb",
        "env/f.ipynb",
        "env/pyvenv.cfg",
        "out/docs/c.ipynb",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    return tmp_path


def chosen(
    tree: Path,
    *arguments: str,
    exclude: Sequence[str] = (),
    listed: Sequence[str] = (),
    cwd: Path | None = None,
) -> list[str]:
    return [
        one.path
        for one in found(tree, *arguments, exclude=exclude, listed=listed, cwd=cwd).notebooks
    ]


def found(
    tree: Path,
    *arguments: str,
    exclude: Sequence[str] = (),
    listed: Sequence[str] = (),
    cwd: Path | None = None,
) -> Selection:
    return select(arguments, listed=listed, exclude=exclude, cwd=cwd or tree, out=tree / "out")


def test_a_folder_is_walked(tree: Path) -> None:
    assert chosen(tree, ".") == ["a.ipynb", "docs/c.ipynb", "docs/deep/d.ipynb"]
    assert chosen(tree, "docs/") == ["docs/c.ipynb", "docs/deep/d.ipynb"]
    assert found(tree, ".").ours == 2


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("*.ipynb", ["a.ipynb"]),
        ("docs/*.ipynb", ["docs/c.ipynb"]),
        ("docs/**/*.ipynb", ["docs/c.ipynb", "docs/deep/d.ipynb"]),
        ("**", ["a.ipynb", "docs/c.ipynb", "docs/deep/d.ipynb"]),
        ("do*", ["docs/c.ipynb", "docs/deep/d.ipynb"]),
        ("docs/[c-d].ipynb", ["docs/c.ipynb"]),
    ],
)
def test_patterns_that_no_shell_has_expanded(tree: Path, pattern: str, wanted: list[str]) -> None:
    assert chosen(tree, pattern) == wanted


def test_a_file_is_run_once_whatever_names_it(tree: Path) -> None:
    (tree / "link.ipynb").symlink_to("a.ipynb")
    assert (
        chosen(
            tree,
            "a.ipynb",
            "./a.ipynb",
            "docs/../a.ipynb",
            str(tree / "a.ipynb"),
            "link.ipynb",
            ".",
        ).count("a.ipynb")
        == 1
    )
    assert "link.ipynb" not in chosen(tree, "a.ipynb", "link.ipynb")


def test_a_name_with_signs_of_patterns_is_a_name(tree: Path) -> None:
    (tree / "x[1].ipynb").write_text("{}")
    assert chosen(tree, "x[1].ipynb") == ["x[1].ipynb"]


def test_what_safe_exec_wrote_is_left_out_though_it_is_named(tree: Path) -> None:
    assert chosen(tree, "a.ipynb", "b.out.ipynb", "b.repro.ipynb") == ["a.ipynb"]
    with pytest.raises(UsageError, match="no notebooks found but 1 that safe-exec wrote"):
        found(tree, "b.out.ipynb")


def test_a_file_that_is_named_is_meant_where_a_folder_would_leave_it_out(tree: Path) -> None:
    assert chosen(tree, "env/f.ipynb", "out/docs/c.ipynb") == ["env/f.ipynb", "out/docs/c.ipynb"]


@pytest.mark.parametrize(
    ("argument", "words"),
    [("no.ipynb", "no such file"), ("no-*.ipynb", "matches nothing"), ("out", None)],
)
def test_what_is_not_there_is_an_error(tree: Path, argument: str, words: str | None) -> None:
    if words is None:  # a folder that is named is walked, be it the output's
        assert chosen(tree, argument) == ["out/docs/c.ipynb"]
        return
    with pytest.raises(UsageError, match=words):
        found(tree, argument)


def test_a_folder_without_notebooks_is_an_error_and_an_empty_list_is_none(tree: Path) -> None:
    (tree / "empty").mkdir()
    with pytest.raises(UsageError, match="no notebook"):
        found(tree, "empty")
    assert chosen(tree, listed=[]) == []


def test_a_list_may_name_other_files_too(tree: Path) -> None:
    assert chosen(tree, listed=["notes.md", "docs", "a.ipynb"]) == [
        "a.ipynb",
        "docs/c.ipynb",
        "docs/deep/d.ipynb",
    ]


@pytest.mark.parametrize(
    ("pattern", "path", "fits"),
    [
        ("c.ipynb", "docs/c.ipynb", True),
        ("*.ipynb", "docs/deep/d.ipynb", True),
        ("deep", "docs/deep/d.ipynb", True),
        ("deep/", "docs/deep/d.ipynb", True),
        ("docs", "docs/deep/d.ipynb", True),
        ("docs/deep", "docs/deep/d.ipynb", True),
        ("docs/*.ipynb", "docs/deep/d.ipynb", False),
        ("docs/**/d.ipynb", "docs/deep/d.ipynb", True),
        ("./docs/c.ipynb", "docs/c.ipynb", True),
        ("deep/d.ipynb", "docs/deep/d.ipynb", False),
        ("c.ipynb/", "docs/c.ipynb", False),
        ("c", "docs/c.ipynb", False),
    ],
)
def test_exclude(pattern: str, path: str, fits: bool) -> None:
    assert excluded(pattern, path) is fits


def test_exclude_leaves_out_what_is_named_too(tree: Path) -> None:
    assert chosen(tree, "a.ipynb", "docs", exclude=["deep", "a.*"]) == ["docs/c.ipynb"]


# --- git --------------------------------------------------------------------------------------------------------


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(["git", "-C", str(folder), *arguments], check=True, capture_output=True)


def test_what_git_ignores_is_left_out_of_folders_and_patterns(tree: Path) -> None:
    git(tree, "init", "-q")
    (tree / ".gitignore").write_text("deep/\n")
    (tree / "docs" / ".gitignore").write_text("c.ipynb\n")
    assert chosen(tree, ".") == ["a.ipynb"]
    assert chosen(tree, "docs/*/*.ipynb", "a.ipynb") == ["a.ipynb"]
    assert chosen(tree, "docs/c.ipynb") == ["docs/c.ipynb"]


def test_what_git_tracks_is_run_though_a_rule_would_ignore_it(tree: Path) -> None:
    git(tree, "init", "-q")
    git(tree, "add", "a.ipynb")
    (tree / ".gitignore").write_text("*.ipynb\n")
    assert chosen(tree, ".") == ["a.ipynb"]


def test_a_repository_within_another_has_its_own_rules(tree: Path) -> None:
    git(tree, "init", "-q")
    git(tree / "docs", "init", "-q")
    (tree / "docs" / ".gitignore").write_text("deep\n")
    git(
        tree,
        "-c",
        "user.email=a@b",
        "-c",
        "user.name=a",
        "commit",
        "-q",
        "--allow-empty",
        "-m",
        "x",
    )
    assert chosen(tree, ".") == ["a.ipynb", "docs/c.ipynb"]


def trap(tree: Path) -> tuple[Path, Path]:
    """A program in a repository, and the file that is there once somebody has run it."""
    program, trapped = tree / ".git" / "program", tree / ".git" / "trapped"
    program.write_text(f"#!/bin/sh\ntouch '{trapped}'\n")
    program.chmod(0o755)
    return program, trapped


def test_no_program_of_a_repositorys_settings_is_run(tree: Path) -> None:
    git(tree, "init", "-q")
    git(tree, "add", "a.ipynb")
    (tree / ".gitignore").write_text("deep/\n")
    program, trapped = trap(tree)
    for name in (
        "core.fsmonitor",
        "core.sshCommand",
        "core.pager",
        "core.editor",
        "core.alternateRefsCommand",
    ):
        git(tree, "config", name, str(program))
    git(tree, "config", "core.hooksPath", str(program.parent))
    git(tree, "status")
    assert trapped.exists(), "no trap"
    trapped.unlink()
    assert chosen(tree, ".") == ["a.ipynb", "docs/c.ipynb"] and not trapped.exists()


def test_what_a_partial_clone_lacks_is_not_fetched(tree: Path) -> None:
    """To fetch it runs what the settings of the remote say."""
    git(tree, "init", "-q")
    ignore = tree / "docs" / ".gitignore"
    ignore.write_text("c.ipynb\n")
    git(tree, "add", "docs/.gitignore")
    git(tree, "-c", "user.email=a@b", "-c", "user.name=a", "commit", "-q", "-m", "x")
    git(tree, "update-index", "--skip-worktree", "docs/.gitignore")
    ignore.unlink()
    for stored in (tree / ".git" / "objects").glob("??/*"):
        stored.unlink()
    program, trapped = trap(tree)
    for name, value in {
        "core.repositoryformatversion": "1",
        "extensions.partialClone": "origin",
        "remote.origin.url": str(tree),
        "remote.origin.promisor": "true",
        "remote.origin.uploadpack": str(program),
    }.items():
        git(tree, "config", name, value)
    subprocess.run(
        ["git", "-C", str(tree), "check-ignore", "docs/c.ipynb"], check=False, capture_output=True
    )
    assert trapped.exists(), "no trap"
    trapped.unlink()
    assert "a.ipynb" in chosen(tree, ".") and not trapped.exists()


def test_git_that_fails_leaves_nothing_out_and_says_so(tree: Path) -> None:
    (tree / ".git").mkdir()  # looks like a repository, and is none
    result = found(tree, ".")
    assert [one.path for one in result.notebooks] == [
        "a.ipynb",
        "docs/c.ipynb",
        "docs/deep/d.ipynb",
    ]
    assert "git failed to list" in result.notes[0]


def test_without_git_nothing_is_left_out_and_it_is_said(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git(tree, "init", "-q")
    (tree / ".gitignore").write_text("a.ipynb\n")
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    result = found(tree, ".")
    assert "a.ipynb" in [one.path for one in result.notebooks]
    assert "git is not installed" in result.notes[0]


# --- paths ------------------------------------------------------------------------------------------------------


def test_a_notebook_elsewhere_moves_the_root_to_what_all_have_in_common(tree: Path) -> None:
    result = found(tree, "../a.ipynb", "c.ipynb", cwd=tree / "docs")
    assert result.root == tree
    assert [one.path for one in result.notebooks] == ["a.ipynb", "docs/c.ipynb"]
    assert [one.source for one in result.notebooks] == [Path("../a.ipynb"), Path("c.ipynb")]


def test_up_through_a_link_leads_where_the_system_says(tree: Path) -> None:
    (tree / "x").mkdir()
    (tree / "x" / "link").symlink_to(tree / "docs" / "deep")
    (tree / "x" / "c.ipynb").write_text("{}")
    result = found(tree, "x/link/../c.ipynb")
    assert [one.path for one in result.notebooks] == ["docs/c.ipynb"]


def test_documents_of_two_never_meet() -> None:
    stems = document_stems(["a.ipynb", "a.IPYNB", "a", "a.IPYNB.ipynb", "d/a.ipynb", ".ipynb"])
    assert stems["a.ipynb"] == "a" and stems["d/a.ipynb"] == "d/a"
    assert len(set(stems.values())) == len(stems)


@given(
    st.lists(st.from_regex(r"(d/)?[ab](\.ipynb|\.IPYNB|\.out){0,3}", fullmatch=True), unique=True)
)
def test_documents_never_meet(paths: list[str]) -> None:
    stems = document_stems(paths)
    assert set(stems) == set(paths) and len(set(stems.values())) == len(paths)


def test_a_name_that_is_no_text_is_carried_along(tree: Path) -> None:
    raw = os.fsencode(tree) + b"/docs/\xff.ipynb"
    Path(os.fsdecode(raw)).write_text("{}")
    assert any(os.fsencode(one.path) == b"docs/\xff.ipynb" for one in found(tree, ".").notebooks)
