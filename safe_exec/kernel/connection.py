"""One connection to a kernel's socket, in the protocol of ZeroMQ (ZMTP 3.0, rfc.zeromq.org/spec/23), bounded in all it takes in.

Why not libzmq: it reads thousands of messages ahead whatever their size, takes any number of parts, and connects again, by name, to
whatever stands there by then. Here a connection is made once, before any code of the notebook runs, and never again. No more is read than
has room among what waits, so the sender is held up by its own full socket. A message that is too large is let go by as it comes,
with only its first, small parts kept. Imports the standard library only.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections import deque
from collections.abc import Callable

from msgspec import Struct

GREETING_BYTES = 64
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
MORE, LONG, COMMAND = 1, 2, 4

MOST_WAITING = 16 << 20
MOST_MESSAGES = 20_000
"""Messages that may wait: a kernel that sends a message a line is faster than we are for a moment, and drops what it cannot send."""
MOST_PARTS = 1000
PART_BYTES = 48
"""What a part costs beside its bytes."""
SMALL = 64 << 10
"""Parts of at most so many bytes come in one piece; only such are kept of a message that is too large."""
FIRST_PARTS = 8
READ_BYTES = 256 << 10
TURN_BYTES = 4 << 20
"""What is read in one turn of the event loop."""
MOST_UNSENT = 64 << 20
TOLD_EVERY = 64 << 20
"""A message without an end is told of each time so much more of it has come."""
COMMAND_BYTES = 4096
RETRY_SECONDS = {"ipc": 0.002, "tcp": 0.01}
OTHER_LOOPBACK = "127.0.0.2"
"""We connect from here: from the address that we connect to, a connection may meet itself before anybody listens (RFC 9293, 3.5)."""


class ConnectFailed(OSError):  # noqa: N818 - says what happened
    """No connection could be made, or what stands there does not speak the protocol."""


class Received(Struct):
    """One message. ``dropped`` counts the bytes of one that was too large: then ``parts`` are its first, small ones."""

    parts: list[bytes]
    dropped: int = 0


class Connection:
    """One end of a connection that stands. ``take()`` gives what came; ``on_arrival`` is called when something did, or the end."""

    def __init__(self, sock: socket.socket, *, largest: int | None) -> None:
        self._socket = sock
        self._loop = asyncio.get_running_loop()
        self.largest = largest
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
        self._out = bytearray()
        self._reading = False
        self.ended = False
        self.on_arrival: Callable[[], None] = lambda: None

    def start(self, first: bytes) -> None:
        """Begin to read; ``first`` has been read already."""
        self._inbox += first
        self._parse()
        self._read_on()

    # --- reading ------------------------------------------------------------------------------------------------

    def take(self) -> Received | None:
        """The message that waits longest."""
        if not self._waiting:
            return None
        message, size = self._waiting.popleft()
        self._waiting_bytes -= size
        if not self._reading and not self.ended:
            self._parse()
            self._read_on()
        return message

    @property
    def exhausted(self) -> bool:
        """Whether the end has come and every message was taken."""
        return self.ended and not self._waiting

    def _read_on(self) -> None:
        if not self._reading and not self.ended and self._has_room(0):
            self._reading = True
            self._loop.add_reader(self._socket.fileno(), self._readable)

    def _pause(self) -> None:
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._socket.fileno())

    def _has_room(self, size: int) -> bool:
        """Whether a part of ``size`` bytes fits in with what waits; alone any does."""
        waiting = len(self._waiting)
        return waiting == 0 or (
            waiting < MOST_MESSAGES and self._waiting_bytes + size <= MOST_WAITING
        )

    def _readable(self) -> None:
        for _ in range(TURN_BYTES // READ_BYTES):
            if not self._receive():
                return

    def _receive(self) -> bool:
        """Read once; whether there may be more to read."""
        try:
            if self._body is not None:
                count = self._socket.recv_into(memoryview(self._body)[self._filled :])
                self._filled += count
            else:
                data = self._socket.recv(READ_BYTES)
                self._inbox += data
                count = len(data)
        except BlockingIOError:
            return False
        except OSError:
            count = 0
        if not count:
            self._end()
            return False
        self._parse()
        return self._reading

    def _end(self) -> None:
        self._pause()
        self.ended = True
        self.on_arrival()

    def _parse(self) -> None:
        """Take what has come apart, as far as there is room for it."""
        count = len(self._waiting)
        while self._step():
            pass
        if len(self._waiting) != count:
            self.on_arrival()

    def _step(self) -> bool:
        """One frame, or a piece of one that is let go by; whether there may be another."""
        if self._body is not None:
            return self._fill()
        if self._skip:
            return self._let_go()
        head = self._head()
        if head is None:
            return False
        flags, start, length = head
        if flags & COMMAND:
            return self._command(start, length)
        if not self._has_room(self._size + length):
            self._pause()
            return False
        return (
            self._small(flags, start, length)
            if length <= SMALL
            else self._large(flags, start, length)
        )

    def _head(self) -> tuple[int, int, int] | None:
        """Flags of the next frame, where its body starts, and the body's length; ``None`` before that has come."""
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
            return self._let_go()
        self._body, self._filled = bytearray(length), 0
        return self._fill()

    def _is_too_large(self, length: int) -> bool:
        if self._message.dropped or len(self._message.parts) >= MOST_PARTS:
            return True
        return self.largest is not None and self._size + length > self.largest

    def _fill(self) -> bool:
        """Move what has come into the part that is under way; whether it is complete."""
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

    def _let_go(self) -> bool:
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
        """The message is too large: keep what says which it was, and count."""
        message = self._message
        if not message.dropped:
            message.dropped = self._size
            message.parts = [part for part in message.parts[:FIRST_PARTS] if len(part) <= SMALL]
            self._size = sum(map(len, message.parts))
        message.dropped += length + PART_BYTES
        if message.dropped - self._reported > TOLD_EVERY:
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
        """Commands after the handshake: only PING wants an answer (ZMTP 3.1, section 3.4)."""
        if length > COMMAND_BYTES:
            self._end()
            return False
        if len(self._inbox) < start + length:
            return False
        body = bytes(self._inbox[start : start + length])
        del self._inbox[: start + length]
        if body.startswith(b"\x04PING"):
            self.write(_frame(b"\x04PONG" + body[7:23], COMMAND))
        return True

    # --- writing ------------------------------------------------------------------------------------------------

    def send(self, parts: list[bytes]) -> bool:
        """Send a message, now or when there is room; whether it was taken on."""
        if self.ended or len(self._out) > MOST_UNSENT:
            return False
        self.write(encode(parts))
        return True

    @property
    def unsent(self) -> int:
        """Bytes that wait for room in the socket."""
        return len(self._out)

    def write(self, data: bytes) -> None:
        """Send an encoded message, now or when there is room, whatever waits already."""
        if not self._out:
            try:
                data = data[self._socket.send(data) :]
            except BlockingIOError:
                pass
            except OSError:
                return  # the end is seen by reading
        if data:
            if not self._out:
                self._loop.add_writer(self._socket.fileno(), self._writable)
            self._out += data

    def _writable(self) -> None:
        try:
            del self._out[: self._socket.send(self._out)]
        except BlockingIOError:
            return
        except OSError:
            self._out.clear()
        if not self._out:
            self._loop.remove_writer(self._socket.fileno())

    def close(self) -> None:
        """Let go of the socket. May be called again."""
        if self._socket.fileno() >= 0:
            self._pause()
            self._loop.remove_writer(self._socket.fileno())
            self._socket.close()
        self.ended = True
        self._waiting.clear()
        self._inbox.clear()
        self._body = None


