"""What the ``isolation:`` of a profile, a file or a notebook says, checked, and laid over each other.

Imports ``model``, ``errors``, ``files``, ``limits_values`` and ``limits_yaml``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from msgspec.structs import replace

from safe_exec.errors import LimitsError
from safe_exec.files import one_line
from safe_exec.limits.values import nearest
from safe_exec.limits.yaml_source import Value
from safe_exec.model.limits import FolderUse, Isolation, RepositoryUse, SystemCalls

KEYS = Isolation.__struct_fields__
_LISTS = ("env", "writable", "show", "hide", "devices")
_PATHS = ("writable", "show", "hide")
_CHOICES: Mapping[str, type[FolderUse | RepositoryUse | SystemCalls]] = {
    "folder": FolderUse,
    "repository": RepositoryUse,
    "system_calls": SystemCalls,
}
_STRICTER_IF = {"network": False, "write_back": False}
"""The value that walls off more; ``True`` for the other keys."""
_ORDER: Mapping[str, list[Any]] = {
    "folder": [FolderUse.WRITE, FolderUse.COPY, FolderUse.READ],
    "repository": list(RepositoryUse),
    "system_calls": list(SystemCalls),
}


def parse(entries: Mapping[str, Value]) -> dict[str, Any]:
    """The keys under an ``isolation:`` of a file, checked. Raises LimitsError with file, line and the nearest right name."""
    found: dict[str, Any] = {}
    for key, value in entries.items():
        name = str(key).replace("-", "_")
        if name not in KEYS:
            raise LimitsError(
                f"{value.where}: unknown key {one_line(key)!r} under isolation; {nearest(str(key), KEYS)}"
            )
        found[name] = _read(name, value)
    return found


def _read(name: str, value: Value) -> Any:
    if name in _LISTS:
        return tuple(_word(name, item.text(name), item.where) for item in value.items(name))
    if name in _CHOICES:
        return _choice(name, value.text(name), value.where)
    return value.flag(name)


def _word(name: str, word: str, where: str) -> str:
    """One entry of a list: a variable, or a path that says by itself where it leads, as no folder is its own here."""
    if "\0" in word or (name == "env" and "=" in word):
        raise LimitsError(
            f"{where}: {name}: expected the name of a variable, found {one_line(word)!r:.60}"
        )
    if name == "devices" and not word.startswith("/dev/"):
        raise LimitsError(
            f"{where}: {name}: expected a path below /dev, found {one_line(word)!r:.60}"
        )
    if name in _PATHS and not word.startswith(("/", "~")):
        raise LimitsError(
            f"{where}: {name}: expected a path that begins with / or ~, found {one_line(word)!r:.60}"
        )
    return word


def _choice(name: str, word: str, where: str) -> Any:
    kind = _CHOICES[name]
    try:
        return kind(word)
    except ValueError:
        raise LimitsError(
            f"{where}: {name}: expected one of {', '.join(kind)}, found {word!r:.60}"
        ) from None


def apply(isolation: Isolation, changes: Mapping[str, Any]) -> Isolation:
    """``isolation`` with other values; lists are added to. Raises LimitsError for the root of all as an entry of one."""
    for name in _PATHS:
        if any(os.path.normpath(path) in ("/", "//") for path in changes.get(name, ())):
            raise LimitsError(
                f"isolation: {name}: / itself can be neither writable, nor shown, nor hidden; name a directory or file in it"
            )
    merged: Any = {
        name: (*getattr(isolation, name), *value) if name in _LISTS else value
        for name, value in changes.items()
    }
    return replace(isolation, **merged)


def of_metadata(metadata: Mapping[str, object], where: str) -> dict[str, Any]:
    """``metadata.safe_exec.isolation`` of a notebook, as a reproduction carries it. Raises LimitsError."""
    ours = metadata.get("safe_exec")
    found = ours.get("isolation") if isinstance(ours, Mapping) else None
    if found is None:
        return {}
    place = f"{one_line(where)}: metadata.safe_exec.isolation"
    if not isinstance(found, Mapping):
        raise LimitsError(f"{place}: expected an object of keys and values")
    return of_mapping(found, place)


def of_mapping(walls: Mapping[Any, object], where: str) -> dict[str, Any]:
    """Keys and values as they stand in JSON or Python, checked. Raises LimitsError that begins with ``where``."""
    return {
        _known(key, where): _plain(_known(key, where), value, where) for key, value in walls.items()
    }


def _known(key: object, place: str) -> str:
    name = str(key).replace("-", "_")
    if name not in KEYS:
        raise LimitsError(f"{place}: unknown key {one_line(key)!r}; {nearest(str(key), KEYS)}")
    return name


def _plain(name: str, value: object, place: str) -> Any:
    if name in _LISTS:
        if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
            return tuple(_word(name, item, place) for item in value)
        raise LimitsError(f"{place}: {name}: expected a list of words")
    if name in _CHOICES:
        return _choice(name, str(value), place)
    if not isinstance(value, bool):
        raise LimitsError(f"{place}: {name}: expected true or false")
    return value


def tighten(isolation: Isolation, wished: Mapping[str, Any]) -> Isolation:
    """What a notebook's own wishes make of it: only more walls, never fewer; what it wants opened is not heard."""
    changes: dict[str, Any] = {}
    for name, value in wished.items():
        before = getattr(isolation, name)
        order = _ORDER.get(name, [])
        if name == "hide":
            changes[name] = value
        elif name in _CHOICES:
            changes[name] = max(before, value, key=order.index)
        elif name not in _LISTS and value is _STRICTER_IF.get(name, True):
            changes[name] = value
    return apply(isolation, changes)


def as_metadata(isolation: Isolation) -> dict[str, Any]:
    """The walls that are up, for the metadata of a reproduction."""
    bare = Isolation()
    found = {
        name: getattr(isolation, name)
        for name in KEYS
        if getattr(isolation, name) != getattr(bare, name)
    }
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in found.items()
    }
