"""Converts a code cell to Python: its source without IPython's own syntax, and facts about it.

Nothing is executed, and no text raises an error: a cell that cannot be parsed is opaque. Pure;
imports the standard library only.
"""

from __future__ import annotations

import ast
import re
import textwrap
import threading
import warnings
from collections.abc import Iterable, Mapping

from msgspec import Struct, field

Names = frozenset[str]

# The filters of warnings belong to the whole process: of two threads that set them aside, the later
# one would put the wrong ones back.
_FILTERS = threading.Lock()


class Read(Struct, frozen=True, kw_only=True):
    """A name that is certain to be evaluated, with the line where its top-level statement begins.

    ``before_effect`` is true if it is evaluated before anything on that line can run foreign code.
    """

    name: str
    line: int
    # It is evaluated before anything on that line could run foreign code.
    before_effect: bool


class CapturedNames(Struct, frozen=True, kw_only=True):
    """The names behind an object that a cell binds or changes.

    ``sources`` are the names that the object was built from; the other fields describe the bodies
    of its functions.
    """

    # The names that the object was built from; the other fields describe function bodies.
    sources: Names
    uses: Names
    calls: Names
    mutates: Names
    passed_to_call: Names


class CellFacts(Struct, frozen=True, kw_only=True):
    """The facts of one cell.

    Fields with ``late_`` describe the bodies of functions, which run when called. Names of inner
    scopes are left out. ``uses`` are names that the cell reads and may not have bound before.
    ``at_once`` are such names in a lambda that is passed to a call, which may run immediately.
    ``own`` are names that the cell reads after it has bound them. ``passed_to_call`` are names
    passed to a call, which may change their objects. ``stars`` is true if the cell may bind names
    that are not visible, ``history`` if it reads outputs of earlier cells. ``start`` is the line of
    the first statement.
    """

    defines: Names = frozenset()
    maybe_defines: Names = frozenset()
    # Read, and not certain to be bound earlier in this cell.
    uses: Names = frozenset()
    # Read in the bodies of functions, which run when called.
    late_uses: Names = frozenset()
    # Read in a lambda that is passed to a call, which may run immediately.
    at_once: Names = frozenset()
    # Read after the cell itself bound it.
    own: Names = frozenset()
    calls: Names = frozenset()
    mutates: Names = frozenset()
    # Passed to a call, which may change the object.
    passed_to_call: Names = frozenset()
    # Names associated with the objects that the cell binds.
    captured: Mapping[str, CapturedNames] = field(default_factory=dict)
    reads: tuple[Read, ...] = ()
    # The line of the first statement.
    start: int = 0
    # The cell cannot be parsed.
    opaque: bool = False
    # The cell may bind names that are not visible (`from x import *`, a shell command).
    stars: bool = False
    # The cell reads outputs of earlier cells.
    history: bool = False
    side_effect_risk: int = 1


def words(text: str) -> Names:
    """Return the words of a text as a set of names."""
    return frozenset(text.split())


# --- IPython's own syntax -------------------------------------------------------------------------

_PYTHON_CELLS = {"time", "timeit", "capture", "prun", "memit"}
_TEXT_CELLS = {"html", "HTML", "latex", "markdown", "javascript", "js", "svg", "SVG"}
_SHELL_CELLS = words("bash sh script perl ruby cmd ! sx system pypy python python2 python3")
_RUNS_PYTHON = {"time", "timeit", "prun", "memit"}
_SHOWS = words(
    "matplotlib config precision pprint who whos who_ls pinfo pinfo2 pdef pdoc pfile psource "
    "psearch page history hist lsmagic "
    "quickref colors xmode tb pwd ls ll pycat doctest_mode"
)
_BINDS_NOTHING = (
    _SHOWS
    | _RUNS_PYTHON
    | words(
        "env set_env cd pip conda mamba uv mkdir rmdir rm mv cp cat lf lk ldir lx sx system gui "
        "pdb autosave automagic autocall "
        "autoawait autoreload killbgscripts notebook"
    )
)
_WORD = r"[^\W\d]\w*"
_BLANKS = re.compile(r"[ \t]*")
_HELP = re.compile(
    r"(?=[^\n]*\?[ \t]*(?:\n|\Z))[^\n#'\"]*?%{0,2}([\w*][\w.*\[\]-]*)\?\??[ \t]*(?=\n|\Z)"
)
_ESCAPE = re.compile(r"()([%!?,;/])")
_ASSIGNED = re.compile(rf"([^\n=#(){{}}'\"%!]*[\w\]] *=[ \t]*)(?:(%)(?={_WORD})|(!))")
_CONTINUED = re.compile(r"(?:[^\n]*\\\n)*[^\n]*")
_AUTOMAGIC = re.compile(rf"(\s*)({_WORD})(?!\S)(?![ \t]*=)[^\n]*\s*")
_CELL_MAGIC = re.compile(r"(\s*)%%([^\s?]*)(?!\S)[ \t]*([^\n]*)")
_OPTIONS = re.compile(r"(?:--?[a-zA-Z][\w-]*(?:[ \t]*\d+)?[ \t]+)*")
_LEXEME = re.compile(
    r""" \"{3}(?:\\.|[^\\])*?(?:\"{3}|\Z) | '{3}(?:\\.|[^\\])*?(?:'{3}|\Z)
    | "(?:\\.|[^"\\\n])*"? | '(?:\\.|[^'\\\n])*'? | \#[^\n]* | \\\n | [()\[\]{}] | \n """,
    re.DOTALL | re.VERBOSE,
)


