r"""JSON as safe-exec writes it, from the types of ``model`` and from plain values.

UTF-8 text; never NaN or infinity (``null``), never a lone surrogate (its escape, ``\udc80``, since
no UTF-8 text can hold it). Numbers look as Python's ``json`` writes them. Imports msgspec only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

# Python writes 1e-06, 1e-05 and 1e+16 where msgspec writes 1e-6, 0.00001 and 1e16. Such a number
# ends its line in the indented form, which no text does: its last character is a quotation mark.
# Both patterns begin with a literal, for which `re` searches many times as fast.
_EXPONENT = re.compile(rb"e(-?)(\d+)(?=,?\n)")
_SMALL = re.compile(rb"0\.0000[1-9]\d*(?=,?\n)")


def document(value: object) -> bytes:
    """Return a value as JSON on indented lines, with a final newline."""
    return _indented(value)


def line(value: object) -> bytes:
    """Return a value as JSON on one line, with a final newline."""
    return msgspec.json.format(_indented(value), indent=0).rstrip() + b"\n"


def plain(value: object) -> Any:
    """Return a value as dicts, lists, texts and numbers, as a JSON parser would."""
    return msgspec.json.decode(_compact(value))


def _indented(value: object) -> bytes:
    text = msgspec.json.format(_compact(value), indent=2) + b"\n"
    return _SMALL.sub(_small, _EXPONENT.sub(_exponent, text))


def _exponent(match: re.Match[bytes]) -> bytes:
    return b"e" + (match[1] or b"+") + match[2].zfill(2)


def _small(match: re.Match[bytes]) -> bytes:
    is_complete = not match.string[
        match.start() - 1 : match.start()
    ].isdigit()  # and not the end of 10.00001
    return repr(float(match[0])).encode() if is_complete else match[0]


def _compact(value: object) -> bytes:
    try:
        return msgspec.json.encode(value, enc_hook=_mapping)
    except UnicodeEncodeError:
        return msgspec.json.encode(_escaped(msgspec.to_builtins(value, enc_hook=_mapping)))


def _mapping(value: object) -> dict[Any, Any]:
    """Convert a mapping other than dict, which msgspec does not support."""
    if isinstance(value, Mapping):
        return dict(value)
    raise NotImplementedError(f"{type(value).__name__} has no form in JSON")


def _escaped(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {_escaped(key): _escaped(item) for key, item in value.items()}
    return [_escaped(item) for item in value] if isinstance(value, list | tuple) else value
