"""Reads the shared page that the agent writes: places, samples, unsent output."""

from __future__ import annotations

import fcntl
import itertools
import json
import mmap
import os
import struct
from collections.abc import Iterator

from msgspec import Struct

from safe_exec.agent import layout

# Imports the standard library only. Everything read here was written by the kernel process and may
# be anything: lengths are checked, text is decoded with replacement, nothing is trusted beyond "the
# kernel says".

MOST_FRAMES = 64
# A segment holds no more messages than that, and text is gathered; what has more was not written by
# us.
MOST_RECORDS = 20_000
SIZE = layout.PAGE_BYTES + 2 * layout.SEGMENT_BYTES


class Note(Struct, frozen=True, kw_only=True):
    """The statement noted last: cell number, line, and when (``time.monotonic`` of the machine).

    Whether the cell is done.
    """

    cell: int
    line: int
    time: float
    finished: bool = False


class Sample(Struct, frozen=True, kw_only=True):
    """One sample: ``wait`` for the interpreter, ``place`` is a hash of the code location."""

    cell: int
    line: int
    time: float
    wait: float
    cpu: float
    place: int


class Text(Struct, frozen=True, kw_only=True):
    """Text of a cell's stream; its first character is number ``start`` of the stream."""

    stream: str
    cell: int
    start: int
    text: str


class Message(Struct, frozen=True, kw_only=True):
    """A message that was about to be queued: its raw frames."""

    cell: int
    frames: tuple[bytes, ...]


class Page:
    """Shared memory between runner and kernel; made before the kernel, read after its death."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("safe-exec-page", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, SIZE)
        # A kernel that shortens the file would have us killed by SIGBUS: seal its size, and the
        # seals.
        fcntl.fcntl(
            self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        )
        self._memory = mmap.mmap(self.fd, SIZE)

    def close(self) -> None:
        """Unmap the memory. May be called again."""
        if self.fd >= 0:
            self._memory.close()
            os.close(self.fd)
            self.fd = -1

    @property
    def alive(self) -> bool:
        """Whether a kernel has begun to write here."""
        return bool(struct.unpack_from("<I", self._memory, 0)[0] == layout.MAGIC)

    def note(self) -> Note:
        """Return the last noted statement."""
        _, _, cell, line, _, noted_at, *_ = layout.HEADER.unpack_from(self._memory, 0)
        return Note(
            cell=cell,
            line=line & ~layout.FINISHED,
            time=noted_at,
            finished=bool(line & layout.FINISHED),
        )

    def counts(self) -> tuple[int, int]:
        """Return the numbers of characters written to stdout and stderr, sent or not."""
        out, err = layout.COUNTS.unpack_from(self._memory, layout.COUNTS_AT)
        return out, err

    def unread(self, stream: str) -> int:
        """Return the bytes that were forwarded but not removed from a descriptor's pipe."""
        written, consumed = struct.unpack_from(
            "<QQ", self._memory, 32 + (16 if stream == "stderr" else 0)
        )
        return max(0, min(int(written) - int(consumed), 65536))

    def sample(self) -> Sample:
        """Return the last sample."""
        return self._sample(layout.SAMPLE_AT)

    def history(self) -> list[Sample]:
        """The last samples, oldest first."""
        size = layout.SAMPLE.size
        samples = [self._sample(layout.HISTORY_AT + n * size) for n in range(layout.HISTORY)]
        return sorted((s for s in samples if s.cell), key=lambda s: s.time)

    def _sample(self, at: int) -> Sample:
        cell, line, _, sampled_at, wait, cpu, place, _ = layout.SAMPLE.unpack_from(self._memory, at)
        return Sample(cell=cell, line=line, time=sampled_at, wait=wait, cpu=cpu, place=place)

    def stack(self) -> tuple[int, list[tuple[str, int, str, int]], bool]:
        """Return the sampled stack: cell number, rows, and whether it awaits something."""
        (length,) = struct.unpack_from("<I", self._memory, layout.STACK_AT)
        start = layout.STACK_AT + 4
        raw = self._memory[start : start + min(length, layout.STACK_BYTES - 4)]
        try:
            document = json.loads(raw)
            rows = [(str(f), int(n), str(p), int(c)) for f, n, p, c in document["rows"]]
            return int(document["cell"]), rows, bool(document["awaiting"])
        except (
            ValueError,
            KeyError,
            TypeError,
            ArithmeticError,
            RecursionError,
        ):  # int(Infinity) is an OverflowError
            return 0, [], False

    def journal(self, cell: int) -> Iterator[Text | Message]:
        """Return the records of one cell, oldest first."""
        (current,) = struct.unpack_from("<I", self._memory, 4)
        current &= 1
        for segment in (current ^ 1, current):
            for record in itertools.islice(self._segment(segment), MOST_RECORDS):
                if record.cell == cell:
                    yield record

    def _segment(self, segment: int) -> Iterator[Text | Message]:
        base = layout.PAGE_BYTES + segment * layout.SEGMENT_BYTES
        (used,) = struct.unpack_from("<I", self._memory, base)
        end = base + layout.SEGMENT_BYTES
        at = base + 4
        # ``used`` is where the last record's header ends; a text that stands last may have grown,
        # up to where memory is zero.
        last = base + min(used, layout.SEGMENT_BYTES)
        while at + layout.RECORD.size <= last:
            length, position, kind, stream, _, cell = layout.RECORD.unpack_from(self._memory, at)
            start = at + layout.RECORD.size
            if start == last and kind == layout.TEXT:
                zero = self._memory.find(b"\0", start, end)
                length = (end if zero < 0 else zero) - start
            at = start + length
            if at > end:
                return
            data = self._memory[start:at]
            if kind == layout.TEXT:
                text = data.replace(layout.NUL, b"\0").decode("utf-8", "replace")
                yield Text(
                    stream="stderr" if stream else "stdout", cell=cell, start=position, text=text
                )
            elif kind == layout.MESSAGE:
                yield Message(cell=cell, frames=_frames(data))


def _frames(data: bytes) -> tuple[bytes, ...]:
    """Frames as ``Page.message`` packs them: their number, then each with its length before it."""
    number = struct.Struct("<I")
    frames: list[bytes] = []
    at = number.size
    while at + number.size <= len(data) and len(frames) < MOST_FRAMES:
        (length,) = number.unpack_from(data, at)
        at += number.size + length
        frames.append(data[at - length : at])
    return tuple(frames)
