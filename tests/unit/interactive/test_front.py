"""The public sockets, with libzmq and with raw sockets on the other side."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import zmq
import zmq.asyncio
from jupyter_client.session import Session

from safe_exec.errors import UsageError
from safe_exec.interactive import sockets
from safe_exec.interactive.front import Front, read_connection_file
from safe_exec.kernel.zmtp import GREETING

ZMQ: Any = zmq  # its constants are made at run time
KEY = "a key"
SECONDS = 20


class Bench:
    """A front, what it handed on, and sockets of clients."""

    def __init__(self, folder: Path, transport: str) -> None:
        path = folder / "c.json"
        document: dict[str, Any] = {"key": KEY, "ip": "127.0.0.1", "transport": transport}
        if transport == "ipc":
            document |= {"ip": str(folder / "s")}
            names = ("shell", "iopub", "stdin", "control", "hb")
            document |= {f"{name}_port": n for n, name in enumerate(names, 1)}
        path.write_text(json.dumps(document))
        path.chmod(0o644)
        self.messages: asyncio.Queue[tuple[str, bytes, list[bytes]]] = asyncio.Queue()
        self.paused = False
        self.front = Front(
            read_connection_file(path),
            on_message=lambda name, peer, m: self.messages.put_nowait((name, peer.name, m.frames)),
            paused=lambda _name: self.paused,
        )
        self.path, self.info = path, json.loads(path.read_text())
        self.context = zmq.asyncio.Context()
        self.session = Session(key=KEY.encode())

    def address(self, name: str) -> str:
        port = self.info[f"{name}_port"]
        if self.info["transport"] == "ipc":
            return f"ipc://{self.info['ip']}-{port}"
        return f"tcp://127.0.0.1:{port}"

    def connect(self, name: str, kind: int, identity: bytes = b"") -> Any:
        sock = self.context.socket(kind)
        sock.linger = 0
        if identity:
            sock.identity = identity
        if kind == ZMQ.SUB:
            sock.subscribe(b"")
        sock.connect(self.address(name))
        return sock

    def raw(self, name: str) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.info[f"{name}_port"]), timeout=SECONDS)

    def request(self, **content: Any) -> list[bytes]:
        frames: list[bytes] = self.session.serialize(self.session.msg("execute_request", content))
        return frames

    async def received(self) -> tuple[str, bytes, list[bytes]]:
        async with asyncio.timeout(SECONDS):
            return await self.messages.get()


@asynccontextmanager
async def bench(folder: Path, transport: str = "tcp") -> AsyncIterator[Bench]:
    made = Bench(folder, transport)
    try:
        yield made
    finally:
        made.front.close()
        made.context.destroy(linger=0)


@pytest.mark.parametrize("transport", ["tcp", "ipc"])
def test_requests_replies_heartbeat_and_welcome(tmp_path: Path, transport: str) -> None:
    async def main() -> None:
        async with bench(tmp_path, transport) as b, asyncio.timeout(SECONDS):
            assert stat.S_IMODE(os.stat(b.path).st_mode) == 0o600
            shell = b.connect("shell", ZMQ.DEALER, b"me")
            await shell.send_multipart(b.request(code="1"))
            name, peer, frames = await b.received()
            assert (name, peer) == ("shell", b"me")
            b.front.reply("shell", b"me", frames)
            assert await shell.recv_multipart() == frames
            heart = b.connect("hb", ZMQ.REQ)
            for beat in (b"ping", b"pong"):
                await heart.send(beat)
                assert await heart.recv() == beat
            iopub = b.connect("iopub", ZMQ.SUB)
            _, parts = b.session.feed_identities(await iopub.recv_multipart())
            welcome = b.session.deserialize(parts)
            assert welcome["msg_type"] == "iopub_welcome"
            b.front.announce("status", {"execution_state": "idle"})
            topic, *_ = await iopub.recv_multipart()
            assert topic == b"kernel.safe-exec.status"

    asyncio.run(main())


def test_wrong_keys_and_repetitions_are_left_out(tmp_path: Path) -> None:
    async def main() -> None:
        async with bench(tmp_path) as b:
            shell = b.connect("shell", ZMQ.DEALER)
            stranger = Session(key=b"another")
            good = b.request(code="1")
            await shell.send_multipart(stranger.serialize(stranger.msg("shutdown_request", {})))
            await shell.send_multipart([b"no message"])
            await shell.send_multipart(good)
            await shell.send_multipart(good)
            await shell.send_multipart(b.request(code="2"))
            assert (await b.received())[2] == good
            assert b'"2"' in (await b.received())[2][-1]
            assert b.front.rejected == 3 and b.messages.empty()

    asyncio.run(main())


def test_a_stranger_cannot_send_much_and_a_client_can(tmp_path: Path) -> None:
    async def main() -> None:
        async with bench(tmp_path) as b:
            shell = b.connect("shell", ZMQ.DEALER)
            large = "x" * (2 * sockets.STRANGER_BYTES)
            await shell.send_multipart(b.request(code=large))
            await shell.send_multipart(b.request(code="1"))
            await b.received()
            assert b.front.rejected == 1
            await shell.send_multipart(b.request(code=large))
            assert len((await b.received())[2][-1]) > len(large)

    asyncio.run(main())


def test_half_handshakes_and_noise_do_no_harm(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(sockets, "HANDSHAKE_SECONDS", 0.2)

    async def main() -> None:
        async with bench(tmp_path) as b:
            raw = [b.raw("shell") for _ in range(6)]
            for sock, data in zip(
                raw,
                (
                    b"",
                    b"GET / HTTP/1.1\r\n\r\n",
                    GREETING[:20],
                    GREETING,
                    GREETING + b"\x04\xff" + b"\0" * 300,
                    GREETING + b"\x04\x08\x05READY\xff\xff",
                ),
                strict=True,
            ):
                sock.sendall(data)
            raw[1].close()
            shell = b.connect("shell", ZMQ.DEALER)
            await shell.send_multipart(b.request(code="1"))
            await b.received()
            for sock in (raw[0], *raw[2:]):
                sock.setblocking(False)

                async def closed(sock: socket.socket = sock) -> None:
                    while await asyncio.get_running_loop().sock_recv(sock, 4096):
                        pass

                async with asyncio.timeout(SECONDS):
                    await closed()
                sock.close()

    asyncio.run(main())


def test_more_clients_than_there_may_be(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(sockets, "MOST_PEERS", 3)

    async def main() -> None:
        async with bench(tmp_path) as b:
            raw = [b.raw("shell") for _ in range(10)]
            loop, refused = asyncio.get_running_loop(), 0
            for sock in raw:
                sock.setblocking(False)
                async with asyncio.timeout(SECONDS):
                    refused += not await loop.sock_recv(sock, 64)
            assert refused == 7
            for sock in raw:
                sock.close()

    asyncio.run(main())


def test_requests_wait_while_they_must(tmp_path: Path) -> None:
    async def main() -> None:
        async with bench(tmp_path) as b:
            b.paused = True
            shell = b.connect("shell", ZMQ.DEALER)
            heart = b.connect("hb", ZMQ.REQ)
            await shell.send_multipart(b.request(code="1"))
            await heart.send(b"x")
            assert await heart.recv() == b"x"
            assert b.messages.empty()
            b.paused = False
            while b.messages.empty():
                b.front.resume()
                await asyncio.sleep(0)

    asyncio.run(main())


def test_a_subscriber_that_takes_nothing_holds_a_bounded_queue(tmp_path: Path) -> None:
    async def main() -> None:
        async with bench(tmp_path) as b, asyncio.timeout(SECONDS):
            iopub = b.connect("iopub", ZMQ.SUB)
            await iopub.recv_multipart()
            raw = b.raw("iopub")
            ready = b"\x04\x19\x05READY\x0bSocket-Type\x00\x00\x00\x03SUB"
            raw.sendall(GREETING + ready + b"\x00\x01\x01")
            data = {"text": "x" * (1 << 20)}
            while b.front.queued <= sockets.MOST_QUEUED:
                b.front.announce("stream", data)
                await asyncio.sleep(0)
            for _ in range(50):
                b.front.announce("stream", data)
            assert b.front.queued < sockets.MOST_QUEUED + (4 << 20)
            b.front.drop_slowest()
            b.front.announce("status", {})
            while b"status" not in (await iopub.recv_multipart())[0]:
                pass
            raw.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not a connection file"),
        ("[]", "not a connection file"),
        ('{"shell_port": "x"}', "not a connection file"),
        ('{"curve_publickey": "x"}', "CurveZMQ"),
    ],
)
def test_connection_files_that_are_none(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(UsageError, match=words):
        read_connection_file(tmp_path / "c.json")
    with pytest.raises(UsageError, match="cannot be read"):
        read_connection_file(tmp_path / "absent.json")


def test_an_address_that_is_taken(tmp_path: Path) -> None:
    async def main() -> None:
        async with bench(tmp_path) as b:
            with pytest.raises(UsageError, match="another kernel has it"):
                Front(
                    read_connection_file(b.path),
                    on_message=lambda *_: None,
                    paused=lambda _name: False,
                )

    asyncio.run(main())
