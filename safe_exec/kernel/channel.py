"""A channel for nbclient: signed messages over one bounded connection."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from hmac import compare_digest

# JSONDecoder.parse_string; typeshed has no name for it.
from json.decoder import scanstring  # type: ignore[attr-defined]
from queue import Empty
from typing import Any

import msgspec.json

from safe_exec.kernel.connection import Connection
from safe_exec.kernel.zmtp import Received

# Invalid messages are skipped and counted, never raised: a wrong signature or number of parts, no
# JSON, types that the protocol does not have, or so much structure that a few megabytes of JSON
# would take hundreds of megabytes in memory.

DELIMITER = b"<IDS|MSG>"
HEADER_BYTES = 64 << 10
# Bytes that the objects of one message may take.
MOST_PARSED = 96 << 20
# Smaller messages cannot exceed that: the most expensive byte of JSON is a bracket (72 bytes).
HARMLESS_BYTES = 1 << 20
MOST_TEXTS = 500_000
_NO_STRUCTURE = bytes(set(range(256)) - set(b'[{,":'))
_STREAMS = tuple((name, f'{{"name": "{name}", "text": "'.encode()) for name in ("stdout", "stderr"))
# Messages are taken for this long without a break. Then timers and other tasks get their turn.
TURN_SECONDS = 0.005


class Refused(ValueError):  # noqa: N818 - names the event
    """The frames are not a valid message."""


class Channel:
    """One channel of a kernel (shell, iopub, stdin, control) with the methods that nbclient calls.

    ``on_oversize`` is called with the size of each message that was too large, ``overheard`` with
    each valid message.
    """

    def __init__(self, session: Any, connection: Connection) -> None:
        self.session = session
        self.refused = 0
        self.first_refused = ""
        self.on_oversize: Callable[[int], None] = lambda _size: None
        self.overheard: Callable[[dict[str, Any]], None] = lambda _message: None
        self.connection = connection
        self._arrived = asyncio.Event()
        self._rested = 0.0
        self._consumer: Callable[[dict[str, Any]], None] = lambda _message: None
        self._is_delivering = False
        connection.on_arrival = self._arrived.set

    async def get_msg(self, timeout: float | None = None) -> dict[str, Any]:  # noqa: ASYNC109
        """Return the next message.

        Waits without a limit, or raises ``queue.Empty`` after ``timeout`` seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            if time.monotonic() - self._rested > TURN_SECONDS:
                await asyncio.sleep(0)
                self._rested = time.monotonic()
            received = self.connection.take()
            if received is None:
                await self._arrival(deadline)
                continue
            message = self._message(received)
            if message is not None:
                self.overheard(message)
                return message

    async def _arrival(self, deadline: float | None) -> None:
        self._arrived.clear()
        remaining = None if deadline is None else deadline - time.monotonic()
        if remaining is not None and remaining <= 0:
            raise Empty
        try:
            # Not wait_for: before Python 3.12 it swallows a cancellation that comes with the
            # arrival.
            async with asyncio.timeout(remaining):
                await self._arrived.wait()
        except TimeoutError:
            raise Empty from None

    def consume(self, consumer: Callable[[dict[str, Any]], None]) -> None:
        """Call ``consumer`` with every message from now on, instead of keeping it for ``get_msg``.

        It must not raise.
        """
        self._consumer = consumer
        self.connection.on_arrival = self._deliver
        self._deliver()

    def _deliver(self) -> None:
        # ``take`` can parse more messages and so call us again: they come in their turn.
        if not self._is_delivering:
            self._is_delivering = True
            self._deliver_on()

    def _deliver_on(self) -> None:
        end = time.monotonic() + TURN_SECONDS
        while (received := self.connection.take()) is not None:
            message = self._message(received)
            if message is not None:
                self.overheard(message)
                self._consumer(message)
            if time.monotonic() > end:
                asyncio.get_running_loop().call_soon(self._deliver_on)
                return
        self._is_delivering = False

    def _message(self, received: Received) -> dict[str, Any] | None:
        try:
            if received.dropped:
                self.on_oversize(received.dropped)
                return self._remains(received.parts)
            return unpacked(self.session, received.parts)
        except Exception as error:  # noqa: BLE001 - whatever a kernel sends
            self.refused += 1
            self.first_refused = self.first_refused or f"{type(error).__name__}: {error}"[:200]
            return None

    def _remains(self, parts: list[bytes]) -> dict[str, Any] | None:
        """Turn the kept parts of a reply that was too large into an error reply.

        ``None`` for other messages.
        """
        # nbclient would wait for the lost reply until the timeout.
        if DELIMITER not in parts:
            return None
        _, header, parent, *_ = [*parts[parts.index(DELIMITER) + 1 :], b"", b"", b""]
        if not header or not parent:
            return None
        head, parent_header = self.session.unpack(header), self.session.unpack(parent)
        if (
            not isinstance(head, dict)
            or not isinstance(parent_header, dict)
            or head.get("msg_type") != "execute_reply"
        ):
            return None
        content = {
            "status": "error",
            "ename": "ReplyTooLarge",
            "evalue": "the kernel's reply was too large",
            "traceback": [],
        }
        remains = {
            "msg_type": "execute_reply",
            "parent_header": parent_header,
            "metadata": {},
            "content": content,
            "buffers": [],
        }
        return {"header": head, "msg_id": str(head.get("msg_id"))[:200], **remains}

    def request(self, kind: str, content: dict[str, Any]) -> str:
        """Send a request, as ``send`` would; return its id."""
        session = self.session
        header = session.msg_header(kind)
        try:
            parts = [msgspec.json.encode(part) for part in (header, {}, {}, content)]
        except (ValueError, TypeError):
            # A lone surrogate has no UTF-8. jupyter_client sends it all the same.
            self.send(session.msg(kind, content, header=header))
        else:
            self.connection.send([DELIMITER, session.sign(parts), *parts])
        return str(header["msg_id"])

    def send(self, msg: dict[str, Any]) -> None:
        """Send a message of the session; it is lost if the kernel has gone."""
        self.connection.send([*self.session.serialize(msg), *map(bytes, msg.get("buffers") or ())])

    def start(self) -> None:
        """Do nothing: the connection is open already."""

    def stop(self) -> None:
        """Close the connection. Can be called again."""
        self.connection.close()

    close = stop

    def is_exhausted(self) -> bool:
        """Whether the other end has closed and all of its messages were taken."""
        return self.connection.exhausted

    def is_alive(self) -> bool:
        """Whether the other end is still connected."""
        return not self.connection.ended


