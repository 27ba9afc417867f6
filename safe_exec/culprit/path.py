"""Names that were read on the way to a crash: at the line of each of its frames. Pure; imports slicing.

A kernel that died in ``solve()``, called at line 2 of its cell, had read ``solve`` just before. Without the cell that defines it the same
run ends there in a NameError, and no trial is needed to know it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from itertools import pairwise

from safe_exec.culprit.slicing import surely_read

_SCOPES = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
_SWALLOWING = ("suppress", "raises")


def read_on_the_way(source: str, line: int) -> frozenset[str]:
    """Global names that the innermost statement at a line reads before it can do anything else; none where that is not sure."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return frozenset()
    chain = list(_chain(tree, line))
    if not chain or any(_may_swallow(outer, inner) for outer, inner in pairwise(chain)):
        return frozenset()
    local = set().union(*(_locals(node) for node in chain if isinstance(node, _SCOPES)), set())
    statement = next((node for node in reversed(chain) if isinstance(node, ast.stmt)), None)
    if statement is None or isinstance(statement, _SCOPES | ast.ClassDef):
        return frozenset()
    return frozenset(read.name for read in surely_read([statement], {}) if read.before_effect) - local


def _chain(node: ast.AST, line: int) -> Iterator[ast.AST]:
    """The statements and functions around a line, outermost first."""
    for child in ast.iter_child_nodes(node):
        first, last = getattr(child, "lineno", None), getattr(child, "end_lineno", None)
        if first is not None and last is not None and first <= line <= last and isinstance(child, ast.stmt):
            yield child
            yield from _chain(child, line)
            return
        if isinstance(child, ast.ExceptHandler | ast.match_case):
            inner = list(_chain(child, line))
            if inner:
                yield from inner
                return


def _may_swallow(outer: ast.AST, inner: ast.AST) -> bool:
    """Whether an exception of the inner statement may be caught by the outer one."""
    if isinstance(outer, ast.Try):
        return bool(outer.handlers) and inner in outer.body
    if isinstance(outer, ast.With | ast.AsyncWith):
        return any(word in ast.unparse(item) for item in outer.items for word in _SWALLOWING)
    return False


def _locals(node: ast.AST) -> set[str]:
    """Names that a function binds: parameters and whatever is stored in it."""
    names = {argument.arg for argument in ast.walk(node) if isinstance(argument, ast.arg)}
    names |= {child.id for child in ast.walk(node) if isinstance(child, ast.Name) and not isinstance(child.ctx, ast.Load)}
    names |= {child.name for child in ast.walk(node) if isinstance(child, ast.FunctionDef | ast.ClassDef) and child is not node}
    names |= {
        (alias.asname or alias.name).partition(".")[0]
        for child in ast.walk(node)
        if isinstance(child, ast.Import | ast.ImportFrom)
        for alias in child.names
    }
    return names
