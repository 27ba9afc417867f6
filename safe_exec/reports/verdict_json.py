"""The verdict as one JSON document, and back.

Imports ``model`` only. The document's keys are the fields of the types in ``model``; ``verdict.schema.json`` beside
this file is its JSON Schema. Numbers are bytes and seconds; ``null`` is "not measured" (in ``limits``: unlimited).
"""

from __future__ import annotations

import json
import math
import types
import typing
from collections.abc import Mapping
from enum import Enum
from functools import cache
from importlib import resources
from typing import Any

from msgspec import Struct, StructMeta

from safe_exec.model.verdict import VERDICT_SCHEMA, Verdict

_ORDER = (
    "safe_exec_version",
    "run_id",
    "started",
    "finished",
    "command",
    "cwd",
    "status",
    "exit_code",
    "notebook",
    "cause",
    "crash_cell",
    "culprits",
    "cells",
    "limits",
    "enforcement",
    "isolation",
    "allow_errors",
    "remote_hosts",
    "timeline",
    "usage",
    "stderr_tail",
    "environment",
    "warnings",
    "outputs",
)
_COUNTS_OF_REPRODUCED = 2  # of how many runs how many did it again


def to_document(verdict: Verdict) -> dict[str, Any]:
    """The verdict as plain JSON values, in the order of the contract."""
    return {"schema": VERDICT_SCHEMA, **{key: plain(getattr(verdict, key)) for key in _ORDER}}


def dumps(verdict: Verdict) -> bytes:
    """The document as UTF-8 text with a final newline; never a NaN, never a lone surrogate."""
    return (
        json.dumps(to_document(verdict), ensure_ascii=False, allow_nan=False, indent=2) + "\n"
    ).encode()


def load_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) that every document obeys."""
    text = (
        resources.files(__package__ or "safe_exec.reports")
        .joinpath("verdict.schema.json")
        .read_text("utf-8")
    )
    schema: dict[str, Any] = json.loads(text)
    return schema


def plain(value: object) -> Any:
    r"""Any value of ``model`` or ``events`` as JSON can take it.

    A number that is none (NaN, infinity) becomes ``null``; a lone surrogate, as an undecodable file name has it,
    becomes its escape (``\udc80``), since no UTF-8 text can hold it.
    """
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Struct):
        return {name: plain(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return value


def from_document(document: Mapping[str, Any]) -> Verdict:
    """The verdict that a document holds; ``ValueError`` names what does not fit."""
    schema = document.get("schema")
    if schema != VERDICT_SCHEMA:
        raise ValueError(f"schema is {schema!r}, expected {VERDICT_SCHEMA!r}")
    fields = {key: item for key, item in document.items() if key not in ("schema", "exit_code")}
    verdict = _read(Verdict, fields, "verdict")
    assert isinstance(verdict, Verdict)
    if verdict.culprits is not None and len(verdict.culprits.reproduced) != _COUNTS_OF_REPRODUCED:
        raise ValueError(
            f"verdict.culprits.reproduced: expected 2 counts, found {len(verdict.culprits.reproduced)}"
        )
    return verdict


def _read(hint: Any, value: Any, where: str) -> Any:
    """``value`` as the type ``hint`` of ``model``: the reverse of :func:`plain`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return _read_union(arguments, value, where)
    if origin is tuple:
        return _read_items(arguments[0], _expect(list, value, where), where)
    if origin is Mapping:
        pairs = _expect(dict, value, where).items()
        return {
            _read(arguments[0], k, where): _read(arguments[1], v, f"{where}.{k}") for k, v in pairs
        }
    if isinstance(hint, StructMeta):
        return _read_fields(hint, _expect(dict, value, where), where)
    if issubclass(hint, Enum):
        return hint(value)
    # JSON has one kind of number: 30 is a fine value for a float.
    return float(value) if hint is float and type(value) is int else _expect(hint, value, where)


def _read_union(choices: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and types.NoneType in choices:
        return None
    rest = [choice for choice in choices if choice is not types.NoneType]
    if len(rest) == 1:
        return _read(rest[0], value, where)
    if type(value) in rest:
        return value
    raise ValueError(f"{where}: unexpected {type(value).__name__}")


def _read_items(hint: Any, items: list[Any], where: str) -> tuple[Any, ...]:
    if {type(item) for item in items} <= _exact(hint):  # a timeline is thousands of numbers
        return tuple(items)
    return tuple(_read(hint, item, f"{where}[{i}]") for i, item in enumerate(items))


@cache
def _exact(hint: Any) -> frozenset[type]:
    """The types whose values are of the type ``hint`` just as JSON has them."""
    choices = (
        typing.get_args(hint)
        if typing.get_origin(hint) in (types.UnionType, typing.Union)
        else (hint,)
    )
    return frozenset(
        choice for choice in choices if choice in (str, int, float, bool, types.NoneType)
    )


@cache
def _hints(hint: Any) -> dict[str, Any]:
    """The types of the fields: to work them out takes longer than to read them, and a batch reads hundreds of verdicts."""
    return typing.get_type_hints(hint)


def _read_fields(hint: Any, value: Mapping[str, Any], where: str) -> Any:
    hints = _hints(hint)
    unknown = sorted(value.keys() - hints.keys())
    if unknown:
        raise ValueError(f"{where}: unknown key {unknown[0]!r}")
    try:
        return hint(
            **{key: _read(hints[key], item, f"{where}.{key}") for key, item in value.items()}
        )
    except TypeError as error:  # a required field is missing
        raise ValueError(f"{where}: {error}") from None


def _expect(kind: Any, value: Any, where: str) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{where}: expected {kind.__name__}, found {type(value).__name__}")
    return value
