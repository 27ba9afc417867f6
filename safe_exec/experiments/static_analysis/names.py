"""Finds the names that a code cell defines, uses and changes, from its syntax tree.

Nothing is executed. Pure; imports only its neighbours.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from msgspec import Struct, field

from safe_exec.experiments.static_analysis.ipython_syntax import (
    CapturedNames,
    Cell,
    CellFacts,
    Special,
    bound_in,
    imports,
    path,
    root,
    words,
)

_Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
_Comprehension = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp

# Many notebooks use these names without the import being in sight.
USUAL = {"np": "numpy", "pd": "pandas", "plt": "matplotlib.pyplot"}
_NAMESPACES = {
    "exec",
    "eval",
    "globals",
    "locals",
    "vars",
    "get_ipython",
    "__builtins__",
    "__builtin__",
    "__import__",
}
_NAMESPACE_ATTRIBUTES = words(
    "user_ns user_global_ns __globals__ __dict__ f_globals f_locals f_back _getframe "
    "currentframe install reload "
    "import_module get_ipython"
)
_NAMESPACE_PATHS = {"sys.modules", "importlib.reload"}
_LEAVES_ARGUMENTS = words(
    "print len str repr format display type id isinstance issubclass callable hash bool int "
    "float complex abs round sum min max "
    "sorted any all range ascii bin hex oct ord chr dir hasattr"
)
# Methods that are known not to change their object, mostly those of pandas.
LEAVES_RECEIVER = words(
    "head tail describe info show display copy sum mean std var count items keys values get "
    "join split strip format startswith "
    "endswith upper lower replace astype nunique unique value_counts isna isnull groupby sample"
)
_MUTATORS = words(
    "setattr delattr random.shuffle numpy.random.shuffle numpy.copyto numpy.put numpy.place "
    "numpy.putmask numpy.fill_diagonal "
    "heapq.heappush heapq.heappop heapq.heapify heapq.heapreplace heapq.heappushpop "
    "bisect.insort operator.setitem"
)
_READ_AS = {
    "Subscript": "Attribute",
    "ImportFrom": "Import",
    "IfExp": "If",
    "AsyncFor": "For",
    "AsyncWith": "With",
    "TryStar": "Try",
    **dict.fromkeys(("MatchStar", "MatchMapping"), "MatchAs"),
    **dict.fromkeys(("SetComp", "DictComp", "GeneratorExp"), "ListComp"),
    **dict.fromkeys(("AsyncFunctionDef", "Lambda"), "FunctionDef"),
}
_HISTORY = re.compile(r"_{1,3}|_\d+|Out|_oh")
_SUPPRESSES = {"suppress", "raises", "assertRaises"}


class _Scope(Struct, kw_only=True):
    """The names of a function, comprehension or class scope.

    A walrus in a comprehension binds outside it, and functions do not see the names of a class.
    """

    names: set[str]
    outer: set[str] = field(default_factory=set)
    kind: str = "function"


class _Bag(defaultdict[str, set[str]]):
    """Sets of names, one set for each way in which code uses a name."""

    def __init__(self) -> None:
        super().__init__(set)

    def take(self, other: _Bag) -> None:
        for key, names in other.items():
            self[key] |= names


class _NameReader(ast.NodeVisitor):
    """Visits a cell in its order of evaluation.

    ``bound_names`` are the names that are certain to be bound at the current point.
    """

    def __init__(self, modules: Mapping[str, str], specials: Mapping[str, Special]) -> None:
        self.modules = {**USUAL, **modules}
        self.imported: dict[str, str] = {}
        self.specials = specials
        self.bound_names: set[str] = set()
        self.immediate, self.late = _Bag(), _Bag()
        self.captured: dict[str, _Bag] = {}
        self.stars = any(special.stars for special in specials.values())
        self._scopes: list[_Scope] = []
        self._depth = 0
        self._statement = _Bag()

    def run(self, body: Iterable[ast.AST], *, binds: bool = True) -> None:
        """Visit the statements.

        Without ``binds``, the code runs immediately in a function of its own.
        """
        body = list(body)
        if not binds:
            self._scopes.append(_Scope(names=bound_in(body)[0]))
        self._block(body)
        if not binds:
            self._scopes.pop()

    def _is_ours(self, name: str) -> bool:
        for distance, scope in enumerate(reversed(self._scopes)):
            if name in scope.outer:
                return True
            if name in scope.names and (distance == 0 or scope.kind != "class"):
                return False
        return True

    def _note(self, usage: str, name: str | None) -> None:
        if name is None or not self._is_ours(name):
            return
        if self._depth:
            self.late[usage].add(name)
            self._statement[usage].add(name)
        else:
            self.immediate[usage].add(name)
            if usage == "mutates":
                self._carry(name)

    def _carry(self, name: str) -> None:
        self.captured.setdefault(name, _Bag()).take(self._statement)

    def load(self, name: str) -> None:
        """Record that a name is read."""
        if not self._is_ours(name):
            return
        self.stars |= name in _NAMESPACES or self.modules.get(name) in _NAMESPACE_PATHS
        if not self._depth:
            self._statement["sources"].add(name)
            if name in self.immediate["defines"]:
                self.immediate["own"].add(name)
        if self._depth or name not in self.bound_names:
            self._note("uses", name)

    def _bind(self, name: str) -> None:
        scope = next((s for s in reversed(self._scopes) if s.kind != "comprehension"), None)
        if scope is None:
            self.immediate["defines"].add(name)
            self.bound_names.add(name)
            self.modules.pop(name, None)
            self.imported.pop(name, None)
            self._carry(name)
        elif name in scope.outer:
            self.immediate["defines"].add(name)
            self._note("mutates", name)
        elif scope.kind == "class":
            scope.names.add(name)

    def _block(self, nodes: Iterable[ast.AST | None]) -> None:
        for node in nodes:
            if node is not None:
                self.visit(node)

    def _branches(self, *blocks: Sequence[ast.AST]) -> None:
        """Visit alternative blocks, one of which runs."""
        # Afterwards a name is bound if every block binds it, except those blocks that leave the
        # code.
        bound_before, ends = set(self.bound_names), []
        for block in blocks:
            self.bound_names = set(bound_before)
            self._block(block)
            if not _leaves(block):
                ends.append(self.bound_names)
        self.bound_names = set.intersection(*ends) if ends else bound_before

    def visit(self, node: ast.AST) -> None:
        """Visit a node; a statement at the top level starts a new collection of captured names."""
        if isinstance(node, ast.stmt) and not self._scopes:
            self._statement = _Bag()
        # Node types that are read alike share one method.
        kind = type(node).__name__
        getattr(self, f"visit_{_READ_AS.get(kind, kind)}", self.generic_visit)(node)

    def visit_Name(self, node: ast.Name) -> None:
        if special := self.specials.get(node.id):
            self._block(ast.Name(id=name, ctx=ast.Load()) for name in sorted(special.uses))
            self.run(special.code.body, binds=special.binds)
        elif isinstance(node.ctx, ast.Load):
            self.load(node.id)
        elif isinstance(node.ctx, ast.Store):
            self._bind(node.id)
        else:
            self.load(node.id)
            self._note("mutates", node.id)
            self.bound_names.discard(node.id)

    def visit_Attribute(self, node: ast.Attribute | ast.Subscript) -> None:
        self.generic_visit(node)
        self.stars |= isinstance(node, ast.Attribute) and node.attr in _NAMESPACE_ATTRIBUTES
        self.stars |= path(node, self.modules) in _NAMESPACE_PATHS
        if not isinstance(node.ctx, ast.Load):
            self._note("mutates", root(node))

    def visit_Call(self, node: ast.Call) -> None:
        uses_before = set(self._statement["uses"])
        self.generic_visit(node)
        if not self._depth:
            for name in self._statement["uses"] - uses_before:
                self.immediate["own" if name in self.bound_names else "at_once"].add(name)
        called, receiver = path(node.func, self.modules), root(node.func)
        self._note("calls", receiver)
        if isinstance(node.func, ast.Attribute):
            self._note("passed_to_call", receiver)
        if called not in _LEAVES_ARGUMENTS:
            for argument in (*node.args, *(keyword.value for keyword in node.keywords)):
                for handed in _handed(argument):
                    self._note("passed_to_call", handed)
        if called in _MUTATORS and node.args:
            self._note("mutates", root(node.args[0]))
        for keyword in node.keywords:
            if keyword.arg in ("out", "inplace"):
                self._note("mutates", root(keyword.value if keyword.arg == "out" else node.func))

    def visit_Expr(self, node: ast.Expr) -> None:
        self.visit(node.value)
        call = node.value.value if isinstance(node.value, ast.Await) else node.value
        if (
            isinstance(call, ast.Call)
            and isinstance(call.func, ast.Attribute)
            and call.func.attr not in LEAVES_RECEIVER
        ):
            receiver = root(call.func)
            self._note("mutates", None if receiver in self.modules else receiver)

    def visit_Assign(self, node: ast.Assign) -> None:
        self._block([node.value, *node.targets])

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        bare = node.value is None and isinstance(node.target, ast.Name)
        self._block([node.value, node.annotation, None if bare else node.target])

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if isinstance(node.target, ast.Name):
            self.load(node.target.id)
        self._block([node.value, node.target])
        self._note("mutates", root(node.target))

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self._block([node.value, node.target])

    def visit_Import(self, node: ast.Import | ast.ImportFrom) -> None:
        modules = {getattr(node, "module", None), *(alias.name for alias in node.names)}
        self.stars |= not modules.isdisjoint({"*", "builtins", "__main__"})
        for name, full in imports(node).items():
            self._bind(name)
            self.modules[name] = full
            if not self._scopes:
                self.imported[name] = full

    def visit_If(self, node: ast.If | ast.IfExp) -> None:
        self.visit(node.test)
        self._branches(
            *(part if isinstance(part, list) else [part] for part in (node.body, node.orelse))
        )

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        self.visit(node.values[0])
        self._branches(node.values[1:], [])

    def visit_While(self, node: ast.While) -> None:
        self.visit(node.test)
        self._branches(node.body, [])
        self._branches(node.orelse, [])

    def visit_For(self, node: ast.For | ast.AsyncFor) -> None:
        self.visit(node.iter)
        self._branches([node.target, *node.body], [])
        self._branches(node.orelse, [])

    def visit_With(self, node: ast.With | ast.AsyncWith) -> None:
        self._block(node.items)
        calls = [
            item.context_expr for item in node.items if isinstance(item.context_expr, ast.Call)
        ]
        skips = any(path(call.func, {}).rpartition(".")[2] in _SUPPRESSES for call in calls)
        self._branches(node.body, *([[]] if skips else []))

    def visit_Try(self, node: ast.Try | ast.TryStar) -> None:
        self._branches([*node.body, *node.orelse], *([handler] for handler in node.handlers))
        self._block(node.finalbody)

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> None:
        self._block([node.type])
        if node.name:
            self._bind(node.name)
        self._block(node.body)
        self.bound_names.discard(node.name or "")

    def visit_Match(self, node: ast.Match) -> None:
        self.visit(node.subject)
        last = node.cases[-1]
        certain = (
            last.guard is None
            and isinstance(last.pattern, ast.MatchAs)
            and last.pattern.pattern is None
        )
        blocks = [
            [part for part in (case.pattern, case.guard, *case.body) if part] for case in node.cases
        ]
        self._branches(*blocks, *([] if certain else [[]]))

    def visit_MatchAs(self, node: ast.MatchAs | ast.MatchStar | ast.MatchMapping) -> None:
        self.generic_visit(node)
        name = node.rest if isinstance(node, ast.MatchMapping) else node.name
        if name:
            self._bind(name)

    def visit_ListComp(self, node: _Comprehension) -> None:
        self.visit(node.generators[0].iter)
        bound_before = set(self.bound_names)
        self._scopes.append(
            _Scope(names=bound_in(g.target for g in node.generators)[0], kind="comprehension")
        )
        for number, generator in enumerate(node.generators):
            self._block([generator.iter if number else None, *generator.ifs])
        self._block([node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt])
        self._scopes.pop()
        self.bound_names = bound_before

    def visit_FunctionDef(self, node: _Function) -> None:
        args = node.args
        every = [
            a
            for a in (*args.posonlyargs, *args.args, args.vararg, *args.kwonlyargs, args.kwarg)
            if a
        ]
        body = [node.body] if isinstance(node, ast.Lambda) else node.body
        self._block([*args.defaults, *args.kw_defaults, *(a.annotation for a in every)])
        if not isinstance(node, ast.Lambda):
            self._block([*node.decorator_list, node.returns])
        local_names, global_, nonlocal_ = bound_in(body)
        own = {a.arg for a in every} | {p.name for p in getattr(node, "type_params", ())}
        self._scopes.append(_Scope(names=(local_names | own) - global_ - nonlocal_, outer=global_))
        self._depth += 1
        self._block(body)
        self._depth -= 1
        self._scopes.pop()
        if not isinstance(node, ast.Lambda):
            self._bind(node.name)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._block([*node.decorator_list, *node.bases, *node.keywords])
        self._scopes.append(_Scope(names=set(), outer=bound_in(node.body)[1], kind="class"))
        self._block(node.body)
        self._scopes.pop()
        self._bind(node.name)


def _leaves(block: Sequence[ast.AST]) -> bool:
    last = block[-1] if block else None
    return (
        _leaves(last.body)
        if isinstance(last, ast.ExceptHandler)
        else isinstance(last, ast.Raise | ast.Return | ast.Continue)
    )


def _handed(node: ast.expr) -> Iterator[str | None]:
    """Yield the names of the objects that an argument passes to a call."""
    if isinstance(node, ast.Tuple | ast.List | ast.Set | ast.Dict):
        for part in node.values if isinstance(node, ast.Dict) else node.elts:
            yield from _handed(part)
    else:
        yield root(node)


def names_in(
    body: Sequence[ast.stmt], cell: Cell, modules: Mapping[str, str]
) -> tuple[CellFacts, dict[str, str]]:
    """Return the facts of a cell, and the modules that it imports, by the names it gives them.

    ``reads`` and ``side_effect_risk`` of the facts are not set here.
    """
    names = _NameReader(modules, cell.specials)
    names.run(body, binds=cell.binds)
    immediate, late = names.immediate, names.late
    defines = immediate["defines"] | cell.defines
    uses = immediate["uses"] | cell.uses
    keys = ("sources", "uses", "calls", "mutates", "passed_to_call")
    facts = CellFacts(
        defines=frozenset(defines),
        maybe_defines=frozenset(immediate["defines"] - names.bound_names),
        uses=frozenset(uses),
        late_uses=frozenset(late["uses"]),
        at_once=frozenset(immediate["at_once"]),
        own=frozenset(immediate["own"]),
        calls=frozenset(immediate["calls"]),
        mutates=frozenset(immediate["mutates"]),
        passed_to_call=frozenset(immediate["passed_to_call"]),
        captured={
            name: CapturedNames(**{k: frozenset(bag[k]) for k in keys})
            for name, bag in names.captured.items()
            if any(bag.values())
        },
        start=min(
            (part.lineno for part in (*body[:1], *getattr(body[0], "decorator_list", ()))),
            default=0,
        )
        if body
        else 0,
        stars=names.stars,
        history=any(_HISTORY.fullmatch(name) for name in uses),
    )
    return facts, names.imported
