"""The repository around a folder: which one it is, and when isolation leaves it open."""

from __future__ import annotations

import os
import pwd
from pathlib import Path
from types import SimpleNamespace

import pytest
from msgspec.structs import replace

from safe_exec.limits.project_file import find_project_file
from safe_exec.limits.repository import find_root
from safe_exec.model.limits import FolderUse, Isolation, RepositoryUse
from safe_exec.sandbox.host import repository as access
from safe_exec.sandbox.host.repository import RepositoryAccess, repository_access

CI = Isolation(hide_home=True, read_only_system=True)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with a folder ``notebooks`` in it, beside a home."""
    made = tmp_path / "repo"
    (made / ".git").mkdir(parents=True)
    (made / "notebooks").mkdir()
    (tmp_path / "home").mkdir()
    return made


def seen(
    root: Path, isolation: Isolation = CI, *, has_disk_limit: bool = False, home: Path | None = None
) -> RepositoryAccess:
    homes = (home or root.parent / "home",)
    return repository_access(
        isolation, root / "notebooks", homes=homes, has_disk_limit=has_disk_limit
    )


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_the_nearest_root_is_found_as_that_of_a_project_file_is(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "outer" / "inner" / "nb"
    folder.mkdir(parents=True)
    (tmp_path / "outer" / ".git").mkdir()
    (tmp_path / "outer" / "safe-exec.yaml").touch()
    assert find_root(folder) == tmp_path / "outer"
    assert find_project_file(folder / "a.ipynb") is not None
    mark = folder.parent / ".git"
    mark.mkdir() if kind == "directory" else mark.write_text("gitdir: /elsewhere\n")
    assert find_root(folder) == folder.parent
    assert find_project_file(folder / "a.ipynb") is None, "both searches end at the same root"
    assert find_root(Path("/nonesuch/folder")) is None


def test_it_is_open_as_far_as_it_was_asked_for(root: Path) -> None:
    for use in RepositoryUse:
        assert seen(root, replace(CI, repository=use)) == RepositoryAccess(root=root, use=use)


def test_there_is_nothing_to_open_where_nothing_is_closed(root: Path) -> None:
    assert seen(root, Isolation()) == RepositoryAccess(root=root)
    assert seen(root, Isolation(network=False)) == RepositoryAccess(root=root)


@pytest.mark.parametrize("folder", [FolderUse.READ, FolderUse.COPY])
def test_it_is_at_most_read_where_the_folder_is_not_written(root: Path, folder: FolderUse) -> None:
    assert seen(root, replace(CI, folder=folder)).use is RepositoryUse.READ
    assert (
        seen(root, replace(CI, folder=folder, repository=RepositoryUse.CLOSED)).use
        is RepositoryUse.CLOSED
    )


def test_it_is_at_most_read_where_a_disk_limit_could_not_count_it(root: Path) -> None:
    assert seen(root, has_disk_limit=True).use is RepositoryUse.READ


def test_what_is_hidden_by_name_stays_hidden(root: Path) -> None:
    for path in (root, root.parent):
        assert seen(root, replace(CI, hide=(str(path),))) == RepositoryAccess(root=root)
    assert seen(root, replace(CI, hide=(str(root / "secret"),))).is_visible


# --- roots that stay closed -------------------------------------------------------------------------------------


def test_a_home_that_is_a_repository_stays_closed(root: Path) -> None:
    for home in (root, root / "home"):
        found = seen(root, home=home)
        assert (
            not found.is_visible
            and "is a home directory" in found.warning
            and "--writable PATH" in found.warning
        )
        assert len(found.warning.splitlines()) == 1


def test_as_root_the_homes_of_others_are_homes_too(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access, "HOMES", root.parent)
    assert "is a home directory" in seen(root).warning
    monkeypatch.setattr(access, "HOMES", Path("/home"))
    monkeypatch.setattr(pwd, "getpwuid", lambda _uid: SimpleNamespace(pw_dir=str(root)))
    assert "is a home directory" in seen(root).warning


@pytest.mark.parametrize(
    "top", ["/", "/tmp", "/var/tmp", "/var", "/etc", "/run", "/usr", "/dev/shm/.."]
)
def test_a_part_of_the_system_stays_closed(monkeypatch: pytest.MonkeyPatch, top: str) -> None:
    monkeypatch.setattr(access, "find_root", lambda _folder: Path(os.path.normpath(top)))
    found = repository_access(CI, Path("/tmp/x"), homes=(), has_disk_limit=False)
    assert not found.is_visible
    assert "is a part of the system" in found.warning or "is a home directory" in found.warning


def test_what_a_stranger_made_stays_closed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    assert seen(root).is_visible, "the folder is of the same owner"
    real = Path.stat
    owners = {".git": 7, "notebooks": 8}

    def stat(path: Path, **options: bool) -> os.stat_result:
        found = real(path, **options)
        fields = list(found)
        fields[4] = owners.get(path.name, found.st_uid)
        return os.stat_result(fields)

    monkeypatch.setattr(Path, "stat", stat)
    assert seen(root).warning.startswith(f"the repository {root} belongs to another user")
    owners[".git"] = 0
    assert seen(root).is_visible, "root's"


def test_a_name_with_an_escape_sequence_stays_inert(tmp_path: Path) -> None:
    root = tmp_path / "\x1b[31mrepo"
    (root / ".git").mkdir(parents=True)
    (root / "notebooks").mkdir()
    assert "\x1b" not in seen(root, home=root).warning
