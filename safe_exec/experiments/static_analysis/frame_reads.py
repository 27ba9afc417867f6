"""Finds the names that were read at the lines of a crash's stack frames.

A kernel that died in ``solve()``, called at line 2 of its cell, had just read ``solve``. Without
the cell that defines it the same run ends there in a NameError, so no trial is needed to find out.
Pure; imports its neighbours only.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from itertools import pairwise

from safe_exec.experiments.static_analysis.dependencies import surely_read
from safe_exec.experiments.static_analysis.ipython_syntax import bound_in

_SCOPES = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
_SWALLOWING = ("suppress", "raises")
_BODIES = ast.stmt | ast.ExceptHandler | ast.match_case


def is_caught(source: str, line: int) -> bool:
    """Tell whether an exception at a line may be caught there.

    True if the source cannot be parsed.
    """
    try:
        return any(
            _may_swallow(outer, inner) for outer, inner in pairwise(_chain(ast.parse(source), line))
        )
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return True


def names_read_at(source: str, line: int) -> frozenset[str]:
    """Return the global names that the innermost statement at a line reads before any other effect.

    The result is empty if that is not certain.
    """
    try:
        return _read_in(ast.parse(source), line)
    except (
        SyntaxError,
        ValueError,
        RecursionError,
        MemoryError,
    ):  # the latter two: nested deeper than can be followed
        return frozenset()


def _read_in(tree: ast.Module, line: int) -> frozenset[str]:
    chain = list(_chain(tree, line))
    if not chain or any(_may_swallow(outer, inner) for outer, inner in pairwise(chain)):
        return frozenset()
    local = set().union(*(_locals(node) for node in chain if isinstance(node, _SCOPES)), set())
    statement = next((node for node in reversed(chain) if isinstance(node, ast.stmt)), None)
    if statement is None or isinstance(statement, _SCOPES):
        return frozenset()
    return (
        frozenset(read.name for read in surely_read([statement], {}) if read.before_effect) - local
    )


def _chain(node: ast.AST, line: int) -> Iterator[ast.AST]:
    """Yield the statements around a line, outermost first."""
    # Nothing is yielded inside a statement whose own head shares the line: the statement may not
    # have got past its head.
    for child in ast.iter_child_nodes(node):
        first, last = getattr(child, "lineno", None), getattr(child, "end_lineno", None)
        if (
            first is not None
            and last is not None
            and first <= line <= last
            and isinstance(child, ast.stmt)
        ):
            yield child
            if not _in_head(child, line):
                yield from _chain(child, line)
            return
        if isinstance(child, ast.ExceptHandler | ast.match_case) and not _in_head(child, line):
            inner = list(_chain(child, line))
            if inner:
                yield from inner
                return


def _in_head(node: ast.AST, line: int) -> bool:
    """Tell whether a line is in the head of a compound statement: the part before its body."""
    heads = (
        part
        for child in ast.iter_child_nodes(node)
        if not isinstance(child, _BODIES)
        for part in ast.walk(child)
    )
    return any((getattr(part, "end_lineno", None) or 0) >= line for part in heads)


def _may_swallow(outer: ast.AST, inner: ast.AST) -> bool:
    """Tell whether the outer statement may catch an exception of the inner one."""
    if isinstance(outer, ast.Try | ast.TryStar):
        leaves = any(
            isinstance(n, ast.Return | ast.Break | ast.Continue)
            for part in outer.finalbody
            for n in ast.walk(part)
        )
        return (bool(outer.handlers) and inner in outer.body) or (
            leaves and inner not in outer.finalbody
        )
    if isinstance(outer, ast.With | ast.AsyncWith):
        return any(word in ast.unparse(item) for item in outer.items for word in _SWALLOWING)
    return False


def _locals(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> set[str]:
    """Return the names that a function or class binds, ignoring ``global`` declarations."""
    names = {argument.arg for argument in ast.walk(node) if isinstance(argument, ast.arg)}
    return (
        names
        | bound_in(node.body)[0]
        | {str(parameter.name) for parameter in getattr(node, "type_params", ())}
    )
