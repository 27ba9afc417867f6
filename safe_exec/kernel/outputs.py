"""Outputs as they stand in a notebook, made from messages that ``content.checked`` has passed.

Pure.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from nbformat.notebooknode import NotebookNode, from_dict

# nbformat makes them too, but checks each against a schema, and there "is it a list?" fails by
# describing the whole text in an error. A stream that came in very many pieces holds a list of
# parts as its text, as a file may: to put each piece to the end of one text would copy it every
# time.

# So many small parts in a row are made one: no list of millions, and nothing is copied more than a
# few times.
JOINED = 256
SMALL_CHARACTERS = 1 << 16
# What is left of a traceback that alone is larger than the cell's cap.
TRACEBACK_BYTES = 64 * 1024
ENDS = 4

_FIELDS = {
    "stream": ("name", "text"),
    "display_data": ("metadata", "data"),
    "execute_result": ("metadata", "data", "execution_count"),
    "error": ("ename", "evalue", "traceback"),
}


def output_node(kind: str, content: Mapping[str, Any]) -> Any:
    """Return the output node of a message, ``None`` for other messages.

    Raises KeyError where a field is missing.
    """
    fields = _FIELDS.get(kind)
    return (
        None
        if fields is None
        else from_dict({"output_type": kind} | {name: content[name] for name in fields})
    )


def remark(text: str) -> Any:
    """Return an output node with a text of safe-exec."""
    return NotebookNode(output_type="stream", name="stderr", text=text)


def joins(last: Mapping[str, Any], more: Mapping[str, Any]) -> bool:
    """Whether two outputs are pieces of one stream."""
    return last.get("output_type") == more.get("output_type") == "stream" and last.get(
        "name"
    ) == more.get("name")


def join(last: Any, text: str) -> None:
    """Put a further piece to a stream."""
    if isinstance(last["text"], str):
        last["text"] = [last["text"]]
    parts: list[str] = last["text"]
    parts.append(text)
    if len(parts) % JOINED == 0 and all(len(part) < SMALL_CHARACTERS for part in parts[-JOINED:]):
        parts[-JOINED:] = ["".join(parts[-JOINED:])]


def size_of(kind: str, content: Mapping[str, Any]) -> int:
    """Bytes of the content that will be stored, near enough."""
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
    """A traceback of at most 64 KiB: the ends stay."""
    if sum(map(len, traceback)) <= TRACEBACK_BYTES:
        return traceback
    half = TRACEBACK_BYTES // 16
    short = [
        line if len(line) < 2 * half else line[:half] + " [...] " + line[-half:]
        for line in traceback
    ]
    return short if len(short) <= 2 * ENDS else [*short[:ENDS], "[...]", *short[-ENDS:]]
