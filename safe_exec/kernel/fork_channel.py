"""The runner's end of the channel to the processes that the agent forks from a kernel.

All its messages are claims, since code of the notebook runs in those processes. They decide only
which trial the culprit search runs next.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import time
from collections.abc import Sequence
from typing import Any

from msgspec import Struct

MESSAGE_BYTES = 1 << 16
MOST_DESCRIPTORS = 1
# The agent reads a message of at most this many bytes; the system's default buffer is a bit larger.
LONGEST_MESSAGE = 150_000
FULL_SECONDS = 0.005


class ForkMessage(Struct, frozen=True, kw_only=True):
    """A message of a fork, and the channel to a snapshot that came with it."""

    fields: dict[str, Any]
    channel: ForkChannel | None
    # The other end was closed.
    ended: bool = False


class ForkChannel:
    """One end of a socket whose other end a sleeping fork holds; ``close`` ends that process."""

    def __init__(self, ours: socket.socket) -> None:
        self._socket = ours
        ours.setblocking(False)

    def fileno(self) -> int:
        """Return the descriptor, -1 once it is closed."""
        return self._socket.fileno()

    async def send(self, time_limit: float, /, **fields: Any) -> bool:
        """Send a message; false if it is too large, or if nobody takes it in time."""
        data = json.dumps(fields).encode()
        if len(data) > LONGEST_MESSAGE:
            return False
        deadline = time.monotonic() + time_limit
        while time.monotonic() < deadline:
            try:
                self._socket.send(data)
            except BlockingIOError:
                # The other end has not read the earlier messages yet.
                await asyncio.sleep(FULL_SECONDS)
            except OSError:
                return False
            else:
                return True
        return False

    async def send_with(self, descriptors: Sequence[int], /, **fields: Any) -> bool:
        """Send a message with descriptors; false if nobody takes it."""
        try:
            socket.send_fds(self._socket, [json.dumps(fields).encode()], descriptors)
        except OSError:
            return False
        return True

    def receive_now(self) -> ForkMessage | None:
        """Return the next message that has arrived, ``None`` if there is none or it is invalid."""
        try:
            data, fds, _, _ = socket.recv_fds(self._socket, MESSAGE_BYTES, MOST_DESCRIPTORS)
        except OSError:
            return None
        if not data and not fds:
            return ForkMessage(fields={}, channel=None, ended=True)
        return _message(data, fds)

    async def receive(self, seconds: float) -> ForkMessage | None:
        """Return the next message; ``None`` at the end of the socket and for an invalid message.

        Raises TimeoutError if there is none in time.
        """
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        loop.add_reader(self._socket.fileno(), readable.set)
        try:
            async with asyncio.timeout(max(0.0, seconds)):
                await readable.wait()
        finally:
            loop.remove_reader(self._socket.fileno())
        try:
            data, fds, _, _ = socket.recv_fds(self._socket, MESSAGE_BYTES, MOST_DESCRIPTORS)
        except OSError:
            return None
        return _message(data, fds)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


def _message(data: bytes, fds: list[int]) -> ForkMessage | None:
    """Return a message and the channel that came with it; ``None`` if it is invalid."""
    channel = _channel_of(fds)
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        if channel is not None:
            channel.close()
        return None
    return ForkMessage(fields=fields, channel=channel)


def _channel_of(fds: list[int]) -> ForkChannel | None:
    for fd in fds:
        try:
            return ForkChannel(socket.socket(fileno=fd))
        except OSError:
            # No socket: the notebook sent it.
            with contextlib.suppress(OSError):
                os.close(fd)
    return None


class RootHandover:
    """A channel to the root of the forks, whose other end is handed over to the agent."""

    def __init__(self) -> None:
        ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.channel = ForkChannel(ours)

    def send(self, facts: socket.socket) -> None:
        """Hand the other end over to the agent."""
        socket.send_fds(facts, [b"forks"], [self._theirs.fileno()])
        self._theirs.close()

    def close(self) -> None:
        """Close both ends."""
        self._theirs.close()
        self.channel.close()
