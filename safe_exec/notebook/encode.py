"""Encodes notebooks as JSON exactly as nbformat does, piece by piece, and safely for any content.

This encoder saves memory: only one piece exists besides the notebook itself. Python's encoder needs
a second copy of all texts, as lists of lines, and with indentation it runs in pure Python; nbformat
copies the whole notebook first. Imports the standard library only.
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

# Copying and writing recurse with about three frames a level, under Python's limit of 1000.
DEEPEST = 200

# About how many characters are encoded at a time.
PIECE = 1 << 18

_TOO_DEEP = "(nested too deeply)"
# Output lines of a whole notebook that are written separately; see _Budget.
_MOST_LINES = 200_000
# The line ends of str.splitlines.
_LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
_ESCAPES = (("\\", "\\\\"), ('"', '\\"'), ("\t", "\\t"))
# A text with any of these is not plain: other line ends, and other characters to escape.
_ODD = tuple({*map(chr, range(32)), *_LINE_ENDS} - {"\t", "\n"})
# From this number of characters on, it is worth while to look for those first.
_WORTHWHILE = 500
_SURROGATE = re.compile("[\ud800-\udfff]")
# The types without text/ that nbformat splits into lines (nbformat/v4/rwbase.py).
_SPLIT_TOO = ("application/javascript", "image/svg+xml")
# Metadata that nbformat removes before it writes a file.
_TRANSIENT = ("orig_nbformat", "orig_nbformat_minor", "signature")


def is_shallow(document: object) -> bool:
    """Tell whether the document is shallow enough for recursion.

    Checked level by level, not recursively.
    """
    # A recursive check would hit the recursion limit that it is to prevent.
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
    """Return text without lone surrogates; two halves of a pair become one character."""
    if isinstance(value, str) and _SURROGATE.search(value):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return value


def mapped(value: Any, leaf: Callable[[Any], Any], depth: int = DEEPEST) -> Any:
    """Return a copy with ``leaf`` applied to every text, number and key.

    Containers that are nested too deeply are replaced by a remark.
    """
    if not isinstance(value, dict | list | tuple):
        return leaf(value)
    if not depth:
        return _TOO_DEEP
    if isinstance(value, dict):
        return {leaf(key): mapped(item, leaf, depth - 1) for key, item in value.items()}
    return [mapped(item, leaf, depth - 1) for item in value]


# --- writing --------------------------------------------------------------------------------------


def dumps(node: NotebookNode) -> bytes:
    """Return the file of a notebook in one piece; see :class:`Encoded`."""
    return b"".join(Encoded(node))


class Encoded(Struct, frozen=True):
    """The file of a notebook in pieces, as nbformat writes it. May be iterated repeatedly.

    The outputs may contain anything a kernel sent, but the file must be JSON that every viewer
    reads. Lone surrogates become U+FFFD, NaN and infinities null, and values that are nested too
    deeply are left out. Cell ids are left out before nbformat 4.5, which does not have them. Texts
    of outputs may be lists of parts.
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
    """A text in parts that is written as one string."""

    parts: list[str]


def _for_a_file(node: Mapping[str, Any]) -> dict[str, Any]:
    """Return the notebook with its texts marked as lines, wherever nbformat writes lists of lines.

    Everything else is shared with the original.
    """
    # The budget is shared by all outputs of the notebook.
    budget = _Budget(node)
    # The schema of earlier formats forbids ids.
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
    # nbformat splits text types only; images stay in one piece.
    split = [
        key
        for key, value in data.items()
        if isinstance(value, str) and (key.startswith("text/") or key in _SPLIT_TOO)
    ]
    # Copy instead of modifying: the notebook is still in use.
    return {**data, **{key: mark(data[key]) for key in split}}


class _Budget:
    """The number of further output lines that are written as separate lines.

    A kernel that prints "y" for a minute produces millions of lines. Written separately, they make
    the file many times as large as the text, and its readers need a hundred times the memory. The
    format allows a text in one piece.
    """

    def __init__(self, node: Mapping[str, Any]) -> None:
        self._remaining_lines = _MOST_LINES
        # A text has no more lines than characters.
        self._counts = _characters(node) > _MOST_LINES

    def marked(self, text: str | list[str]) -> _Lines | _Whole | str:
        """Return the text as a list of lines, or in one piece once the budget is spent."""
        parts = [text] if isinstance(text, str) else text
        if self._counts:
            # Counting is cheaper than splitting.
            lines = sum(_line_ends(part) for part in parts)
            if lines > self._remaining_lines:
                return _Whole(parts)
            self._remaining_lines -= lines
        return _Lines(text)


def _characters(node: Mapping[str, Any]) -> int:
    """Return the number of characters in the texts of all outputs."""
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
    """Encode as ``json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False)``.

    ``indent`` is a newline and the spaces of the current level.
    """
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
    # nbformat sorts keys, so that diffs stay small.
    for key in sorted(value):
        name = encode_basestring(key if isinstance(key, str) else _scalar(key))
        yield f"{separator}{inner}{name}: "
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
    # NaN and infinity are not JSON, though Python writes them.
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "null"
    # bool is a subclass of int, so it must be checked first.
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
    """Return a text as it stands between the quotes of a JSON string."""
    return _replaced(text, "\\n") if _is_plain(text) else encode_basestring(text)[1:-1]


def _is_plain(text: str) -> bool:
    """Tell whether a text has no line ends except newlines, and few characters to escape."""
    return len(text) >= _WORTHWHILE and not any(odd in text for odd in _ODD)


def _replaced(text: str, newline: str) -> str:
    """Return a plain text (see ``_is_plain``) as it stands between the quotes of a JSON string."""
    # Searching for a character and replacing it is many times as fast as CPython's own escaping.
    for character, written in (*_ESCAPES, ("\n", newline)):
        if character in text:
            text = text.replace(character, written)
    return text


class _Block(str):
    """Plain lines, each with its line end."""

    __slots__ = ()


def _lines(text: str | list[str], indent: str) -> Iterator[str]:
    """Encode the lines of a text as a list."""
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
    """Yield a text's lines, many at a time, exactly as ``splitlines(True)`` would split it.

    The text comes in parts; a line that spans several of them is yielded alone.
    """
    partial_line: list[str] = []
    for part in _slices(parts):
        # The last line of a part may continue in the next one.
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
    """Return the pieces of a part that are encoded one by one.

    A plain part (see ``_is_plain``) gives its first line, a ``_Block`` of whole lines, and the
    rest; any other part gives its lines.
    """
    if not _is_plain(part):
        return part.splitlines(keepends=True)
    # The middle consists of whole lines and can be encoded in one step.
    first, last = part.find("\n") + 1, part.rfind("\n") + 1
    return [piece for piece in (part[:first], _Block(part[first:last]), part[last:]) if piece]


def _slices(parts: list[str]) -> Iterator[str]:
    """Yield the text in small, non-empty parts.

    A part never ends inside of CR LF or of a surrogate pair.
    """
    carry = ""
    for part in parts:
        # Small pieces bound the memory, whatever the size of an output.
        for at in range(0, len(part), PIECE):
            piece, carry = carry + part[at : at + PIECE], ""
            if piece[-1] == "\r" or "\ud800" <= piece[-1] <= "\udbff":
                piece, carry = piece[:-1], piece[-1]
            if piece:
                yield piece
    if carry:
        yield carry
