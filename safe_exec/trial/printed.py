"""Finds the last traceback of a thread or worker process in the outputs of cells. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from safe_exec.model.patterns import lazy_pattern

LONGEST_TEXT = 8000
# What threading and multiprocessing print before a traceback.
BEGIN = lazy_pattern(
    r"^(?:Exception in thread .+|Process \S*(?:Process|Worker)\S*):$", re.MULTILINE
)
# Python 3.13 and newer print tracebacks in colours where FORCE_COLOR is set, as ipykernel does.
_COLOURS = lazy_pattern(r"\x1b\[[0-9;]*m")


def without_colours(text: str) -> str:
    """Return a text without the escape sequences that colour it on a terminal."""
    return _COLOURS.sub("", text)


def printed_traceback(
    cells: Iterable[tuple[int, Any]], late: Mapping[int, str]
) -> tuple[int, str] | None:
    """Return a thread's or worker's last traceback, the text behind it, and the cell of its start.

    Returns ``None`` if there is none. ``late`` is text of a cell's threads that arrived after the
    cell had ended and is not in its outputs. A thread's lines may be split between the cell that
    runs at the time and the next one, so the texts of all cells are read as one.
    """
    starts: list[tuple[int, int]] = []
    text = ""
    for index, cell in cells:
        starts.append((len(text), index))
        text += "".join(map(_text, cell.get("outputs", ()))) + without_colours(late.get(index, ""))
    last = next(reversed(list(BEGIN.finditer(text))), None)
    if last is None:
        return None
    index = next(index for start, index in reversed(starts) if start <= last.start())
    return index, text[last.start() :][:LONGEST_TEXT]


def stderr_tail(cell: Any, late: str) -> str:
    """Return the end of a cell's stderr and of ``late``, text that is not in its outputs."""
    text = "".join(map(_text, cell.get("outputs", ()))) + without_colours(late)
    return text[-LONGEST_TEXT:]


def _text(output: Any) -> str:
    if output.get("output_type") != "stream" or output.get("name") != "stderr":
        return ""
    text = output.get("text", "")
    return without_colours(text if isinstance(text, str) else "".join(text))
