"""Makes the JSON Schemas from the types; ``python -m safe_exec.reports.schemas`` writes them.

msgspec knows keys, types and bounds from the annotations. This module adds descriptions, rules that
connect fields, and the keys that documents of earlier versions lack.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from safe_exec.limits.spec import ROWS, Kind
from safe_exec.model.verdict import VERDICT_SCHEMA, CauseKind, Status, Verdict
from safe_exec.reports.batch.summary_json import SUMMARY_SCHEMA, Summary

DIALECT = "https://json-schema.org/draft/2020-12/schema"

_UNITS = {Kind.SIZE: "Bytes. ", Kind.TIME: "Seconds. ", Kind.GRACE: "Seconds. "}

OPTIONAL: Mapping[str, frozenset[str]] = {
    "Environment": frozenset({"isolation_facts", "machine"}),
    "NotebookSummary": frozenset({"machine", "losses"}),
    "Frame": frozenset({"source_line"}),
    "Isolation": frozenset({"repository", "show"}),
    "Culprits": frozenset({"endings", "recognised", "forked", "fork_note", "disagreements"}),
    "CellRecord": frozenset({"reason"}),
    "Usage": frozenset({"memory_upper_bound", "memory_lower_bound"}),
}
"""Keys that verdicts of earlier versions lack. All others are always written."""

DESCRIPTIONS: Mapping[str, Mapping[str, str]] = {
    "Verdict": {
        "command": "The command line; empty when run from Python.",
        "cells": "One entry for each code cell, in order.",
        "isolation": "The walls that were asked for; environment.isolation says what holds each.",
        "remote_hosts": "Other hosts that the notebook was seen to talk to.",
        "outputs": "The files that were written, by what they are.",
    },
    "Limits": {
        row.name: _UNITS.get(row.kind, "") + row.help.partition(" (")[0].rstrip(".") + "."
        for row in ROWS
    },
    "CrashCell": {"line": "Counted from 1 within the cell.", "stack": "Innermost frame first."},
    "Frame": {
        "cell": "The index of the notebook cell whose code it runs.",
        "source_line": "The text of the line, for the code of a cell.",
    },
    "Environment": {"machine": "The host name of the machine that ran the notebook."},
    "CellRecord": {"memory_kept": "What stayed allocated after the cell; may be negative."},
    "Culprits": {
        "cells": "In order, the crash cell last; empty where nothing reproduced.",
        "minimal": "Whether without any one of them it no longer happens.",
        "look_first": "The index of the cell that a person should read first.",
        "trials": "Kernels that were started for the search.",
        "cached": "Trials that an earlier search had run.",
        "forked": "Answers that were found in forks of a live kernel.",
        "fork_note": "Why there were no such answers, or not from all states of the notebook.",
        "reproduced": "How often of how many times it happened again.",
        "endings": "How these runs ended: passed, or the kind of the cause, with the number of runs.",
        "seconds": "Wall time of the search.",
        "stopped": "Why the search ended before its result was known to be minimal, if it did.",
    },
    "Summary": {
        "started": "When this call began, ISO 8601 in UTC.",
        "seconds": "Wall time of this call.",
        "root": "The directory that paths are relative to.",
        "out": "The directory that everything was written to.",
        "resumed": "It went on from the journal of an earlier call.",
        "jobs": "How many notebooks could run at a time.",
        "limits": "The profile or file that --limits named.",
        "shard": "[K, N].",
        "counts": "How many notebooks there are of each status.",
        "flaky": "How many passed after an attempt that did not.",
    },
    "NotebookSummary": {
        "path": "Relative to root, with /.",
        "seconds": "Wall time of the last attempt, the search for culprits left out.",
        "error": "Why it was refused, or what failed.",
        "cause": "The kind of the verdict's cause.",
        "summary": "The cause in one sentence.",
        "crash_cell": "The code cell that ran when it happened, from 0.",
        "culprits": "The code cells that it takes, from 0; null where there was no search.",
        "verdict": "Relative to out.",
        "notebook": "The annotated notebook, relative to out.",
        "repro": "The reproduction, relative to out.",
        "machine": "The host name of the machine that ran it.",
        "losses": "Machines of a cluster whose workers were lost while they ran it.",
    },
}


def _const(**values: object) -> dict[str, Any]:
    return {"properties": {name: {"const": value} for name, value in values.items()}}


def _types(**kinds: str) -> dict[str, Any]:
    return {"properties": {name: {"type": kind} for name, kind in kinds.items()}}


FAILURES = ("cell_error", "kernel_died", "timeout", "limit_exceeded", "start_failed")
RULES: Mapping[str, list[dict[str, Any]]] = {
    "Verdict": [
        {
            "description": "Each status has its exit code.",
            "oneOf": [_const(status=s.value, exit_code=s.exit_code) for s in Status],
        },
        {
            "description": "A notebook that passed has no cause.",
            "if": _const(status="passed"),
            "then": _types(cause="null", crash_cell="null", culprits="null"),
        },
        {
            "description": "Whatever the notebook or its kernel did wrong has one, be it unknown.",
            "if": {"properties": {"status": {"enum": list(FAILURES)}}},
            "then": _types(cause="object"),
        },
    ],
    "Enforcement": [{"if": _const(by="none"), "then": _const(hard=False)}],
    "Cause": [
        {
            "description": "A process ends by a signal or by an exit code, never by both.",
            "not": _types(signal="integer", exit_code="integer"),
        }
    ],
    "Culprits": [
        {
            "description": "A search that came to its end has found cells; nothing is not minimal.",
            "if": {"anyOf": [_types(stopped="null"), _const(minimal=True)]},
            "then": {"properties": {"cells": {"minItems": 1}}},
        }
    ],
}
"""Rules that connect fields, by the name of their type."""


def verdict_schema() -> dict[str, Any]:
    """Return the JSON Schema of ``verdict.json``."""
    return _schema(
        Verdict,
        VERDICT_SCHEMA,
        "The verdict of safe-exec on one notebook",
        "Sizes are bytes, times are seconds. A null number was not measured; in limits it means "
        "unlimited. Cells are counted from 0: index over all cells of the notebook (without those "
        "that safe-exec added), code_index over its code cells.",
    )


def summary_schema() -> dict[str, Any]:
    """Return the JSON Schema of ``summary.json``."""
    schema = _schema(
        Summary,
        SUMMARY_SCHEMA,
        "The summary of a safe-exec batch",
        "Times are seconds. null is not known, or none.",
    )
    # The words of NotebookResult.status: those of a verdict, and those of a notebook that was not run.
    statuses = [*(s.value for s in Status), "refused", "unchanged", "not_run"]
    codes = sorted({2, *(s.exit_code for s in Status)})
    notebook = schema["$defs"]["NotebookSummary"]["properties"]
    notebook["status"] = {"enum": statuses}
    notebook["exit_code"] = {"enum": [*codes, None]}
    notebook["cause"] |= {"enum": [*(kind.value for kind in CauseKind), None]}
    schema["properties"]["exit_code"] = {"enum": codes}
    schema["properties"]["counts"]["propertyNames"] = {"enum": statuses}
    return schema


def _schema(kind: type[msgspec.Struct], identity: str, title: str, text: str) -> dict[str, Any]:
    definitions = msgspec.json.schema(kind)["$defs"]
    for name, definition in definitions.items():
        _overlay(name, definition)
    head = {"$schema": DIALECT, "$id": identity, "title": title, "description": text}
    root = definitions.pop(kind.__name__)
    del root["title"]
    return {**head, **root, "$defs": dict(sorted(definitions.items()))}


def _overlay(name: str, definition: dict[str, Any]) -> None:
    # A docstring of the code is not a description of the document; nor is a default one of a
    # document that always has the key.
    definition.pop("description", None)
    properties = definition.get("properties", {})
    for key, value in properties.items():
        value.pop("default", None)
        if (description := DESCRIPTIONS.get(name, {}).get(key)) is not None:
            value["description"] = description
    if properties:
        absent = OPTIONAL.get(name, frozenset())
        definition["required"] = [key for key in properties if key not in absent]
        definition["additionalProperties"] = False
    if name in RULES:
        definition["allOf"] = RULES[name]


FILES = {
    Path(__file__).parent / "verdict.schema.json": verdict_schema,
    Path(__file__).parent / "batch" / "summary.schema.json": summary_schema,
}


def text_of(schema: Mapping[str, Any]) -> str:
    """Return a schema as the text of its file."""
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for path, schema in FILES.items():
        path.write_text(text_of(schema()), encoding="utf-8")
