"""Messages between a worker and the process of a notebook.

A message on the socket is a length and a pickle.
"""

from __future__ import annotations

import pickle
import socket
import struct
from typing import Any

LENGTH = struct.Struct("!Q")


def send(connection: socket.socket, message: object) -> None:
    """Send a message, pickled. Raises OSError."""
    data = pickle.dumps(message)
    connection.sendall(LENGTH.pack(len(data)) + data)


def receive(connection: socket.socket) -> Any:
    """Wait for a message. Raises EOFError at the end of the socket, and OSError."""
    (length,) = LENGTH.unpack(_read(connection, LENGTH.size))
    # Both ends are ours: see the fork server.
    return pickle.loads(_read(connection, length))  # noqa: S301


def _read(connection: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = connection.recv(min(size - len(data), 1 << 20))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)