def encode(parts: list[bytes]) -> bytes:
    """A message as it goes over the wire."""
    last = len(parts) - 1
    return b"".join(_frame(part, MORE if n < last else 0) for n, part in enumerate(parts))


def _frame(body: bytes, flags: int) -> bytes:
    length = len(body)
    head = (
        struct.pack(">BB", flags, length)
        if length < 256  # noqa: PLR2004
        else struct.pack(">BQ", flags | LONG, length)
    )
    return head + body


# --- connecting -------------------------------------------------------------------------------------------------


class Address(Struct, frozen=True, kw_only=True):
    """Where a kernel listens: a path (``port`` is 0), or a host and a port."""

    host: str
    port: int = 0

    @property
    def kind(self) -> str:
        """``ipc`` or ``tcp``."""
        return "tcp" if self.port else "ipc"


async def connect(
    address: Address, *, kind: str, identity: bytes, largest: int | None
) -> Connection:
    """Connect as a socket of a kind (``DEALER``, ``SUB``). Raises ConnectFailed.

    What does not listen yet is waited for, without an end: whoever waits for us cancels. Once somebody listens there is no second try.
    """
    sock = await _connected(address)
    try:
        first_bytes = await _shake_hands(sock, kind, identity)
    except OSError as error:
        sock.close()
        raise ConnectFailed(f"the kernel's socket does not speak ZMTP 3: {error}") from error
    except BaseException:
        sock.close()
        raise
    connection = Connection(sock, largest=largest)
    connection.start(first_bytes)
    return connection


