"""A ZMTP 3.0 server (the protocol of ZeroMQ) with bounded memory per client.

Imports kernel.connection and kernel.zmtp.
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

# Why not libzmq: it bounds neither the frames of a message nor the bytes of a queue, and any local
# user can connect to a TCP port. Here a client that has not signed a message yet can send little, a
# client that takes nothing gets no more messages, and an unfinished handshake times out.

# The largest message from a client that has not signed one yet.
STRANGER_BYTES = 256 << 10

# The largest message from a client that has: a cell, or data of a widget.
REQUEST_BYTES = 16 << 20

# Bytes that may wait for one client; further messages to it are dropped.
MOST_QUEUED = 4 << 20

# Clients of one socket. JupyterLab opens two or three, independent of the number of tabs.
MOST_PEERS = 100
HANDSHAKE_SECONDS = 5.0
BACKLOG = 128

# Socket types that each of ours accepts (ZMTP 3.0, section "Socket-Type").
ACCEPTED = {
    "ROUTER": (b"DEALER", b"REQ", b"ROUTER"),
    "XPUB": (b"SUB", b"XSUB"),
    "REP": (b"REQ", b"DEALER"),
}


class Peer:
    """One client at one socket. ``name`` is its identity, ``topics`` are its subscriptions."""

    def __init__(self, connection: Connection, name: bytes) -> None:
        self.connection = connection
        self.name = name
        self.topics: set[bytes] = set()

    def trust(self) -> None:
        """Accept large messages from now on: the client has proved that it knows the key."""
        self.connection.reader.largest = REQUEST_BYTES

    def send(self, data: bytes) -> bool:
        """Put an encoded message into the client's queue; false if that is full."""
        if self.connection.ended or self.connection.unsent > MOST_QUEUED:
            return False
        self.connection.write(data)
        return True


class Listener:
    """One listening socket.

    ``on_arrival`` is called with each client that sent something or has ended.
    """

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
        """The number of the TCP port."""
        return int(self._socket.getsockname()[1])

    def _accept(self) -> None:
        try:
            sock, _ = self._socket.accept()
        except OSError:
            # The client has gone again (ECONNABORTED), or no descriptor is left (EMFILE). The
            # socket stays readable in the second case, and the loop calls again.
            return
        sock.setblocking(False)
        if len(self.peers) + len(self._greeting) >= MOST_PEERS:
            sock.close()
            return
        if sock.family != socket.AF_UNIX:
            # Nagle's algorithm and delayed acknowledgements can hold a small message for 40 ms.
            # libzmq turns it off too.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        task = self._loop.create_task(self._greet(sock))
        self._greeting.add(task)
        task.add_done_callback(self._greeting.discard)

    async def _greet(self, sock: socket.socket) -> None:
        try:
            async with asyncio.timeout(HANDSHAKE_SECONDS):
                remainder, identity = await self._handshake(sock)
        except (OSError, TimeoutError):
            sock.close()
            return
        except BaseException:
            sock.close()
            raise
        # A client must not choose an identity that begins with a zero byte (ZMTP 3.0), so our own
        # names begin with one.
        self._count += 1
        peer = Peer(Connection(sock, largest=STRANGER_BYTES), identity or b"\0%d" % self._count)
        former = self.peers.pop(peer.name, None)
        # A client can reconnect before we see the end of its old connection.
        if former is not None:
            former.connection.close()
        self.peers[peer.name] = peer
        peer.connection.on_arrival = lambda: self._arrived(peer)
        peer.connection.start(remainder)

    async def _handshake(self, sock: socket.socket) -> tuple[bytes, bytes]:
        """Return the bytes that followed the handshake, and the client's identity.

        Raises OSError.
        """
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
        """Send a message to all subscribers of its topic, except those with a full queue."""
        data = encode(frames)
        for peer in self.peers.values():
            if any(frames[0].startswith(topic) for topic in peer.topics):
                peer.send(data)

    @property
    def queued(self) -> int:
        """The number of bytes in the longest queue of a client."""
        return max((peer.connection.unsent for peer in self.peers.values()), default=0)

    def drop_slowest(self) -> None:
        """Disconnect the client with the longest queue; it may reconnect."""
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
    """Listen at an address of a connection file; port 0 lets the system choose. Raises OSError."""
    # jupyter_client builds the path of an ipc socket as IP-PORT.
    if transport == "ipc":
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        address: object = f"{ip}-{port}"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{ip}-{port}")
    else:
        host = "0.0.0.0" if ip == "*" else ip  # noqa: S104 - what the client asks for
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        # libzmq sets this too. A restarted kernel can then bind the ports of the previous one while
        # its connections are still in TIME_WAIT.
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
