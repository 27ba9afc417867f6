"""What the inspector printed becomes frames of the notebook."""

from __future__ import annotations

import json
from typing import Any

import pytest
from msgspec.structs import replace

from safe_exec.kernel.native_stack import (
    NOT_HELD,
    NOT_READ,
    OWN_END,
    NativeReading,
    native_frames,
    parse,
    with_innermost,
)
from safe_exec.model.evidence import FaultReport, FaultSite, NativeFrame
from tests.unit.kernel.cells import code_of_files

CELLS = code_of_files({"/tmp/ipykernel_1/a.py": 4})
C_FRAME: dict[str, Any] = {
    "function": "strlen",
    "library": "/usr/lib/libc.so.6",
    "version": "2.36",
    "offset": 16,
}
LAUNCHER = {"function": "launch", "file": "/x/launch.py", "line": 1, "locals": {}}


def code(**local_variables: str) -> dict[str, Any]:
    return {
        "function": "f",
        "file": "/tmp/ipykernel_1/a.py",
        "line": 3,
        "locals": local_variables,
    }


def line(**document: Any) -> bytes:
    return json.dumps(document).encode() + b"\n"


@pytest.mark.parametrize(
    ("lines", "count", "error"),
    [
        ([line(frames=[C_FRAME]), line(frames=[C_FRAME, code()])], 2, None),
        ([line(frames=[C_FRAME])], 1, "late"),
        ([line(frames=[C_FRAME]), line(error="no\n rights")], 1, "no rights"),
        ([line(frames=[C_FRAME]), b'{"frames": [{"fun'], 1, "late"),
        ([], 0, "late"),
    ],
    ids=["whole", "killed after the first line", "error", "cut line", "nothing"],
)
def test_lines(lines: list[bytes], count: int, error: str | None) -> None:
    reading = parse(lines, "late")
    assert (len(reading.frames), reading.error) == (count, error)


def test_python_frames_are_placed_in_their_cells_and_the_rest_is_left_out() -> None:
    reading = NativeReading(frames=(C_FRAME, code(n="1"), LAUNCHER))
    c_frame, python = native_frames(reading, CELLS, "3.11.2")
    assert c_frame == NativeFrame(**C_FRAME)
    assert python.python is not None
    assert (python.python.cell, python.python.line, python.locals) == (4, 3, {"n": "1"})


def test_the_interpreter_has_its_own_version() -> None:
    paths = {
        "/usr/bin/python3.11": "3.11.2",
        "/usr/lib/python3.11/lib-dynload/_ctypes.cpython-311.so": "3.11.2",
        "/usr/lib/libffi.so.8": None,
    }
    for library, version in paths.items():
        (frame,) = native_frames(
            NativeReading(frames=({"function": None, "library": library, "offset": 1},)),
            CELLS,
            "3.11.2",
        )
        assert frame.version == version


def test_variables_with_secret_names_are_masked() -> None:
    (frame,) = native_frames(NativeReading(frames=(code(password="'x'", n="1"),)), CELLS, None)
    assert frame.locals == {"password": "***", "n": "1"}


@pytest.mark.parametrize(
    ("title", "function"),
    [
        ("none_dealloc: deallocating None: bug likely", "none_dealloc"),
        ("Segmentation fault", None),
        ("Aborted", None),
    ],
)
def test_the_interpreter_names_the_function_that_ended_it(title: str, function: str | None) -> None:
    named = with_innermost(FaultReport(title=title, stack=()))
    assert [frame.function for frame in named.native] == ([function] if function else [])
    assert named.native_error == (OWN_END if function else NOT_HELD)


def test_without_a_stack_the_registers_tell_the_library() -> None:
    site = FaultSite(
        faulted=True,
        main=True,
        address=0,
        stack_pointer=0,
        stack_bytes=None,
        overflow=False,
        library="/usr/lib/libfast.so",
        library_offset=7,
    )
    report = FaultReport(title="Segmentation fault", stack=(), site=site, native_error="too slow")
    (frame,) = with_innermost(report).native
    assert (frame.function, frame.library, frame.offset) == (None, "/usr/lib/libfast.so", None)
    assert with_innermost(report).native_error == "too slow"
    unread = replace(report, native_error=None)
    assert with_innermost(unread).native_error == NOT_HELD
    assert with_innermost(unread, was_to_be_read=False).native_error == NOT_READ
