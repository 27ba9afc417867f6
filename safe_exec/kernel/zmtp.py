"""The protocol of ZeroMQ (ZMTP 3.0, rfc.zeromq.org/spec/23) without sockets."""

from __future__ import annotations

import struct
from collections import deque

from msgspec import Struct

# A reader of messages is bounded in everything that it keeps. No message is parsed for which there
# is no room among those that wait; of a message that is too large only the first, small parts are
# kept.

GREETING_BYTES = 64
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
MORE, LONG, COMMAND = 1, 2, 4
LONGEST_SHORT_FRAME = 255
OLDEST_VERSION = 3

MOST_WAITING = 16 << 20
# A kernel that sends a message for each line is faster than we are for a moment, and drops what it
# cannot send. So many messages may wait.
MOST_MESSAGES = 20_000
MOST_PARTS = 1000
# Memory that a part takes beside its bytes.
PART_BYTES = 48
# Parts of at most this size are read in one piece, and kept of a message that is too large.
SMALL = 64 << 10
FIRST_PARTS = 8
# A message without an end is reported each time so many more bytes of it have arrived.
REPORT_EVERY = 64 << 20
COMMAND_BYTES = 4096


class ProtocolError(ConnectionError):
    """The other end does not speak ZMTP 3 without encryption."""


class Received(Struct):
    """One message.

    ``dropped`` counts the bytes of one that was too large, with its first, small parts.
    """

    parts: list[bytes]
    dropped: int = 0


class MessageReader:
    """Turns bytes into messages.

    ``largest`` bounds a message (``None``: unbounded). ``is_blocked``: the next part has no room,
    so ``parse`` is to be called again after ``take``. ``is_broken``: a command was too long.
    ``replies`` are frames to send.
    """

    def __init__(self, *, largest: int | None) -> None:
        self.largest = largest
        self.most_waiting = MOST_WAITING
        self.is_blocked = False
        self.is_broken = False
        self.replies: list[bytes] = []
        # Small frames are cut from here. A large part is read straight into ``_body``: copying it
        # from here would cost its size a second time.
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
        """Bytes that are not parsed yet, and bytes of messages that wait."""
        return len(self._inbox), self._waiting_bytes

    def add(self, data: bytes) -> None:
        """Append bytes from the socket."""
        self._inbox += data

    def space(self) -> memoryview | None:
        """Return the unread rest of a large part, ``None`` if there is none."""
        return None if self._body is None else memoryview(self._body)[self._filled :]

    def filled(self, count: int) -> None:
        """Note that so many bytes were read into ``space``."""
        self._filled += count

    def take(self) -> Received | None:
        """Remove and return the oldest message."""
        if not self._waiting:
            return None
        message, size = self._waiting.popleft()
        self._waiting_bytes -= size
        return message

    def has_room(self, size: int) -> bool:
        """Whether a part of this size fits beside the waiting messages; alone every part does."""
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
        """Parse as far as there is room; true if a message was completed."""
        self.is_blocked = False
        count = len(self._waiting)
        while not self.is_broken and self._step():
            pass
        return len(self._waiting) != count

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
        # Checked before the body is read: whatever is not read stays in the kernel's own socket and
        # blocks the sender.
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
        """Move bytes into the part under way; true if it is complete."""
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
        """Count bytes of a message that is too large; the parts kept tell which message it was."""
        message = self._message
        if not message.dropped:
            message.dropped = self._size
            message.parts = [part for part in message.parts[:FIRST_PARTS] if len(part) <= SMALL]
            self._size = sum(map(len, message.parts))
        message.dropped += length + PART_BYTES
        # The trial counts this against the run's output limit while the message is still arriving;
        # without it an endless message would never be seen.
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
        # After the handshake only PING wants a reply (ZMTP 3.1, section 3.4).
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
    """Return a message as frames."""
    last = len(parts) - 1
    return b"".join(frame(part, MORE if n < last else 0) for n, part in enumerate(parts))


def frame(body: bytes, flags: int) -> bytes:
    """Return a frame with its head."""
    length = len(body)
    if length <= LONGEST_SHORT_FRAME:
        return struct.pack(">BB", flags, length) + body
    return struct.pack(">BQ", flags | LONG, length) + body


# --- the handshake ------------------------------------------------------------------------------


def ready_command(kind: str, identity: bytes = b"") -> bytes:
    """Return the READY command of a type of socket."""
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
    """Return the end of the other side's READY, ``None`` if it is incomplete.

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
