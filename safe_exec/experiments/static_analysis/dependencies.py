"""Finds the cells that a cell's names come from, as the starting point of a culprit search.

A cell depends on the cells that bind the names it uses, and on the cells in between that certainly
or very probably change these objects. Names that are bound, used or changed inside functions count
at the call. Two names for the same object are not tracked. Pure; imports only its neighbours.
"""

from __future__ import annotations

import ast
import builtins
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from msgspec.structs import replace

from safe_exec.experiments.static_analysis.ipython_syntax import (
    CellFacts,
    Read,
    Special,
    bound_in,
    python_of,
)
from safe_exec.experiments.static_analysis.names import names_in
from safe_exec.experiments.static_analysis.side_effects import side_effect_risk_of

__all__ = ["CellFacts", "Dependencies", "Read", "imported_modules", "read_cell"]

# --- what is surely evaluated ---------------------------------------------------------------------

# This mark stands among the evaluated names where foreign code may run.
_EFFECT = ""


# The parts that are evaluated whatever the values are, in order. Nothing is certain of nodes that
# are not listed.
_PARTS: dict[type[ast.AST], tuple[str, ...]] = {
    **dict.fromkeys(
        (
            ast.Attribute,
            ast.Starred,
            ast.Await,
            ast.keyword,
            ast.NamedExpr,
            ast.Expr,
            ast.AnnAssign,
        ),
        ("value",),
    ),
    **dict.fromkeys((ast.If, ast.IfExp, ast.While), ("test",)),
    **dict.fromkeys((ast.For, ast.AsyncFor), ("iter",)),
    **dict.fromkeys((ast.Tuple, ast.List), ("elts",)),
    ast.Subscript: ("value", "slice"),
    ast.Slice: ("lower", "upper", "step"),
    ast.BinOp: ("left", "right"),
    ast.UnaryOp: ("operand",),
    ast.JoinedStr: ("values",),
    ast.FormattedValue: ("value", "format_spec"),
    ast.arguments: ("defaults", "kw_defaults"),
    ast.Lambda: ("args",),
    ast.Raise: ("exc",),
    ast.Match: ("subject",),
}
_QUIET = ast.Constant | ast.Name | ast.Tuple | ast.List | ast.NamedExpr | ast.Slice | ast.Lambda


def _parts(node: ast.AST) -> list[ast.AST | None]:
    values = [getattr(node, name) for name in _PARTS.get(type(node), ())]
    return [part for value in values for part in (value if isinstance(value, list) else [value])]


def _operands(node: ast.AST) -> list[ast.AST | None]:
    """Return the parts that are evaluated before the expression's own effect.

    An effect between two parts is represented by an ``ast.Starred``.
    """
    parts = _parts(node)
    match node:
        case ast.BoolOp(values=values):
            parts = [values[0]]
        case ast.Compare(left=operand, comparators=others):
            parts = [operand, others[0]]
        case ast.ListComp() | ast.SetComp() | ast.DictComp() | ast.GeneratorExp():
            parts = [node.generators[0].iter]
        case ast.Call(func=func, args=args, keywords=keywords):
            parts = [
                func,
                *args,
                *(keyword.value if keyword.arg else keyword for keyword in keywords),
            ]
        case ast.Dict(keys=keys, values=values):
            parts = [
                part
                for key, value in zip(keys, values, strict=True)
                for part in (key, ast.Starred(value=value))
            ]
        case ast.Set(elts=elements):
            parts = [ast.Starred(value=element) for element in elements]
    return parts


def _evaluated(node: ast.AST | None) -> Iterator[str]:
    if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Store):
        yield node.id
    for part in _operands(node) if node else ():
        yield from _evaluated(part)
    if isinstance(node, ast.expr | ast.keyword) and not isinstance(node, _QUIET):
        yield _EFFECT


