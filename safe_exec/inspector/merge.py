"""Merges a native stack with the Python frames that its interpreter loops ran. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

# The kinds of native frames: a loop of the interpreter, one of its helpers, anything else.
EVAL, IGNORED, PLAIN = "eval", "ignored", "plain"


class Entry(NamedTuple):
    """A native frame with its kind."""

    kind: str
    frame: dict[str, Any]


class CodeFrame(NamedTuple):
    """A Python frame.

    ``is_entry`` is true if a loop of the interpreter was started for this frame.
    """

    is_entry: bool
    frame: dict[str, Any]


def merge(native: Sequence[Entry], python: Sequence[CodeFrame]) -> list[dict[str, Any]]:
    """Merge the native stack and the Python stack into one; all three are innermost first.

    In the native stack, the Python frames that a loop of the interpreter runs replace the loop
    (``EVAL``). From Python 3.11 on, a loop may run several frames; the last of them is its entry
    frame. All C functions that the innermost loop called are kept, because the fault is among them;
    further out the interpreter's helpers are left out. If the number of loops differs from that of
    the entry frames (a corrupted heap, an interpreter without symbols), all Python frames follow
    the innermost C functions.
    """
    first = next((i for i, entry in enumerate(native) if entry.kind == EVAL), len(native))
    merged = [entry.frame for entry in native[:first]]
    # The loop itself is the innermost function if no other one was called.
    if not merged and native:
        merged.append(native[0].frame)
    loops = sum(entry.kind == EVAL for entry in native)
    if loops != sum(frame.is_entry for frame in python):
        return [*merged, *(code.frame for code in python)]
    waiting = list(python)
    for entry in native[first:]:
        if entry.kind == PLAIN:
            merged.append(entry.frame)
        while entry.kind == EVAL and waiting:
            code = waiting.pop(0)
            merged.append(code.frame)
            if code.is_entry:
                break
    return merged
