"""Finds the library of an address in another process, and the library's version."""

from __future__ import annotations

import bisect
import contextlib
import os
import re
import struct
from typing import NamedTuple

from safe_exec.inspector import symbols

# A process may have 65530 mappings (sysctl vm.max_map_count).
MAPS_BYTES = 8 << 20
LIBRARY_BYTES = 16 << 20
# There is no time to look at all symbols of a larger one.
SMALL_LIBRARY_BYTES = 16 << 20
RECORD_BYTES = 4 << 20
MOST_PACKAGES = 3000

_GLIBC = re.compile(rb"GNU C Library .{0,200}?release version ([0-9]+\.[0-9]+(?:\.[0-9]+)?)")
_PACKAGES = re.compile(r"^(.*/(?:site|dist)-packages)/([^/]+)/.*$")
_NORMAL = re.compile(r"[-_.]+")


class Loaded(NamedTuple):
    """A memory mapping of a part of a library.

    The part lies between the addresses ``low`` and ``high``, and at ``offset`` in the file.
    ``base`` is the address at which the library begins.
    """

    low: int
    high: int
    base: int
    offset: int
    path: str


class Libraries:
    """The libraries that a process has loaded."""

    def __init__(self, pid: int) -> None:
        self._root = f"/proc/{pid}/root"
        with open(f"/proc/{pid}/maps", errors="replace") as file:
            self._parts = parse(file.read(MAPS_BYTES))
        self._versions: dict[str, str | None] = {}

    def locate(self, address: int) -> dict[str, str | int | None]:
        """Return ``library``, ``version`` and ``offset`` of an address, if they are known."""
        part = self._part(address)
        if part is None:
            return {}
        if part.path not in self._versions:
            # Not each file can be read: it may be deleted by now.
            self._versions[part.path] = None
            with contextlib.suppress(OSError):
                self._versions[part.path] = version_of(part.path, self._root)
        return {
            "library": part.path,
            "version": self._versions[part.path],
            "offset": address - part.base,
        }

    def function_at(self, address: int) -> str | None:
        """Return the name of the function at an address, from the symbols of its library."""
        part = self._part(address)
        if part is None:
            return None
        # A file that was replaced meanwhile need not be valid.
        with (
            contextlib.suppress(OSError, OverflowError, IndexError, struct.error),
            open(self._root + part.path, "rb") as file,
        ):
            elf = file.read(symbols.MOST_BYTES)
            return symbols.function_at(elf, address - part.low + part.offset)
        return None

    def caller_at(self, address: int) -> str | None:
        """Return the function that made a call, if the return address lies behind its end.

        A call that never returns may be a function's last instruction. Its return address then lies
        in the next function, and unwinders give the frame the name of that one.
        """
        part = self._part(address)
        if part is None or os.stat(self._root + part.path).st_size > SMALL_LIBRARY_BYTES:
            return None
        caller = self.function_at(address - 1)
        return symbols.demangled(caller) if caller and caller != self.function_at(address) else None

    def _part(self, address: int) -> Loaded | None:
        at = bisect.bisect_right(self._parts, address, key=lambda part: part.low) - 1
        return self._parts[at] if at >= 0 and address < self._parts[at].high else None


def parse(maps: str) -> list[Loaded]:
    """Parse /proc/PID/maps; return the mapped parts of files, in the order of their addresses."""
    parts: list[Loaded] = []
    bases: dict[str, int] = {}
    for line in maps.splitlines():
        fields = line.split(None, 5)
        if not fields[-1].startswith("/"):
            continue
        low, high = (int(part, 16) for part in fields[0].split("-"))
        offset, path = int(fields[2], 16), fields[5]
        # A library that is loaded a second time begins at a second base.
        if offset == 0 or path not in bases:
            bases[path] = low
        parts.append(Loaded(low=low, high=high, base=bases[path], offset=offset, path=path))
    return parts


def version_of(path: str, root: str = "") -> str | None:
    """Return the version of a library: its Python package's, or glibc's own; ``None`` if unknown.

    ``root`` is the root directory of the process. Raises OSError.
    """
    if match := _PACKAGES.match(path):
        return _package_version(root, match[1], match[2], path)
    if os.path.basename(path).startswith("libc.so"):
        with open(root + path, "rb") as file:
            banner = _GLIBC.search(file.read(LIBRARY_BYTES))
        return banner[1].decode() if banner else None
    return None


def _package_version(root: str, folder: str, top: str, path: str) -> str | None:
    """Return the version of the package that installed a file below ``folder``."""
    packages = [
        name.removesuffix(".dist-info").rpartition("-")[::2]
        for name in os.listdir(root + folder)[:MOST_PACKAGES]
        if name.endswith(".dist-info")
    ]
    # auditwheel puts the libraries of a package into NAME.libs.
    name = _NORMAL.sub("-", top.removesuffix(".libs")).lower()
    for package, version in packages:
        if _NORMAL.sub("-", package).lower() == name:
            return version
    # Packages may install directories of another name: then the package's list of files tells.
    line = path.removeprefix(folder + "/").encode() + b","
    for package, version in packages:
        with (
            contextlib.suppress(OSError),
            open(f"{root}{folder}/{package}-{version}.dist-info/RECORD", "rb") as record,
        ):
            if line in record.read(RECORD_BYTES):
                return version
    return None
