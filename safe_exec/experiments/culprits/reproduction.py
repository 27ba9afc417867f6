"""Builds the reproduction: a small notebook of the culprits alone, with the limits in its metadata.

Pure; imports model and the notebook's metadata key.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from safe_exec.model.limits import Limits
from safe_exec.model.verdict import Cause
from safe_exec.notebook.notebook import METADATA_KEY
from safe_exec.notebook.validate import complete_metadata

# The key in `metadata.safe_exec` by which a reproduction is known.
REPRODUCES = "reproduces"
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
    sources: Mapping[int, str] | None = None,
    isolation: Mapping[str, Any] | None = None,
) -> Any:
    """Build a notebook of the given cells, in order, with the crash cell last.

    ``node`` is a stripped notebook and is not modified. ``sources`` has, by index, the shorter
    source of each cell that is needed only in part. ``origin`` is the path of the original
    notebook.
    """
    document = copy.deepcopy(node)
    document["cells"] = [copy.deepcopy(node.cells[index]) for index in cells]
    for index, cell in zip(cells, document.cells, strict=True):
        cell["outputs"], cell["execution_count"] = [], None
        cell["source"] = (sources or {}).get(index, cell["source"])
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
    # metadata.execution.timeout would count after the figures carried here; allow_errors is part of
    # how it ran.
    execution = dict(metadata.get("execution") or {})
    execution.pop("timeout", None)
    execution["allow_errors"] = allow_errors
    metadata["execution"] = execution
    return document


def is_reproduction(node: Any) -> bool:
    """Tell whether safe-exec wrote this notebook as a reproduction.

    Another search could not make it smaller.
    """
    ours = node.metadata.get(METADATA_KEY)
    return isinstance(ours, dict) and isinstance(ours.get(REPRODUCES), dict)
