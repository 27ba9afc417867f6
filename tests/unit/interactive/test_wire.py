"""Messages as frames, and their signatures, against jupyter_client's own session."""

from __future__ import annotations

import json
from typing import Any

import pytest
from jupyter_client.session import Session

from safe_exec.interactive.wire import DELIMITER, Author, NotAMessage, Signer, parse

KEY = b"a key"


def request(session: Session, **content: Any) -> list[bytes]:
    frames: list[bytes] = session.serialize(session.msg("execute_request", content))
    return frames


def test_a_message_of_jupyter_client_is_read_and_verified() -> None:
    session = Session(key=KEY)
    message = parse([b"who", *request(session, code="1")])
    assert (message.kind, message.parent_id, message.content()) == (
        "execute_request",
        "",
        {"code": "1"},
    )
    Signer(KEY).verify(message)


def test_jupyter_client_accepts_our_messages() -> None:
    session = Session(key=KEY)
    asked = parse(request(session, code="1"))
    signer = Signer(KEY)
    author = Author(signer)
    frames = author.frames("stream", {"name": "stdout", "text": "é\ud800"}, asked.header_frame)
    _, parts = session.feed_identities(frames)
    answer = session.deserialize(parts)
    assert answer["parent_header"]["msg_id"] == asked.id
    assert answer["content"]["text"].startswith("é")
    again = author.resigned(parse(frames), {"name": "stderr", "text": ""})
    assert session.deserialize(session.feed_identities(again)[1])["content"]["name"] == "stderr"


@pytest.mark.parametrize(
    "change",
    [
        lambda frames: [],
        lambda frames: frames[1:],
        lambda frames: frames[:4],
        lambda frames: [b"x"] * 50 + frames,
        lambda frames: [*frames[:2], b"[]", *frames[3:]],
        lambda frames: [*frames[:2], b"{", *frames[3:]],
        lambda frames: [*frames[:2], b'{"msg_type": 1, "msg_id": "x"}', *frames[3:]],
        lambda frames: [*frames[:2], b"[" * 100_000, *frames[3:]],
        lambda frames: [*frames[:2], b'"' + b"x" * 70_000 + b'"', *frames[3:]],
        lambda frames: [*frames[:5], json.dumps({"code": "2"}).encode()],
        lambda frames: [DELIMITER, b"0" * 64, *frames[2:]],
    ],
)
def test_what_is_no_message_of_the_key_is_refused(change: Any) -> None:
    frames = request(Session(key=KEY), code="1")
    with pytest.raises(NotAMessage):
        Signer(KEY).verify(parse(change(frames)))


def test_a_message_counts_once() -> None:
    signer, message = Signer(KEY), parse(request(Session(key=KEY), code="1"))
    signer.verify(message)
    with pytest.raises(NotAMessage, match="of before"):
        signer.verify(message)


def test_without_a_key_nothing_is_signed() -> None:
    signer = Signer(b"")
    frames = Author(signer).frames("status", {})
    assert frames[1] == b""
    signer.verify(parse(frames))


def test_a_scheme_that_hashlib_lacks() -> None:
    with pytest.raises(ValueError, match="hmac-sha256"):
        Signer(KEY, "hmac-rot13")
