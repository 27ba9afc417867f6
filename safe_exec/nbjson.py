"""The JSON of notebooks: harmless whatever is in it, and written as nbformat writes it.

Imports nothing of safe-exec; nbformat (150 ms) when something is written.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nbformat import NotebookNode

IDS_SINCE = 5
"""nbformat 4.5 has ids for cells, and its schema forbids them before."""

DEEPEST = 200
"""Levels: copying and writing recurse, some three frames a level, under Python's limit of 1000."""

_TOO_DEEP = "(nested too deeply)"
_MOST_LINES = 200_000
_LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"  # of str.splitlines
_SURROGATE = re.compile("[\ud800-\udfff]")


def is_shallow(document: object) -> bool:
    """Whether nothing in ``document`` lies deeper than is safe to recurse over; level by level, so never recursing."""
    level = [document]
    for _ in range(DEEPEST):
        level = [child for item in level for child in _children(item) if isinstance(child, dict | list)]
        if not level:
            return True
    return False


def _children(item: object) -> list[Any]:
    if isinstance(item, dict):
        return list(item.values())
    return item if isinstance(item, list) else []


def dumps(node: NotebookNode) -> bytes:
    """The file of a notebook, as nbformat writes it, whatever a kernel has put into the outputs.

    Lone surrogates become U+FFFD, NaN and infinities null, and what is nested too deeply to write is left out: the
    file must be JSON that every viewer reads. Ids are left out before nbformat 4.5, which does not have them.
    """
    try:
        return _encoded(node)
    except (ValueError, RecursionError):  # UnicodeEncodeError is a ValueError
        return _encoded(mapped(node, _harmless))


def _encoded(node: Any) -> bytes:
    from nbformat import from_dict
    from nbformat.v4.nbjson import BytesEncoder
    from nbformat.v4.rwbase import strip_transient

    # from_dict, because what was put into the node may hold plain dicts, on which nbformat's writer stumbles. It also
    # copies, so that what follows leaves the caller's node alone.
    node = from_dict(_without_ids(node) if node["nbformat_minor"] < IDS_SINCE else node)
    _split_lines(node)
    strip_transient(node)
    # As v4.writes does; but piece by piece, since texts of many megabytes are not to be held once more in one.
    encoder = BytesEncoder(ensure_ascii=False, allow_nan=False, indent=1, sort_keys=True, separators=(",", ": "))
    return b"".join([*(piece.encode() for piece in encoder.iterencode(node)), b"\n"])


def _split_lines(node: NotebookNode) -> None:
    """Turn texts into lists of lines in place, as nbformat does, but for what would be too many lines.

    A kernel that prints "y" for a minute makes millions of them, a hundred times the memory of the text. The format
    allows a text in one piece.
    """
    from nbformat.v4.rwbase import split_lines

    whole = list(_beyond_counting(node))
    for holder, key, _ in whole:
        holder[key] = ""
    split_lines(node)
    for holder, key, text in whole:
        holder[key] = text


def _beyond_counting(node: NotebookNode) -> Iterator[tuple[dict[str, Any], str, str]]:
    """The texts of outputs, and where they are, that do not fit into what is left of the lines for all of them."""
    left = _MOST_LINES
    outputs = [output for cell in node.cells if cell.cell_type == "code" for output in cell.outputs]
    holders = [part for output in outputs for part in (output, output.get("data")) if isinstance(part, dict)]
    for holder in holders:
        for key, text in holder.items():
            lines = sum(map(text.count, _LINE_ENDS)) if isinstance(text, str) else 0
            if lines > left:
                yield holder, key, text
            else:
                left -= lines


def _without_ids(node: Mapping[str, Any]) -> dict[str, Any]:
    cells = [{key: value for key, value in cell.items() if key != "id"} for cell in node["cells"]]
    return {**node, "cells": cells}


def mapped(value: Any, leaf: Callable[[Any], Any], depth: int = DEEPEST) -> Any:
    """A copy with ``leaf`` applied to every text and number, and to the keys; containers too deep become a remark."""
    if not isinstance(value, dict | list | tuple):
        return leaf(value)
    if not depth:
        return _TOO_DEEP
    if isinstance(value, dict):
        return {leaf(key): mapped(item, leaf, depth - 1) for key, item in value.items()}
    return [mapped(item, leaf, depth - 1) for item in value]


def joined(value: Any) -> Any:
    """Text without lone surrogates; two halves of a pair are one character again."""
    if isinstance(value, str) and _SURROGATE.search(value):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return value


def _harmless(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else joined(value)
