"""The protocol of ZeroMQ (ZMTP 3.0, rfc.zeromq.org/spec/23) without sockets."""

from __future__ import annotations

import struct
from collections import deque

from msgspec import Struct

# A reader has a bound for everything that it keeps. It parses no message for which the queue has no
# room. Of a message that is too large it keeps only the first, small parts.

GREETING_BYTES = 64
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
MORE, LONG, COMMAND = 1, 2, 4
LONGEST_SHORT_FRAME = 255
# Of a frame: its flags, and eight bytes of length.
LONGEST_HEAD = 9
OLDEST_VERSION = 3

MOST_WAITING = 16 << 20
# A kernel that sends a message for each line can for a moment be faster than we are, and its PUB
# socket drops messages that it cannot send. So this many may wait.
MOST_MESSAGES = 20_000
MOST_PARTS = 1000
# Memory that a part takes in addition to its bytes.
PART_BYTES = 48
# Parts up to this size are read in one piece. Of a message that is too large, the first ones of
# them are kept.
SMALL = 64 << 10
FIRST_PARTS = 8
# A message that is too large is reported each time this many more bytes have arrived.
REPORT_EVERY = 64 << 20
COMMAND_BYTES = 4096


class ProtocolError(ConnectionError):
    """The other end does not speak ZMTP 3 without encryption."""


class Received(Struct):
    """One message.

    If it was too large, ``dropped`` counts its bytes and ``parts`` are its first, small parts.
    """

    parts: list[bytes]
    dropped: int = 0


