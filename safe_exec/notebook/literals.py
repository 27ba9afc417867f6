"""Values as literals of a kernel's language, for the cell that sets a notebook's parameters.

The literals of Python, R, Julia and bash follow papermill's translators, so that a notebook gets
the same values from both.
"""

from __future__ import annotations

import json
import keyword
import math
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

Value = None | bool | int | float | str | Sequence["Value"] | Mapping[str, "Value"]

_IDENTIFIER = re.compile(r"[A-Za-z_]\w*", re.ASCII)
# A name in R may begin with a dot, but not with a dot and a digit.
_R_NAME = re.compile(r"(?:[A-Za-z]|\.(?![0-9]))[\w.]*")


class Language(NamedTuple):
    """The syntax of a language for comments, assignments, names and values."""

    comment: str
    assignment: str
    is_name: Callable[[str], bool]
    literal: Callable[[Value], str]


def python(value: Value) -> str:
    """Return a Python literal, or a call for a float without one."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"float('{value}')"
    if isinstance(value, Mapping):
        items = (f"{_quoted(str(key))}: {python(item)}" for key, item in value.items())
        return f"{{{', '.join(items)}}}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(map(python, value))}]"
    return _quoted(value) if isinstance(value, str) else repr(value)


def r(value: Value) -> str:
    """Return an R literal; a mapping becomes a named list, a sequence a list."""
    if value is None:
        return "NULL"
    if isinstance(value, bool):
        return "TRUE" if value else "FALSE"
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Inf" if value > 0 else "-Inf"
    if isinstance(value, Mapping):
        items = (f"{_quoted(str(key))} = {r(item)}" for key, item in value.items())
        return f"list({', '.join(items)})"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"list({', '.join(map(r, value))})"
    return _quoted(value) if isinstance(value, str) else repr(value)


def julia(value: Value) -> str:
    """Return a Julia literal."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Inf" if value > 0 else "-Inf"
    if isinstance(value, Mapping):
        items = (f"{julia(str(key))} => {julia(item)}" for key, item in value.items())
        return f"Dict({', '.join(items)})"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(map(julia, value))}]"
    # Julia would interpolate a variable after a dollar sign.
    return _quoted(value).replace("$", "\\$") if isinstance(value, str) else repr(value)


def bash(value: Value) -> str:
    """Return a word of the shell. Raises ValueError for lists and mappings."""
    if value is None:
        return "''"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return shlex.quote(value)
    raise ValueError("a shell variable holds no list or mapping; pass a text")


def javascript(value: Value) -> str:
    """Return a JavaScript literal."""
    if isinstance(value, float) and not math.isfinite(value):
        # JSON lacks these numbers; all other JSON is valid JavaScript.
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        items = (f"{json.dumps(str(key))}: {javascript(item)}" for key, item in value.items())
        return f"{{{', '.join(items)}}}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(map(javascript, value))}]"
    return json.dumps(value)


def _quoted(text: str) -> str:
    """Return a text in double quotes, with the escapes that Python, R and Julia share."""
    escapes = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    escaped = "".join(
        escapes.get(char) or (char if char.isprintable() else _escaped(char)) for char in text
    )
    return f'"{escaped}"'


def _escaped(char: str) -> str:
    number = ord(char)
    # \xNN is a byte in Julia and a byte of the locale's encoding in R: a code point is \u there.
    return f"\\u{number:04x}" if number < 1 << 16 else f"\\U{number:08x}"


def _is_python_name(name: str) -> bool:
    # isidentifier() accepts keywords, too.
    return name.isidentifier() and not keyword.iskeyword(name)


def _is_identifier(name: str) -> bool:
    return _IDENTIFIER.fullmatch(name) is not None


def _is_r_name(name: str) -> bool:
    return _R_NAME.fullmatch(name) is not None


_SCRIPT = Language("//", "var {name} = {value};", _is_identifier, javascript)

# By the name in a notebook's `language_info`, in lower case.
LANGUAGES: Mapping[str, Language] = {
    "python": Language("#", "{name} = {value}", _is_python_name, python),
    "r": Language("#", "{name} = {value}", _is_r_name, r),
    "julia": Language("#", "{name} = {value}", _is_identifier, julia),
    "bash": Language("#", "{name}={value}", _is_identifier, bash),
    "javascript": _SCRIPT,
    "typescript": _SCRIPT,
}
