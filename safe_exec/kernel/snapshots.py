"""The runner's end of the sleeping copies that a kernel leaves before its cells.

``agent/snapshots.py`` makes them. If a cell fails, ``SleepingKernel`` is what its trial leaves: the
sandbox with the copy of the kernel from before the cell. ``wake`` makes that copy the kernel.
All messages of the copies are claims; that a process is a copy in our sandbox, and how it ended, is
the keeper's observation.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from safe_exec.errors import SandboxError
from safe_exec.files import one_line
from safe_exec.kernel.agent_facts import AgentFacts
from safe_exec.kernel.fork_channel import ForkChannel, ForkMessage
from safe_exec.kernel.launch import AgentChannels, LaunchedKernel, has_pystack
from safe_exec.model.verdict import CellRecord, CellStatus
from safe_exec.sandbox.plan import SpawnPlan
from safe_exec.sandbox.sandbox import Sandbox

MESSAGE_BYTES = 1 << 16
# A copy that does not answer within this time is not used.
WAKE_SECONDS = 10.0
LONGEST_REASON = 200
# The notebook can write to the channel too.
MOST_MESSAGES = 100


class Snapshot(Struct, frozen=True, kw_only=True):
    """A sleeping copy of a kernel: its process, and the request that it did not answer yet."""

    pid: int
    request_id: str
    channel: ForkChannel


class KernelSnapshots:
    """Receives the copies of one kernel and keeps the newest.

    ``watched`` are folders whose files a failed cell must not have changed, except for paths that
    begin with one of ``unwatched``. ``trouble`` says why there is no newer copy.
    """

    def __init__(self, watched: Sequence[str], unwatched: Sequence[str]) -> None:
        self._settings = {"watch": list(watched), "except": list(unwatched)}
        self._channel: ForkChannel | None = None
        self._spare: Callable[[int | None], None] = lambda _pid: None
        self.newest: Snapshot | None = None
        self.trouble = ""

    def again(self) -> KernelSnapshots:
        """Return the same settings for the next kernel."""
        return KernelSnapshots(self._settings["watch"], self._settings["except"])

    def begin(self, facts: socket.socket, spare: Callable[[int | None], None]) -> None:
        """Send the agent its end of a new channel for copies, through the socket ``facts``.

        ``spare`` is called with the pid of each copy that arrives.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            ours.send(json.dumps(self._settings).encode())
            socket.send_fds(facts, [b"snapshots"], [theirs.fileno()])
        self._channel, self._spare = ForkChannel(ours), spare
        asyncio.get_running_loop().add_reader(ours.fileno(), self.take)

    def take(self) -> None:
        """Receive the copies that have been made."""
        for _ in range(MOST_MESSAGES):
            message = None if self._channel is None else self._channel.receive_now()
            if message is None:
                return
            if not self._note(message) and message.channel is not None:
                message.channel.close()

    def _note(self, message: ForkMessage) -> bool:
        """Store a copy in place of the one before; tell whether its channel is kept."""
        if message.ended:
            self._stop_reading()
            return False
        fields = message.fields
        if "unbranchable" in fields:
            self.trouble = str(fields["unbranchable"])[:LONGEST_REASON]
            return False
        pid, request_id = fields.get("pid"), fields.get("snapshot")
        if message.channel is None or not isinstance(pid, int) or not isinstance(request_id, str):
            return False
        self._drop()
        self.newest = Snapshot(pid=pid, request_id=request_id, channel=message.channel)
        self._spare(pid)
        return True

    def _drop(self) -> None:
        if self.newest is not None:
            self.newest.channel.close()
            self.newest = None

    def _stop_reading(self) -> None:
        if self._channel is not None:
            with contextlib.suppress(ValueError, OSError):
                asyncio.get_running_loop().remove_reader(self._channel.fileno())
            self._channel.close()
            self._channel = None

    def hand_over(self) -> Snapshot | None:
        """Return the newest copy, which the caller closes, and receive no more."""
        self.take()
        self._stop_reading()
        newest, self.newest = self.newest, None
        return newest

    def close(self) -> None:
        """End all copies."""
        self._stop_reading()
        self._drop()


class SleepingKernel:
    """A sandbox whose kernel has ended, and the copy from before the cell that failed.

    ``cell`` is the index of that cell; ``records`` are the figures of the cells before it that the
    copy has run, and ``facts`` what the agent told of them.
    """

    def __init__(
        self,
        sandbox: Sandbox,
        snapshot: Snapshot,
        *,
        cell: int,
        records: Mapping[int, CellRecord],
        facts: AgentFacts,
        launched: LaunchedKernel,
    ) -> None:
        self.cell = cell
        self.records = {
            index: record
            for index, record in records.items()
            if index < cell and record.status in (CellStatus.PASSED, CellStatus.FAILED)
        }
        self.facts = facts
        self._sandbox, self._snapshot, self._launched = sandbox, snapshot, launched
        self._is_awake = False
        # Why the copy was not woken.
        self.trouble = ""

    async def wake(self) -> bool:
        """Make the copy the kernel; false if that is impossible, with the reason in ``trouble``."""
        descriptors = await asyncio.to_thread(self._sandbox.continue_with, self._snapshot.pid)
        if descriptors is None:
            self.trouble = "the copy of the kernel does not live any more"
            return False
        try:
            channels = AgentChannels()
        except SandboxError as error:
            self.trouble = str(error)
            return False
        number = self._snapshot.pid
        address = f"{self._sandbox.directory}/k{number}"
        message = {
            "address": address,
            "keeper": self._sandbox.keeper_pid,
            "tracer": os.getpid() if has_pystack() else None,
        }
        theirs = channels.pass_fds
        is_sent = await self._snapshot.channel.send_with(
            (theirs["page"], theirs["facts"], *descriptors), **message
        )
        channels.handed_over()
        for descriptor in descriptors:
            os.close(descriptor)
        reply = await self._reply() if is_sent else {}
        self._snapshot.channel.close()
        if not reply.get("woken"):
            channels.close()
            self.trouble = _trouble_of(reply)
            return False
        self._is_awake = True
        connection = {**self._launched.connection, "ip": address}
        self._launched = replace(self._launched, connection=connection, channels=channels)
        return True

    async def _reply(self) -> Mapping[str, Any]:
        try:
            message = await self._snapshot.channel.receive(WAKE_SECONDS)
        except TimeoutError:
            return {}
        return {} if message is None else message.fields

    def sandbox_for(self, _plan: SpawnPlan) -> Sandbox:
        """Return the sandbox, as for a kernel that was started in advance."""
        return self._sandbox

    def outcome(self) -> LaunchedKernel:
        """Return the kernel that was woken."""
        return self._launched

    def close(self) -> None:
        """End the copy, unless it was woken, and remove the sandbox. Can be called again."""
        self._snapshot.channel.close()
        if not self._is_awake:
            self._sandbox.shutdown()


def _trouble_of(reply: Mapping[str, Any]) -> str:
    """Return why a copy was not woken, by its answer."""
    if reply.get("changed"):
        return f"the cell has changed files ({one_line(str(reply['changed'])[:LONGEST_REASON])})"
    return one_line(
        str(reply.get("failed", "the copy of the kernel does not answer"))[:LONGEST_REASON]
    )
