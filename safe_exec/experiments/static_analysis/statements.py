"""Splits the source of a cell into its top-level statements. Pure."""

from __future__ import annotations

import ast
import re


def statements_of(source: str, last_line: int | None) -> list[tuple[int, str]]:
    """Return the top-level statements of a cell, each with its first line, up to ``last_line``.

    The result is empty for a cell that is not valid Python.
    """
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    lines = re.split(
        r"\r\n|\r|\n", source
    )  # those of the parser: splitlines() knows more, within texts too
    spans: list[tuple[int, int]] = []
    for statement in body:
        first = min(
            [statement.lineno, *(d.lineno for d in getattr(statement, "decorator_list", []))]
        )
        if last_line is not None and first > last_line:
            break
        last = statement.end_lineno or first
        # Two statements on one line stay together, also if the line goes on after a backslash.
        if spans and (spans[-1][1] >= first or lines[first - 2].endswith("\\")):
            spans[-1] = (spans[-1][0], last)
        else:
            spans.append((first, last))
    return [(first, "\n".join(lines[first - 1 : last])) for first, last in spans]
