"""Validate and merge the ``isolation`` sections of profiles, files and notebooks.

Pure; imports ``model``, ``errors``, ``files`` and its siblings ``values`` and ``yaml_source``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any, get_type_hints

import msgspec
from msgspec import UNSET, UnsetType
from msgspec.structs import replace

from safe_exec.errors import LimitsError
from safe_exec.files import one_line
from safe_exec.limits.values import nearest
from safe_exec.limits.yaml_source import Value
from safe_exec.model.limits import FolderUse, Isolation, RepositoryUse, SystemCalls
from safe_exec.model.patterns import lazy_pattern

KEYS = Isolation.__struct_fields__
_LISTS = ("env", "writable", "show", "hide", "devices")
_PATHS = ("writable", "show", "hide")
_CHOICES: Mapping[str, type[FolderUse | RepositoryUse | SystemCalls]] = {
    "folder": FolderUse,
    "repository": RepositoryUse,
    "system_calls": SystemCalls,
}

# The stricter value of a switch; ``True`` for the keys that are not listed.
_STRICTER_IF = {"network": False, "write_back": False}
# From the loosest to the strictest. A copy can still be written, so it comes before READ.
_ORDER: Mapping[str, list[Any]] = {
    "folder": [FolderUse.WRITE, FolderUse.COPY, FolderUse.READ],
    "repository": list(RepositoryUse),
    "system_calls": list(SystemCalls),
}


def parse(entries: Mapping[str, Value]) -> dict[str, Any]:
    """Check the ``isolation`` section of a file. Raises LimitsError with file and line."""

    def place(key: str, index: int | None) -> str:
        value = entries[key]
        # Each item of a list has its own line in the file.
        if index is not None and isinstance(value.data, tuple):
            value = value.data[index]
        return value.location

    plain = {key: value.plain() for key, value in entries.items()}
    return _changes(plain, place, section=" under isolation")


def of_mapping(walls: Mapping[Any, object], error_prefix: str) -> dict[str, Any]:
    """Validate JSON or Python values. Raises LimitsError, which begins with ``error_prefix``."""
    return _changes(walls, lambda _key, _index: error_prefix)


def _changes(
    plain: Mapping[Any, object], place: Callable[[Any, int | None], str], *, section: str = ""
) -> dict[str, Any]:
    """Return the values by field name. ``place`` names a key, or one of its items, in errors."""
    keys: dict[str, Any] = {}
    for key in plain:
        # Both spellings are valid, as for limits.
        name = str(key).replace("-", "_")
        # msgspec rejects unknown keys too, but cannot suggest the nearest one.
        if name not in KEYS:
            raise LimitsError(
                f"{place(key, None)}: unknown key {one_line(key)!r}{section}; {nearest(str(key), KEYS)}"
            )
        keys[name] = key
    try:
        changes = msgspec.convert({name: plain[key] for name, key in keys.items()}, _type())
    except msgspec.ValidationError as error:
        # msgspec's error has the path of the value only; users need the file and the line.
        problem, name, index = _located(error)
        raise LimitsError(
            f"{place(keys[name], index)}: {name}: {_explanation(name, problem)}"
        ) from None
    return {
        name: _words(name, getattr(changes, name) or (), partial(place, key))
        if name in _LISTS
        else getattr(changes, name)
        for name, key in keys.items()
    }


@cache
def _type() -> type[msgspec.Struct]:
    """Return a variant of ``Isolation`` with optional keys; a list may be null."""
    # UNSET distinguishes a missing key from one with the default value: only the latter overrides
    # the profile below.
    fields: list[Any] = [
        (name, (hint | None if name in _LISTS else hint) | UnsetType, UNSET)
        for name, hint in get_type_hints(Isolation).items()
    ]
    return msgspec.defstruct("IsolationChanges", fields, kw_only=True, forbid_unknown_fields=True)


# The text of msgspec.ValidationError, which has no attributes for its parts.
_PROBLEM = lazy_pattern(r"(?s)(?P<problem>.*) - at `\$\.(?P<name>\w+)(?:\[(?P<index>\d+)\])?`")
_TYPES = lazy_pattern(r"Expected `(.+)`, got `(.+)`")
_EXPECTED = {"bool": "true or false", "str": "text", "array | null": "a list"}
_FOUND = {
    "null": "nothing",
    "bool": "yes or no",
    "str": "text",
    "array": "a list",
    "object": "a mapping",
    "int": "a number",
    "float": "a number",
}


def _located(error: msgspec.ValidationError) -> tuple[str, str, int | None]:
    """Split an error of msgspec into problem, field, and the index of the item in a list."""
    match = _PROBLEM.fullmatch(str(error))
    assert match is not None
    return match["problem"], match["name"], None if match["index"] is None else int(match["index"])


def _explanation(name: str, problem: str) -> str:
    match = _TYPES.fullmatch(problem)
    if match is not None:
        expected, actual = (
            table.get(word, word)
            for table, word in zip((_EXPECTED, _FOUND), match.groups(), strict=True)
        )
        return f"expected {expected}, found {actual}"
    # The remaining problem is a word that the enum does not have.
    word = problem.removeprefix("Invalid enum value ")
    return f"expected one of {', '.join(_CHOICES[name])}, found {word:.60}"


def _words(name: str, entries: Sequence[str], place: Callable[[int], str]) -> tuple[str, ...]:
    return tuple(_word(name, word, place(index)) for index, word in enumerate(entries))


def _word(name: str, word: str, error_prefix: str) -> str:
    """Validate one entry of a list: a variable or a path. Raises LimitsError."""
    # execve(2) ends names at a NUL, and takes the text after = for the value.
    if not word or "\0" in word or (name == "env" and "=" in word):
        raise LimitsError(
            f"{error_prefix}: {name}: expected the name of a variable, found {one_line(word)!r:.60}"
        )
    # Other paths belong to ``show`` and ``writable``.
    if name == "devices" and not word.startswith("/dev/"):
        raise LimitsError(
            f"{error_prefix}: {name}: expected a path below /dev, found {one_line(word)!r:.60}"
        )
    # A limits file serves notebooks in many folders, so a relative path would be ambiguous.
    if name in _PATHS and not word.startswith(("/", "~")):
        raise LimitsError(
            f"{error_prefix}: {name}: expected a path that begins with / or ~, found {one_line(word)!r:.60}"
        )
    return word


def apply(isolation: Isolation, changes: Mapping[str, Any]) -> Isolation:
    """Return ``isolation`` with the changes; lists are extended. Raises LimitsError for ``/``."""
    for name in _PATHS:
        # Opening / would open every hidden directory, and hiding it would hide the interpreter.
        if any(os.path.normpath(path) in ("/", "//") for path in changes.get(name, ())):
            raise LimitsError(
                f"isolation: {name}: / itself can be neither writable, nor shown, nor hidden; name a directory or file in it"
            )
    # A file cannot remove the list entries of the profile below it.
    merged: Any = {
        name: (*getattr(isolation, name), *value) if name in _LISTS else value
        for name, value in changes.items()
    }
    return replace(isolation, **merged)


def of_metadata(metadata: Mapping[str, object], error_prefix: str) -> dict[str, Any]:
    """Return ``metadata.safe_exec.isolation`` of a notebook. Raises LimitsError."""
    # A reproduction has this section. Metadata may contain anything, so each level is checked.
    ours = metadata.get("safe_exec")
    settings = ours.get("isolation") if isinstance(ours, Mapping) else None
    if settings is None:
        return {}
    place = f"{one_line(error_prefix)}: metadata.safe_exec.isolation"
    if not isinstance(settings, Mapping):
        raise LimitsError(f"{place}: expected an object of keys and values")
    return of_mapping(settings, place)


def tighten(isolation: Isolation, wished: Mapping[str, Any]) -> Isolation:
    """Return the isolation with a notebook's own requests: they may add walls, never remove any."""
    changes: dict[str, Any] = {}
    for name, value in wished.items():
        current = getattr(isolation, name)
        order = _ORDER.get(name, [])
        # Hiding more paths is always stricter.
        if name == "hide":
            changes[name] = value
        # The later word in the order is stricter.
        elif name in _CHOICES:
            changes[name] = max(current, value, key=order.index)
        # The other lists (env, writable, show, devices) would open something and are ignored.
        elif name not in _LISTS and value is _STRICTER_IF.get(name, True):
            changes[name] = value
    return apply(isolation, changes)


def as_metadata(isolation: Isolation) -> dict[str, Any]:
    """Return the requested walls for the metadata of a reproduction."""
    # Only differences from the default are stored, so that the metadata stay short.
    bare = Isolation()
    changes = {
        name: getattr(isolation, name)
        for name in KEYS
        if getattr(isolation, name) != getattr(bare, name)
    }
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in changes.items()
    }
