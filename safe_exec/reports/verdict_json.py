"""Convert a verdict to its JSON document and back.

The document's keys are the fields of the types in ``model``, in their order; ``verdict.schema.json``
beside this file is its JSON Schema, which ``make schema`` makes from these types. Numbers are bytes
and seconds; ``null`` is "not measured" (in ``limits``: unlimited). Imports ``model`` only.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from typing import Any

import msgspec

from safe_exec.model.patterns import lazy_pattern
from safe_exec.model.verdict import VERDICT_SCHEMA, Verdict
from safe_exec.reports import json_text

_PLACE = lazy_pattern(r"(?s)(?P<problem>.*?)(?: - at `\$(?P<place>.*)`)?")
"""The text of a ValidationError of msgspec."""


class _Header(msgspec.Struct):
    """The part of a document that names its format."""

    schema: str | None = None


def dumps(verdict: Verdict) -> bytes:
    """Return the document as UTF-8 text with a final newline, without NaN and lone surrogates."""
    return json_text.document(verdict)


def loads(data: bytes) -> Verdict:
    """Read the verdict from the text of a document.

    Raises ValueError, one line with the problem.
    """
    try:
        _check_schema(msgspec.json.decode(data, type=_Header).schema)
        return msgspec.json.decode(data, type=Verdict)
    except msgspec.DecodeError as error:
        raise ValueError(_explanation(error)) from None


def from_document(document: Mapping[str, Any]) -> Verdict:
    """Read the verdict from a document of plain values. Raises ValueError as :func:`loads` does."""
    try:
        _check_schema(msgspec.convert(document, _Header).schema)
        return msgspec.convert(document, Verdict)
    except msgspec.ValidationError as error:
        raise ValueError(_explanation(error)) from None


def load_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of the document."""
    text = (
        resources.files(__package__ or "safe_exec.reports")
        .joinpath("verdict.schema.json")
        .read_bytes()
    )
    return msgspec.json.decode(text, type=dict[str, Any])


def _check_schema(schema: str | None) -> None:
    if schema != VERDICT_SCHEMA:
        raise ValueError(f"schema is {schema!r}, expected {VERDICT_SCHEMA!r}")


def _explanation(error: msgspec.DecodeError) -> str:
    match = _PLACE.fullmatch(str(error))
    assert match is not None
    problem = match["problem"]
    if not isinstance(error, msgspec.ValidationError):  # the text is not JSON at all
        return problem
    return f"verdict{match['place'] or ''}: {problem[:1].lower()}{problem[1:]}"
