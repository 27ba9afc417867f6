"""The form in which an executed notebook is written: its path, and which traces of the run stay."""

from __future__ import annotations

import copy
from enum import StrEnum
from typing import Any

from msgspec import Struct

from safe_exec.errors import UsageError

# Times of a cell's execution, as JupyterLab and nbclient store them.
_TIMES = "execution"
# Outputs with widgets need their state.
_WIDGETS = "widgets"


class OnFailure(StrEnum):
    """The treatment of a notebook that is executed in place and fails."""

    KEEP = "keep"
    WRITE = "write"


def on_failure(text: str) -> OnFailure:
    """Parse ``keep`` or ``write``. Raises UsageError."""
    try:
        return OnFailure(text)
    except ValueError:
        raise UsageError(f"on_failure: {text!r} is neither 'keep' nor 'write'") from None


class OutputForm(Struct, frozen=True, kw_only=True):
    """The form in which an executed notebook is written.

    With ``in_place`` it replaces the notebook itself; after a failure, only if ``on_failure`` is
    WRITE. With ``clean_metadata`` it has no times, figures and other traces of the run, with
    ``no_output`` no outputs of cells.
    """

    in_place: bool = False
    on_failure: OnFailure = OnFailure.KEEP
    clean_metadata: bool = False
    no_output: bool = False


def arrange(node: Any, original: Any, form: OutputForm) -> Any:
    """Return the executed notebook in this form; ``original`` has the same cells.

    Neither is changed. The result shares outputs with ``node``.
    """
    if not (form.clean_metadata or form.no_output):
        return node
    arranged_node = copy.copy(node)
    arranged_node["cells"] = [copy.copy(cell) for cell in node.cells]
    for cell, original_cell in zip(arranged_node.cells, original.cells, strict=True):
        if form.clean_metadata:
            cell["metadata"] = copy.deepcopy(original_cell.metadata)
            cell.metadata.pop(_TIMES, None)
        if form.no_output and cell.cell_type == "code":
            cell["outputs"] = []
            cell["execution_count"] = None
    metadata = copy.copy(node.metadata)
    if form.clean_metadata:
        metadata = copy.deepcopy(original.metadata)
        if _WIDGETS in node.metadata:
            metadata[_WIDGETS] = node.metadata[_WIDGETS]
    if form.no_output:
        metadata.pop(_WIDGETS, None)
    arranged_node["metadata"] = metadata
    return arranged_node