class MessageReader:
    """Turns bytes into messages.

    ``largest`` bounds a message (``None``: no bound). If ``is_blocked``, the queue has no room for
    the next part; call ``parse`` again after ``take``. A command that is too long sets
    ``is_broken``. ``replies`` are frames to send.
    """

    def __init__(self, *, largest: int | None) -> None:
        self.largest = largest
        self.most_waiting = MOST_WAITING
        self.is_blocked = False
        self.is_broken = False
        self.replies: list[bytes] = []
        # Small frames are cut from the inbox. A large part is read straight into ``_body``, since a
        # copy from the inbox would need its size a second time.
        self._inbox = bytearray()
        self._body: bytearray | None = None
        self._filled = 0
        self._skip = 0
        self._more = False
        self._message = Received([])
        self._size = 0
        self._reported = 0
        self._waiting: deque[tuple[Received, int]] = deque()
        self._waiting_bytes = 0

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def buffered(self) -> tuple[int, int]:
        """Return the number of unparsed bytes, and of bytes in waiting messages."""
        return len(self._inbox), self._waiting_bytes

    def add(self, data: bytes) -> None:
        """Append bytes from the socket."""
        self._inbox += data

    def space(self) -> memoryview | None:
        """Return the buffer for the missing bytes of a large part, ``None`` if there is none."""
        return None if self._body is None else memoryview(self._body)[self._filled :]

    def filled(self, count: int) -> None:
        """Record that ``count`` bytes were read into ``space``."""
        self._filled += count

    def take(self) -> Received | None:
        """Remove and return the oldest message."""
        if not self._waiting:
            return None
        message, size = self._waiting.popleft()
        self._waiting_bytes -= size
        return message

    def has_room(self, size: int) -> bool:
        """Whether the queue has room for a part of this size."""
        # An empty queue accepts any part. Otherwise a part above the bound would block for ever.
        waiting = len(self._waiting)
        return waiting == 0 or (
            waiting < MOST_MESSAGES and self._waiting_bytes + size <= self.most_waiting
        )

    def clear(self) -> None:
        """Drop all bytes and messages."""
        self._waiting.clear()
        self._inbox.clear()
        self._body = None

    def parse(self) -> bool:
        """Parse until bytes or room run out; true if a message was completed."""
        self.is_blocked = False
        count = len(self._waiting)
        while not self.is_broken and (self._take_small_frames() or self._step()):
            pass
        return len(self._waiting) != count

    def _take_small_frames(self) -> bool:
        """Parse the small frames at the start of the inbox; false if there is none."""
        # Nearly all frames are small, and a message has seven. Cut in one pass, they cost a third.
        if self._body is not None or self._skip:
            return False
        inbox, at = self._inbox, 0
        with memoryview(inbox) as view:
            while len(inbox) - at >= LONGEST_HEAD:
                flags, length, start = inbox[at], inbox[at + 1], at + 2
                if flags & LONG:
                    start = at + LONGEST_HEAD
                    length = int.from_bytes(view[at + 1 : start], "big")
                stop = start + length
                if (
                    flags & COMMAND
                    or length > SMALL
                    or stop > len(inbox)
                    or not self.has_room(self._size + length)
                ):
                    break
                self._part(bytes(view[start:stop]), more=bool(flags & MORE))
                at = stop
        del inbox[:at]
        return at > 0

    def _step(self) -> bool:
        """Parse one frame, or skip a piece of one; false if more bytes or more room are needed."""
        if self._body is not None:
            return self._fill()
        if self._skip:
            return self._skip_on()
        head = self._head()
        if head is None:
            return False
        flags, start, length = head
        if flags & COMMAND:
            return self._command(start, length)
        # Check before reading the body: unread bytes stay in the kernel's own socket and block the
        # sender.
        if not self.has_room(self._size + length):
            self.is_blocked = True
            return False
        read = self._small if length <= SMALL else self._large
        return read(flags, start, length)

    def _head(self) -> tuple[int, int, int] | None:
        """Return flags, start and length of the next frame's body.

        ``None`` if its head is incomplete.
        """
        start = 9 if self._inbox and self._inbox[0] & LONG else 2
        if len(self._inbox) < start:
            return None
        return self._inbox[0], start, int.from_bytes(self._inbox[1:start], "big")

    def _small(self, flags: int, start: int, length: int) -> bool:
        if len(self._inbox) < start + length:
            return False
        part = bytes(self._inbox[start : start + length])
        del self._inbox[: start + length]
        self._part(part, more=bool(flags & MORE))
        return True

    def _large(self, flags: int, start: int, length: int) -> bool:
        del self._inbox[:start]
        self._more = bool(flags & MORE)
        if self._is_too_large(length):
            self._skip = length
            self._overflow(0)
            return self._skip_on()
        self._body, self._filled = bytearray(length), 0
        return self._fill()

    def _is_too_large(self, length: int) -> bool:
        # A message of millions of empty parts would pass any bound on bytes.
        if self._message.dropped or len(self._message.parts) >= MOST_PARTS:
            return True
        return self.largest is not None and self._size + length > self.largest

    def _fill(self) -> bool:
        """Move bytes into the unfinished part; true if it is complete."""
        assert self._body is not None
        piece = self._inbox[: len(self._body) - self._filled]
        self._body[self._filled : self._filled + len(piece)] = piece
        del self._inbox[: len(piece)]
        self._filled += len(piece)
        if self._filled < len(self._body):
            return False
        body, self._body = self._body, None
        self._part(bytes(body), more=self._more)
        return True

    def _skip_on(self) -> bool:
        skipped = min(self._skip, len(self._inbox))
        del self._inbox[:skipped]
        self._skip -= skipped
        self._overflow(skipped)
        if self._skip:
            return False
        if not self._more:
            self._finish()
        return True

    def _part(self, part: bytes, *, more: bool) -> None:
        if self._is_too_large(len(part)):
            self._overflow(len(part))
        else:
            self._message.parts.append(part)
            self._size += len(part) + PART_BYTES
        if not more:
            self._finish()

    def _overflow(self, length: int) -> None:
        """Count bytes of a message that is too large, and drop its large parts."""
        # The first parts contain the headers, which tell what kind of message was dropped.
        message = self._message
        if not message.dropped:
            message.dropped = self._size
            message.parts = [part for part in message.parts[:FIRST_PARTS] if len(part) <= SMALL]
            self._size = sum(map(len, message.parts))
        message.dropped += length + PART_BYTES
        # Report the bytes while the message is still arriving, so that the trial can count them
        # against the run's output limit. An endless message would otherwise never be noticed.
        if message.dropped - self._reported > REPORT_EVERY:
            self._store(Received([], message.dropped - self._reported), 0)
            self._reported = message.dropped

    def _finish(self) -> None:
        message, size = self._message, self._size
        if message.dropped:
            message.dropped = max(1, message.dropped - self._reported)
        self._message, self._size, self._reported = Received([]), 0, 0
        self._store(message, size)

    def _store(self, message: Received, size: int) -> None:
        self._waiting.append((message, size))
        self._waiting_bytes += size

    def _command(self, start: int, length: int) -> bool:
        # After the handshake only PING needs a reply (ZMTP 3.1, section 3.4).
        if length > COMMAND_BYTES:
            self.is_broken = True
            return False
        if len(self._inbox) < start + length:
            return False
        body = bytes(self._inbox[start : start + length])
        del self._inbox[: start + length]
        if body.startswith(b"\x04PING"):
            self.replies.append(frame(b"\x04PONG" + body[7:23], COMMAND))
        return True