# --- messages -------------------------------------------------------------------------------------


def unpacked(session: Any, parts: Sequence[bytes]) -> dict[str, Any]:
    """Parse and verify a message. Raises ValueError and others if it is invalid."""
    # Like Session.deserialize of jupyter_client, but without its search for dates in every text of
    # both headers by dateutil. That search takes two thirds of the time of a message.
    signed = parts[parts.index(DELIMITER) + 1 :]
    if len(signed) < 5:  # noqa: PLR2004 - signature, header, parent, metadata, content
        raise Refused(f"a message of {len(signed)} parts")
    if len(signed[1]) > HEADER_BYTES or len(signed[2]) > HEADER_BYTES:
        raise Refused("a header of more than 64 KiB")
    _demand_signed(session, signed)
    header, parent, metadata = (_unpacked(session, part) for part in signed[1:4])
    if (
        not isinstance(header, dict)
        or not isinstance(header.get("msg_type"), str)
        or not isinstance(header.get("msg_id"), str)
    ):
        raise Refused("its type or id is no text")
    header["date"] = _date(header.get("date"))
    content = stream_content(signed[4]) if header["msg_type"] == "stream" else None
    message = {
        "header": header,
        "msg_id": header["msg_id"],
        "msg_type": header["msg_type"],
        "parent_header": parent,
        "metadata": metadata,
        "content": _unpacked(session, signed[4]) if content is None else content,
        "buffers": [memoryview(part) for part in signed[5:]],
    }
    for key in ("parent_header", "metadata", "content"):
        if not isinstance(message[key], dict):
            raise Refused(f"its {key} is no object")
    return message if str(header.get("version", "")).startswith("5.") else _adapted(message)


def _demand_signed(session: Any, signed: Sequence[bytes]) -> None:
    """Raise Refused unless the signature is valid and was not seen before."""
    if session.auth is None:
        return
    if signed[0] in session.digest_history:
        raise Refused("Duplicate signature: a message of before")
    if not compare_digest(signed[0], session.sign(signed[1:5])):
        raise Refused("Invalid signature")
    session._add_digest(signed[0])  # noqa: SLF001 - also bounds the history


def _unpacked(session: Any, part: bytes) -> Any:
    if (
        len(part) > HARMLESS_BYTES
        and _cost(part) > MOST_PARSED
        and _cost_of_structure(part) > MOST_PARSED
    ):
        raise Refused("a message that would take hundreds of megabytes")
    try:
        return msgspec.json.decode(part)
    except (ValueError, RecursionError):
        # Python's parser accepts more: NaN, lone surrogates, invalid UTF-8.
        return session.unpack(part)


def stream_content(part: bytes) -> dict[str, Any] | None:
    """Parse a stream's content in the exact form that ipykernel sends; ``None`` for other forms."""
    # Text is the most frequent message by far, and one call of the C scanner parses it.
    for name, head in _STREAMS:
        if part.startswith(head):
            content = part.decode("utf-8", "replace")
            with contextlib.suppress(ValueError):
                text, end = scanstring(content, len(head))
                return {"name": name, "text": text} if content[end:] == "}" else None
    return None


def _date(text: object) -> object:
    """Parse an ISO 8601 date; return anything else unchanged."""
    # nbclient stores the dates of messages as the cell's timings.
    try:
        return datetime.fromisoformat(text) if isinstance(text, str) else text
    except ValueError:
        return text


def _adapted(message: dict[str, Any]) -> dict[str, Any]:
    """Convert a message from another version of the protocol."""
    from jupyter_client.adapter import adapt

    adapted: dict[str, Any] = adapt(message)
    return adapted


def _cost(part: bytes) -> int:
    """Return an upper bound of the memory that a JSON text needs once it is parsed."""
    # Bytes in CPython: a container 72 including its place in the parent, a text 56, an entry of an
    # object 50, a number 32.
    marks = part.translate(None, _NO_STRUCTURE)  # one pass instead of five
    containers = marks.count(b"[") + marks.count(b"{")
    return (
        len(part)
        + 72 * containers
        + 40 * marks.count(b",")
        + 28 * marks.count(b'"')
        + 50 * marks.count(b":")
    )


def _cost_of_structure(part: bytes) -> int:
    """Return a closer bound than ``_cost``: commas and brackets in strings cost one byte each."""
    # An HTML or SVG output has many brackets and commas within a text, where they cost one byte.
    plain = part.replace(b"\\\\", b"").replace(b'\\"', b"")
    texts = plain.count(b'"') // 2
    if texts > MOST_TEXTS:
        return MOST_PARSED + 1
    outside = b"".join(plain.split(b'"')[::2])
    return len(part) + 56 * texts + _cost(outside)
