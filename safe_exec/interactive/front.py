"""The five public sockets of a connection file and their clients.

Only messages with a valid signature are passed on. The heartbeat is answered here, so a busy or
dead kernel does not delay it. Imports wire and sockets.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct

from safe_exec.errors import UsageError
from safe_exec.interactive.sockets import Listener, Peer, listen
from safe_exec.interactive.wire import Author, Message, NotAMessage, Signer, parse
from safe_exec.kernel.zmtp import encode

KINDS = {"shell": "ROUTER", "iopub": "XPUB", "stdin": "ROUTER", "control": "ROUTER", "hb": "REP"}
MOST_CONNECTION_BYTES = 64 << 10
FLUSH_SECONDS = 0.001


class ConnectionFile(Struct, frozen=True, kw_only=True):
    """The addresses that clients connect to, and the key that they sign with."""

    path: Path
    transport: str
    ip: str
    key: bytes
    scheme: str
    ports: Mapping[str, int]
    document: Mapping[str, Any]


def read_connection_file(path: Path) -> ConnectionFile:
    """Read a client's connection file. Raises UsageError, one line."""
    try:
        document = json.loads(path.read_bytes()[:MOST_CONNECTION_BYTES])
        # Our ZMTP server speaks the NULL mechanism only. A client that expects CurveZMQ would wait
        # for a handshake that never comes.
        if document.get("curve_publickey"):
            raise UsageError(
                f"{path}: encrypted transport (CurveZMQ) is not supported by `safe-exec kernel`;"
                " set transport_encryption to 'disabled', or install the kernel with --provisioner"
            )
        return ConnectionFile(
            path=path,
            transport=str(document.get("transport", "tcp")),
            ip=str(document.get("ip", "127.0.0.1")),
            key=str(document.get("key", "")).encode(),
            scheme=str(document.get("signature_scheme") or "hmac-sha256"),
            ports={name: int(document.get(f"{name}_port", 0)) for name in KINDS},
            document=document,
        )
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, AttributeError, TypeError) as error:
        raise UsageError(f"{path}: not a connection file: {error}") from None


class Front:
    """The public sockets. ``on_message`` gets each valid message with its channel and client.

    While ``paused`` returns true for shell, control or stdin, messages stay in the client's socket;
    ``resume`` reads them.
    """

    def __init__(
        self,
        file: ConnectionFile,
        *,
        on_message: Callable[[str, Peer, Message], None],
        paused: Callable[[str], bool],
    ) -> None:
        """Listen on all addresses of ``file``. Raises UsageError if one is taken or invalid."""
        try:
            self.signer = Signer(file.key, file.scheme)
        except ValueError as error:
            raise UsageError(f"{file.path}: {error}") from None
        self.author = Author(self.signer)
        self.rejected = 0
        self.first_rejection = ""
        self._on_message, self._paused = on_message, paused
        self._listeners: dict[str, Listener] = {}
        # A client may have written this file with its umask. Anyone who can read the key can run
        # code in the kernel.
        with contextlib.suppress(OSError):
            os.chmod(file.path, 0o600)
        arrivals = {"iopub": self._subscribe, "hb": self._beat}
        try:
            for name, kind in KINDS.items():
                sock = listen(file.transport, file.ip, file.ports[name])
                take = arrivals.get(name) or self._taker(name)
                self._listeners[name] = Listener(sock, kind, take)
        except OSError as error:
            self.close()
            address = f"{file.transport}://{file.ip}, {name} port {file.ports[name]}"
            reason = " (another kernel has it)" if error.errno == errno.EADDRINUSE else ""
            raise UsageError(f"{address}: cannot listen: {error.strerror}{reason}") from None
        self._write_ports(file)

    def _write_ports(self, file: ConnectionFile) -> None:
        # A port of 0 lets the system choose. Like ipykernel, write the chosen port back into the
        # file, where the client reads it.
        if all(file.ports.values()) or file.transport != "tcp":
            return
        document = {**file.document, "ip": file.ip, "transport": file.transport}
        document |= {f"{name}_port": listener.port for name, listener in self._listeners.items()}
        file.path.write_text(json.dumps(document, indent=1))

    # --- from clients -----------------------------------------------------------------------------

    def _taker(self, name: str) -> Callable[[Peer], None]:
        return lambda peer: self._take(name, peer)

    def _take(self, name: str, peer: Peer) -> None:
        while not self._paused(name) and (received := peer.connection.take()) is not None:
            # Like ipykernel, send no answer to an invalid message. The count and the first reason
            # are kept for the log.
            try:
                message = parse([] if received.dropped else received.parts)
                self.signer.verify(message)
            except NotAMessage as error:
                self.rejected += 1
                self.first_rejection = self.first_rejection or str(error)
                continue
            # A valid signature proves that the client knows the key, so it may send large messages
            # from now on.
            peer.trust()
            self._on_message(name, peer, message)

    def resume(self) -> None:
        """Read the messages that arrived during a pause."""
        # Control first: an interrupt or a shutdown must not queue behind cells.
        for name in ("control", "stdin", "shell"):
            for peer in tuple(self._listeners[name].peers.values()):
                self._take(name, peer)

    def _subscribe(self, peer: Peer) -> None:
        while (received := peer.connection.take()) is not None:
            for frame in received.parts[:1]:
                # ZMTP 3.0: a frame that begins with 1 subscribes, one that begins with 0 cancels.
                # Topics and their number are bounded, since subscriptions are not signed.
                topic = frame[1:256]
                if frame[:1] == b"\1" and len(peer.topics) < 100:  # noqa: PLR2004
                    peer.topics.add(topic)
                    # A subscription takes effect asynchronously, so early output could be lost.
                    # JEP 65: a welcome tells the client that it will now miss nothing.
                    content = {"subscription": topic.decode("utf-8", "replace")}
                    welcome = self.author.frames("iopub_welcome", content)
                    peer.send(encode([topic, *welcome] if topic else welcome))
                elif frame[:1] == b"\0":
                    peer.topics.discard(topic)

    def _beat(self, peer: Peer) -> None:
        while (received := peer.connection.take()) is not None:
            if not received.dropped:
                peer.send(encode(received.parts))

    # --- to clients -------------------------------------------------------------------------------

    def reply(self, name: str, client: bytes, frames: list[bytes]) -> None:
        """Send a message to one client, if it is still connected."""
        peer = self._listeners[name].peers.get(client)
        if peer is not None:
            peer.send(encode(frames))

    def publish(self, frames: list[bytes]) -> None:
        """Send a message to all subscribers."""
        self._listeners["iopub"].publish(frames)

    def announce(self, kind: str, content: Mapping[str, Any], parent: bytes = b"{}") -> None:
        """Publish a message that the proxy itself wrote."""
        self.publish(
            [f"kernel.safe-exec.{kind}".encode(), *self.author.frames(kind, content, parent)]
        )

    @property
    def queued(self) -> int:
        """Return the bytes that wait for the slowest subscriber."""
        return self._listeners["iopub"].queued

    def drop_slowest(self) -> None:
        """Disconnect the subscriber with the longest queue."""
        self._listeners["iopub"].drop_slowest()

    async def flush(self, seconds: float) -> None:
        """Wait until all queued messages are in the system's buffers, or ``seconds`` are over."""
        deadline = asyncio.get_running_loop().time() + seconds
        while any(listener.queued for listener in self._listeners.values()):
            if asyncio.get_running_loop().time() > deadline:
                return
            await asyncio.sleep(FLUSH_SECONDS)

    def close(self) -> None:
        """Close all sockets and disconnect all clients."""
        for listener in self._listeners.values():
            listener.close()