class Special(Struct, kw_only=True):
    """A magic, shell or help line: the Python code that it runs and the names that it reads."""

    code: ast.Module = field(default_factory=lambda: ast.Module(body=[], type_ignores=[]))
    uses: set[str] = field(default_factory=set)
    stars: bool = False
    binds: bool = True
    side_effect_risk: int = 0


class Cell(Struct, kw_only=True):
    """The Python code of a cell, with a placeholder name for each line in IPython's own syntax.

    ``guarded`` is true if a magic runs the code, and may catch its errors.
    """

    text: str
    specials: dict[str, Special] = field(default_factory=dict)
    defines: set[str] = field(default_factory=set)
    uses: set[str] = field(default_factory=set)
    side_effect_risk: int = 0
    # A cell magic may catch errors, so an error need not end the run.
    guarded: bool = False
    binds: bool = True
    opaque: bool = False


def parse(text: str) -> ast.Module | None:
    """Parse Python code that also compiles; ``None`` for any other text."""
    flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    with _FILTERS, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tree: ast.Module = compile(
                text, "<cell>", "exec", flags | ast.PyCF_ONLY_AST, dont_inherit=True
            )
            compile(tree, "<cell>", "exec", flags, dont_inherit=True)
        except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError):
            return None
    return tree


def _interpolated(text: str) -> set[str]:
    """Return the names in ``$name`` and ``{expression}``."""
    inside = " ".join(re.findall(r"\{([^{}]*)\}", text))
    return set(re.findall(rf"(?<![\\$])\$({_WORD})", text)) | set(
        re.findall(rf"(?<![\w.'\"]){_WORD}", inside)
    )


def _line_magic(name: str, arguments: str) -> Special:
    if name in _RUNS_PYTHON:
        code = parse(arguments[_OPTIONS.match(arguments).end() :].strip())  # type: ignore[union-attr]
        return (
            Special(code=code, binds=name in ("time", "prun"))
            if code
            else Special(stars=True, side_effect_risk=1)
        )
    binds_nothing = name in _BINDS_NOTHING or (name, arguments.strip()) == (
        "load_ext",
        "autoreload",
    )
    return Special(
        uses=_interpolated(arguments),
        stars=not binds_nothing,
        side_effect_risk=1 if name in _SHOWS else 3,
    )


def _special(text: str) -> Special:
    """Analyse one line in IPython's own syntax, such as a magic."""
    if text.startswith("%"):
        name, _, arguments = text.lstrip("% \t").partition(" ")
        return _line_magic(name, arguments)
    if text.startswith("!"):
        return Special(uses=_interpolated(text), side_effect_risk=3)
    names = re.findall(_WORD, text)
    return Special(
        uses=set(names if text.startswith("/") else names[:1]),
        side_effect_risk=0 if text.startswith("?") else 1,
    )


def _logical_end(text: str, at: int) -> int:
    """Return the end of the logical line that begins at ``at``."""
    # Brackets continue a logical line, whatever the line ends.
    depth = 0
    for lexeme in _LEXEME.finditer(text, at):
        if lexeme[0] in "([{":
            depth += 1
        elif lexeme[0] in ")]}":
            depth -= 1
        elif lexeme[0] == "\n" and depth <= 0:
            return lexeme.end()
    return len(text)


def _replace_specials(cell: Cell) -> None:
    """Replace the lines in IPython's own syntax by placeholder names."""
    # Only the beginnings of logical lines count: a `%` within brackets or a string is Python's own.
    text, out, at = cell.text, [], 0
    # The placeholder must not collide with a name of the cell.
    prefix = "ipython_line_"
    while prefix in text:
        prefix += "_"
    while at < len(text):
        start = _BLANKS.match(text, at).end()  # type: ignore[union-attr]
        name = f"{prefix}{len(cell.specials)}"
        if match := _HELP.match(text, start):
            cell.specials[name] = Special(uses=set(re.findall(_WORD, match[1])[:1]))
            out.append(text[at:start] + name)
            at = match.end()
        elif match := _ESCAPE.match(text, start) or _ASSIGNED.match(text, start):
            end = _CONTINUED.match(text, match.end()).end()  # type: ignore[union-attr]
            escaped = text[match.end(1) : end]
            cell.specials[name] = _special(escaped.replace("\\\n", " "))
            out.append(text[at:start] + match[1] + name + "\n" * escaped.count("\n"))
            at = end
        else:
            end = _logical_end(text, at)
            out.append(text[at:end])
            at = end
    cell.text = "".join(out)


