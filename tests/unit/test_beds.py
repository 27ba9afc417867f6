"""What becomes of tests whose bed is absent: left out and listed, or a failure where the bed is pinned; with workers and without."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.beds import BEDS, FOUND, PINNED, REMEDIES, table
from tests.support import ROOT

CONFTEST = """
from tests import beds
BEDS = {"here": lambda: "", "gone": lambda: "it went", "far": lambda: "it is far"}

def pytest_addoption(parser):
    parser.addoption("--bed", action="append", default=[])

def pytest_configure(config):
    config.addinivalue_line("markers", "bed(name): a bed")
    beds.register(config, BEDS)
"""
TESTS = """
import pytest

def test_anywhere(): pass
@pytest.mark.bed("here")
def test_here(): pass
@pytest.mark.bed("gone")
def test_gone(): raise AssertionError
@pytest.mark.bed("gone", "here")
@pytest.mark.parametrize("n", [1, pytest.param(2, marks=pytest.mark.bed("far"))])
def test_both(n): raise AssertionError
"""


def run(folder: Path, *options: str, pinned: str = "", tests: str = TESTS) -> tuple[int, str]:
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_it.py").write_text(tests)
    env = {
        k: v
        for k, v in os.environ.items()
        if k not in (FOUND, PINNED) and not k.startswith("PYTEST_")
    }
    argv = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:randomly",
        "--rootdir",
        str(folder),
        *options,
    ]
    env |= {"PYTHONPATH": str(ROOT)} | ({PINNED: pinned} if pinned else {})
    done = subprocess.run(
        [*argv, str(folder)], env=env, cwd=folder, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


WORKERS = pytest.mark.parametrize("workers", [(), ("-n", "1")], ids=["alone", "workers"])


@WORKERS
def test_tests_of_an_absent_bed_are_left_out_and_listed(
    tmp_path: Path, workers: tuple[str, ...]
) -> None:
    code, said = run(tmp_path, *workers)
    assert code == 0, said
    assert "2 passed" in said
    listed = said[said.index("beds absent here") :]
    assert re.findall(r"^(\w+) \((\d+) tests?\): (.*)$", listed, re.MULTILINE) == [
        ("far", "1", "it is far"),
        ("gone", "3", "it went"),
    ]


@WORKERS
def test_a_pinned_bed_that_is_absent_fails_the_run(
    tmp_path: Path, workers: tuple[str, ...]
) -> None:
    code, said = run(tmp_path, *workers, pinned="here, gone,far")
    assert code == 1, said
    assert "2 failed, 2 passed" in said
    for name, why_not in (("gone", "it went"), ("far", "it is far")):
        assert f"{PINNED} pins this bed, and it is not to be had here: {why_not}" in said
        assert f"bed[{name}]" in said
    assert "bed[here]" not in said


def test_a_pinned_bed_fails_the_run_even_where_no_test_needs_it(tmp_path: Path) -> None:
    code, said = run(tmp_path, "-k", "anywhere", pinned="gone")
    assert (code, "1 failed, 1 passed" in said) == (1, True)


def test_what_other_options_leave_out_is_not_counted(tmp_path: Path) -> None:
    code, said = run(tmp_path, "-k", "anywhere")
    assert (code, "beds absent here" in said) == (0, False)


def test_only_tests_of_a_bed(tmp_path: Path) -> None:
    assert "1 passed" in run(tmp_path, "--bed", "here")[1]
    code, said = run(tmp_path, "--bed", "nowhere")
    assert (code, "--bed: nowhere is no bed; there are here, gone, far" in said) == (4, True)


def test_a_bed_that_is_none_is_an_error(tmp_path: Path) -> None:
    code, said = run(
        tmp_path, tests="import pytest\n@pytest.mark.bed('herr')\ndef test_it(): pass\n"
    )
    assert (code, "test_it: herr is no bed; there are here, gone, far" in said) == (4, True)
    code, said = run(tmp_path, pinned="herr")
    assert (code, f"{PINNED}: herr is no bed" in said) == (4, True)


def test_the_table_says_what_is_absent_and_how_to_get_it() -> None:
    assert set(REMEDIES) <= set(BEDS)
    assert table(
        {"root": "", "bash": "no kernel bash is installed", "landlock": "too old"}
    ).splitlines() == [
        "test beds here: root",
        f"test bed absent: bash: no kernel bash is installed; {REMEDIES['bash']}",
        "test bed absent: landlock: too old",
        "tests of absent beds are left out, and counted at the end",
    ]
    assert table({"root": ""}) == "test beds here: root"


def test_ci_pins_only_beds_that_there_are() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    found = re.search(rf"^export {PINNED}=(\S+)$", script, re.MULTILINE)
    assert found is not None
    pinned = found.group(1).split(",")
    assert set(pinned) <= set(BEDS)
    # What each test run on an ordinary machine as root would miss without a word.
    assert {"root", "ordinary-user", "cgroup-v1-root", "bubblewrap", "bash"} <= set(pinned)