async def _connected(address: Address) -> socket.socket:
    while True:
        sock = _open(address)
        try:
            if address.port:
                await asyncio.get_running_loop().sock_connect(sock, (address.host, address.port))
            else:
                sock.connect(
                    address.host
                )  # at once, or not at all: EAGAIN is a queue that is full (unix(7))
        except OSError:
            sock.close()
        except BaseException:
            sock.close()
            raise
        else:
            return sock
        await asyncio.sleep(RETRY_SECONDS[address.kind])


def _open(address: Address) -> socket.socket:
    family = (
        socket.AF_UNIX
        if not address.port
        else socket.AF_INET6
        if ":" in address.host
        else socket.AF_INET
    )
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setblocking(False)
    if address.port:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if address.host.startswith("127."):
            with contextlib.suppress(OSError):
                sock.bind((OTHER_LOOPBACK, 0))
    return sock


async def _shake_hands(sock: socket.socket, kind: str, identity: bytes) -> bytes:
    """Greet, say what we are, and hear that the other end is ready; what it sent after that."""
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(sock, GREETING + ready_command(kind, identity))
    data = bytearray()
    while (end := end_of_handshake(data)) is None:
        piece = await loop.sock_recv(sock, COMMAND_BYTES)
        if not piece:
            raise ConnectionError("it was closed")
        data += piece
    if kind == "SUB":
        await loop.sock_sendall(sock, _frame(b"\x01", 0))  # subscribe to everything
    return bytes(data[end:])


def ready_command(kind: str, identity: bytes = b"") -> bytes:
    """The command that says of what type a socket is, and who."""
    ready = b"\x05READY" + _property(b"Socket-Type", kind.encode())
    return _frame(ready + (_property(b"Identity", identity) if identity else b""), COMMAND)


def ready_properties(frame: bytes) -> dict[bytes, bytes]:
    """The properties in a READY command, their names in lower case. Raises ConnectionError."""
    at = (9 if frame[0] & LONG else 2) + len(b"\x05READY")
    properties: dict[bytes, bytes] = {}
    while at < len(frame):
        name = frame[at + 1 : at + 1 + frame[at]]
        at += 1 + len(name)
        length = int.from_bytes(frame[at : at + 4], "big")
        if at + 4 + length > len(frame):
            raise ConnectionError("a property that is cut off")
        properties[name.lower()] = frame[at + 4 : at + 4 + length]
        at += 4 + length
    return properties


def _property(name: bytes, value: bytes) -> bytes:
    return bytes([len(name)]) + name + struct.pack(">I", len(value)) + value


def end_of_handshake(data: bytearray) -> int | None:
    """Where the READY of the other end ends, ``None`` before it has all come. Raises ConnectionError for anything else."""
    if len(data) < GREETING_BYTES:
        return None
    if (
        data[0] != GREETING[0]
        or data[9] != GREETING[9]
        or data[10] < 3  # noqa: PLR2004
        or data[12:32] != GREETING[12:32]
    ):
        raise ConnectionError("another protocol, or one with encryption")
    at = GREETING_BYTES
    if len(data) < at + 2:
        return None
    start = at + (9 if data[at] & LONG else 2)
    length = int.from_bytes(data[at + 1 : start], "big")
    if not data[at] & COMMAND or length > COMMAND_BYTES:
        raise ConnectionError("no READY")
    if len(data) < start + length:
        return None
    if not data[start : start + length].startswith(b"\x05READY"):
        raise ConnectionError("it refused")
    return start + length
