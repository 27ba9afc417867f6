"""The native stack of a kernel that crashes, read while its fault handler holds it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.support import (
    make_notebook,
    ordinary_user,
    ordinary_user_with_namespaces,
    private_directory,
    run_notebook,
)

SETUP = "import ctypes\nAPI_TOKEN = 'plain-and-open-41'"
CRASH = """\
def measure(size, password='hunter2-hunter2'):
    return ctypes.CDLL(None).div(size, 0)
measure(5)"""
SECRET = "s3cr3t-of-the-environment"


def names(verdict: dict[str, Any]) -> list[str]:
    return [frame["function"] for frame in verdict["crash_cell"]["native"]]


@pytest.mark.parametrize(
    ("prefix", "options"),
    [
        ([], ()),
        pytest.param([], ("--limits", "untrusted"), marks=pytest.mark.bed("bubblewrap")),
        (ordinary_user(), ()),
        pytest.param(
            ordinary_user_with_namespaces(),
            ("--limits", "untrusted"),
            marks=pytest.mark.bed("bubblewrap"),
        ),
    ],
    ids=["root", "root, untrusted", "user", "user, untrusted"],
)
def test_the_function_that_faulted_is_named(prefix: list[str], options: tuple[str, ...]) -> None:
    with private_directory() as folder:
        home, work = folder / "home", folder / "work"
        for directory in (home, work):
            directory.mkdir()
            directory.chmod(0o777)
        path = make_notebook(work / "nb.ipynb", SETUP, CRASH)
        env = {"HOME": str(home)} if prefix else {}
        outcome = run_notebook(path, "--no-bisect", *options, prefix=prefix, env=env)
    assert outcome.verdict["cause"]["kind"] == "floating_point_exception"
    crash = outcome.verdict["crash_cell"]
    assert crash["native_error"] is None
    first = crash["native"][0]
    assert first["function"] == "div"
    assert os.path.basename(first["library"]).startswith("libc")
    assert first["version"] is not None and first["offset"] > 0
    assert names(outcome.verdict)[-2:] == ["measure", "<module>"]
    assert [f["python"]["line"] for f in crash["native"][-2:]] == [2, 3]
    assert all(frame["locals"] == {} for frame in crash["native"])
    assert "div() in libc.so.6" in outcome.stdout


def test_locals_are_shown_on_request_and_masked(tmp_path: Path) -> None:
    source = CRASH.replace("(5)", "(5, token)").replace("password=", "word=")
    path = make_notebook(
        tmp_path / "nb.ipynb", SETUP, "import os; token = os.environ['MY_TOKEN']", source
    )
    outcome = run_notebook(path, "--no-bisect", "--locals", env={"MY_TOKEN": SECRET})
    (measure,) = (f for f in outcome.verdict["crash_cell"]["native"] if f["function"] == "measure")
    assert measure["locals"]["size"] == "5"
    assert "***" in measure["locals"]["word"]
    assert "size = 5" in outcome.stdout
    assert SECRET not in outcome.stdout + path.with_suffix(".verdict.json").read_text()


def test_a_destroyed_heap_does_not_hold_up_the_report(tmp_path: Path) -> None:
    source = """\
spans = [line.split()[0] for line in open('/proc/self/maps') if '[heap]' in line]
low, high = (int(part, 16) for part in spans[0].split('-'))
libc = ctypes.PyDLL(None)
libc.memset(ctypes.c_void_p(low), 0x41, ctypes.c_size_t(high - low))"""
    path = make_notebook(tmp_path / "nb.ipynb", SETUP, source)
    outcome = run_notebook(path, "--no-bisect")
    assert outcome.verdict["status"] == "kernel_died"
    assert outcome.verdict["cause"]["kind"] in {"segfault", "abort", "bus_error"}
    assert outcome.verdict["usage"]["wall_seconds"] < 30
    assert outcome.verdict["crash_cell"]["code_index"] == 1


def test_a_stack_too_deep_to_unwind_keeps_its_innermost_function(tmp_path: Path) -> None:
    path = make_notebook(tmp_path / "nb.ipynb", SETUP, OVERFLOW)
    outcome = run_notebook(path, "--no-bisect")
    assert outcome.verdict["cause"]["kind"] == "stack_overflow"
    assert outcome.verdict["crash_cell"]["line"] is not None
    assert outcome.verdict["crash_cell"]["native_error"] is not None
    assert outcome.verdict["crash_cell"]["native"][0]["library"] is not None


OVERFLOW = """\
import sys
class Link:
    def __repr__(self):
        return repr(self)
sys.setrecursionlimit(10**9)
repr(Link())"""
