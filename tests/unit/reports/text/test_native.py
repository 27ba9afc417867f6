"""The wording of native stacks."""

from __future__ import annotations

import pytest

from safe_exec.model.evidence import Frame, NativeFrame
from safe_exec.model.verdict import CauseKind, Verdict
from safe_exec.reports.text import native
from tests.unit.builders import make_crash, make_verdict

LIBC = "/usr/lib/x86_64-linux-gnu/libc.so.6"
NUMPY = (
    "/v/lib/python3.11/site-packages/numpy/_core/_multiarray_umath.cpython-311-x86_64-linux-gnu.so"
)
CTYPES = "/usr/lib/python3.11/lib-dynload/_ctypes.cpython-311-x86_64-linux-gnu.so"


def c(
    function: str | None, library: str | None = LIBC, version: str | None = "2.36"
) -> NativeFrame:
    return NativeFrame(function=function, library=library, version=version, offset=0x10)


def crashed(*frames: NativeFrame, error: str | None = None) -> Verdict:
    crash = make_crash(native=frames, native_error=error)
    return make_verdict(kind=CauseKind.SEGFAULT, crash_cell=crash)


PYTHON = NativeFrame(
    function="load",
    python=Frame(function="load", line=3, file="/tmp/a.py", cell=0, source_line="read(n)"),
    locals={"n": "5", "password": "***"},
)


@pytest.mark.parametrize(
    ("frames", "summary"),
    [
        ((c("strlen"), c("call", CTYPES, "3.11.2"), PYTHON), "strlen() in libc.so.6 2.36 · called by call()"),
        ((c("copy", NUMPY, "2.4.6"), c("copy", NUMPY), PYTHON), "copy() in numpy 2.4.6"),
        (
            (c("__pthread_kill_implementation"), c("raise"), c("abort"), c(None), c("_int_free"), c("free"), PYTHON),
            "_int_free() in libc.so.6 2.36 · called by free()",
        ),
        ((c("raise"), c("abort"), PYTHON), "raise() in libc.so.6 2.36 · called by abort()"),
        ((c(None, CTYPES, "3.11.2"),), "a function without a name in _ctypes 3.11.2 (+0x10)"),
        ((c("none_dealloc", None, None),), "none_dealloc()"),
        ((c("std::f(int)", "/x/libc++.so", None),), "std::f(int) in libc++.so"),
        ((PYTHON,), ""),
        ((), ""),
    ],
)  # fmt: skip
def test_summary(frames: tuple[NativeFrame, ...], summary: str) -> None:
    assert native.summary(crashed(*frames)) == summary


def test_lines_and_local_variables() -> None:
    verdict = crashed(c("strlen"), PYTHON)
    assert native.stack_lines(verdict) == [
        "strlen() in libc.so.6 2.36",
        "in `load`, a cell, line 3: read(n) · n = 5, password = ***",
    ]
    assert native.locals_lines(verdict, 3) == ["load(): n = 5, password = ***"]


@pytest.mark.parametrize(
    ("verdict", "gap"),
    [
        (crashed(c("strlen")), ""),
        (crashed(c("strlen"), error="late"), "only the innermost frame is known: late"),
        (crashed(error="no\nrights"), "not known: no rights"),
    ],
)
def test_gap(verdict: Verdict, gap: str) -> None:
    assert native.gap(verdict) == gap
