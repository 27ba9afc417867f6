"""The kernel's side of the shared page."""

import _thread
import mmap
import os
import struct
import time

from . import layout


class Page:
    """The shared memory: header, last stack, and two journal segments that are used in turn."""

    def __init__(self, fd):
        self.lock = _thread.RLock()
        # The number of the running cell, or of the last one.
        self.cell = 0
        self.counts = [0, 0]
        self.fd_bytes = [[0, 0], [0, 0]]
        self.move_to(fd)

    def move_to(self, fd):
        """Write to this memory from now on; cells are numbered on."""
        self.memory = mmap.mmap(fd, layout.PAGE_BYTES + 2 * layout.SEGMENT_BYTES)
        self.pid = os.getpid()
        self.segment = 0
        # The start of the last record's payload.
        self.start = 0
        self.end = layout.PAGE_BYTES + layout.SEGMENT_BYTES
        self.memory.seek(
            layout.PAGE_BYTES + 4
        )  # where the journal goes on: the file position of the mapping
        # The stream whose record a further write of this cell may extend.
        self.last = None
        self.counts[:] = 0, 0
        for counts in self.fd_bytes:
            counts[:] = 0, 0
        self.head()

    def head(self, line=0):
        """Write the page's header in one store, so that a reader hardly ever sees half of it."""
        (out_w, out_c), (err_w, err_c) = self.fd_bytes
        layout.HEADER.pack_into(
            self.memory,
            0,
            layout.MAGIC,
            self.segment,
            self.cell,
            line,
            self.pid,
            time.monotonic(),
            out_w,
            out_c,
            err_w,
            err_c,
        )

    def note_line(self, line, _pack=struct.Struct("<QIId").pack_into, _clock=time.monotonic):
        """Record the statement that is about to run."""
        _pack(self.memory, 8, self.cell, line, self.pid, _clock())

    def finish(self):
        """Record that the cell's code is done and its reply not yet sent.

        The record keeps the line, because effects of the cell may still end the process.
        """
        (line,) = struct.unpack_from("<I", self.memory, 16)
        self.note_line(line | layout.FINISHED)

    def note_fd(self, stream, written, consumed):
        """Count bytes from descriptor 1 or 2: those forwarded, and those removed from the pipe."""
        counts = self.fd_bytes[stream]
        counts[0] += written
        counts[1] += consumed
        struct.pack_into("<QQ", self.memory, 32 + 16 * stream, counts[0], counts[1])

    def text(self, stream, string):
        """Journal text that the current cell writes.

        Returns true if a segment is full, so that the streams need a flush.
        """
        # Character by character, so that counts hold.
        data = string.encode("utf-8", "replace")
        if b"\0" in data:
            data = data.replace(b"\0", layout.NUL)
        with self.lock:
            characters_before = self.counts[stream]
            self.counts[stream] = characters_before + len(string)
            if len(data) > 4096:
                self.note_counts()
            if stream == self.last and self.memory.tell() + len(data) <= self.end:
                self.memory.write(data)
                return False
            if len(data) > layout.SEGMENT_BYTES // 2:
                tail = data[-layout.SEGMENT_BYTES // 2 :].decode("utf-8", "ignore")
                characters_before += len(string) - len(tail.replace("\xc0\x80", "\0"))
                data = tail.encode()
            switched = self._append(layout.TEXT, stream, data, characters_before)
            self.last = stream
            return switched

    def note_counts(self):
        """Update the counts in the header; while a cell runs they lag behind by one sample."""
        layout.COUNTS.pack_into(self.memory, layout.COUNTS_AT, *self.counts)

    def message(self, frames):
        """Journal a message that is about to be queued."""
        parts = [bytes(frame) for frame in frames]
        data = struct.pack("<I", len(parts)) + b"".join(
            struct.pack("<I", len(p)) + p for p in parts
        )
        if len(data) < layout.SEGMENT_BYTES // 2:
            with self.lock:
                self._append(layout.MESSAGE, 0, data, 0)
                self.last = None

    def _append(self, kind, stream, data, characters_before):
        memory = self.memory
        base = self.end - layout.SEGMENT_BYTES
        offset = memory.tell()
        switched = offset + layout.RECORD.size + len(data) > self.end
        if switched:
            self.segment ^= 1
            base = layout.PAGE_BYTES + self.segment * layout.SEGMENT_BYTES
            self.end = base + layout.SEGMENT_BYTES
            memory[base : self.end] = bytes(layout.SEGMENT_BYTES)
            struct.pack_into("<I", memory, base, 4)
            struct.pack_into("<I", memory, 4, self.segment)
            offset = base + 4
        elif offset > base + 4:
            struct.pack_into("<I", memory, self.start - layout.RECORD.size, offset - self.start)
        layout.RECORD.pack_into(
            memory, offset, len(data), characters_before, kind, stream, 0, self.cell
        )
        self.start = offset + layout.RECORD.size
        memory.seek(self.start)
        memory.write(data)
        # Written last: a reader may trust the memory up to here. A text that is written on is the
        # last record, and ends where memory is zero.
        struct.pack_into("<I", memory, base, self.start - base)
        return switched

    def take_request(self):
        """Tell whether the runner asked for the stacks of all threads, and clear its request."""
        if not self.memory[layout.REQUEST_AT]:
            return False
        self.memory[layout.REQUEST_AT] = 0
        return True

    def stack(self, text):
        """Record the stack that the sampling thread saw."""
        data = text.encode("utf-8", "replace")[: layout.STACK_BYTES - 4]
        self.memory[layout.STACK_AT + 4 : layout.STACK_AT + 4 + len(data)] = data
        struct.pack_into("<I", self.memory, layout.STACK_AT, len(data))
