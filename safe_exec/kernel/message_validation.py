"""Validates the content of messages: types, outputs and their MIME bundles. Pure.

An invalid entry of a bundle is removed; any other error invalidates the message. Source: "Messaging
in Jupyter" in jupyter_client's documentation, and the schema of nbformat 4 for notebook files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

MOST_TYPES = 100
LONGEST_TYPE = 200
MOST_COUNT = 2**31
_BASE64 = re.compile(r"[A-Za-z0-9+/=\s]*")
_ALPHABET = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=\n"
# Types with arbitrary JSON values (the schema of nbformat 4).
_JSON = re.compile(r"application/(.*\+)?json")
_BINARY = ("image/png", "image/jpeg", "image/gif", "image/webp", "image/bmp", "application/pdf")
_BUNDLES = ("display_data", "execute_result", "update_display_data")


def checked(kind: str, content: dict[str, Any]) -> list[str]:
    """Remove invalid parts from a message's ``content``; return the problems.

    Raises ValueError if nothing usable remains.
    """
    problems = _count_checked(content)
    if kind == "stream":
        _demand(content, name=str, text=str)
    elif kind == "error":
        _demand(content, ename=str, evalue=str, traceback=list)
        if not all(isinstance(line, str) for line in content["traceback"]):
            raise ValueError("its traceback is no list of texts")
    elif kind in _BUNDLES:
        problems += _bundle_checked(content)
    elif kind in ("comm_open", "comm_msg", "comm_close"):
        _demand(content, comm_id=str, data=dict)
    return problems


def mended_reply(content: dict[str, Any]) -> dict[str, Any]:
    """Return a cell's reply, with every field of the right type.

    A reply that reports neither success nor an error becomes an error.
    """
    status, payload = content.get("status"), content.get("payload")
    mended = {
        **content,
        "payload": [item for item in payload if isinstance(item, dict)]
        if isinstance(payload, list)
        else [],
    }
    if status in ("ok", "aborted"):
        return mended
    if status != "error":
        content = {
            "ename": "MalformedReply",
            "evalue": "the kernel's reply says neither that the cell ran nor that it failed",
        }
    traceback = content.get("traceback")
    return mended | {
        "status": "error",
        "ename": str(content.get("ename", "")),
        "evalue": str(content.get("evalue", "")),
        "traceback": [str(line) for line in traceback] if isinstance(traceback, list) else [],
    }


def _demand(content: Mapping[str, Any], **types: type) -> None:
    for key, kind in types.items():
        if not isinstance(content.get(key), kind):
            raise ValueError(f"its {key} is {type(content.get(key)).__name__}")  # noqa: TRY004


def _count_checked(content: dict[str, Any]) -> list[str]:
    """Remove an invalid execution count; return the problem, if any."""
    # The schema of nbformat allows no negative numbers, so the notebook would be invalid.
    count = content.get("execution_count")
    if count is None or (type(count) is int and 0 <= count < MOST_COUNT):
        return []
    content["execution_count"] = None
    return ["its execution_count is no number"]


def _bundle_checked(content: dict[str, Any]) -> list[str]:
    _demand(content, data=dict)
    data: dict[str, Any] = content["data"]
    if not isinstance(content.get("metadata", {}), dict):
        raise ValueError("its metadata is no object")  # noqa: TRY004
    content.setdefault("metadata", {})
    wrong = {key: reason for key, value in data.items() if (reason := _why_not(key, value))}
    wrong |= dict.fromkeys(list(data)[MOST_TYPES:], "one of too many types")
    valid = {key: value for key, value in data.items() if key not in wrong}
    if data and not valid:
        raise ValueError(f"{next(iter(wrong))[:LONGEST_TYPE]!r} is {next(iter(wrong.values()))}")
    content["data"] = valid
    return [f"{key[:LONGEST_TYPE]!r} is {reason}" for key, reason in list(wrong.items())[:1]]


def _why_not(key: str, value: Any) -> str:
    """Return the problem with one entry of a MIME bundle, or ""."""
    if len(key) > LONGEST_TYPE:
        return "no MIME type"
    if _JSON.fullmatch(key):
        return ""
    lines = value if isinstance(value, list) else [value]
    if not all(isinstance(line, str) for line in lines):
        return f"{type(value).__name__}, not text"
    return "not base64" if key in _BINARY and not all(map(_is_base64, lines)) else ""


def _is_base64(text: str) -> bool:
    # A picture may have megabytes, and deleting the valid characters is four times as fast as
    # matching the pattern.
    return (text.isascii() and not text.encode().translate(None, _ALPHABET)) or _BASE64.fullmatch(
        text
    ) is not None


def bounded_size(value: object) -> int:
    """Return a size in bytes from the kernel, bounded by the size of a disk."""
    # JSON of Python can contain Infinity and NaN, which int() rejects.
    if isinstance(value, float) and not math.isfinite(value):
        return 0
    return max(0, min(int(value), 2**40)) if isinstance(value, int | float) else 0