def _steps(node: ast.stmt) -> list[ast.AST | None]:
    """Return the expressions that a statement is certain to evaluate.

    The body of a ``try`` is left out because its errors may be caught. Of several context managers
    only the first counts: it may suppress errors of the others.
    """
    parts = _parts(node)
    match node:
        case ast.Assign(targets=targets, value=value):
            parts = [ast.Starred(value=value), *targets]
        case ast.AugAssign(target=target, value=value):
            parts = [
                ast.Name(id=target.id, ctx=ast.Load()) if isinstance(target, ast.Name) else target,
                value,
            ]
        case ast.With(items=items) | ast.AsyncWith(items=items):
            parts = [items[0].context_expr]
        case ast.Delete(targets=targets):
            parts = [ast.Starred(value=target) for target in targets]
        case (
            ast.FunctionDef(decorator_list=decorators, args=args)
            | ast.AsyncFunctionDef(decorator_list=decorators, args=args)
        ):
            parts = [*decorators, *_parts(args)]
        case ast.ClassDef(decorator_list=decorators, bases=bases, keywords=keywords):
            parts = [
                *decorators,
                *(() if getattr(node, "type_params", ()) else (*bases, *keywords)),
            ]
    return parts


def surely_read(body: Sequence[ast.stmt], specials: Mapping[str, Special]) -> Iterator[Read]:
    """Yield the names that the statements are certain to read, without repetitions."""
    # A statement that begins on the line where another ends counts as part of it: the line of a
    # crash cannot tell them apart.
    skipped_names: set[str] = set()
    line = end = 0
    for node in body:
        first = min(part.lineno for part in (node, *getattr(node, "decorator_list", ())))
        quiet = first > end
        line, end = first if quiet else line, max(end, node.end_lineno or first)
        nodes = list(ast.walk(node))
        cell_specials = [
            specials[n.id] for n in nodes if isinstance(n, ast.Name) and n.id in specials
        ]
        skipped_names |= {n.target.id for n in nodes if isinstance(n, ast.NamedExpr)}
        for name in (
            () if cell_specials else (name for step in _steps(node) for name in _evaluated(step))
        ):
            if name and name not in skipped_names:
                yield Read(name=name, line=line, before_effect=quiet)
                skipped_names.add(name)
            quiet = quiet and name != _EFFECT
        skipped_names |= bound_in(
            [node, *(part for special in cell_specials for part in special.code.body)]
        )[0]
        skipped_names |= {name for n in nodes if isinstance(n, ast.Global) for name in n.names}


# --- a cell ---------------------------------------------------------------------------------------


def read_cell(source: str, modules: Mapping[str, str] | None = None) -> CellFacts:
    """Return the facts of a cell.

    ``modules`` maps names to the modules that earlier cells imported.
    """
    return _read(source, modules or {})[0]


def imported_modules(source: str) -> dict[str, str]:
    """Return the names that a cell's imports bind, each with its full path."""
    return _read(source, {})[1]


def _read(source: str, modules: Mapping[str, str]) -> tuple[CellFacts, dict[str, str]]:
    try:
        cell, tree = python_of(source)
        if tree is None:
            return CellFacts(opaque=True, side_effect_risk=max(cell.side_effect_risk, 1)), {}
        facts, imported = names_in(tree.body, cell, modules)
        mutates = not facts.mutates.isdisjoint(facts.uses)
        side_effect_risk = side_effect_risk_of(
            tree.body, cell.specials.values(), modules, mutates=mutates
        )
        reads = () if cell.guarded else tuple(surely_read(tree.body, cell.specials))
    except RecursionError:
        # Nested deeper than can be followed.
        return CellFacts(opaque=True), {}
    return replace(
        facts, reads=reads, side_effect_risk=max(cell.side_effect_risk, side_effect_risk)
    ), imported


# --- a notebook -----------------------------------------------------------------------------------

_GIVEN = frozenset(dir(builtins)) | {"get_ipython", "display", "exit", "quit", "In", "Out", "open"}


