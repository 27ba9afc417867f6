"""A root file system of another release gets this machine's package sources, and nothing else of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import versions
from tests.releases import __main__ as command
from tests.releases.rootfs import enter
from tests.releases.settings import os_release, pip_settings


def conf(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_later_files_and_the_environment_win(tmp_path: Path) -> None:
    first = conf(tmp_path / "1", "[global]\nindex-url = a\ntimeout = 1\n[install]\nretries = 7\n")
    second = conf(tmp_path / "2", "[global]\nindex_url = b\n")
    environ = {"PIP_INDEX_URL": "c", "PIP_DEFAULT_TIMEOUT": "9", "PIP_PROXY": "", "OTHER": "x"}
    for files, given, expected in (
        (
            [first, second, tmp_path / "absent"],
            {},
            {"index-url": "b", "timeout": "1", "retries": "7"},
        ),
        ([first, second], environ, {"index-url": "c", "timeout": "9", "retries": "7"}),
        ([], {}, {}),
    ):
        assert pip_settings(files, given).values == expected


def test_taste_is_not_carried(tmp_path: Path) -> None:
    file = conf(tmp_path / "1", "[global]\nuser = yes\ntarget = /x\n[list]\nformat = columns\n")
    assert pip_settings([file], {"PIP_REQUIRE_VIRTUALENV": "1"}).values == {}


def test_files_are_copied_and_folders_bound(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    (tmp_path / "own" / "simple").mkdir(parents=True)
    cert = conf(tmp_path / "ca.pem", "certificates")
    index = f"file://{tmp_path}/own/simple"
    settings = pip_settings(
        [],
        {
            "PIP_CERT": str(cert),
            "PIP_CONSTRAINT": str(tmp_path / "absent"),
            "PIP_EXTRA_INDEX_URL": f"https://example.org/simple {index}",
            "PIP_FIND_LINKS": f"{tmp_path}/wheels {tmp_path}/gone",
        },
    )
    copy = settings.values["cert"]
    assert settings.files == {copy: cert} and copy.startswith("/etc/")
    assert settings.folders == (tmp_path / "own", tmp_path / "wheels")
    assert settings.values["extra-index-url"] == f"https://example.org/simple {index}"
    assert settings.values["find-links"] == f"{tmp_path}/wheels"
    assert "constraint" not in settings.values
    assert f"\ncert = {copy}\n" in settings.text() and settings.text().startswith("[global]\n")


def test_os_release(tmp_path: Path) -> None:
    file = conf(tmp_path / "os-release", 'ID=debian\nVERSION_CODENAME="trixie"\n\n# a comment\n')
    assert os_release(file) == {"ID": "debian", "VERSION_CODENAME": "trixie"}


def test_targets_see_only_listed_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFE_EXEC_BEDS", "root,bash")
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    text = command._command(["run", "test"], None)
    assert text.startswith("exec env -i HOME=/root ") and "SAFE_EXEC_BEDS=root,bash" in text
    assert "PYTHONUNBUFFERED" not in text
    assert text.index("make run") < text.index("make test")


def test_a_root_is_entered_in_namespaces_that_end_with_it(tmp_path: Path) -> None:
    argv = enter(tmp_path / "root", tmp_path / "cache", "true", (Path("/wheels"),))
    assert argv[0] == "unshare" and {"--mount", "--pid", "--kill-child=SIGKILL"} <= set(argv)
    assert argv[-4:] == [str(tmp_path / "root"), str(tmp_path / "cache"), "true", "/wheels"]
    assert (tmp_path / "cache" / "pip").is_dir()


def document_of(*tables: str) -> str:
    marks = "".join(
        f"<!-- {name}: written by make versions-table -->\n<!-- /{name} -->\nbetween\n"
        for name in tables
    )
    return f"before\n\n{marks}after\n"


def test_the_tables_of_versions_keep_rows_of_other_machines(tmp_path: Path) -> None:
    document = tmp_path / "platforms.md"
    document.write_text(document_of("kernels", "libraries"))
    kernels, libraries = versions.KERNELS, versions.LIBRARIES
    old = kernels.row("3.9", "3.9", "6.20.2").replace(f"| {versions.RUNNER} ", "| 3.99 ", 1)
    new = [kernels.row("3.10", "3.10", "7.0.0"), kernels.row("3.9-6", "3.9", "6.31.0")]
    oldest = libraries.row("oldest", "0.10.0", "5.9.0", "8.3.0", "7.4.0")
    versions.write(document, [old, *new, oldest, kernels.row("3.10", "3.10", "7.1.0")])
    versions.write(document, [new[0]])
    text = document.read_text()
    assert [line for line in text.splitlines() if kernels.test in line] == [new[1], new[0], old]
    assert [line for line in text.splitlines() if libraries.test in line] == [oldest]
    assert text.startswith("before\n") and text.endswith("after\n")
    versions.write(document, [])
    assert document.read_text() == text


def test_a_document_without_a_place_for_the_table_is_an_error(tmp_path: Path) -> None:
    document = tmp_path / "platforms.md"
    document.write_text(document_of("kernels"))
    with pytest.raises(ValueError, match="libraries"):
        versions.write(document, [])
    assert document.read_text() == document_of("kernels")


def test_lower_bounds_are_those_of_the_package() -> None:
    bounds = versions.lower_bounds()
    assert {"nbclient", "nbformat", "jupyter_client", "pyzmq"} <= bounds.keys()
    assert all(version[0].isdigit() for version in bounds.values())
