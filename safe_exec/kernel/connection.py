"""One ZeroMQ connection to a kernel's socket (frames in ``zmtp``), with bounded memory."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable

from msgspec import Struct

from safe_exec.kernel import zmtp
from safe_exec.kernel.zmtp import MessageReader, Received

# Why not libzmq: it reads thousands of messages ahead regardless of their size, accepts any number
# of parts, and reconnects by name to any process that has taken over the address. Here a connection
# is made once, before any code of the notebook runs. It stops reading when the queue of messages is
# full, so a fast sender is blocked by its own full socket.

READ_BYTES = 256 << 10
# Bytes read in one turn of the event loop.
TURN_BYTES = 4 << 20
MOST_UNSENT = 64 << 20
# Pauses between attempts to connect while the kernel starts. libzmq retries every 100 ms.
RETRY_SECONDS = {"ipc": 0.002, "tcp": 0.01}
# Our end of a TCP connection. A socket that connects to an unused port of its own address can, by
# chance, connect to itself (simultaneous open, RFC 9293, 3.5). Another source address excludes
# that.
OTHER_LOOPBACK = "127.0.0.2"


class ConnectFailed(OSError):  # noqa: N818 - names the event
    """The connection failed, or the other end does not speak the protocol."""


class Connection:
    """An open connection to a kernel's socket.

    ``take`` returns messages. ``on_arrival`` is called when a message has arrived, and when the
    other end has closed.
    """

    def __init__(self, sock: socket.socket, *, largest: int | None) -> None:
        self._socket = sock
        self._loop = asyncio.get_running_loop()
        self.reader = MessageReader(largest=largest)
        self._out = bytearray()
        self._reading = False
        self.ended = False
        self.on_arrival: Callable[[], None] = lambda: None

    def start(self, first: bytes) -> None:
        """Start reading; ``first`` are bytes that came with the handshake."""
        self.reader.add(first)
        self._parse()
        self._resume()

    # --- reading --------------------------------------------------------------------------------

    def take(self) -> Received | None:
        """Return the oldest waiting message."""
        message = self.reader.take()
        if message is not None and not self._reading and not self.ended:
            self._parse()
            self._resume()
        return message

    @property
    def exhausted(self) -> bool:
        """Whether the other end has closed and every message was taken."""
        return self.ended and not self.reader

    def _resume(self) -> None:
        if not self._reading and not self.ended and self.reader.has_room(0):
            self._reading = True
            self._loop.add_reader(self._socket.fileno(), self._readable)

    def _pause(self) -> None:
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._socket.fileno())

    def _readable(self) -> None:
        # A kernel that sends without a pause must not delay the timers of the event loop.
        for _ in range(TURN_BYTES // READ_BYTES):
            if not self._receive():
                return

    def _receive(self) -> bool:
        """Read once; false if there is nothing more to read in this turn."""
        room = READ_BYTES
        try:
            space = self.reader.space()
            # A large part is read straight to its place, without a copy.
            if space is not None:
                room = len(space)
                count = self._socket.recv_into(space)
                self.reader.filled(count)
            else:
                data = self._socket.recv(READ_BYTES)
                self.reader.add(data)
                count = len(data)
        except BlockingIOError:
            return False
        except OSError:
            count = 0
        if not count:
            self._end()
            return False
        self._parse()
        return self._reading and count == room

    def _end(self) -> None:
        self._pause()
        self.ended = True
        self.on_arrival()

    def _parse(self) -> None:
        has_news = self.reader.parse()
        for reply in self.reader.replies:
            self.write(reply)
        self.reader.replies.clear()
        if self.reader.is_blocked:
            self._pause()
        if self.reader.is_broken and not self.ended:
            self._end()
        elif has_news:
            self.on_arrival()

    # --- writing --------------------------------------------------------------------------------

    def send(self, parts: list[bytes]) -> bool:
        """Send a message, now or when the socket has room; false if it was rejected."""
        if self.ended or len(self._out) > MOST_UNSENT:
            return False
        self.write(zmtp.encode(parts))
        return True

    @property
    def unsent(self) -> int:
        """The number of bytes that wait until the socket has room."""
        return len(self._out)

    def write(self, data: bytes) -> None:
        """Send an encoded message, now or when the socket has room, without a bound."""
        if not self._out:
            try:
                data = data[self._socket.send(data) :]
            except BlockingIOError:
                pass
            except OSError:
                # The reader notices the end of the connection and reports it.
                return
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
        """Close the socket. Can be called again."""
        if self._socket.fileno() >= 0:
            self._pause()
            self._loop.remove_writer(self._socket.fileno())
            self._socket.close()
        self.ended = True
        self.reader.clear()


# --- connecting ---------------------------------------------------------------------------------


class Address(Struct, frozen=True, kw_only=True):
    """A kernel's address: a path (``port`` is 0), or a host and a port."""

    host: str
    port: int = 0

    @property
    def kind(self) -> str:
        """Return "ipc" or "tcp"."""
        return "tcp" if self.port else "ipc"


async def connect(
    address: Address, *, kind: str, identity: bytes, largest: int | None
) -> Connection:
    """Connect as a type of socket (``DEALER``, ``SUB``). Raises ConnectFailed.

    Waits without a timeout until the kernel listens; the caller cancels.
    """
    # Only the wait for a listener is repeated. A failed handshake is final.
    sock = await _connected(address)
    try:
        first_bytes = await _handshake(sock, kind, identity)
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
                # This never blocks: EAGAIN means that the listener's queue is full (unix(7)).
                sock.connect(address.host)
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
        # Requests are small and each waits for its reply, so Nagle's algorithm would add 40 ms.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if address.host.startswith("127."):
            with contextlib.suppress(OSError):
                sock.bind((OTHER_LOOPBACK, 0))
    return sock


async def _handshake(sock: socket.socket, kind: str, identity: bytes) -> bytes:
    """Exchange greetings and READY commands; return the bytes that followed the other end's."""
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(sock, zmtp.GREETING + zmtp.ready_command(kind, identity))
    data = bytearray()
    while (end := zmtp.end_of_handshake(data)) is None:
        piece = await loop.sock_recv(sock, zmtp.COMMAND_BYTES)
        if not piece:
            raise ConnectionError("it was closed")
        data += piece
    if kind == "SUB":
        # An empty subscription is one to every topic.
        await loop.sock_sendall(sock, zmtp.frame(b"\x01", 0))
    return bytes(data[end:])
