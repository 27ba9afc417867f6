"""The JSON of notebooks: harmless whatever is in it, and written as nbformat writes it, piece by piece.

Imports the standard library only. The encoder is our own: Python's needs all texts of a notebook once more as lists of lines, with an
indent it is written in Python too, and nbformat copies the whole before. Here no more than a piece is held beside the notebook itself.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from json.encoder import encode_basestring
from typing import TYPE_CHECKING, Any

from msgspec import Struct

if TYPE_CHECKING:
    from nbformat import NotebookNode

# nbformat 4.5 has ids for cells, and its schema forbids them before.
IDS_SINCE = 5

# Levels: copying and writing recurse, some three frames a level, under Python's limit of 1000.
DEEPEST = 200

# Characters that are encoded at a time, about.
PIECE = 1 << 18

_TOO_DEEP = "(nested too deeply)"
_MOST_LINES = 200_000
# Of str.splitlines.
_LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
_ESCAPES = (("\\", "\\\\"), ('"', '\\"'), ("\t", "\\t"))
# What makes a text other than plain: the rest of what ends lines or must be escaped.
_ODD = tuple({*map(chr, range(32)), *_LINE_ENDS} - {"\t", "\n"})
# Characters from which on it is worth while to look for those first.
_WORTHWHILE = 500
_SURROGATE = re.compile("[\ud800-\udfff]")
_SPLIT_TOO = ("application/javascript", "image/svg+xml")
_TRANSIENT = ("orig_nbformat", "orig_nbformat_minor", "signature")


def is_shallow(document: object) -> bool:
    """Whether nothing in ``document`` lies deeper than is safe to recurse over; level by level, so never recursing."""
    level = [document]
    for _ in range(DEEPEST):
        level = [
            child for item in level for child in _children(item) if isinstance(child, dict | list)
        ]
        if not level:
            return True
    return False


def _children(item: object) -> list[Any]:
    if isinstance(item, dict):
        return list(item.values())
    return item if isinstance(item, list) else []


def joined(value: Any) -> Any:
    """Text without lone surrogates; two halves of a pair are one character again."""
    if isinstance(value, str) and _SURROGATE.search(value):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return value


def mapped(value: Any, leaf: Callable[[Any], Any], depth: int = DEEPEST) -> Any:
    """A copy with ``leaf`` applied to every text and number, and to the keys; containers too deep become a remark."""
    if not isinstance(value, dict | list | tuple):
        return leaf(value)
    if not depth:
        return _TOO_DEEP
    if isinstance(value, dict):
        return {leaf(key): mapped(item, leaf, depth - 1) for key, item in value.items()}
    return [mapped(item, leaf, depth - 1) for item in value]


# --- writing --------------------------------------------------------------------------------------


def dumps(node: NotebookNode) -> bytes:
    """The file of a notebook in one piece; see :class:`Encoded`."""
    return b"".join(Encoded(node))


class Encoded(Struct, frozen=True):
    """The file of a notebook in pieces, as nbformat writes it, whatever a kernel has put into the outputs. May be gone through again.

    Lone surrogates become U+FFFD, NaN and infinities null, and what is nested too deeply is left out: the file must be JSON that
    every viewer reads. Ids are left out before nbformat 4.5, which does not have them. Texts of outputs may be lists of parts.
    """

    node: NotebookNode

    def __iter__(self) -> Iterator[bytes]:
        pieces: list[str] = []
        size = 0
        for part in _value(_for_a_file(self.node), "\n", DEEPEST):
            pieces.append(part)
            size += len(part)
            if size >= PIECE:
                yield _bytes("".join(pieces))
                pieces.clear()
                size = 0
        pieces.append("\n")
        yield _bytes("".join(pieces))


def _bytes(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        result: str = joined(text)
        return result.encode()


class _Lines(Struct, frozen=True):
    """A text that is written as a list of its lines."""

    text: str | list[str]


class _Whole(Struct, frozen=True):
    """A text in parts that is written as one."""

    parts: list[str]


def _for_a_file(node: Mapping[str, Any]) -> dict[str, Any]:
    """The notebook with its texts marked as nbformat would split them, and without what does not go into files; all else is shared."""
    budget = _Budget(node)
    ids = node["nbformat_minor"] >= IDS_SINCE
    metadata = {key: value for key, value in node["metadata"].items() if key not in _TRANSIENT}
    return {
        **node,
        "metadata": metadata,
        "cells": [_cell(cell, budget, ids=ids) for cell in node["cells"]],
    }


def _cell(cell: Mapping[str, Any], budget: _Budget, *, ids: bool) -> dict[str, Any]:
    encoded = {key: value for key, value in cell.items() if ids or key != "id"}
    encoded["metadata"] = {
        key: value for key, value in cell["metadata"].items() if key != "trusted"
    }
    if isinstance(encoded.get("source"), str):
        encoded["source"] = _Lines(encoded["source"])
    if "attachments" in encoded:
        encoded["attachments"] = {
            key: _bundle(value, _Lines) for key, value in encoded["attachments"].items()
        }
    if encoded["cell_type"] == "code":
        encoded["outputs"] = [_output(output, budget) for output in encoded["outputs"]]
    return encoded


def _output(output: Mapping[str, Any], budget: _Budget) -> Mapping[str, Any]:
    if output["output_type"] == "stream":
        return {**output, "text": budget.marked(output["text"])}
    if output["output_type"] in ("execute_result", "display_data"):
        return {**output, "data": _bundle(output["data"], budget.marked)}
    return output


def _bundle(data: Mapping[str, Any], mark: Callable[[str], Any]) -> dict[str, Any]:
    split = [
        key
        for key, value in data.items()
        if isinstance(value, str) and (key.startswith("text/") or key in _SPLIT_TOO)
    ]
    return {**data, **{key: mark(data[key]) for key in split}}


class _Budget:
    """How many more lines of outputs are written as lines.

    A kernel that prints "y" for a minute makes millions of them: a file many times as large as the text, and a hundred times the memory
    for whoever reads it. The format allows a text in one piece.
    """

    def __init__(self, node: Mapping[str, Any]) -> None:
        self._remaining_lines = _MOST_LINES
        # Else they cannot be so many.
        self._counts = _characters(node) > _MOST_LINES

    def marked(self, text: str | list[str]) -> _Lines | _Whole | str:
        """The text as it is to be written."""
        parts = [text] if isinstance(text, str) else text
        if self._counts:
            lines = sum(_line_ends(part) for part in parts)
            if lines > self._remaining_lines:
                return _Whole(parts)
            self._remaining_lines -= lines
        return _Lines(text)


def _characters(node: Mapping[str, Any]) -> int:
    """Characters in the texts of all outputs."""
    outputs = [output for cell in node["cells"] for output in cell.get("outputs") or ()]
    texts = [
        text
        for output in outputs
        for text in (output.get("text"), *(output.get("data") or {}).values())
    ]
    return sum(
        sum(map(len, text)) if isinstance(text, list) else len(text)
        for text in texts
        if isinstance(text, str | list)
    )


def _line_ends(text: str) -> int:
    # Looking for a character is ten times as fast as counting it.
    return sum(text.count(end) for end in _LINE_ENDS if end in text)


# --- the encoder ----------------------------------------------------------------------------------


def _value(value: Any, indent: str, depth: int) -> Iterator[str]:
    """As ``json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False)``; ``indent`` is a newline and the blanks of this level."""
    if isinstance(value, str):
        yield from _text(value)
    elif isinstance(value, _Lines):
        yield from _lines(value.text, indent)
    elif isinstance(value, _Whole):
        yield from _whole(value)
    elif isinstance(value, Mapping | list | tuple) and not depth:
        yield f'"{_TOO_DEEP}"'
    elif isinstance(value, Mapping):
        yield from _object(value, indent, depth)
    elif isinstance(value, list | tuple):
        yield from _array(value, indent, depth)
    else:
        yield _scalar(value)


def _object(value: Mapping[Any, Any], indent: str, depth: int) -> Iterator[str]:
    if not value:
        yield "{}"
        return
    separator, inner = "{", indent + " "
    for key in sorted(value):
        yield f"{separator}{inner}{encode_basestring(key if isinstance(key, str) else _scalar(key))}: "
        yield from _value(value[key], inner, depth - 1)
        separator = ","
    yield indent + "}"


def _array(value: list[Any] | tuple[Any, ...], indent: str, depth: int) -> Iterator[str]:
    if not value:
        yield "[]"
        return
    separator, inner = "[", indent + " "
    for item in value:
        yield separator + inner
        yield from _value(item, inner, depth - 1)
        separator = ","
    yield indent + "]"


def _scalar(value: Any) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return int.__repr__(value)
    if isinstance(value, float):
        return float.__repr__(value)
    # Base64, as nbformat's own encoder takes it.
    if isinstance(value, bytes):
        return encode_basestring(value.decode("ascii"))
    raise TypeError(f"no JSON: {type(value).__name__}")


def _text(value: str) -> Iterator[str]:
    if len(value) <= PIECE:
        yield f'"{_escaped(value)}"'
    else:
        yield from _whole(_Whole([value]))


def _whole(text: _Whole) -> Iterator[str]:
    yield '"'
    yield from map(_escaped, _slices(text.parts))
    yield '"'


def _escaped(text: str) -> str:
    """The inside of a JSON string."""
    return _replaced(text, "\\n") if _is_plain(text) else encode_basestring(text)[1:-1]


def _is_plain(text: str) -> bool:
    """Whether no lines end in it but by newlines, and nothing else in it must be escaped but quotes, backslashes and tabs."""
    return len(text) >= _WORTHWHILE and not any(odd in text for odd in _ODD)


def _replaced(text: str, newline: str) -> str:
    """A plain text with its escapes. To look for a character and to replace it is many times as fast as CPython's own escaping."""
    for character, written in (*_ESCAPES, ("\n", newline)):
        if character in text:
            text = text.replace(character, written)
    return text


