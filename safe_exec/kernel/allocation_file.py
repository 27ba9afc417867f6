"""The file in which memray, in the kernel, records allocations; its content is a claim."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, Self

from msgspec import Struct

from safe_exec.kernel.cell_code import CellCode
from safe_exec.model.memory import CensusLine, CensusSite

READER = Path(__file__).with_name("allocation_reader.py")
READER_SECONDS = 30.0
MOST_BYTES = 1 << 47
MOST_SITES = 10
LONGEST_ERROR = 200


class Recording(Struct, frozen=True, kw_only=True):
    """The recording of memray, or the reason why it could not be read."""

    lines: tuple[CensusLine, ...] = ()
    error: str | None = None


def can_read_allocations() -> bool:
    """Whether memray is installed here too, to read the recordings of the kernel's memray."""
    return find_spec("memray") is not None


class AllocationFile:
    """An unlinked file that a kernel writes to and that outlives it; a context manager."""

    def __init__(self, directory: Path, *, records: bool) -> None:
        """Create the file; without ``records`` it stays empty. Raises OSError."""
        self._records = records and can_read_allocations()
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 - closed on exit
        # The kernel may run as another user. Nobody else can open a file without a name.
        os.fchmod(self._file.fileno(), 0o666)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def send(self, facts: socket.socket) -> None:
        """Send the descriptor to the agent, if allocations are to be recorded."""
        if self._records:
            socket.send_fds(facts, [b"allocations"], [self._file.fileno()])

    def read(self, code: CellCode, peak: int | None) -> Recording:
        """Return the memory that each stack of cell lines holds at the end, the largest first.

        If the kernel's environment has no memray, the recording is empty and has no error. ``peak``
        is the highest memory use in bytes.
        """
        descriptor = self._file.fileno()
        if not os.fstat(descriptor).st_size:
            return Recording()
        command = [sys.executable, "-I", str(READER), str(descriptor)]
        try:
            reader = subprocess.run(
                command,
                pass_fds=(descriptor,),
                capture_output=True,
                timeout=READER_SECONDS,
                check=True,
            )
            return Recording(lines=lines_of(json.loads(reader.stdout), code, peak))
        except subprocess.CalledProcessError as error:
            message = error.stderr.decode("utf-8", "replace").strip().splitlines()
            return Recording(error=message[-1][:LONGEST_ERROR] if message else str(error))
        except (subprocess.SubprocessError, ValueError, TypeError, OSError) as error:
            return Recording(error=" ".join(str(error).split())[:LONGEST_ERROR])


def without_reserved(rows: list[Any], peak: int | None) -> list[Any]:
    """Return the reader's rows without large mappings that were only reserved.

    Allocators reserve address space beyond what they use: pyarrow's takes 1 GiB at once.
    """
    if peak is None:
        return rows
    total = sum(size for size, _, _ in rows)
    written: list[Any] = []
    for size, mapped, stack in sorted(rows, key=lambda row: -int(row[1])):
        reserved = int(mapped) if total > peak else 0
        total -= reserved
        written.append([size - reserved, mapped, stack])
    return written


def lines_of(rows: list[Any], code: CellCode, peak: int | None) -> tuple[CensusLine, ...]:
    """Return the bytes by stacks of cell lines. Raises ValueError or TypeError for invalid rows."""
    sums: dict[tuple[CensusSite, ...], int] = {}
    for size, _, stack in without_reserved(rows, peak):
        sites = _sites(stack, code)
        if sites and int(size) > 0:
            sums[sites] = sums.get(sites, 0) + min(int(size), MOST_BYTES)
    ordered = sorted(sums.items(), key=lambda item: -item[1])
    return tuple(CensusLine(bytes=size, sites=sites) for sites, size in ordered)


def _sites(stack: list[Any], code: CellCode) -> tuple[CensusSite, ...]:
    sites = []
    for function, file, number in stack:
        cell, line = code.locate(str(function), int(number), str(file))
        if cell is not None and line:
            sites.append(CensusSite(cell=cell, line=line, function=str(function)[:200]))
    return tuple(sites[:MOST_SITES])
