"""Connects to a kernel that has just been started, and waits until it answers.

Each socket is connected once and never again: notebook code could later put a socket of its own in
its place.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from queue import Empty
from typing import Any

from safe_exec.errors import KernelStartError
from safe_exec.kernel.channel import Channel
from safe_exec.kernel.connection import Address, ConnectFailed, Connection, connect
from safe_exec.kernel.manager import Manager
from safe_exec.model.limits import Limits
from safe_exec.sandbox.sandbox import Sandbox

READY_RETRY_SECONDS = 0.25
MESSAGE_SLACK = 3 << 20
# Connected in this order: the subscription must be in place before the first reply.
CHANNELS = {"iopub": "SUB", "shell": "DEALER", "control": "DEALER"}
# Only an interactive kernel can ask a person for input, and `--stdin` answers for one.
STDIN = {"stdin": "DEALER"}
# A kernel that closes its sockets while we connect is probably ending; wait this long for its
# status.
END_SECONDS = 1.0


class Handshake:
    """The connections to one kernel, and its first answer.

    ``forwarder_prefix`` is that of a kernel on TCP behind a network of its own.
    """

    def __init__(
        self,
        manager: Manager,
        sandbox: Sandbox,
        died: asyncio.Event,
        *,
        limits: Limits,
        forwarder_prefix: str | None,
    ) -> None:
        self._manager, self._sandbox, self._died = manager, sandbox, died
        self._limits, self._forwarder_prefix = limits, forwarder_prefix

    async def open_channels(
        self, kc: Any, channels: dict[str, Channel], *, has_stdin: bool, deadline: float | None
    ) -> None:
        """Connect to each socket, and add its channel to ``channels`` and to the client.

        Raises KernelStartError.
        """
        for name, kind in (CHANNELS | STDIN if has_stdin else CHANNELS).items():
            port = getattr(self._manager, f"{name}_port")
            is_local = self._manager.transport == "ipc" or self._forwarder_prefix
            address = (
                Address(host=f"{self._sockets()}-{port}")
                if is_local
                else Address(host=self._manager.ip, port=port)
            )
            identity = kc.session.bsession if kind == "DEALER" else b""
            try:
                connection = await self._alive(
                    connect(address, kind=kind, identity=identity, largest=self._largest()),
                    deadline,
                )
            except ConnectFailed as error:
                # The status of a dying kernel explains more than a closed socket.
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._died.wait(), END_SECONDS)
                dead = self._died.is_set()
                raise KernelStartError(self._why_it_ended() if dead else str(error)) from error
            channels[name] = Channel(kc.session, connection)
            setattr(kc, f"_{name}_channel", channels[name])

    async def first_answer(self, kc: Any, deadline: float | None) -> dict[str, Any]:
        """Wait until the kernel answers on shell, iopub and control; return its kernel_info.

        Raises KernelStartError if it ends, or does not answer before ``deadline``.
        """
        while deadline is None or time.monotonic() < deadline:
            info = await self._request_kernel_info(kc)
            if info is not None:
                await self._control_stands(kc)
                return info
            if self._died.is_set():
                raise KernelStartError(self._why_it_ended())
        raise KernelStartError(self._silent())

    def _sockets(self) -> str:
        """Return the prefix of the kernel's socket paths as seen by the runner."""
        # Inside bubblewrap the directory is in the sandbox's own mount namespace. The init hands
        # out a descriptor of it, and /proc/self/fd also keeps the path below 108 bytes (unix(7)).
        inside = self._sandbox.sockets
        prefix = self._forwarder_prefix or self._manager.ip
        return prefix if inside is None else f"/proc/self/fd/{inside}/{Path(prefix).name}"

    async def _alive(
        self, connecting: Coroutine[Any, Any, Connection], deadline: float | None
    ) -> Connection:
        """Wait for a connection.

        Raises KernelStartError if the kernel ends or the time is up first.
        """
        attempt, death = asyncio.create_task(connecting), asyncio.create_task(self._died.wait())
        remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
        try:
            await asyncio.wait(
                {attempt, death}, timeout=remaining, return_when=asyncio.FIRST_COMPLETED
            )
            if attempt.done():
                return attempt.result()
            raise KernelStartError(self._why_it_ended() if self._died.is_set() else self._silent())
        finally:
            death.cancel()
            attempt.cancel()

    def _largest(self) -> int | None:
        """Return the largest accepted message; a larger one could not be stored."""
        most = self._limits.cell_output
        return None if most is None else most + MESSAGE_SLACK

    async def _request_kernel_info(self, kc: Any) -> dict[str, Any] | None:
        """Send one kernel_info request.

        Return its reply if iopub sent "idle" too, else ``None``.
        """
        msg_id = kc.kernel_info()
        reply = await self._until(
            kc.shell_channel, lambda m: m["parent_header"].get("msg_id") == msg_id
        )
        if reply is None:
            return None
        idle = await self._until(
            kc.iopub_channel,
            lambda m: m["msg_type"] == "status" and m["content"].get("execution_state") == "idle",
        )
        content: dict[str, Any] = reply["content"]
        return content if idle is not None else None

    async def _control_stands(self, kc: Any) -> None:
        """Wait until the control channel answers too."""
        # Only ipykernel is known to answer there.
        if self._manager.transport == "ipc":
            kc.control_channel.send(self._manager.session.msg("kernel_info_request", {}))
            await self._until(kc.control_channel, lambda m: m["msg_type"] == "kernel_info_reply")

    async def _until(
        self, channel: Any, accepts: Callable[[dict[str, Any]], bool]
    ) -> dict[str, Any] | None:
        """Return the first accepted message; ``None`` after READY_RETRY_SECONDS or a death."""
        deadline = time.monotonic() + READY_RETRY_SECONDS
        while (remaining := deadline - time.monotonic()) > 0 and not self._died.is_set():
            with contextlib.suppress(Empty):
                message: dict[str, Any] = await channel.get_msg(timeout=max(remaining, 0.001))
                if accepts(message):
                    return message
        return None

    def _silent(self) -> str:
        return (
            f"the kernel did not answer within {self._limits.start_timeout or 0:g} s "
            "(--start-timeout)"
        )

    def _why_it_ended(self) -> str:
        ended = self._sandbox.exit
        status = str(ended.status) if ended and ended.status else "its supervisor was killed"
        return f"the kernel ended before it was ready: {status}"
