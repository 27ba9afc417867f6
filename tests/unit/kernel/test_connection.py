"""The connection to a kernel's socket, against libzmq's own, and against peers that do not keep to the protocol. No kernel."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import zmq as _zmq
from jupyter_client.session import Session

from safe_exec.kernel import connection as wire
from safe_exec.kernel import zmtp
from safe_exec.kernel.channel import Channel, unpacked
from safe_exec.kernel.connection import Address, ConnectFailed, Connection, connect
from safe_exec.kernel.zmtp import GREETING, Received

ZMQ: Any = _zmq  # which has no types here
LARGEST = 1 << 20
READY = b"\x04\x19\x05READY\x0bSocket-Type\x00\x00\x00\x03PUB"


async def arrived(connection: Connection) -> Received:
    deadline = asyncio.get_running_loop().time() + 10
    while (found := connection.take()) is None:
        assert asyncio.get_running_loop().time() < deadline and not connection.ended, "nothing came"
        await asyncio.sleep(0.001)
    return found


@asynccontextmanager
async def raw_peer(path: Path, first: bytes) -> AsyncIterator[tuple[Connection, socket.socket]]:
    """A connection whose other end is ours, byte by byte."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        connecting = asyncio.create_task(
            connect(Address(host=str(path)), kind="SUB", identity=b"", largest=LARGEST)
        )
        await asyncio.sleep(0.01)
        with listener.accept()[0] as theirs:
            theirs.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(theirs, GREETING + READY + first)
            connection = await connecting
            try:
                yield connection, theirs
            finally:
                connection.close()


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 30))


@pytest.mark.parametrize("place", ["ipc", "tcp"])
def test_libzmq_is_understood_both_ways(tmp_path: Path, place: str) -> None:
    async def test() -> None:
        context = ZMQ.Context()
        router, publisher = context.socket(ZMQ.ROUTER), context.socket(ZMQ.XPUB)
        addresses = []
        for number, peer in enumerate((router, publisher)):
            if place == "ipc":
                peer.bind(f"ipc://{tmp_path}/{number}")
                addresses.append(Address(host=f"{tmp_path}/{number}"))
            else:
                addresses.append(
                    Address(host="127.0.0.1", port=peer.bind_to_random_port("tcp://127.0.0.1"))
                )
        shell = await connect(addresses[0], kind="DEALER", identity=b"me", largest=LARGEST)
        iopub = await connect(addresses[1], kind="SUB", identity=b"", largest=LARGEST)
        sizes = (0, 1, 254, 255, 256, 65535, 65536, 300_000)
        assert shell.send([os.urandom(1), *(bytes(size) for size in sizes)])
        got = await asyncio.to_thread(router.recv_multipart)
        assert got[0] == b"me" and [len(part) for part in got[2:]] == list(sizes)
        router.send_multipart([b"me", *(bytes(size) for size in sizes)])
        assert [len(part) for part in (await arrived(shell)).parts] == list(sizes)
        assert await asyncio.to_thread(publisher.recv) == b"\x01"
        for number in range(2000):
            publisher.send_multipart([b"topic", b"%d" % number])
            if number % 100 == 0:
                await asyncio.sleep(0)
            assert (await arrived(iopub)).parts == [b"topic", b"%d" % number]
        for connection in (shell, iopub):
            connection.close()
        context.destroy(linger=0)

    run(test)


def frames(*parts: bytes) -> bytes:
    return b"".join(
        struct.pack(">BQ", zmtp.LONG | (zmtp.MORE if n < len(parts) - 1 else 0), len(part)) + part
        for n, part in enumerate(parts)
    )


def test_what_is_too_large_is_let_go_by_and_the_next_is_whole(tmp_path: Path) -> None:
    async def test() -> None:
        async with raw_peer(tmp_path / "s", b"") as (connection, theirs):
            loop = asyncio.get_running_loop()
            for parts in (
                (b"id", bytes(2 * LARGEST)),
                (b"id", *[bytes(70_000)] * 40),
                (b"id", *[b""] * 3000),
            ):
                sending = asyncio.create_task(
                    loop.sock_sendall(theirs, frames(*parts) + frames(b"next"))
                )
                large = await arrived(connection)
                assert (
                    large.dropped > 0
                    and large.parts[0] == b"id"
                    and sum(map(len, large.parts)) < zmtp.SMALL * 2
                )
                assert (await arrived(connection)).parts == [b"next"]
                await sending

    run(test)


def test_no_more_is_read_than_has_room(tmp_path: Path) -> None:
    async def test() -> None:
        async with raw_peer(tmp_path / "s", b"") as (connection, theirs):
            loop = asyncio.get_running_loop()
            total = 100
            sending = asyncio.create_task(
                loop.sock_sendall(theirs, frames(bytes(LARGEST - 1000)) * total)
            )
            await asyncio.sleep(0.5)
            assert not sending.done() and connection.reader.buffered[1] <= zmtp.MOST_WAITING
            for _ in range(total):
                assert len((await arrived(connection)).parts[0]) == LARGEST - 1000
            await sending

    run(test)


