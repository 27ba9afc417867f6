"""Checks the structure of a version 4 notebook, as far as executing and writing rely on it.

nbformat's JSON schema takes longer to load than a small notebook takes to run, and it rejects
notebooks for a single harmless extra key. Imports no other module of safe-exec.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

_CELL_TYPES = ("code", "markdown", "raw")
# The required keys of outputs that some tools omit, and their default values.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "stream": {"name": "stdout"},
    "display_data": {"metadata": {}},
    "execute_result": {"metadata": {}, "execution_count": None},
    "error": {"evalue": "", "traceback": []},
}


def complete_metadata(metadata: dict[str, Any], kernel: str, language: str | None) -> None:
    """Add the metadata that the format requires and some tools omit, so that the output is valid.

    ``kernel`` is the kernel that ran, ``language`` its language. Valid values are not changed.
    """
    if "kernelspec" in metadata:
        section = metadata["kernelspec"]
        spec = dict(section) if isinstance(section, Mapping) else {}
        if not isinstance(spec.get("name"), str):
            spec["name"] = kernel
        if not isinstance(spec.get("display_name"), str):
            spec["display_name"] = spec["name"]
        metadata["kernelspec"] = spec
    if "language_info" in metadata:
        section = metadata["language_info"]
        info = dict(section) if isinstance(section, Mapping) else {}
        if not isinstance(info.get("name"), str):
            info["name"] = language or kernel
        metadata["language_info"] = info
    # nbformat writes it in memory only; files with it are invalid.
    original = metadata.get("orig_nbformat", 1)
    # No format has a place for it in a file.
    if type(original) is not int or original < 1:
        del metadata["orig_nbformat"]


def problems(document: Mapping[str, Any]) -> Iterator[str]:
    """Yield the problems that would make executing or writing the notebook fail."""
    if not isinstance(document.get("metadata"), dict):
        yield "its metadata must be an object"
    cells = document.get("cells")
    if not isinstance(cells, list):
        yield "its cells must be a list"
        return
    for index, cell in enumerate(cells):
        for problem in _cell_problems(cell):
            yield f"cell {index} (from 0): {problem}"


def _cell_problems(cell: Any) -> Iterator[str]:
    if not isinstance(cell, dict):
        yield "it must be an object"
        return
    if cell.get("cell_type") not in _CELL_TYPES:
        yield f"cell_type must be one of {', '.join(_CELL_TYPES)}"
    if not _is_text(cell.get("source")):
        yield "source must be text or a list of lines"
    metadata = cell.get("metadata")
    if not isinstance(metadata, dict):
        yield "metadata must be an object"
    # nbclient only tests whether a word is in the tags, so texts and mappings do no harm.
    elif not isinstance(metadata.get("tags", []), list | str | dict):
        yield "metadata.tags must be a list of words"
    attachments = cell.get("attachments", {})
    if not isinstance(attachments, dict) or not all(
        isinstance(item, dict) for item in attachments.values()
    ):
        yield "attachments must be objects"
    if cell.get("cell_type") == "code":
        yield from _outputs_problems(cell.setdefault("outputs", []))
        # The format requires the key, and some tools omit it.
        cell.setdefault("execution_count", None)
        return
    # Converters leave these keys in text cells, where no format allows them.
    for key in ("outputs", "execution_count"):
        if not cell.get(key):
            cell.pop(key, None)


def _outputs_problems(outputs: Any) -> Iterator[str]:
    if not isinstance(outputs, list):
        yield "outputs must be a list"
        return
    for index, output in enumerate(outputs):
        for problem in _output_problems(output):
            yield f"output {index}: {problem}"


def _output_problems(output: Any) -> Iterator[str]:
    if not isinstance(output, dict) or not isinstance(output.get("output_type"), str):
        yield "it must be an object with an output_type"
        return
    kind = output["output_type"]
    if kind == "stream" and not _is_text(output.get("text")):
        yield "text must be text or a list of lines"
    if kind in ("display_data", "execute_result") and not isinstance(output.get("data"), dict):
        yield "data must be an object"
    if kind == "error" and not isinstance(output.get("ename"), str):
        yield "ename must be text"
    # Tools omit these keys, and viewers fail without them.
    for key, default in _DEFAULTS.get(kind, {}).items():
        output.setdefault(key, copy.copy(default))


def _is_text(value: object) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and all(isinstance(line, str) for line in value)
    )
