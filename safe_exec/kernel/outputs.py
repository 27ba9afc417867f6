"""Notebook outputs from validated messages (``message_validation.checked``). Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from nbformat.notebooknode import NotebookNode, from_dict

# nbformat can make outputs too, but it checks each against a schema: the test whether a text is a
# list fails with an error message that contains the whole text.

# A stream in very many pieces stores its text as a list of parts, which the file format allows.
# Appending each piece to one string would copy the string every time. This many small parts in a
# row become one part, so the list stays short and each character is copied only a few times.
JOINED = 256
SMALL_CHARACTERS = 1 << 16
# The size to which a traceback is shortened if it alone is larger than the cell's cap.
TRACEBACK_BYTES = 64 * 1024
ENDS = 4

_FIELDS = {
    "stream": ("name", "text"),
    "display_data": ("metadata", "data"),
    "execute_result": ("metadata", "data", "execution_count"),
    "error": ("ename", "evalue", "traceback"),
}


def output_node(kind: str, content: Mapping[str, Any]) -> Any:
    """Return the output node of a message, ``None`` for messages that are not outputs.

    Raises KeyError if a field is missing.
    """
    fields = _FIELDS.get(kind)
    return (
        None
        if fields is None
        else from_dict({"output_type": kind} | {name: content[name] for name in fields})
    )


def remark(text: str) -> Any:
    """Return an output node with a remark of safe-exec."""
    return NotebookNode(output_type="stream", name="stderr", text=text)


def joins(last: Mapping[str, Any], more: Mapping[str, Any]) -> bool:
    """Tell whether ``more`` continues ``last``: both are text of the same stream."""
    return last.get("output_type") == more.get("output_type") == "stream" and last.get(
        "name"
    ) == more.get("name")


def join(last: Any, text: str) -> None:
    """Append text to a stream output, in place."""
    if isinstance(last["text"], str):
        last["text"] = [last["text"]]
    parts: list[str] = last["text"]
    parts.append(text)
    if len(parts) % JOINED == 0 and all(len(part) < SMALL_CHARACTERS for part in parts[-JOINED:]):
        parts[-JOINED:] = ["".join(parts[-JOINED:])]


def size_of(kind: str, content: Mapping[str, Any]) -> int:
    """Return the approximate size in bytes of the content that will be stored."""
    if kind == "stream":
        text = content.get("text", "")
        return len(text) if text.isascii() else len(text.encode("utf-8", "replace"))
    if kind in ("display_data", "execute_result", "update_display_data"):
        return sum(
            len(v) if isinstance(v, str) else len(json.dumps(v))
            for v in content.get("data", {}).values()
        )
    if kind == "error":
        return sum(map(len, content.get("traceback") or ()))
    return len(json.dumps(content))


def bounded(traceback: list[str]) -> list[str]:
    """Shorten a traceback to 64 KiB."""
    # The first lines show the call in the cell, the last ones the exception. Keep both ends.
    if sum(map(len, traceback)) <= TRACEBACK_BYTES:
        return traceback
    half = TRACEBACK_BYTES // 16
    short = [
        line if len(line) < 2 * half else line[:half] + " [...] " + line[-half:]
        for line in traceback
    ]
    return short if len(short) <= 2 * ENDS else [*short[:ENDS], "[...]", *short[-ENDS:]]
