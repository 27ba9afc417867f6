"""Reads the shared page that the agent writes: current line, samples, unsent output."""

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

# Imports the standard library only. The kernel process can write anything to the page. So lengths
# are checked, text is decoded with replacement, and everything counts as a claim.

MOST_FRAMES = 64
# A segment written by our agent holds fewer records than this, since it joins text.
MOST_RECORDS = 20_000
SIZE = layout.PAGE_BYTES + 2 * layout.SEGMENT_BYTES


class Note(Struct, frozen=True, kw_only=True):
    """The last noted statement; ``time`` is CLOCK_MONOTONIC, which all processes share."""

    cell: int
    line: int
    time: float
    finished: bool = False


class Sample(Struct, frozen=True, kw_only=True):
    """One sample. ``wait`` is the wait for the GIL in seconds, ``place`` a hash of the location."""

    cell: int
    line: int
    time: float
    wait: float
    cpu: float
    place: int


class Text(Struct, frozen=True, kw_only=True):
    """Text of a cell's stream; ``start`` is the position of its first character."""

    stream: str
    cell: int
    start: int
    text: str


class Message(Struct, frozen=True, kw_only=True):
    """The raw frames of a message that was about to be queued."""

    cell: int
    frames: tuple[bytes, ...]


class Page:
    """Shared memory between runner and kernel. It outlives the kernel."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("safe-exec-page", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, SIZE)
        # If the kernel could shrink the file, our next read would raise SIGBUS. So seal the size,
        # and seal the seals (memfd_create(2), F_ADD_SEALS in fcntl(2)).
        fcntl.fcntl(
            self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        )
        self._memory = mmap.mmap(self.fd, SIZE)

    def close(self) -> None:
        """Unmap the memory. Can be called again."""
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

    def request_stacks(self, enabled: bool) -> None:
        """Ask the sampling thread for the stacks of all threads, or withdraw the request.

        The thread writes them where the fault handler does.
        """
        self._memory[layout.REQUEST_AT] = int(enabled)

    def counts(self) -> tuple[int, int]:
        """Return the numbers of characters written to stdout and stderr, sent or not."""
        out, err = layout.COUNTS.unpack_from(self._memory, layout.COUNTS_AT)
        return out, err

    def unread(self, stream: str) -> int:
        """Return the number of bytes that were forwarded but are still in a descriptor's pipe."""
        # The agent copies with tee(2), forwards, and only then reads the pipe. A death in between
        # must not repeat the forwarded bytes.
        written, consumed = struct.unpack_from(
            "<QQ", self._memory, 32 + (16 if stream == "stderr" else 0)
        )
        return max(0, min(int(written) - int(consumed), 65536))

    def sample(self) -> Sample:
        """Return the last sample."""
        return self._sample(layout.SAMPLE_AT)

    def history(self) -> list[Sample]:
        """Return the last samples, oldest first."""
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
        except (ValueError, KeyError, TypeError, ArithmeticError, RecursionError):
            # A stack that was half written, or forged; int(Infinity) is an OverflowError.
            return 0, [], False

    def journal(self, cell: int) -> Iterator[Text | Message]:
        """Return the records of one cell, oldest first."""
        # Two segments take turns: when one is full, the agent starts to overwrite the older one.
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
        # ``used`` is the end of the last record's header. The agent appends to a text in place, so
        # the last text may be longer than its header says and ends at the first zero byte.
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
    """Unpack frames: their number, then the length and bytes of each."""
    number = struct.Struct("<I")
    frames: list[bytes] = []
    at = number.size
    while at + number.size <= len(data) and len(frames) < MOST_FRAMES:
        (length,) = number.unpack_from(data, at)
        at += number.size + length
        frames.append(data[at - length : at])
    return tuple(frames)
