"""The library of an address, its version and its functions."""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path

import pytest

from safe_exec.inspector import symbols
from safe_exec.inspector.libraries import Libraries, parse, version_of

MAPS = """\
00400000-0041f000 r--p 00000000 fe:00 260811                             /usr/bin/python3.11
0041f000-006d2000 r-xp 0001f000 fe:00 260811                             /usr/bin/python3.11
02a00000-02b00000 rw-p 00000000 00:00 0                                  [heap]
7f0000000000-7f0000001000 r--p 00000000 fe:00 9                          /opt/with space/lib.so
7f0000001000-7f0000002000 r-xp 00001000 fe:00 9                          /opt/with space/lib.so
7f0000002000-7f0000003000 rw-p 00000000 00:00 0
7f00000"""


def test_parts_of_libraries() -> None:
    parts = parse(MAPS)
    assert [(part.low, part.base, part.offset) for part in parts] == [
        (0x400000, 0x400000, 0),
        (0x41F000, 0x400000, 0x1F000),
        (0x7F0000000000, 0x7F0000000000, 0),
        (0x7F0000001000, 0x7F0000000000, 0x1000),
    ]
    assert parts[-1].path == "/opt/with space/lib.so"


def test_a_function_of_this_process() -> None:
    libc = ctypes.CDLL(None)
    address = ctypes.cast(libc.getppid, ctypes.c_void_p).value
    assert address is not None
    libraries = Libraries(os.getpid())
    assert libraries.function_at(address) in {"getppid", "__getppid"}
    place = libraries.locate(address)
    assert "libc" in str(place["library"])
    assert str(place["version"]).count(".") >= 1
    assert libraries.locate(8) == {} and libraries.function_at(8) is None


def test_a_call_at_the_end_of_a_function_is_not_one_of_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    libc = ctypes.CDLL(None)
    address = ctypes.cast(libc.getppid, ctypes.c_void_p).value
    assert address is not None
    libraries = Libraries(os.getpid())
    # The byte before a function belongs to none, or to the one before it.
    assert libraries.caller_at(address) != libraries.function_at(address)
    assert libraries.caller_at(address + 1) is None
    names = {address - 1: "_ZSt17__throw_bad_allocv", address: "next"}
    monkeypatch.setattr(libraries, "function_at", names.get)
    assert libraries.caller_at(address) == "std::__throw_bad_alloc()"


@pytest.mark.parametrize(
    ("file", "version"),
    [
        ("numpy/core/x.so", "2.4.6"),
        ("numpy.libs/libblas.so", "2.4.6"),
        ("zmq/backend/y.so", "27.1"),
        ("scikit_learn/z.so", "1.5"),
        ("unknown/w.so", None),
    ],
)
def test_version_of_a_package(file: str, version: str | None, tmp_path: Path) -> None:
    folder = tmp_path / "lib/python3.11/site-packages"
    for name in ("numpy-2.4.6", "pyzmq-27.1", "scikit_learn-1.5"):
        (folder / f"{name}.dist-info").mkdir(parents=True)
    (folder / "pyzmq-27.1.dist-info/RECORD").write_text("zmq/backend/y.so,sha256=x,1\n")
    assert version_of("/lib/python3.11/site-packages/" + file, str(tmp_path)) == version


def test_a_file_that_is_no_elf_names_nothing() -> None:
    assert symbols.function_at(b"#!/bin/sh\n", 0) is None
    with pytest.raises((struct.error, IndexError, OverflowError)):
        symbols.function_at(b"\x7fELF\x02\x01" + b"\xff" * 90, 1)