class Dependencies:
    """The dependencies between cells.

    ``is_python`` is false for other languages: then no cell depends on another.
    """

    def __init__(self, facts: Sequence[CellFacts], *, is_python: bool = True) -> None:
        self.facts = tuple(facts)
        self.is_python = is_python
        self._defining: dict[str, list[int]] = defaultdict(list)
        for index, cell in enumerate(self.facts):
            for name in cell.defines:
                self._defining[name].append(index)
        self._memo: dict[tuple[int, bool], frozenset[int]] = {}
        self._makers_memo: dict[tuple[str, int, bool], frozenset[int]] = {}
        self._changing: dict[bool, dict[str, list[int]]] = {}

    @classmethod
    def of_sources(cls, sources: Sequence[str], *, language: str | None) -> Dependencies:
        """Analyse a notebook's code cells, in order.

        A notebook that does not name its language is treated as one in another language.
        """
        if not (language or "").lower().startswith(("python", "ipython")):
            return cls([CellFacts(opaque=True) for _ in sources], is_python=False)
        modules: dict[str, str] = {}
        facts = []
        for source in sources:
            cell, imported = _read(source, modules)
            modules = {
                name: full for name, full in modules.items() if name not in cell.defines
            } | imported
            facts.append(cell)
        return cls(facts)

    def side_effect_risks(self) -> tuple[int, ...]:
        """Return each cell's risk of causing a later failure, from 0 to 3."""
        return tuple(cell.side_effect_risk if self.is_python else 1 for cell in self.facts)

    def definers(self, name: str, position: int) -> tuple[int, ...]:
        """Return the cells before ``position`` that bind ``name``, the latest first.

        The cells that may bind it invisibly follow, the latest first.
        """
        # The latest definition is the one that the cell saw.
        visible = [index for index in reversed(self._defining.get(name, ())) if index < position]
        return (
            (*visible, *(index for index in self._unseen(position) if index not in visible))
            if self.is_python
            else ()
        )

    def needs(self, cell: int) -> frozenset[int]:
        """Return the earlier cells on which ``cell`` depends directly."""
        return self._direct(cell, weak=False)

    def slice_of(self, cell: int, *, weak: bool = False) -> frozenset[int]:
        """Return the cell and all its direct and indirect dependencies.

        With ``weak``, merely possible changes of an object count as well.
        """
        members, todo = {cell}, [cell]
        while todo:
            new = self._direct(todo.pop(), weak=weak) - members
            members |= new
            todo.extend(new)
        return frozenset(members)

    def surely_missing(
        self, subset: Iterable[int], *, crash: int, crash_line: int | None
    ) -> tuple[int, str] | None:
        """Return the cell and the name of a NameError that is certain to end a run of ``subset``.

        The error comes before the crash can happen again, and another error may come even earlier.
        Only names that an omitted cell binds visibly are certain: all others came from elsewhere,
        since the whole notebook did run. The caller must exclude cells whose errors do not end the
        run.
        """
        bound_names: set[str] = set()
        for index in sorted({index for index in subset if self.is_python and 0 <= index <= crash}):
            cell = self.facts[index]
            # Such a cell may bind any name, so nothing is certain from here on.
            if cell.opaque or cell.stars:
                return None
            reads = _before_crash(cell, crash_line) if index == crash else cell.reads
            for name in (read.name for read in reads):
                left_out = any(definer < index for definer in self._defining.get(name, ()))
                if (
                    left_out
                    and name not in bound_names
                    and name not in _GIVEN
                    and not name.startswith("_")
                ):
                    return index, name
            bound_names |= cell.defines
        return None

    def lack_any(self, subset: Iterable[int], names: Mapping[int, frozenset[str]]) -> bool:
        """Tell whether ``subset`` lacks a name that one of its cells is certain to read.

        ``names`` holds these names by cell. As in :meth:`surely_missing`, an omitted cell binds the
        name visibly, and no cell of the subset can bind it.
        """
        cells = [index for index in subset if self.is_python]
        if not cells or any(self.facts[index].opaque or self.facts[index].stars for index in cells):
            return False
        bound_names = frozenset().union(*(self.facts[index].defines for index in cells))
        left_out = {
            name
            for name, binders in self._defining.items()
            if any(binder < max(cells) for binder in binders)
        }
        return any(
            names.get(index, frozenset()) & left_out - bound_names - _GIVEN for index in cells
        )

    def _unseen(self, position: int) -> list[int]:
        return [
            i
            for i in range(min(position, len(self.facts)) - 1, -1, -1)
            if self.facts[i].opaque or self.facts[i].stars
        ]

    def _direct(self, cell: int, *, weak: bool) -> frozenset[int]:
        if not self.is_python:
            return frozenset()
        if (cell, weak) not in self._memo:
            self._memo[cell, weak] = frozenset(self._find(cell, weak=weak))
        return self._memo[cell, weak]

    def _find(self, cell: int, *, weak: bool) -> set[int]:
        """Return the direct dependencies of a cell."""
        # The names that a function reads are resolved where it may be called, not where it is
        # defined.
        facts = self.facts[cell]
        cells = set(range(cell)) if weak and facts.history else set()
        own = (facts.captured[name].uses for name in facts.own if name in facts.captured)
        todo = [(name, cell) for name in facts.uses.union(facts.at_once, *own)]
        visited = set(todo)
        while todo:
            name, at = todo.pop()
            makers = self._makers(name, at, weak=weak)
            cells |= makers if at == cell else set()
            for maker in (*makers, at):
                if captured := self.facts[maker].captured.get(name):
                    new = {(n, cell) for n in captured.uses} | {
                        (n, maker) for n in captured.sources
                    }
                    todo.extend(new - visited)
                    visited |= new
        return cells

    def _binders(self, name: str, at: int) -> tuple[list[int], bool]:
        """Return the cells before ``at`` that may have bound the name last, the latest first.

        The second value tells whether the earliest of them is certain to have bound it.
        """
        binders = []
        for index in reversed(self._defining.get(name, ())):
            if index < at:
                binders.append(index)
                if name not in self.facts[index].maybe_defines:
                    return binders, True
        return binders, False

    def _makers(self, name: str, at: int, *, weak: bool) -> frozenset[int]:
        """Return the cells that created the object named ``name`` at the start of cell ``at``."""
        if (makers := self._makers_memo.get((name, at, weak))) is None:
            # An uncertain binding leaves earlier ones possible.
            binders, certain = self._binders(name, at)
            first = binders[-1] if certain else -1
            makers = frozenset(
                index for index in self._changers(weak=weak).get(name, ()) if first < index < at
            ).union(binders)
            if not certain and name not in _GIVEN:
                makers = makers.union(self._unseen(at)[:1])
            self._makers_memo[name, at, weak] = makers
        return makers

    def _changers(self, *, weak: bool) -> dict[str, list[int]]:
        if weak not in self._changing:
            changing: dict[str, list[int]] = defaultdict(list)
            for index in range(len(self.facts)):
                for name in self._changes(index, weak=weak):
                    changing[name].append(index)
            self._changing[weak] = changing
        return self._changing[weak]

    def _changes(self, cell: int, *, weak: bool) -> set[str]:
        """Return the names of the objects that the cell changes, also in functions that it calls.

        With ``weak``, every object that it can reach counts as changed.
        """
        facts = self.facts[cell]
        names = set(facts.mutates | facts.passed_to_call if weak else facts.mutates)
        todo = [
            (name, cell)
            for name in (
                facts.calls | facts.uses | facts.own | facts.at_once if weak else facts.calls
            )
        ]
        visited = set(todo)
        while todo:
            name, at = todo.pop()
            for maker in (*self._binders(name, at)[0], at):
                if captured := self.facts[maker].captured.get(name):
                    names |= (
                        captured.mutates | captured.passed_to_call if weak else captured.mutates
                    )
                    new = {
                        (n, cell)
                        for n in (captured.calls | captured.uses if weak else captured.calls)
                    }
                    new |= {(n, maker) for n in captured.sources} if weak else set()
                    todo.extend(new - visited)
                    visited |= new
        return names


def _before_crash(cell: CellFacts, line: int | None) -> list[Read]:
    """Return the reads that precede the effects of a line.

    The statement of the line may begin on an earlier one.
    """
    statement_line = max(
        (read.line for read in cell.reads if line is not None and read.line <= line), default=0
    )
    first_line = cell.start if line is None else statement_line
    return [
        read
        for read in cell.reads
        if read.line < first_line or (read.line == first_line and read.before_effect)
    ]
