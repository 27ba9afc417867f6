"""Rates a cell's risk of side effects that cause a later failure. Pure; imports its neighbours."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping, Sequence

from safe_exec.experiments.static_analysis.ipython_syntax import (
    Special,
    imports,
    path,
    root,
    words,
)
from safe_exec.experiments.static_analysis.names import USUAL

_TRAPS = words(
    "ctypes cffi signal threading _thread multiprocessing concurrent resource gc faulthandler "
    "atexit subprocess socket mmap "
    "builtins pty fcntl numba cython"
)
_TRAP_PATHS = words(
    "os.fork os.kill os.killpg os._exit os.abort os.environ os.putenv os.chdir os.close "
    "os.closerange os.dup2 os.dup os.truncate "
    "os.ftruncate os.system os.popen os.nice os.setsid sys.exit sys.stdout sys.stderr sys.stdin "
    "warnings.filterwarnings "
    "warnings.simplefilter numpy.seterr matplotlib.use asyncio.run asyncio.get_event_loop "
    "asyncio.get_running_loop "
    "asyncio.new_event_loop asyncio.set_event_loop asyncio.set_event_loop_policy "
    "asyncio.create_task asyncio.ensure_future"
)
_WRITES = words(
    "os.remove os.unlink os.rename os.replace os.rmdir os.removedirs pickle.dump json.dump "
    "numpy.save numpy.savez"
)
_WRITERS = words(
    "to_csv to_parquet to_pickle to_hdf to_excel to_sql to_feather to_json tofile savefig "
    "write_text write_bytes unlink"
)
_INERT_CALLS = {"print", "display", "len", "str", "repr", "format", "type", "id", "isinstance"}
_LITERAL = (
    ast.Constant
    | ast.Tuple
    | ast.List
    | ast.Set
    | ast.Dict
    | ast.UnaryOp
    | ast.unaryop
    | ast.expr_context
)
_SHOWN = _LITERAL | ast.Name | ast.JoinedStr | ast.FormattedValue | ast.keyword


def is_trap(node: ast.AST, modules: Mapping[str, str]) -> bool:
    """Tell whether a node affects the whole process rather than only the notebook's names."""
    if isinstance(node, ast.ImportFrom):
        return (node.module or "") in _TRAPS and any(alias.name == "*" for alias in node.names)
    if isinstance(node, ast.Call) and path(node.func, {}) in ("setattr", "delattr") and node.args:
        return root(node.args[0]) in modules
    if not isinstance(node, ast.Name | ast.Attribute):
        return False
    if root(node) not in modules:
        return isinstance(node, ast.Name) and node.id in ("exit", "quit", "get_ipython")
    if not isinstance(node.ctx, ast.Load):
        return isinstance(node, ast.Attribute)
    name = path(node, modules)
    return (
        name.partition(".")[0] in _TRAPS
        or name in _TRAP_PATHS
        or name.startswith(("sys.set", "os.exec", "os.spawn"))
    )


def writes_file(node: ast.AST, modules: Mapping[str, str]) -> bool:
    """Tell whether a call writes a file."""
    if not isinstance(node, ast.Call):
        return False
    name = path(node.func, modules)
    if name == "open" or name.endswith(".open"):
        modes = [
            *node.args[name == "open" : 2],
            *(keyword.value for keyword in node.keywords if keyword.arg == "mode"),
        ]
        return any(
            isinstance(m, ast.Constant)
            and re.fullmatch(r"[rwaxbt+]*[wax+][rwaxbt+]*", str(m.value))
            for m in modes
        )
    return (
        name in _WRITES
        or name.startswith("shutil.")
        or (isinstance(node.func, ast.Attribute) and node.func.attr in _WRITERS)
    )


def _calls_inert(node: ast.AST) -> bool:
    formats = (
        isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Constant)
        and node.attr == "format"
    )
    return formats or path(node, {}) in _INERT_CALLS


def _is_inert(node: ast.stmt) -> bool:
    """Tell whether a statement can do no more than print, and bind plain values."""
    match node:
        case ast.Expr(value=value):
            parts = list(ast.walk(value))
            inert = [
                part for part in parts if isinstance(part, ast.Call) and _calls_inert(part.func)
            ]
            return all(
                isinstance(part, _SHOWN) or part in inert or part in [call.func for call in inert]
                for part in parts
            )
        case ast.Assign(targets=targets, value=value):
            plain = all(isinstance(target, ast.Name) for target in targets)
            return plain and all(isinstance(part, _LITERAL) for part in ast.walk(value))
    return isinstance(node, ast.Pass)


def side_effect_risk_of(
    body: Sequence[ast.stmt],
    specials: Iterable[Special],
    modules: Mapping[str, str],
    *,
    mutates: bool,
) -> int:
    """Rate a cell's risk of causing a later failure, from 0 to 3.

    0: harmless; 1: ordinary code; 2: changes other cells' objects, or files; 3: changes state of
    the whole process.
    """
    specials = list(specials)
    statements = [*body, *(part for special in specials for part in special.code.body)]
    nodes = [node for statement in statements for node in ast.walk(statement)]
    modules = {
        **USUAL,
        **modules,
        **{name: full for node in nodes for name, full in imports(node).items()},
    }
    least = max((special.side_effect_risk for special in specials), default=0)
    if any(is_trap(node, modules) for node in nodes):
        return 3
    if mutates or any(writes_file(node, modules) for node in nodes):
        return max(least, 2)
    return max(least, 0 if all(map(_is_inert, statements)) else 1)
