"""Finds a cell's effects beyond binding names, each with its line.

An effect acts on the whole process, writes a file, changes an object, or calls a function. Pure:
the source is analysed, and nothing is executed.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from enum import IntEnum

from msgspec import Struct

from safe_exec.experiments.static_analysis.ipython_syntax import (
    imports,
    path,
    python_of,
    root,
    words,
)
from safe_exec.experiments.static_analysis.names import LEAVES_RECEIVER, USUAL
from safe_exec.experiments.static_analysis.side_effects import is_trap, writes_file

_IN_PLACE = words(
    "add append clear discard extend fill insert pop popitem put remove resize reverse "
    "setdefault sort update"
)
# Functions that only look at the process, or make an object that no other cell sees.
_READERS = words(
    "active_count collect cpu_count current_thread enumerate main_thread Lock RLock Event "
    "Condition Semaphore Queue"
)
# Names that are input of later cells rather than triggers of their failure.
_INPUTS = (
    "os.environ",
    "os.putenv",
    "os.chdir",
    "subprocess.run",
    "subprocess.check",
    "subprocess.call",
    "os.system",
)
_SCOPES = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


# Functions that slow or limit all code that runs later, whatever names it uses.
_ON_ALL_CODE = words(
    "sys.settrace sys.setprofile threading.settrace threading.setprofile resource.setrlimit"
)


class EffectKind(IntEnum):
    """The kinds of effects, the most significant first."""

    PROCESS = 0
    FILE = 1
    OBJECT = 2
    CALL = 3


class Effect(Struct, frozen=True, kw_only=True):
    """One effect. ``text`` describes it in a few words, ``name`` is the name that it concerns.

    ``is_input`` is true if it prepares input of later cells, such as an environment variable.
    ``on_all_code`` is true if it slows down or limits all code that runs later.
    """

    kind: EffectKind
    line: int
    text: str
    name: str | None = None
    # It prepares input of later cells, such as an environment variable.
    is_input: bool = False
    # It slows down or limits all code that runs later.
    on_all_code: bool = False


def is_imports_only(source: str) -> bool:
    """Tell whether a cell consists of imports only."""
    _, tree = python_of(source)
    body = tree.body if tree is not None else []
    return bool(body) and all(
        isinstance(s, ast.Import | ast.ImportFrom) or _is_text(s) for s in body
    )


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def effects_of(source: str, modules: Mapping[str, str]) -> tuple[Effect, ...]:
    """Return the effects of a cell's top level, sorted by kind.

    ``modules`` maps names to the modules that they were imported as.
    """
    _, tree = python_of(source)
    if tree is None:
        return ()
    modules = {**USUAL, **modules, **{k: v for n in ast.walk(tree) for k, v in imports(n).items()}}
    # Only the top level takes effect when the cell runs.
    effects = [
        effect
        for statement in tree.body
        for node in _immediate_nodes(statement)
        for effect in _effects(node, modules)
    ]
    return tuple(sorted(effects, key=lambda effect: effect.kind))


def functions_of(source: str, modules: Mapping[str, str]) -> dict[str, Effect]:
    """Return the most significant effect of each function that a cell defines.

    A call of the function has this effect.
    """
    _, tree = python_of(source)
    if tree is None:
        return {}
    modules = {**USUAL, **modules, **{k: v for n in ast.walk(tree) for k, v in imports(n).items()}}
    effects_by_function: dict[str, Effect] = {}
    for function in tree.body:
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            effects = [
                e
                for node in ast.walk(function)
                for e in _effects(node, modules)
                if e.kind <= EffectKind.FILE
            ]
            if effects:
                effects_by_function[function.name] = min(effects, key=lambda effect: effect.kind)
    return effects_by_function


def _immediate_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield a statement's nodes without the bodies of functions, which run only when called."""
    yield node
    if not isinstance(node, _SCOPES):
        for child in ast.iter_child_nodes(node):
            yield from _immediate_nodes(child)


def _effects(node: ast.AST, modules: Mapping[str, str]) -> Iterator[Effect]:
    line = getattr(node, "lineno", 0)
    if isinstance(node, ast.Call):
        yield from _of_call(node, modules, line)
    elif isinstance(node, ast.Attribute | ast.Subscript) and not isinstance(node.ctx, ast.Load):
        name = root(node)
        if name is not None and name in modules:
            target: ast.expr = node
            while isinstance(target, ast.Subscript):
                target = target.value
            changed = path(target, modules) or modules[name]
            yield Effect(
                kind=EffectKind.PROCESS,
                line=line,
                text=f"changes `{changed}`",
                is_input=changed.startswith(_INPUTS),
            )
        elif name is not None:
            yield Effect(kind=EffectKind.OBJECT, line=line, text=f"changes `{name}`", name=name)


def _only_reads(called: str) -> bool:
    last = called.rpartition(".")[2]
    return last in _READERS or last.startswith("get")


def _of_call(node: ast.Call, modules: Mapping[str, str], line: int) -> Iterator[Effect]:
    called, receiver = path(node.func, modules), root(node.func)
    if writes_file(node, modules) or called in ("os.truncate", "os.ftruncate"):
        yield Effect(
            kind=EffectKind.FILE, line=line, text=f"writes a file (`{ast.unparse(node.func)}`)"
        )
    elif is_trap(node.func, modules) and not _only_reads(called):
        yield Effect(
            kind=EffectKind.PROCESS,
            line=line,
            text=f"calls `{called or ast.unparse(node.func)}`, which affects the whole process",
            is_input=called.startswith(_INPUTS),
            on_all_code=called in _ON_ALL_CODE,
        )
    elif isinstance(node.func, ast.Attribute) and receiver is not None and receiver not in modules:
        attribute = node.func.attr
        if attribute in _IN_PLACE:
            yield Effect(
                kind=EffectKind.OBJECT,
                line=line,
                text=f"changes `{receiver}` (`{attribute}`)",
                name=receiver,
            )
        elif attribute not in LEAVES_RECEIVER:
            yield Effect(
                kind=EffectKind.CALL,
                line=line,
                text=f"calls `{path(node.func, {}) or attribute}()`",
                name=receiver,
            )
    elif isinstance(node.func, ast.Name):
        yield Effect(
            kind=EffectKind.CALL, line=line, text=f"calls `{node.func.id}()`", name=node.func.id
        )
