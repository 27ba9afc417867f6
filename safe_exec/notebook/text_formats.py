"""Notebooks that are kept as text: scripts with cells, MyST, R Markdown and Quarto (jupytext).

jupytext does not tell where a cell lies in its file, so ``file_lines`` finds it by its text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safe_exec.errors import NotebookError
from safe_exec.files import one_line
from safe_exec.model.patterns import lazy_pattern

SCRIPTS = frozenset({".py", ".r", ".jl"})
DOCUMENTS = frozenset({".md", ".rmd", ".qmd"})
# A larger text is data with the wrong name.
MOST_BYTES = 16 << 20
# Comparisons of lines after which the place of the remaining cells is given up as unknown.
MOST_COMPARISONS = 5_000_000

_CELL_MARK = lazy_pattern(r"^#[ ]?%%", re.MULTILINE)
_HEADER = lazy_pattern(
    r"\A(?:#!.*\n)?(?:# )?---\n(?:.*\n){0,60}?(?:# )?jupy(?:ter|text):", re.ASCII
)
_MYST_CELL = lazy_pattern(r"^[`~]{3,}\s*\{code-cell\}", re.MULTILINE)
_FENCE = lazy_pattern(r"^[`~]{3,}\s*\{?\w", re.MULTILINE)
_QUARTO_KERNEL = lazy_pattern(r"\A---\n(?:(?!---).*\n)*?jupyter:[ \t]*([\w.-]+)[ \t]*\n")
_COMMENT = lazy_pattern(r"^#[ ]?")


def is_text_format(path: Path) -> bool:
    """Tell whether a file of this name may be a notebook kept as text."""
    return path.suffix.lower() in SCRIPTS | DOCUMENTS


def has_cells(path: Path, data: bytes) -> bool:
    """Tell whether a text has code cells or a header of jupytext."""
    text = _decode(data)
    if path.suffix.lower() in SCRIPTS:
        return _CELL_MARK.search(text) is not None or _HEADER.match(text) is not None
    return _FENCE.search(text) is not None


def document_of(path: Path, data: bytes) -> dict[str, Any]:
    """Convert a text to the JSON document of a notebook. Raises NotebookError."""
    if len(data) > MOST_BYTES:
        raise NotebookError(f"{one_line(path)}: larger than {MOST_BYTES >> 20} MiB of text")
    try:
        import jupytext
    except ImportError:
        raise NotebookError(
            f"{one_line(path)}: a notebook kept as text needs jupytext: "
            "pip install 'safe-exec[jupytext]'"
        ) from None
    text = _decode(data)
    try:
        node = jupytext.reads(text, fmt=_format_of(path, text))
    # The header is YAML of anybody's, and jupytext raises the errors of its parsers.
    except Exception as error:  # noqa: BLE001
        reason = one_line(error)[:200]
        raise NotebookError(f"{one_line(path)}: jupytext cannot read it: {reason}") from None
    settings = node.metadata.pop("jupytext", {})
    for cell in node.cells:
        # jupytext's ids are random; ours depend only on the file.
        cell.pop("id", None)
    document: dict[str, Any] = {
        "cells": [dict(cell) for cell in node.cells],
        "metadata": dict(node.metadata),
        "nbformat": node.nbformat,
        "nbformat_minor": node.nbformat_minor,
    }
    _complete(document["metadata"], settings, path, text)
    return document


def _format_of(path: Path, text: str) -> str:
    suffix = path.suffix.lower()
    if suffix == ".md":
        return "md:myst" if _MYST_CELL.search(text) else "md"
    # Cells of Quarto are those of R Markdown; jupytext's own format starts Quarto's program.
    if suffix in (".rmd", ".qmd"):
        return "Rmd"
    name = {".r": "R"}.get(suffix, suffix[1:])
    return f"{name}:percent" if _CELL_MARK.search(text) else name


def _complete(metadata: dict[str, Any], settings: Mapping[str, Any], path: Path, text: str) -> None:
    """Add the kernel and the language that the text implies."""
    kernel = _QUARTO_KERNEL.match(text) if path.suffix.lower() == ".qmd" else None
    if kernel is not None:
        metadata["kernelspec"] = {"name": kernel[1], "display_name": kernel[1]}
    kernelspec = metadata.get("kernelspec")
    kernel_language = kernelspec.get("language") if isinstance(kernelspec, Mapping) else None
    lexer = str(settings.get("default_lexer", ""))
    language = (
        kernel_language
        or settings.get("main_language")
        or ("python" if "python" in lexer else None)
    )
    if isinstance(language, str):
        metadata.setdefault("language_info", {"name": language})


def _decode(data: bytes) -> str:
    return data.decode("utf-8-sig", "replace").replace("\r\n", "\n")


# --- lines ----------------------------------------------------------------------------------------


def file_lines(data: bytes, cells: Sequence[Mapping[str, Any]]) -> list[tuple[int, ...]]:
    """Return, for each line of each cell, its line in the text, from 1; empty if not found.

    ``cells`` are those of the whole notebook, in order.
    """
    search = _Search(_decode(data).split("\n"))
    return [
        search.place(str(cell["source"]).split("\n"), cell["cell_type"] == "code") for cell in cells
    ]


class _Search:
    """Finds cells one after the other; each is searched behind the one before."""

    def __init__(self, lines: list[str]) -> None:
        self._lines = lines
        self._position = 0
        self._comparisons = 0

    def place(self, source: list[str], is_code: bool) -> tuple[int, ...]:
        start = self._find(source, is_code)
        if start is not None:
            return tuple(range(start + 1, start + 1 + len(source)))
        # jupytext puts the language of a fence in front of the cell, as a magic.
        if is_code and source[0].startswith("%%") and len(source) > 1:
            start = self._find(source[1:], is_code)
        return () if start is None else (start, *range(start + 1, start + len(source)))

    def _find(self, source: list[str], is_code: bool) -> int | None:
        """Return the index of a cell's first line; later searches start behind its last one."""
        for start in range(self._position, len(self._lines) - len(source) + 1):
            if self._comparisons > MOST_COMPARISONS:
                return None
            if all(self._matches(start + n, line, is_code) for n, line in enumerate(source)):
                self._position = start + len(source)
                return start
        return None

    def _matches(self, number: int, line: str, is_code: bool) -> bool:
        self._comparisons += 1
        file_line = self._lines[number].rstrip()
        if file_line == line.rstrip():
            return True
        # Scripts keep text as comments, and magics too.
        is_comment = not is_code or line.lstrip().startswith(("%", "!", "?"))
        return is_comment and _COMMENT.sub("", file_line, count=1) == line.rstrip()
