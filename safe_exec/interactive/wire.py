"""Jupyter messages as ZeroMQ frames: parse, verify, sign, build. Pure but for ids and the clock.

Source: "The wire protocol" in jupyter_client's "Messaging in Jupyter".
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from msgspec import DecodeError, Struct
from msgspec.json import Decoder

# Clients and kernel share one key, so the proxy passes frames on unchanged and their signatures
# stay valid.
DELIMITER = b"<IDS|MSG>"
MOST_IDENTITIES = 8
MOST_HEADER_BYTES = 64 << 10

# Signatures that are remembered against replays. jupyter_client remembers 65,536.
MOST_DIGESTS = 16_384
VERSION = "5.4"


class NotAMessage(ValueError):  # noqa: N818 - names the frames
    """Frames that are not a message or have no valid signature."""


class Header(Struct, frozen=True):
    """The fields of a header that the proxy reads."""

    msg_type: str
    msg_id: str


class Parent(Struct, frozen=True):
    """The field of a parent header that the proxy reads; empty if there is no parent."""

    msg_id: str = ""


class Message(Struct, frozen=True, kw_only=True):
    """One message as it came over the wire.

    ``kind`` is its ``msg_type``, ``parent_id`` the id of its request (empty if there is none).
    ``frames`` are all frames; the signature is at ``start``.
    """

    frames: list[bytes]
    start: int
    kind: str
    id: str
    parent_id: str

    @property
    def header_frame(self) -> bytes:
        """The unparsed header, which becomes the parent header of each answer."""
        return self.frames[self.start + 1]

    @property
    def content_frame(self) -> bytes:
        """The unparsed content."""
        return self.frames[self.start + 4]

    @property
    def size(self) -> int:
        """The number of bytes of content and buffers."""
        return sum(map(len, self.frames[self.start + 4 :]))

    def content(self) -> dict[str, Any]:
        """Parse the content. Raises NotAMessage."""
        try:
            value = json.loads(self.content_frame)
        except (ValueError, RecursionError):
            raise NotAMessage("its content is no JSON") from None
        if not isinstance(value, dict):
            raise NotAMessage("its content is no object")
        return value


def parse(frames: list[bytes]) -> Message:
    """Parse everything except the content. Raises NotAMessage."""
    # Content can be megabytes of output, and most messages are passed on without a look at it.
    try:
        start = frames.index(DELIMITER, 0, MOST_IDENTITIES + 1) + 1
    except ValueError:
        raise NotAMessage("no delimiter") from None
    if len(frames) < start + 5:
        raise NotAMessage(f"a message of {len(frames)} frames")
    if max(len(frames[start + 1]), len(frames[start + 2])) > MOST_HEADER_BYTES:
        raise NotAMessage("a header of more than 64 KiB")
    try:
        header = _HEADER.decode(frames[start + 1])
        parent = _PARENT.decode(frames[start + 2])
    except (DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise NotAMessage(f"its header: {error}") from None
    return Message(
        frames=frames,
        start=start,
        kind=header.msg_type,
        id=header.msg_id,
        parent_id=parent.msg_id,
    )


_HEADER, _PARENT = Decoder(Header), Decoder(Parent)


class Signer:
    """Signs and verifies with the key of a connection file; an empty key turns both off."""

    def __init__(self, key: bytes, scheme: str = "hmac-sha256") -> None:
        """Prepare to sign.

        Raises ValueError for a scheme that is not ``hmac-`` with a hash of hashlib.
        """
        method, _, digest = scheme.partition("-")
        if method != "hmac" or digest not in hashlib.algorithms_available:
            raise ValueError(f"signature scheme {scheme!r} is not supported; use hmac-sha256")
        self._base = hmac.new(key, digestmod=digest) if key else None
        self._signatures: OrderedDict[bytes, None] = OrderedDict()

    def signature(self, parts: Sequence[bytes]) -> bytes:
        """Return the signature of header, parent header, metadata and content."""
        if self._base is None:
            return b""
        mac = self._base.copy()
        for part in parts:
            mac.update(part)
        return mac.hexdigest().encode()

    def verify(self, message: Message) -> None:
        """Raise NotAMessage unless the signature is valid and was not seen before."""
        if self._base is None:
            return
        at = message.start
        signature = message.frames[at]
        if not hmac.compare_digest(signature, self.signature(message.frames[at + 1 : at + 5])):
            raise NotAMessage("invalid signature")
        if signature in self._signatures:
            raise NotAMessage("a message of before")
        self._signatures[signature] = None
        if len(self._signatures) > MOST_DIGESTS:
            self._signatures.popitem(last=False)


class Author:
    """Builds messages that the proxy itself sends, all with one session id."""

    def __init__(self, signer: Signer) -> None:
        self._signer = signer
        self._session = os.urandom(16).hex()
        self._count = 0

    def frames(self, kind: str, content: Mapping[str, Any], parent: bytes = b"{}") -> list[bytes]:
        """Build the frames of a message whose parent header is ``parent``."""
        self._count += 1
        header = {
            "msg_id": f"{self._session}_{os.getpid()}_{self._count}",
            "username": "safe-exec",
            "session": self._session,
            "date": datetime.now(UTC).isoformat().replace("+00:00", "Z"),
            "msg_type": kind,
            "version": VERSION,
        }
        parts = [_dumps(header), parent, b"{}", _dumps(content)]
        return [DELIMITER, self._signer.signature(parts), *parts]

    def resigned(self, message: Message, content: Mapping[str, Any]) -> list[bytes]:
        """Replace a message's content and sign it again; identities stay."""
        at = message.start
        parts = [*message.frames[at + 1 : at + 4], _dumps(content)]
        return [*message.frames[:at], self._signer.signature(parts), *parts]


def _dumps(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, default=str).encode("utf-8", "replace")