class _Block(str):
    """Plain lines, each with its end."""

    __slots__ = ()


def _lines(text: str | list[str], indent: str) -> Iterator[str]:
    """The list of the lines of a text."""
    between = f",{indent} "
    separator = f"[{indent} "
    for lines in _split([text] if isinstance(text, str) else text):
        yield separator
        if isinstance(lines, _Whole):
            yield from _whole(lines)
        else:
            yield between.join(
                [
                    _block(line, between) if type(line) is _Block else encode_basestring(line)
                    for line in lines
                ]
            )
        separator = between
    yield f"{indent}]" if separator is between else "[]"


def _block(lines: _Block, between: str) -> str:
    return '"' + _replaced(lines[:-1], f'\\n"{between}"') + '\\n"'


def _split(parts: list[str]) -> Iterator[list[str] | _Whole]:
    """The lines of a text in parts, as ``splitlines(True)`` gives them, many at a time; one that goes over several parts alone."""
    partial_line: list[str] = []
    for part in _slices(parts):
        lines = _divided(part)
        if partial_line:
            partial_line.append(lines.pop(0))
            if partial_line[-1][-1] not in _LINE_ENDS:
                continue
            yield _Whole(partial_line)
            partial_line = []
        if lines and lines[-1][-1] not in _LINE_ENDS:
            partial_line = [lines.pop()]
        if lines:
            yield lines
    if partial_line:
        yield _Whole(partial_line)


def _divided(part: str) -> list[str]:
    """The lines of a part; of a plain one the first, a block of those between, and what follows after the last line end."""
    if not _is_plain(part):
        return part.splitlines(keepends=True)
    first, last = part.find("\n") + 1, part.rfind("\n") + 1
    return [piece for piece in (part[:first], _Block(part[first:last]), part[last:]) if piece]


def _slices(parts: list[str]) -> Iterator[str]:
    """The same text in parts that are not large, none of them empty or ending where one must not: in a line end or a surrogate pair."""
    carry = ""
    for part in parts:
        for at in range(0, len(part), PIECE):
            piece, carry = carry + part[at : at + PIECE], ""
            if piece[-1] == "\r" or "\ud800" <= piece[-1] <= "\udbff":
                piece, carry = piece[:-1], piece[-1]
            if piece:
                yield piece
    if carry:
        yield carry
