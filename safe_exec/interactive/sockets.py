"""Listening sockets in the protocol of ZeroMQ (ZMTP 3.0), for any number of clients, bounded in all they take in and hold.

Why not libzmq: a message may have any number of frames there, and a queue any number of bytes, from
whoever connects. Here a client that has not signed a message yet may send little, one that takes
nothing is left out, and half a handshake ends after a while. Imports kernel.connection and kernel.zmtp.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable

from safe_exec.kernel.connection import ConnectFailed, Connection
from safe_exec.kernel.zmtp import (
    COMMAND_BYTES,
    GREETING,
    GREETING_BYTES,
    encode,
    end_of_handshake,
    ready_command,
    ready_properties,
)

# The largest message from a client that has not signed one yet.
STRANGER_BYTES = 256 << 10

# The largest message from a client that has: a cell, or data of a widget.
REQUEST_BYTES = 16 << 20

# Bytes that may wait for one client; more is not put into its queue.
MOST_QUEUED = 4 << 20

# Clients of one socket. JupyterLab has two or three, whatever the number of tabs.
MOST_PEERS = 100
HANDSHAKE_SECONDS = 5.0
BACKLOG = 128

# Which types of socket may talk to which (ZMTP 3.0, section "Socket-Type").
ACCEPTED = {
    "ROUTER": (b"DEALER", b"REQ", b"ROUTER"),
    "XPUB": (b"SUB", b"XSUB"),
    "REP": (b"REQ", b"DEALER"),
}


class Peer:
    """One client at one socket. ``name`` is its identity, or one that we gave it; ``topics`` are its subscriptions."""

    def __init__(self, connection: Connection, name: bytes) -> None:
        self.connection = connection
        self.name = name
        self.topics: set[bytes] = set()

    def trust(self) -> None:
        """Let it send large messages: it knows the key."""
        self.connection.reader.largest = REQUEST_BYTES

    def send(self, data: bytes) -> bool:
        """Put an encoded message into its queue; ``False`` where that is full."""
        if self.connection.ended or self.connection.unsent > MOST_QUEUED:
            return False
        self.connection.write(data)
        return True


class Listener:
    """One listening socket. ``on_arrival`` is called with a client that has sent something, or has ended."""

    def __init__(self, sock: socket.socket, kind: str, on_arrival: Callable[[Peer], None]) -> None:
        self._socket = sock
        self._kind = kind
        self._on_arrival = on_arrival
        self._loop = asyncio.get_running_loop()
        self._greeting: set[asyncio.Task[None]] = set()
        self._count = 0
        self.peers: dict[bytes, Peer] = {}
        self._loop.add_reader(sock.fileno(), self._accept)

    @property
    def port(self) -> int:
        """The number of a TCP port."""
        return int(self._socket.getsockname()[1])

    def _accept(self) -> None:
        try:
            sock, _ = self._socket.accept()
        except OSError:  # gone again, or no descriptor is left
            return
        sock.setblocking(False)
        if len(self.peers) + len(self._greeting) >= MOST_PEERS:
            sock.close()
            return
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        task = self._loop.create_task(self._greet(sock))
        self._greeting.add(task)
        task.add_done_callback(self._greeting.discard)

    async def _greet(self, sock: socket.socket) -> None:
        try:
            async with asyncio.timeout(HANDSHAKE_SECONDS):
                remainder, identity = await self._shake_hands(sock)
        except (OSError, TimeoutError):
            sock.close()
            return
        except BaseException:
            sock.close()
            raise
        self._count += 1
        peer = Peer(Connection(sock, largest=STRANGER_BYTES), identity or b"\0%d" % self._count)
        former = self.peers.pop(peer.name, None)
        if former is not None:  # it has come again before we saw it go
            former.connection.close()
        self.peers[peer.name] = peer
        peer.connection.on_arrival = lambda: self._arrived(peer)
        peer.connection.start(remainder)

    async def _shake_hands(self, sock: socket.socket) -> tuple[bytes, bytes]:
        """The bytes that followed the handshake, and the client's identity. Raises OSError."""
        await self._loop.sock_sendall(sock, GREETING + ready_command(self._kind))
        data = bytearray()
        while (end := end_of_handshake(data)) is None:
            piece = await self._loop.sock_recv(sock, COMMAND_BYTES)
            if not piece or len(data) > GREETING_BYTES + 2 * COMMAND_BYTES:
                raise ConnectFailed("it was closed")
            data += piece
        properties = ready_properties(bytes(data[GREETING_BYTES:end]))
        if properties.get(b"socket-type") not in ACCEPTED[self._kind]:
            raise ConnectFailed("another type of socket")
        return bytes(data[end:]), properties.get(b"identity", b"")[:255]

    def _arrived(self, peer: Peer) -> None:
        if peer.connection.ended and self.peers.get(peer.name) is peer:
            del self.peers[peer.name]
        self._on_arrival(peer)
        if peer.connection.exhausted:
            peer.connection.close()

    def publish(self, frames: list[bytes]) -> None:
        """Send a message to all that subscribe to its first frame; one whose queue is full misses it."""
        data = encode(frames)
        for peer in self.peers.values():
            if any(frames[0].startswith(topic) for topic in peer.topics):
                peer.send(data)

    @property
    def queued(self) -> int:
        """The most bytes that wait for one client."""
        return max((peer.connection.unsent for peer in self.peers.values()), default=0)

    def drop_slowest(self) -> None:
        """Cut off the client whose queue is longest; it may come again."""
        peer = max(self.peers.values(), key=lambda peer: peer.connection.unsent)
        del self.peers[peer.name]
        peer.connection.close()

    def close(self) -> None:
        """Close the socket and all its clients."""
        self._loop.remove_reader(self._socket.fileno())
        if self._socket.family == socket.AF_UNIX:
            with contextlib.suppress(OSError):
                os.unlink(self._socket.getsockname())
        self._socket.close()
        for task in self._greeting:
            task.cancel()
        for peer in self.peers.values():
            peer.connection.close()
        self.peers.clear()


def listen(transport: str, ip: str, port: int) -> socket.socket:
    """A listening socket at an address of a connection file. Raises OSError.

    A port of 0 lets the system choose. A path of a socket is ``IP-PORT``, as jupyter_client has it.
    """
    if transport == "ipc":
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        address: object = f"{ip}-{port}"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{ip}-{port}")
    else:
        host = "0.0.0.0" if ip == "*" else ip  # noqa: S104 - what the client asks for
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        # As libzmq does: a restarted kernel gets the ports of the one before.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        address = (host, port)
    try:
        sock.bind(address)  # type: ignore[arg-type]
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    sock.setblocking(False)
    return sock
