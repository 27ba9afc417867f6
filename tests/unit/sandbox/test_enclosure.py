"""The walls around a kernel on a machine."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from safe_exec.errors import IsolationError
from safe_exec.model.limits import FolderUse, Isolation, Limits, Mechanism, SystemCalls
from safe_exec.sandbox import enclosure
from safe_exec.sandbox.enclosure import (
    Enclosure,
    PlannedKernel,
    demand_narrow,
    enclose,
    parts_beside,
    settled,
)
from safe_exec.sandbox.host.capabilities import HostCapabilities
from safe_exec.sandbox.planner import build_plan
from safe_exec.sandbox.sandbox import WallSetup

Make = Callable[..., Path]


def test_paths_are_settled(home: Path, tmp_path: Path) -> None:
    (home / "out").mkdir()
    (tmp_path / "way").symlink_to(home / "out")
    found = settled(
        Isolation(writable=("~/out", str(tmp_path / "way")), hide=("~/out", "/nonesuch", "~/none"))
    )
    assert found.writable == (str(home / "out"), str(tmp_path / "way")), (
        "a link is opened by its own name too"
    )
    assert found.hide == (str(home / "out"),)
    assert settled(Isolation()) == Isolation()


@pytest.mark.parametrize(
    ("isolation", "said"),
    [
        (Isolation(writable=("/nonesuch",)), "writable: /nonesuch: no such file or directory"),
        (Isolation(show=("/nonesuch",)), "show: /nonesuch: no such file or directory"),
        (Isolation(show=("/usr/..",)), "/ itself can be neither"),
        (Isolation(devices=("/dev/nonesuch",)), "devices: /dev/nonesuch: no such file"),
        (Isolation(devices=("/dev/../etc/passwd",)), "devices: /etc/passwd is not below /dev"),
        (Isolation(writable=("/",)), "/ itself can be neither"),
        (Isolation(hide=("/usr/..",)), "/ itself can be neither"),
    ],
)
def test_paths_that_cannot_be_used(isolation: Isolation, said: str) -> None:
    with pytest.raises(IsolationError, match=said):
        settled(isolation)


WALLED = Isolation(hide_home=True, read_only_system=True)


@pytest.mark.parametrize("path", ["/", "/tmp", "/etc", "/usr", "/dev", "/proc"])
def test_a_folder_that_holds_what_is_to_be_closed_is_refused(path: str) -> None:
    with pytest.raises(IsolationError, match=r"is, or holds, .* that is to be walled off"):
        demand_narrow(Path(path), WALLED)
    demand_narrow(Path(path) / "inner", replace(WALLED, hide_home=False))


def test_a_home_is_no_folder_for_a_notebook_that_is_to_see_no_home(home: Path) -> None:
    for folder in (home, home.parent):
        with pytest.raises(IsolationError, match="a home that is to be walled off"):
            demand_narrow(folder, Isolation(hide_home=True))
        demand_narrow(folder, Isolation(network=False))
    demand_narrow(home / "project", WALLED)


# --- what the keeper is told ------------------------------------------------------------------------------------

LANDLOCK = HostCapabilities(uid=1000, landlock=7)
BUBBLEWRAP = HostCapabilities(uid=1000, bubblewrap="/usr/bin/bwrap", bubblewrap_why_not="")


def told(
    home: Path,
    machine: HostCapabilities,
    isolation: Isolation,
    *,
    cwd: Path | None = None,
    disk: int | None = None,
) -> Enclosure:
    folder = cwd or home / "project"
    folder.mkdir(exist_ok=True)
    plan = build_plan(Limits(disk=disk), machine, "id", isolation)
    planned = PlannedKernel(
        plan=plan,
        argv=[sys.executable],
        env={"A": "b"},
        cwd=folder,
        runtime=home.parent / "runtime",
    )
    return enclose(planned)


def test_the_folder_is_told_without_links(home: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (home / "way").symlink_to(tmp_path / "real")
    found = told(home, BUBBLEWRAP, WALLED, cwd=home / "way")
    assert found.cwd == str(tmp_path / "real")


def test_without_bubblewrap_there_is_no_enclosure(home: Path) -> None:
    assert told(home, LANDLOCK, WALLED).setup.bwrap is None
    plain = told(home, HostCapabilities(), Isolation(listed_environment=True))
    assert plain.setup == WallSetup()
    assert (plain.env, plain.cwd) == ({"A": "b"}, str(home / "project"))


@pytest.mark.parametrize(
    ("isolation", "asked", "size", "back"),
    [
        (Isolation(folder=FolderUse.COPY), None, 1 << 30, False),
        (Isolation(folder=FolderUse.COPY), 5, 5, False),
        (Isolation(), 5, 5, True),
        (Isolation(write_back=False), 5, 5, False),
        (Isolation(folder=FolderUse.READ), 5, 5, False),
        (Isolation(hide_home=True), None, None, None),
    ],
)
def test_the_disk(
    home: Path, isolation: Isolation, asked: int | None, size: int | None, back: bool | None
) -> None:
    bwrap = told(home, BUBBLEWRAP, isolation, disk=asked).setup.bwrap
    assert bwrap is not None
    disk = bwrap.disk
    assert (disk and disk.size, disk and disk.write_back) == (size, back)
    if disk is not None:
        assert disk.inodes >= enclosure.LEAST_INODES
        assert disk.base == str(home.parent / "runtime" / "disk")


def test_without_a_tmp_of_its_own_there_is_a_directory_that_goes_with_the_run(home: Path) -> None:
    assert told(home, LANDLOCK, WALLED).env == {"A": "b", "TMPDIR": str(home.parent / "runtime")}
    assert told(home, BUBBLEWRAP, WALLED).env == {"A": "b"}


def test_a_filter_is_handed_over_only_where_it_is_to_hold(home: Path) -> None:
    refused = Isolation(system_calls=SystemCalls.REFUSE)
    walls = told(home, HostCapabilities(), refused).setup.walls
    assert walls is not None and walls.seccomp
    without = (
        HostCapabilities(allowed=frozenset({Mechanism.RLIMIT})),
        HostCapabilities(seccomp_why_not="none"),
    )
    assert [told(home, machine, refused).setup.walls for machine in without] == [None, None]


def opened(found: Enclosure, path: Path, access: str) -> bool:
    """Whether a rule opens a path for an access: readable or writable."""
    assert found.setup.walls is not None and found.setup.walls.landlock is not None
    return any(path.is_relative_to(rule) for rule in getattr(found.setup.walls.landlock, access))


@pytest.fixture
def files(home: Path) -> dict[str, Path]:
    found = {name: home / name for name in ("key", "project/secret/key", "project/data")}
    for path in found.values():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    return found


@pytest.mark.parametrize("system", [True, False])
def test_landlock_hides_homes_whether_or_not_the_system_may_be_written(
    home: Path, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, *, system: bool
) -> None:
    monkeypatch.setattr(enclosure, "visible", lambda *_: ())
    found = told(home, LANDLOCK, Isolation(hide_home=True, read_only_system=system))
    for what in ("readable", "writable"):
        assert not opened(found, files["key"], what)
        assert opened(found, files["project/data"], what)
    assert opened(found, Path("/usr/bin/env"), "readable")
    assert opened(found, Path("/usr/bin/env"), "writable") is not system


@pytest.mark.parametrize("use", [FolderUse.READ, FolderUse.COPY])
@pytest.mark.parametrize("system", [True, False])
def test_landlock_makes_no_copy_so_the_folder_is_only_read(
    home: Path,
    files: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    use: FolderUse,
    *,
    system: bool,
) -> None:
    monkeypatch.setattr(enclosure, "visible", lambda *_: ())
    found = told(home, LANDLOCK, Isolation(folder=use, read_only_system=system))
    assert not opened(found, files["project/data"], "writable")
    assert opened(found, files["project/data"], "readable")


def test_landlock_hides_a_part_of_the_folder(
    home: Path, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(enclosure, "visible", lambda *_: ())
    found = told(home, LANDLOCK, replace(WALLED, hide=(str(home / "project" / "secret"),)))
    for what in ("readable", "writable"):
        assert not opened(found, files["project/secret/key"], what)
        assert opened(found, files["project/data"], what)


def test_parts_beside(home: Path, files: dict[str, Path]) -> None:
    project = str(home / "project")
    (home / "project" / "way").symlink_to(home / "project" / "secret")
    assert (
        parts_beside(project, [])
        == parts_beside(project, ["/srv"])
        == parts_beside(project, [project])
        == [project]
    )
    assert parts_beside(project, [f"{project}/secret"]) == [f"{project}/data"]
    assert parts_beside(project, [f"{project}/secret/key"]) == [f"{project}/data"]
    assert parts_beside("/nonesuch", ["/nonesuch/x"]) == []
