"""Splits code cells into statements at all depths, and joins the remaining ones. Pure.

A reproduction consists of the user's own lines. So a statement is removed with all its lines, with
the comments above it, and nothing is put in its place.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from msgspec import Struct

from safe_exec.experiments.static_analysis.ipython_syntax import python_of

# Deeper blocks are left whole.
MOST_DEPTH = 12
# The lines of Python's parser. splitlines() knows more, within texts too.
_LINE_END = re.compile(r"\r\n|\r|\n")
_CLAUSE = re.compile(r"\s*(?:else|finally)\b")


class Span(Struct, frozen=True, kw_only=True):
    """The lines of a statement or of one of its optional clauses: first and last, from 1.

    The comments and blank lines above it belong to it. ``depth`` is 0 at the top level of a cell.
    """

    first: int
    last: int
    depth: int

    def has(self, line: int) -> bool:
        """Whether a line lies in the span."""
        return self.first <= line <= self.last

    def holds(self, other: Span) -> bool:
        """Whether another span is nested in this one."""
        return self.depth < other.depth and self.first <= other.first and other.last <= self.last


def lines_of(source: str) -> list[str]:
    """Return the lines of a source as Python's parser counts them."""
    return _LINE_END.split(source)


def spans_of(source: str) -> list[Span]:
    """Return the spans of a cell, outer spans before inner ones.

    A cell that is not Python, or whose body a magic passes elsewhere, has none.
    """
    lines = lines_of(source)
    cell, tree = python_of(source)
    # A magic may have changed the number of lines: then nothing is known of their places.
    if tree is None or cell.text.count("\n") + 1 != len(lines):
        return []
    return list(_spans(tree.body, lines, 0, first_free=1 + _magic_lines(lines)))


def _magic_lines(lines: Sequence[str]) -> int:
    """Return the number of lines up to the last cell magic at the top of a cell."""
    count = 0
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.lstrip().startswith("%%"):
            break
        if line.strip():
            count = number
    return count


def _spans(
    body: Sequence[ast.stmt], lines: Sequence[str], depth: int, first_free: int
) -> Iterator[Span]:
    """Yield the spans of a block; lines above ``first_free`` belong to the statement before it."""
    groups: list[list[ast.stmt]] = []
    for statement in body:
        # Two statements on one line stay together, also if the line goes on after a backslash.
        if groups and (
            (groups[-1][-1].end_lineno or 0) >= _first_line(statement)
            or lines[_first_line(statement) - 2].endswith("\\")
        ):
            groups[-1].append(statement)
        else:
            groups.append([statement])
    for group in groups:
        start, last = _first_line(group[0]), group[-1].end_lineno or group[-1].lineno
        # The tree ends before a comment behind a backslash, whose line must not be lost.
        while depth == 0 and last < len(lines) and _ends_backslash(lines, last + 1):
            last += 1
        # A block in the line of its header cannot be removed by lines.
        if start < first_free or lines[start - 1][: group[0].col_offset].strip():
            return
        yield Span(first=_with_comments(lines, start, first_free), last=last, depth=depth)
        if len(group) == 1 and depth < MOST_DEPTH:
            yield from _inside(group[0], lines, depth + 1)
        first_free = last + 1


def _inside(statement: ast.AST, lines: Sequence[str], depth: int) -> Iterator[Span]:
    """Yield the spans inside a statement or clause."""
    body = _block(statement, "body")
    if not body:
        # This is no compound statement, or a `match`, which has only cases.
        yield from _clauses(statement, lines, depth)
        return
    header_end = _first_line(body[0]) - 1
    while header_end > 0 and _is_comment(lines[header_end - 1]):
        header_end -= 1
    yield from _spans(body, lines, depth, header_end + 1)
    yield from _clauses(statement, lines, depth)
    end = max(
        _last_line(body), *(_last_line(_block(c, "body")) for c in _block(statement, "handlers")), 0
    )
    for name in ("orelse", "finalbody"):
        block = _block(statement, name)
        if block:
            yield from _alternative(block, lines, depth, end)
            end = _last_line(block)


def _clauses(statement: ast.AST, lines: Sequence[str], depth: int) -> Iterator[Span]:
    """Yield the spans of `except` and `case` clauses, and the spans inside them."""
    for clause in (*_block(statement, "handlers"), *_block(statement, "cases")):
        first = int(getattr(clause, "lineno", 0) or clause.pattern.lineno)
        yield Span(first=first, last=_last_line(_block(clause, "body")), depth=depth)
        if depth < MOST_DEPTH:
            yield from _inside(clause, lines, depth + 1)


def _alternative(block: list[Any], lines: Sequence[str], depth: int, end: int) -> Iterator[Span]:
    """Yield the spans of an `else`, `finally` or `elif` below the line ``end``."""
    last = _last_line(block)
    at = next((n for n in range(end + 1, block[0].lineno + 1) if _CLAUSE.match(lines[n - 1])), None)
    yield Span(first=at or block[0].lineno, last=last, depth=depth)
    if depth >= MOST_DEPTH:
        return
    if at is not None:
        yield from _spans(block, lines, depth + 1, at + 1)
    else:
        yield from _inside(block[0], lines, depth + 1)


def _block(node: ast.AST, name: str) -> list[Any]:
    """Return the statements or clauses of a field of a node; empty without such a field."""
    block = getattr(node, name, None)
    return block if isinstance(block, list) else []


def _last_line(block: Sequence[Any]) -> int:
    return int(block[-1].end_lineno or 0) if block else 0


def _first_line(statement: ast.stmt) -> int:
    decorators = _block(statement, "decorator_list")
    return min([statement.lineno, *(int(decorator.lineno) for decorator in decorators)])


def _with_comments(lines: Sequence[str], first: int, first_free: int) -> int:
    while first > first_free and _is_comment(lines[first - 2]):
        first -= 1
    return first


def _is_comment(line: str) -> bool:
    return not line.strip() or line.lstrip().startswith("#")


def _ends_backslash(lines: Sequence[str], number: int) -> bool:
    """Whether Python refuses the lines above ``number`` without it, because of a backslash."""
    # A backslash joins the next line. If that one is blank, Python wants one more.
    padded: list[str] = ["", "", *lines[: number - 1]]
    farther, above = padded[-2], padded[-1]
    if above.endswith("\\"):
        return True
    return not above.strip() and farther.endswith("\\") and _is_comment(lines[number - 1])


def remaining_lines(source: str, spans: Sequence[Span], removed: Collection[Span]) -> list[int]:
    """Return the numbers of the lines that remain after the removal of some spans.

    Blank lines at both ends, and comments below the last statement, go too.
    """
    lines = lines_of(source)
    removed_lines = {n for span in removed for n in range(span.first, span.last + 1)}
    end = max((span.last for span in spans), default=len(lines))
    numbers = [n for n in range(1, end + 1) if n not in removed_lines]
    while numbers and not lines[numbers[0] - 1].strip():
        numbers.pop(0)
    while numbers and not lines[numbers[-1] - 1].strip():
        if _ends_backslash(lines, numbers[-1]):
            break
        numbers.pop()
    return numbers


def text_of(source: str, numbers: Sequence[int]) -> str:
    """Return the lines of a source with these numbers, as one text."""
    lines = lines_of(source)
    return "\n".join(lines[number - 1] for number in numbers)


def is_valid(source: str) -> bool:
    """Whether a source is Python with at least one statement."""
    _, tree = python_of(source)
    return tree is not None and bool(tree.body)
