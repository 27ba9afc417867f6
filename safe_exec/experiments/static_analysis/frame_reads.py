"""Names that were read on the way to a crash: at the line of each of its frames. Pure; imports slicing and cells.

A kernel that died in ``solve()``, called at line 2 of its cell, had read ``solve`` just before. Without the cell that defines it the same
run ends there in a NameError, and no trial is needed to know it.
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
    """Whether an exception at a line may be caught there; also where the source cannot be read."""
    try:
        return any(
            _may_swallow(outer, inner) for outer, inner in pairwise(_chain(ast.parse(source), line))
        )
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return True


def names_read_at(source: str, line: int) -> frozenset[str]:
    """Global names that the innermost statement at a line reads before it can do anything else; none where that is not sure."""
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
    """The statements around a line, outermost first; none within one whose own head shares the line: it may not have got there."""
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
    """Whether what comes before the body of a statement, a handler or a case reaches to a line."""
    heads = (
        part
        for child in ast.iter_child_nodes(node)
        if not isinstance(child, _BODIES)
        for part in ast.walk(child)
    )
    return any((getattr(part, "end_lineno", None) or 0) >= line for part in heads)


def _may_swallow(outer: ast.AST, inner: ast.AST) -> bool:
    """Whether an exception of the inner statement may be caught by the outer one."""
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
    """Names that a function or class binds: parameters and whatever is bound in it, though a ``global`` may say otherwise."""
    names = {argument.arg for argument in ast.walk(node) if isinstance(argument, ast.arg)}
    return (
        names
        | bound_in(node.body)[0]
        | {str(parameter.name) for parameter in getattr(node, "type_params", ())}
    )