def test_a_message_without_an_end_is_told_of_and_not_kept(tmp_path: Path) -> None:
    async def test() -> None:
        async with raw_peer(tmp_path / "s", struct.pack(">BQ", zmtp.LONG, 2**64 - 1)) as (
            connection,
            theirs,
        ):
            loop = asyncio.get_running_loop()
            sending = asyncio.create_task(
                loop.sock_sendall(theirs, bytes(zmtp.REPORT_EVERY + (8 << 20)))
            )
            told = await arrived(connection)
            assert told.parts == [] and zmtp.REPORT_EVERY < told.dropped < 2 * zmtp.REPORT_EVERY
            assert connection.reader.buffered[0] <= wire.READ_BYTES
            await sending

    run(test)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 400 Bad Request\r\n" + bytes(64),
        b"",
        GREETING[:32] + bytes(32),
        GREETING + b"\x00\x05ERROR",
    ],
)
def test_another_protocol_is_refused(tmp_path: Path, answer: bytes) -> None:
    async def test() -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(tmp_path / "s"))
            listener.listen()
            connecting = asyncio.create_task(
                connect(Address(host=str(tmp_path / "s")), kind="SUB", identity=b"", largest=None)
            )
            await asyncio.sleep(0.01)
            with listener.accept()[0] as theirs:
                theirs.sendall(answer)
            with pytest.raises(ConnectFailed):
                await connecting

    run(test)


def test_pings_are_answered(tmp_path: Path) -> None:
    async def test() -> None:
        async with raw_peer(tmp_path / "s", b"\x04\x0b\x04PING\x00\x10abcd") as (_, theirs):
            data = b""
            while b"\x04PONGabcd" not in data:
                data += await asyncio.get_running_loop().sock_recv(theirs, 4096)

    run(test)


# --- messages ---------------------------------------------------------------------------------------------------


@pytest.fixture
def session() -> Any:
    return Session(key=b"key")


def signed(session: Any, *parts: bytes) -> list[bytes]:
    return [b"<IDS|MSG>", session.sign(list(parts)), *parts]


HEADER = b'{"msg_id":"a","msg_type":"stream","version":"5.3"}'


@pytest.mark.parametrize(
    "parts",
    [
        (b"[]", b"{}", b"{}", b"{}"),
        (HEADER, b"[1]", b"{}", b"{}"),
        (HEADER, b"{}", b"{}", b"[]"),
        (b'{"msg_id":[1],"msg_type":"x"}', b"{}", b"{}", b"{}"),
        (b"{}", b"{}", b"{}", b"{}"),
        (HEADER, b"{}", b"{}", b"[" * 100_000 + b"]" * 100_000),
        (HEADER, b"{}", b"{}"),
        (HEADER + b" " * 70_000, b"{}", b"{}", b"{}"),
        (HEADER, b"{}", b"{}", b'{"a":[' + b"{}," * 2_000_000 + b"1]}"),
    ],
    ids=range(9),
)
def test_what_is_no_message_is_refused(session: Any, parts: tuple[bytes, ...]) -> None:
    with pytest.raises((ValueError, TypeError, KeyError, RecursionError, AttributeError)):
        unpacked(session, signed(session, *parts))


def test_a_signature_counts_once(session: Any) -> None:
    parts = signed(session, HEADER, b"{}", b"{}", b'{"text":"x"}')
    assert unpacked(session, parts)["content"] == {"text": "x"}
    with pytest.raises(ValueError, match="Duplicate"):
        unpacked(session, parts)
    with pytest.raises(ValueError, match="Invalid"):
        unpacked(session, [parts[0], b"0" * 64, *parts[2:]])


def test_large_texts_full_of_brackets_are_text(session: Any) -> None:
    text = b'[{,:\\"\\\\' * 400_000
    assert (
        len(
            unpacked(session, signed(session, HEADER, b"{}", b"{}", b'{"text":"' + text + b'"}'))[
                "content"
            ]["text"]
        )
        == 6 * 400_000
    )


def test_a_channel_skips_what_is_no_message_and_lets_timers_run(
    session: Any, tmp_path: Path
) -> None:
    async def test() -> None:
        async with raw_peer(tmp_path / "s", b"") as (connection, theirs):
            channel = Channel(session, connection)
            good = [
                frames(b"t", *signed(session, HEADER, b'{"n":%d}' % n, b"{}", b"{}"))
                for n in range(500)
            ]
            data = b"".join(frames(b"no", b"message") + part for part in good)
            sending = asyncio.create_task(asyncio.get_running_loop().sock_sendall(theirs, data))
            numbers = [(await channel.get_msg())["parent_header"]["n"] for _ in range(500)]
            await sending
            assert numbers == list(range(500)) and channel.refused == 500

    run(test)
