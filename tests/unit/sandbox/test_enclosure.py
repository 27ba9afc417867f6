"""What walls go around on a machine: what a kernel needs stays readable, and never a whole home with it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

import safe_exec
from safe_exec.errors import IsolationError
from safe_exec.model.limits import FolderUse, Isolation, Limits, Mechanism, SystemCalls
from safe_exec.sandbox import enclosure
from safe_exec.sandbox.enclosure import (
    Enclosure,
    PlannedKernel,
    demand_narrow,
    enclose,
    homes,
    parts_beside,
    settled,
    visible,
)
from safe_exec.sandbox.host.capabilities import HostCapabilities
from safe_exec.sandbox.planner import build_plan
from safe_exec.sandbox.sandbox import WallSetup

Make = Callable[..., Path]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "homes" / "ann"
    path.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(path))
    monkeypatch.chdir(tmp_path)
    return path


def program(path: Path, text: str = "#!/bin/sh\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def link(path: Path, to: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(to)
    return path


def venv(prefix: Path, base: Path) -> Path:
    """A virtual environment as venv makes it: links and a file that names the base."""
    found = link(prefix / "bin" / "python", base)
    (prefix / "pyvenv.cfg").write_text(
        f"home = {base.parent}\ninclude-system-site-packages = false\n"
    )
    (prefix / "lib" / "python3.11" / "site-packages").mkdir(parents=True)
    return found


def seen(argv0: Path | str, **env: str) -> set[Path]:
    return set(visible([str(argv0), "-m", "ipykernel_launcher"], env))


# --- homes ------------------------------------------------------------------------------------------------------


def test_the_own_home_comes_first_and_none_lies_in_an_earlier_one(home: Path) -> None:
    found = homes()
    assert found[0] == home.resolve()
    assert all(
        not later.is_relative_to(earlier)
        for n, earlier in enumerate(found)
        for later in found[n + 1 :]
    )
    assert all(path.is_dir() and path.is_absolute() and path != Path("/") for path in found)


@pytest.mark.parametrize("value", ["/", "", "/nonesuch/home"])
def test_a_home_that_is_none_is_not_hidden(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", value)
    assert (
        Path("/") not in homes()
        and Path("/nonesuch/home") not in homes()
        and Path.cwd() not in homes()
    )


def test_a_home_behind_a_link_is_hidden_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    monkeypatch.setenv("HOME", str(link(tmp_path / "link", tmp_path / "real")))
    assert homes()[0] == (tmp_path / "real").resolve()


# --- what stays readable ----------------------------------------------------------------------------------------


def test_this_interpreter_and_this_package_are_visible(home: Path) -> None:
    found = seen(sys.executable)
    assert {
        Path(sys.prefix),
        Path(sys.base_prefix).resolve(),
        Path(safe_exec.__file__).parent,
    } <= found
    assert all(path.is_absolute() and path.exists() for path in found)


def test_a_virtual_environment_shows_itself_and_its_base(home: Path) -> None:
    base = program(home / ".pyenv" / "versions" / "3.11.7" / "bin" / "python3.11")
    python = venv(home / "project" / ".venv", base)
    found = seen(python)
    assert {home / "project" / ".venv", home / ".pyenv" / "versions" / "3.11.7"} <= found
    assert not {home, home / "project", home / ".pyenv", home / ".pyenv" / "versions"} & found


def test_chains_of_links_are_followed(home: Path) -> None:
    real = program(home / "uv" / "cpython-3.12" / "bin" / "python3.12")
    middle = link(home / "tools" / "py" / "bin" / "python3", real)
    python = venv(home / "work" / "venv", middle)
    assert {home / "uv" / "cpython-3.12", home / "tools" / "py", home / "work" / "venv"} <= seen(
        python
    )


def test_links_that_go_round_end(home: Path) -> None:
    link(home / "env" / "bin" / "python", home / "env" / "bin" / "other")
    link(home / "env" / "bin" / "other", home / "env" / "bin" / "python")
    assert home not in seen(home / "env" / "bin" / "python")


def test_packages_installed_for_development_are_visible(home: Path) -> None:
    python = venv(home / "venv", program(home / "base" / "bin" / "python3"))
    site = home / "venv" / "lib" / "python3.11" / "site-packages"
    (home / "src" / "mine").mkdir(parents=True)
    (site / "mine.pth").write_text(
        f"{home}/src/mine\n# a comment\nimport sys; sys.path\nrelative/folder\n/nonesuch\n{home}\n"
    )
    (site / "bad.pth").mkdir()
    found = seen(python)
    assert home / "src" / "mine" in found
    assert not {home, Path("/nonesuch"), home / "relative"} & found


FINDERS = {
    # setuptools, editables (hatchling), and one that says nothing.
    "__editable___mine_finder.py": "MAPPING: dict[str, str] = {{'mine': '{home}/src/mine'}}\nNAMESPACES = {{'ns': ['{home}/src/ns']}}\n",
    "_other.py": "from editables.redirector import RedirectingFinder as F\nF.map_module('other', '{home}/src/other/__init__.py')\n",
    "_single.py": "map_module('single', '{home}/src/single.py')\nHOME, GONE = '{home}', '{home}/gone'\n",
    "_broken.py": "this is '{home}/src/secret' (\n",
}


def test_packages_that_a_finder_finds_are_visible(home: Path) -> None:
    python = venv(home / "venv", program(home / "base" / "bin" / "python3"))
    site = home / "venv" / "lib" / "python3.11" / "site-packages"
    for name in ("mine", "ns", "other", "secret"):
        (home / "src" / name).mkdir(parents=True)
    (home / "src" / "other" / "__init__.py").touch()
    (home / "src" / "single.py").touch()
    for name, source in FINDERS.items():
        (site / name).write_text(source.format(home=home))
        (site / f"{name}.pth").write_text(
            f"import {name.removesuffix('.py')}; {name.removesuffix('.py')}.install()\n"
        )
    (site / "_unused.py").write_text(f"PLACE = '{home}/src/secret'\n")
    (site / "builtin.pth").write_text("import os; import nonesuch\n")
    found = seen(python)
    assert {home / "src" / name for name in ("mine", "ns", "other", "single.py")} <= found
    assert not {home, home / "src", home / "gone", home / "src" / "secret"} & found


@pytest.mark.parametrize("place", ["bin/python", ".local/bin/python"])
def test_a_program_right_in_a_home_does_not_show_the_home(home: Path, place: str) -> None:
    python = program(home / place)
    prefix = python.parent.parent
    (prefix / "lib").mkdir(exist_ok=True)
    (prefix / "share" / "jupyter").mkdir(parents=True)
    (prefix / "share" / "keyrings").mkdir()
    found = seen(python)
    assert {prefix / "bin", prefix / "lib", prefix / "share" / "jupyter"} <= found
    assert not {home, prefix, prefix / "share", prefix / "share" / "keyrings"} & found


def test_an_environment_made_of_a_whole_home_shows_its_parts_alone(home: Path) -> None:
    python = venv(home, program(home.parent / "base" / "bin" / "python3"))
    found = seen(python)
    assert {home / "bin", home / "lib", home / "pyvenv.cfg"} <= found and home not in found


def test_a_command_without_a_path_is_looked_for_where_the_kernel_will(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "project" / "nb").mkdir(parents=True)
    monkeypatch.chdir(home / "project" / "nb")
    program(home / "R" / "bin" / "R")
    found = seen("R", PATH=f"{home}/R/bin")
    assert home / "R" in found
    assert not {home, home / "project"} & found, "it has nothing to do with where we are"
    assert not {home, home / "project", home / "R"} & seen("nonesuch", PATH=f"{home}/R/bin")
    assert not {home, home / "project"} & seen("./R", PATH="")


@pytest.mark.parametrize("name", ["PYTHONPATH", "JUPYTER_PATH", "R_LIBS", "LD_LIBRARY_PATH"])
def test_search_paths_are_visible_but_not_homes(home: Path, name: str) -> None:
    (home / "lib").mkdir()
    value = os.pathsep.join(
        [f"{home}/lib", str(home), str(home.parent), "/", "", ".", "relative", "/nonesuch"]
    )
    found = seen("/bin/sh", **{name: value})
    assert home / "lib" in found
    assert not {home, home.parent, Path("/"), Path.cwd(), Path("/nonesuch")} & found


def test_what_is_visible_behind_a_link_is_so_under_both_names(home: Path) -> None:
    (home / "real").mkdir()
    link(home / "lib", home / "real")
    assert {home / "lib", home / "real"} <= seen("/bin/sh", PYTHONPATH=f"{home}/lib")


# --- paths as they are here -------------------------------------------------------------------------------------


def test_paths_are_settled(home: Path, tmp_path: Path) -> None:
    (home / "out").mkdir()
    link(tmp_path / "way", home / "out")
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
    found = told(home, BUBBLEWRAP, WALLED, cwd=link(home / "way", tmp_path / "real"))
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
    link(home / "project" / "way", home / "project" / "secret")
    assert (
        parts_beside(project, [])
        == parts_beside(project, ["/srv"])
        == parts_beside(project, [project])
        == [project]
    )
    assert parts_beside(project, [f"{project}/secret"]) == [f"{project}/data"]
    assert parts_beside(project, [f"{project}/secret/key"]) == [f"{project}/data"]
    assert parts_beside("/nonesuch", ["/nonesuch/x"]) == []
