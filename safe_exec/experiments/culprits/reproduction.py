"""The reproduction: a small notebook that holds the culprits alone and carries its limits. Pure; imports notebook's key and model."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from safe_exec.model.limits import Limits
from safe_exec.model.verdict import Cause
from safe_exec.notebook.notebook import METADATA_KEY
from safe_exec.notebook.validate import complete_metadata

REPRODUCES = "reproduces"
"""The key in ``metadata.safe_exec`` by which a reproduction is known."""
_NOT_CARRIED = ("interrupt_grace",)


def build(
    node: Any,
    cells: Sequence[int],
    *,
    limits: Limits,
    kernel: str,
    allow_errors: bool,
    origin: str,
    cause: Cause | None,
    crash_source: str | None = None,
    isolation: Mapping[str, Any] | None = None,
) -> Any:
    """A notebook of the culprits, in order, the crash cell last; ``node`` is stripped and stays as it is.

    ``crash_source`` stands in for the source of the crash cell, where less of it is enough. ``origin`` names the notebook it is from.
    """
    document = copy.deepcopy(node)
    document["cells"] = [copy.deepcopy(node.cells[index]) for index in cells]
    for cell in document.cells:
        cell["outputs"], cell["execution_count"] = [], None
    if crash_source is not None:
        document.cells[-1]["source"] = crash_source
    metadata = document.metadata
    metadata.pop("widgets", None)
    spec = metadata.get("kernelspec")
    metadata["kernelspec"] = {
        "display_name": kernel,
        **(spec if isinstance(spec, Mapping) else {}),
        "name": kernel,
    }
    complete_metadata(metadata, kernel, None)
    ours = metadata.setdefault(METADATA_KEY, {})
    ours["limits"] = {
        name: value for name, value in limits.as_dict().items() if name not in _NOT_CARRIED
    }
    if isolation:
        ours["isolation"] = dict(isolation)
    ours[REPRODUCES] = {
        "notebook": origin,
        "cells": list(cells),
        "cause": cause.kind.value if cause else None,
    }
    # metadata.execution.timeout would count after the figures carried here; allow_errors is part of how it ran.
    execution = dict(metadata.get("execution") or {})
    execution.pop("timeout", None)
    execution["allow_errors"] = allow_errors
    metadata["execution"] = execution
    return document


def is_reproduction(node: Any) -> bool:
    """Whether a notebook is one that we wrote: it is small already."""
    ours = node.metadata.get(METADATA_KEY)
    return isinstance(ours, dict) and isinstance(ours.get(REPRODUCES), dict)
