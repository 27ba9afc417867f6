"""The last traceback that a thread or a worker process had printed into the outputs of cells. Pure; knows nbformat's outputs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

LONGEST_TEXT = 8000
# What threading and multiprocessing print before a traceback.
BEGIN = re.compile(r"^(?:Exception in thread .+|Process \S*(?:Process|Worker)\S*):$", re.MULTILINE)
"""What threading and multiprocessing print before a traceback."""
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
"""Python 3.13 and newer print tracebacks in colours where FORCE_COLOR is set, as ipykernel does."""


def without_colours(text: str) -> str:
    """A text without the sequences that colour it on a terminal."""
    return _COLOURS.sub("", text)


def printed_traceback(
    cells: Iterable[tuple[int, Any]], late: Mapping[int, str]
) -> tuple[int, str] | None:
    """The last such traceback and what follows it, with the index of the cell in whose output it begins; ``None`` where there is none.

    ``late`` is text that came for a cell when it was done, and is not in its outputs: that of the threads it had started. The lines of a
    thread may be divided between the cell that runs at the time and the next one, so the cells' texts are read as one.
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


def _text(output: Any) -> str:
    if output.get("output_type") != "stream" or output.get("name") != "stderr":
        return ""
    text = output.get("text", "")
    return without_colours(text if isinstance(text, str) else "".join(text))
