"""The file in which the agent, in the kernel, records which lines ran; its content is a claim."""

from __future__ import annotations

import errno
import os
import socket
import tempfile
import weakref

import msgspec
from msgspec import Struct

from safe_exec.files import one_line

MOST_BYTES = 64 << 20
MOST_FILES = 20_000
LONGEST_PATH = 4096
LONGEST_TEXT = 300
# coverage packs two line numbers into one integer of 56 bits.
LARGEST_LINE = (1 << 28) - 1


class CoverageSettings(Struct, frozen=True, kw_only=True):
    """The part of coverage's configuration that the agent needs for its measurement.

    Paths are absolute; ``source`` may also name packages. ``core`` is ``None`` for the best one.
    """

    branch: bool = False
    source: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    omit: tuple[str, ...] = ()
    concurrency: tuple[str, ...] = ()
    cover_pylib: bool = False
    timid: bool = False
    core: str | None = None


class CoverageRecord(Struct, frozen=True, kw_only=True):
    """The record of a kernel by path: lines, or arcs between lines if branches were measured.

    ``missing`` is the interpreter that has no package coverage, ``replaced`` the number of the cell
    (from 1, as the agent counts requests) that replaced the trace function. A kernel without our
    agent has not ``started``.
    """

    started: bool = False
    lines: dict[str, set[int]] = msgspec.field(default_factory=dict)
    arcs: dict[str, set[tuple[int, int]]] = msgspec.field(default_factory=dict)
    missing: str | None = None
    replaced: int | None = None
    problem: str | None = None


class _Row(Struct):
    started: str | None = None
    missing: str | None = None
    replaced: int | None = None
    problem: str | None = None
    file: str | None = None
    lines: set[int] | None = None
    arcs: set[tuple[int, int]] | None = None


class CoverageFile:
    """A file without a name that a kernel writes to and that outlives it."""

    def __init__(self, settings: CoverageSettings) -> None:
        """Create the file. Raises OSError."""
        self.settings = settings
        descriptor, path = tempfile.mkstemp(prefix="safe-exec-")
        os.unlink(path)
        self._descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)

    def send(self, facts: socket.socket) -> None:
        """Send the descriptor to the agent, which receives it when it starts."""
        socket.send_fds(facts, [b"coverage"], [self._descriptor])

    def read(self) -> CoverageRecord:
        """Return the record so far."""
        return record_of(os.pread(self._descriptor, MOST_BYTES, 0))


def record_of(data: bytes) -> CoverageRecord:
    """Combine the valid rows of a file: a kill or a full disk may leave half a row."""
    record: dict[str, object] = {}
    lines: dict[str, set[int]] = {}
    arcs: dict[str, set[tuple[int, int]]] = {}
    decoder = msgspec.json.Decoder(_Row)
    for text in data.splitlines():
        try:
            row = decoder.decode(text)
        except (msgspec.DecodeError, UnicodeDecodeError):
            continue
        if row.file is None:
            record |= _remark(row)
        elif _is_path(row.file) and len(lines) + len(arcs) < MOST_FILES:
            if row.arcs is not None:
                valid_arcs = {arc for arc in row.arcs if all(map(_is_line, arc))}
                arcs.setdefault(row.file, set()).update(valid_arcs)
            else:
                lines.setdefault(row.file, set()).update(filter(_is_line, row.lines or ()))
    return CoverageRecord(lines=lines, arcs=arcs, **record)  # type: ignore[arg-type]


def lost_rows(error: int) -> str:
    """Return the warning about rows that the kernel could not write; ``error`` is the errno."""
    if error == errno.EFBIG:
        reason = "its limit on the size of files is reached (raise --file-size)"
    elif error in (errno.ENOSPC, errno.EDQUOT):
        folder = one_line(tempfile.gettempdir())
        reason = f"no space is left in {folder} (free some, or set TMPDIR)"
    else:
        reason = os.strerror(error)
    return f"coverage is incomplete: the kernel could not write its record: {reason}"


def _remark(row: _Row) -> dict[str, object]:
    """Return the fields of a record that a row without a file sets."""
    if row.started is not None:
        return {"started": True}
    if row.replaced is not None:
        return {"replaced": row.replaced}
    texts = {"missing": row.missing, "problem": row.problem}
    return {name: text[:LONGEST_TEXT] for name, text in texts.items() if text is not None}


def _is_path(path: str) -> bool:
    return path.startswith("/") and len(path) <= LONGEST_PATH and path.isprintable()


def _is_line(number: int) -> bool:
    # Arcs into and out of a function have negative numbers.
    return -LARGEST_LINE <= number <= LARGEST_LINE