# --- frames -------------------------------------------------------------------------------------


def encode(parts: list[bytes]) -> bytes:
    """Encode a message."""
    last = len(parts) - 1
    return b"".join(frame(part, MORE if n < last else 0) for n, part in enumerate(parts))


def frame(body: bytes, flags: int) -> bytes:
    """Encode one frame."""
    length = len(body)
    if length <= LONGEST_SHORT_FRAME:
        return struct.pack(">BB", flags, length) + body
    return struct.pack(">BQ", flags | LONG, length) + body


# --- the handshake ------------------------------------------------------------------------------


def ready_command(kind: str, identity: bytes = b"") -> bytes:
    """Return the READY command that announces a type of socket, such as ``DEALER``."""
    ready = b"\x05READY" + _property(b"Socket-Type", kind.encode())
    if identity:
        ready += _property(b"Identity", identity)
    return frame(ready, COMMAND)


def _property(name: bytes, value: bytes) -> bytes:
    return bytes([len(name)]) + name + struct.pack(">I", len(value)) + value


def ready_properties(command: bytes) -> dict[bytes, bytes]:
    """Return the properties of a READY command, by name in lower case. Raises ProtocolError."""
    at = (9 if command[0] & LONG else 2) + len(b"\x05READY")
    properties: dict[bytes, bytes] = {}
    while at < len(command):
        name = command[at + 1 : at + 1 + command[at]]
        at += 1 + len(name)
        length = int.from_bytes(command[at : at + 4], "big")
        if at + 4 + length > len(command):
            raise ProtocolError("a property that is cut off")
        properties[name.lower()] = command[at + 4 : at + 4 + length]
        at += 4 + length
    return properties


def end_of_handshake(data: bytearray) -> int | None:
    """Return the position after the other side's READY command, ``None`` if it is incomplete.

    Raises ProtocolError.
    """
    if len(data) < GREETING_BYTES:
        return None
    # Signature, version and mechanism of the greeting (ZMTP 3.0, section 2.2). A mechanism other
    # than NULL would be encrypted.
    if (
        data[0] != GREETING[0]
        or data[9] != GREETING[9]
        or data[10] < OLDEST_VERSION
        or data[12:32] != GREETING[12:32]
    ):
        raise ProtocolError("another protocol, or one with encryption")
    at = GREETING_BYTES
    if len(data) < at + 2:
        return None
    start = at + (9 if data[at] & LONG else 2)
    length = int.from_bytes(data[at + 1 : start], "big")
    if not data[at] & COMMAND or length > COMMAND_BYTES:
        raise ProtocolError("no READY")
    if len(data) < start + length:
        return None
    if not data[start : start + length].startswith(b"\x05READY"):
        raise ProtocolError("it refused")
    return start + length