def _unwrap(source: str) -> Cell:
    """Strip the lines of cell magics, and record the names that each one defines and uses."""
    cell = Cell(text=textwrap.dedent(re.sub(r"\r\n?", "\n", source)))
    while match := _CELL_MAGIC.match(cell.text):
        lead, name, line = match.groups()
        cell.guarded, body = True, cell.text[match.end() :]
        cell.uses |= _interpolated(line)
        cell.text = "\n" * lead.count("\n") + body
        if name == "capture":
            cell.defines |= {word.rstrip(";") for word in line.split() if not word.startswith("-")}
        elif name in _PYTHON_CELLS:
            cell.binds = cell.binds and name not in ("timeit", "memit")
            cell.text = "\n" * lead.count("\n") + line[_OPTIONS.match(line + " ").end() :] + body  # type: ignore[union-attr]
        else:
            cell.defines |= set(re.findall(rf"--(?:out|err|proc)[ =]+({_WORD})", line))
            cell.side_effect_risk = (
                0 if name in _TEXT_CELLS else 2 if name in ("writefile", "file") else 3
            )
            cell.opaque = name not in _TEXT_CELLS | _SHELL_CELLS | {"writefile", "file"}
            cell.text = ""
    return cell


def python_of(source: str) -> tuple[Cell, ast.Module | None]:
    """Return the cell, and the syntax tree of its Python code if it can be parsed."""
    cell = _unwrap(source)
    tree = None if cell.opaque else parse(cell.text)
    # Without the percent sign, `ls` is valid Python too.
    automagic = _AUTOMAGIC.fullmatch(cell.text)
    if automagic and automagic[2] in _BINDS_NOTHING:
        cell.guarded = True
        cell.text = f"{automagic[1]}%{cell.text.strip()}" if tree is None else cell.text
    if tree is None and not cell.opaque:
        _replace_specials(cell)
        tree = parse(cell.text)
    return cell, tree


# --- trees ----------------------------------------------------------------------------------------


def root(node: ast.expr | None) -> str | None:
    """Return the name at the beginning of a chain of attributes and subscripts."""
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Starred):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def path(node: ast.AST | None, modules: Mapping[str, str]) -> str:
    """Return a dotted name with imports resolved; empty for any other expression."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return (
        ".".join([modules.get(node.id, node.id), *reversed(parts)])
        if isinstance(node, ast.Name)
        else ""
    )


def imports(node: ast.AST) -> dict[str, str]:
    """Return the names that one import statement binds, each with its full path."""
    if isinstance(node, ast.Import):
        return {
            a.asname or a.name.partition(".")[0]: a.name if a.asname else a.name.partition(".")[0]
            for a in node.names
        }
    if isinstance(node, ast.ImportFrom):
        return {
            a.asname or a.name: f"{node.module or ''}.{a.name}" for a in node.names if a.name != "*"
        }
    return {}


def bound_in(nodes: Iterable[ast.AST]) -> tuple[set[str], set[str], set[str]]:
    """Return the names bound in this scope, and the global and nonlocal declarations."""
    bound_names: set[str] = set()
    outer: dict[type[ast.AST], set[str]] = {ast.Global: set(), ast.Nonlocal: set()}
    stack = list(nodes)
    while stack:
        node = stack.pop()
        match node:
            case (
                ast.Name(id=name, ctx=ast.Store() | ast.Del())
                | ast.MatchAs(name=str(name))
                | ast.MatchStar(name=str(name))
            ):
                bound_names.add(name)
            case ast.MatchMapping(rest=str(name)) | ast.ExceptHandler(name=str(name)):
                bound_names.add(name)
            case (
                ast.FunctionDef(name=name)
                | ast.AsyncFunctionDef(name=name)
                | ast.ClassDef(name=name)
            ):
                bound_names.add(name)
                continue
            case ast.Import() | ast.ImportFrom():
                bound_names |= set(imports(node))
            case ast.Global(names=names) | ast.Nonlocal(names=names):
                outer[type(node)] |= set(names)
            case ast.Lambda():
                continue
            case ast.ListComp() | ast.SetComp() | ast.DictComp() | ast.GeneratorExp():
                bound_names |= {n.target.id for n in ast.walk(node) if isinstance(n, ast.NamedExpr)}
                continue
        stack.extend(ast.iter_child_nodes(node))
    return bound_names, outer[ast.Global], outer[ast.Nonlocal]
