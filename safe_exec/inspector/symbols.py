"""Finds the function at an address of a library, from the symbol tables of its ELF file.

Unwinding an overflowed stack may take too long, but its innermost function can be found without
unwinding. Format: elf(5), 64-bit and little-endian only.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator
from typing import NamedTuple

_MAGIC = b"\x7fELF\x02\x01"
_SECTIONS = struct.Struct("<40xQ10xHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SEGMENTS = struct.Struct("<32xQ14xHH")
_SEGMENT = struct.Struct("<IIQQQQQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_LOADED = 1
_TABLES = (2, 11)
_FUNCTIONS = (2, 10)
_LONGEST_NAME = 1000
# The symbols of the largest libraries (PyTorch) fill some 100 MiB.
MOST_BYTES = 64 << 20


class _Section(NamedTuple):
    name: int
    kind: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    info: int
    alignment: int
    entry_size: int


def function_at(elf: bytes, offset: int) -> str | None:
    """Return the name of the function at a file offset of an ELF file; ``None`` if unknown.

    Raises struct.error, IndexError and OverflowError for a file that is not valid.
    """
    if elf[: len(_MAGIC)] != _MAGIC:
        return None
    address = _address_of(elf, offset)
    if address is None:
        return None
    sections = list(_sections(elf))
    for section in sections:
        if section.kind in _TABLES:
            table = elf[section.offset : section.offset + section.size]
            names = sections[section.link]
            for name, info, _, _, value, size in _SYMBOL.iter_unpack(
                table[: len(table) - len(table) % _SYMBOL.size]
            ):
                if value <= address < value + size and info & 0xF in _FUNCTIONS:
                    start = names.offset + name
                    end = elf.find(b"\0", start, start + _LONGEST_NAME)
                    return elf[start:end].decode("utf-8", "replace") or None
    return None


def demangled(name: str) -> str:
    """Return a C++ function's name as in its source, if the C++ library is installed here."""
    if not name.startswith("_Z"):
        return name
    try:
        library = ctypes.CDLL("libstdc++.so.6")
    except OSError:
        return name
    demangle = library["__cxa_demangle"]
    demangle.restype = ctypes.c_void_p
    status = ctypes.c_int()
    # This process ends soon: the text needs no release.
    text = demangle(name.encode(), None, None, ctypes.byref(status))
    return name if not text else ctypes.string_at(text).decode("utf-8", "replace")


def _sections(elf: bytes) -> Iterator[_Section]:
    start, size, count, _ = _SECTIONS.unpack_from(elf)
    for number in range(count):
        yield _Section(*_SECTION.unpack_from(elf, start + number * size))


def _address_of(elf: bytes, offset: int) -> int | None:
    """Return the address that the file gives to an offset in one of its loaded segments."""
    start, size, count = _SEGMENTS.unpack_from(elf)
    for number in range(count):
        kind, _, in_file, address, _, bytes_in_file, _, _ = _SEGMENT.unpack_from(
            elf, start + number * size
        )
        if kind == _LOADED and in_file <= offset < in_file + bytes_in_file:
            return int(offset - in_file + address)
    return None
