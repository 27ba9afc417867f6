"""What a kernel needs stays readable, and never a whole home with it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import safe_exec
from safe_exec.sandbox.visible_paths import homes, visible

Make = Callable[..., Path]


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
