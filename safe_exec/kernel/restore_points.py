"""The runner's side of the snapshots that an interactive kernel leaves behind before its cells.

Only the latest one is kept: a snapshot ends when its channel is closed. All messages are claims,
but the process that sends one is named by the system.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import struct
from collections.abc import Callable
from typing import Any

from msgspec import Struct

from safe_exec.keeper import takeover
from safe_exec.model.limits import LimitName

MESSAGE_BYTES = 4096
CREDENTIALS = struct.Struct("3i")
# The process id comes first (unix(7), SCM_CREDENTIALS).
SCM_CREDENTIALS = 2
# A snapshot answers on new sockets within 0.1 s; a busy machine may take longer.
WAKE_SECONDS = 20.0
# A snapshot sleeps within 0.1 s of its fork, and a cell may kill its kernel sooner.
ASLEEP_SECONDS = 5.0
LOOK_SECONDS = 0.005
LONGEST_REASON = 200
NEVER_TAKEN = "no snapshot was taken yet"
ENDED = "the snapshot was ended before the kernel, to free memory or a process"
STARTING = "the snapshot was not ready when the kernel died"
OUTDATED = "there is no snapshot from before this cell"


class Snapshot:
    """A sleeping copy of the kernel from before a cell, the agent's number ``cell_number``.

    ``pid`` is known once it sleeps. ``is_given_up`` if we ended it for a limit, ``has_ended`` if
    its channel has ended.
    """

    def __init__(self, channel: socket.socket, cell_number: int) -> None:
        channel.setblocking(False)
        self.channel, self.cell_number = channel, cell_number
        self.pid: int | None = None
        self.has_ended = self.is_given_up = False

    def read(self) -> dict[str, Any] | None:
        """Return a message, ``None`` if there is none. Raises OSError at the end of the channel."""
        room = socket.CMSG_SPACE(CREDENTIALS.size)
        try:
            data, ancillary, _, _ = self.channel.recvmsg(MESSAGE_BYTES, room)
        except BlockingIOError:
            return None
        if not data:
            raise ConnectionResetError
        for level, kind, packed in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, SCM_CREDENTIALS) and self.pid is None:
                message = _fields(data)
                # The kernel that made it writes to the same socket first.
                if "asleep" in message:
                    self.pid = CREDENTIALS.unpack(packed[: CREDENTIALS.size])[0]
        return _fields(data)


class NoSnapshot(Struct, frozen=True, kw_only=True):
    """There is no snapshot from before a cell. ``suspended``: nor will there be any later."""

    reason: str
    cell_number: int
    suspended: bool = False


class RestorePoints:
    """The snapshots of one sandbox.

    ``on_change`` is called with the process id of the latest snapshot, 0 if it has ended;
    ``on_suspended`` once with the reason if the kernel takes no more of them.
    """

    def __init__(self, on_change: Callable[[int], None], on_lost: Callable[[], None]) -> None:
        self._on_change, self._on_lost = on_change, on_lost
        self.on_suspended: Callable[[str], None] = lambda _reason: None
        self._latest: Snapshot | None = None
        self._none = NoSnapshot(reason=NEVER_TAKEN, cell_number=0)
        self.suspended = False
        self.memory_limit: int | None = None

    def take(self, fact: dict[str, Any], fds: list[int]) -> None:
        """Process a fact about a snapshot; the caller closes the descriptors."""
        cell_number = int(fact["before"])
        if fact["restore_point"] and len(fds) == 1:
            self._replace(Snapshot(_socket(fds[0]), cell_number))
            return
        self._replace(None)
        suspended = fact.get("suspended") is True
        reason = str(fact.get("why"))[:LONGEST_REASON]
        self._none = NoSnapshot(reason=reason, cell_number=cell_number, suspended=suspended)
        if suspended and not self.suspended:
            self.suspended = True
            self.on_suspended(reason)

    def _replace(self, snapshot: Snapshot | None) -> None:
        self._drop()
        self._latest = snapshot
        if snapshot is not None:
            loop = asyncio.get_running_loop()
            loop.add_reader(snapshot.channel.fileno(), self.look)

    def _drop(self) -> None:
        latest, self._latest = self._latest, None
        if latest is None:
            return
        with contextlib.suppress(RuntimeError, ValueError, OSError):
            asyncio.get_running_loop().remove_reader(latest.channel.fileno())
        latest.channel.close()
        if latest.pid is not None and not latest.has_ended:
            self._on_change(0)

    def look(self) -> None:
        """Process the messages of the latest snapshot."""
        latest = self._latest
        if latest is None or latest.has_ended:
            return
        try:
            was_known = latest.pid is not None
            while latest.read() is not None:
                pass
            if not was_known and latest.pid is not None:
                self._on_change(latest.pid)
        except OSError:
            latest.has_ended = True
            asyncio.get_running_loop().remove_reader(latest.channel.fileno())
            self._on_change(0)
            self._on_lost()

    def makes_room(self, limit: LimitName) -> bool:
        """End the latest snapshot if a limit was exceeded because of it. From any thread."""
        latest = self._latest
        if latest is None or latest.pid is None or latest.is_given_up:
            return False
        if limit is LimitName.MEMORY:
            own = takeover.own_bytes(latest.pid)
            if own is not None and own <= takeover.most_own_bytes(self.memory_limit or 0):
                return False
        elif limit is not LimitName.PROCESSES:
            return False
        # The event loop notices its end.
        latest.is_given_up = True
        with contextlib.suppress(OSError):
            latest.channel.shutdown(socket.SHUT_RDWR)
        return True

    def latest(self, number: int) -> Snapshot | str:
        """Return the snapshot from before the cell with this number, or why there is none."""
        self.look()
        latest = self._latest
        if latest is None:
            is_of_cell = self._none.cell_number == number or self._none.suspended
            return self._none.reason if is_of_cell or not self._none.cell_number else OUTDATED
        if latest.has_ended or latest.is_given_up:
            return ENDED
        if latest.cell_number != number:
            return OUTDATED
        return STARTING if latest.pid is None else latest

    async def asleep(self, number: int) -> Snapshot | str:
        """Return the same as ``latest``, but wait for a snapshot that does not sleep yet."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + ASLEEP_SECONDS
        # It may have ended, too, so there is no event to wait for.
        while self.latest(number) == STARTING and loop.time() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(LOOK_SECONDS)
        return self.latest(number)

    async def wake(self, snapshot: Snapshot, *, tracer: int | None) -> str:
        """Wake a snapshot and wait until it listens; return why it does not, empty if it does.

        Descendants of ``tracer`` may trace it.
        """
        loop, arrived = asyncio.get_running_loop(), asyncio.Event()
        channel = snapshot.channel
        loop.remove_reader(channel.fileno())
        loop.add_reader(channel.fileno(), arrived.set)
        try:
            channel.send(json.dumps({"wake": True, "tracer": tracer}).encode())
            async with asyncio.timeout(WAKE_SECONDS):
                while (message := snapshot.read()) is None:
                    arrived.clear()
                    await arrived.wait()
        except TimeoutError:
            return f"the snapshot did not answer within {WAKE_SECONDS:g} s"
        except OSError:
            return "the snapshot ended when it was woken"
        finally:
            loop.remove_reader(channel.fileno())
            channel.close()
            if self._latest is snapshot:
                self._latest = None
        if message.get("restored") is True:
            self._none = NoSnapshot(reason=NEVER_TAKEN, cell_number=0)
            return ""
        return str(message.get("failed"))[:LONGEST_REASON]

    def close(self) -> None:
        """End the latest snapshot."""
        self._drop()


def _socket(fd: int) -> socket.socket:
    """Return a socket of our own. Raises OSError if the descriptor is no socket: a forgery."""
    own = os.dup(fd)
    try:
        return socket.socket(fileno=own)
    except OSError:
        os.close(own)
        raise


def _fields(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
