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

from safe_exec.kernel.cell_code import CellCode
from safe_exec.model.memory import CensusLine, CensusSite

READER = Path(__file__).with_name("allocation_reader.py")
READER_SECONDS = 30.0
MOST_BYTES = 1 << 47
MOST_SITES = 10


def can_read_allocations() -> bool:
    """Whether memray is installed here, to read what one in the kernel recorded."""
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

    def read(self, code: CellCode) -> tuple[CensusLine, ...]:
        """Return what each stack of cell lines had allocated at the end, the largest first.

        Empty if nothing was recorded, or if it cannot be read.
        """
        descriptor = self._file.fileno()
        if not os.fstat(descriptor).st_size:
            return ()
        command = [sys.executable, "-I", str(READER), str(descriptor)]
        try:
            reader = subprocess.run(
                command,
                pass_fds=(descriptor,),
                capture_output=True,
                timeout=READER_SECONDS,
                check=True,
            )
            return lines_of(json.loads(reader.stdout), code)
        except (subprocess.SubprocessError, ValueError, TypeError, OSError):
            return ()


def lines_of(rows: list[Any], code: CellCode) -> tuple[CensusLine, ...]:
    """Return the bytes by stacks of cell lines. Raises ValueError or TypeError for other rows."""
    sums: dict[tuple[CensusSite, ...], int] = {}
    for size, stack in rows:
        sites = _sites(stack, code)
        if sites:
            sums[sites] = sums.get(sites, 0) + min(max(0, int(size)), MOST_BYTES)
    ordered = sorted(sums.items(), key=lambda item: -item[1])
    return tuple(CensusLine(bytes=size, sites=sites) for sites, size in ordered)


def _sites(stack: list[Any], code: CellCode) -> tuple[CensusSite, ...]:
    sites = []
    for function, file, number in stack:
        cell, line = code.locate(str(function), int(number), str(file))
        if cell is not None and line:
            sites.append(CensusSite(cell=cell, line=line, function=str(function)[:200]))
    return tuple(sites[:MOST_SITES])
