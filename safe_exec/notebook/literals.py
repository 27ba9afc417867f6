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


class Notation(NamedTuple):
    """The literals of a language. ``nan`` to ``minus_infinity`` are floats that are not finite."""

    none: str
    true: str
    false: str
    nan: str
    infinity: str
    minus_infinity: str
    sequence: str
    mapping: str
    pair: str
    text: Callable[[str], str]

    def literal(self, value: Value) -> str:
        """Return the literal of a value."""
        if value is None or isinstance(value, bool):
            return {None: self.none, True: self.true, False: self.false}[value]
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, float) and not math.isfinite(value):
            infinity = self.infinity if value > 0 else self.minus_infinity
            return self.nan if math.isnan(value) else infinity
        if isinstance(value, Mapping):
            pairs = (
                self.pair.format(key=self.text(str(key)), item=self.literal(item))
                for key, item in value.items()
            )
            return self.mapping.format(", ".join(pairs))
        if isinstance(value, Sequence):
            return self.sequence.format(", ".join(map(self.literal, value)))
        return _number(value)


def _number(value: object) -> str:
    # Subclasses, such as numpy's float64, have a repr that is no literal.
    for kind in (int, float):
        if isinstance(value, kind):
            return kind.__repr__(value)
    raise ValueError(
        f"{type(value).__name__} has no literal; pass a number, a text, a list or a mapping"
    )


def bash(value: Value) -> str:
    """Return a word of the shell, or an array. Raises ValueError for mappings and nested lists."""
    if value is None:
        return "''"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return shlex.quote(value)
    if isinstance(value, Mapping | Sequence):
        return _bash_array(value)
    return _number(value)


def _bash_array(value: Mapping[str, Value] | Sequence[Value]) -> str:
    if isinstance(value, Mapping) or any(
        isinstance(item, Mapping | Sequence) and not isinstance(item, str) for item in value
    ):
        raise ValueError("a shell variable holds no mapping and no nested list; pass a text")
    return f"({' '.join(map(bash, value))})"


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


# Floats that are not finite have no literal in Python.
python = Notation(
    "None",
    "True",
    "False",
    "float('nan')",
    "float('inf')",
    "float('-inf')",
    "[{}]",
    "{{{}}}",
    "{key}: {item}",
    _quoted,
).literal
# A mapping becomes a named list.
r = Notation(
    "NULL", "TRUE", "FALSE", "NaN", "Inf", "-Inf", "list({})", "list({})", "{key} = {item}", _quoted
).literal
# Julia would interpolate a variable after a dollar sign.
julia = Notation(
    "nothing",
    "true",
    "false",
    "NaN",
    "Inf",
    "-Inf",
    "[{}]",
    "Dict({})",
    "{key} => {item}",
    lambda text: _quoted(text).replace("$", "\\$"),
).literal
# JSON lacks numbers that are not finite; all other JSON is valid JavaScript.
javascript = Notation(
    "null",
    "true",
    "false",
    "NaN",
    "Infinity",
    "-Infinity",
    "[{}]",
    "{{{}}}",
    "{key}: {item}",
    json.dumps,
).literal


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
