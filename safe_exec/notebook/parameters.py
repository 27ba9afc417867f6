"""Parameters of a notebook: those that it declares, and the cell that sets the values of a run.

The rules are papermill's, so that both run a notebook alike. The cell with the tag ``parameters``
holds the defaults. The values of a run go into a cell with the tag ``injected-parameters``. It
replaces an existing one; otherwise it is inserted below the defaults, or at the top.
"""

from __future__ import annotations

import ast
import copy
import difflib
import hashlib
import io
import re
import tokenize
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from safe_exec.errors import UsageError
from safe_exec.files import one_line, read_regular
from safe_exec.notebook.encode import IDS_SINCE
from safe_exec.notebook.inputs import INJECTED_TAG
from safe_exec.notebook.literals import LANGUAGES, Language, Value

DEFAULTS_TAG = "parameters"

WITHOUT_DEFAULTS = (
    "the notebook has no cell with the tag 'parameters', so the parameters were set at the top:"
    " a later cell may set them again"
)
_MOST_BYTES = 16 << 20
# A cell of parameters that does not parse is read piece by piece, which takes quadratic time.
_MOST_LINES = 300
_LONGEST_STATEMENT = 30
_KEYWORDS = {"True": True, "False": False, "None": None}
_ASSIGNMENT = re.compile(r"^\s*(?:var |let |const |export )?([\w.]+)\s*(?:<-|=)\s*(.*?);?\s*$")
_COMMENT = re.compile(r"\s(?:#|//)\s*(.*)$")
_TYPE_COMMENT = re.compile(r"type:\s*(\S+)\s*(.*)")


class Parameter(NamedTuple):
    """A parameter that a notebook declares; texts are empty if the notebook does not state them."""

    name: str
    type: str
    default: str
    help: str


class Injected(NamedTuple):
    """A notebook with the parameters of a run set in it, and warnings about them.

    ``inserted_at`` is the index of the new cell, ``None`` if there is none or it replaced another.
    """

    node: Any
    warnings: tuple[str, ...]
    inserted_at: int | None = None


# --- values of a run ------------------------------------------------------------------------------


def typed(text: str) -> Value:
    """Convert a text of the command line to a boolean, ``None`` or a number if it is one."""
    if text in _KEYWORDS:
        return _KEYWORDS[text]
    # An integer is also a valid float, so it must be tried first.
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def read_file(path: Path) -> dict[str, Value]:
    """Read the parameters in a YAML or JSON file. Raises UsageError, one line."""
    data = read_regular(path, most=_MOST_BYTES, error=UsageError)
    try:
        # JSON is a subset of YAML, so one parser reads both.
        document = yaml.load(data, Loader=_Loader)  # noqa: S506 - a SafeLoader without dates
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f":{mark.line + 1}:{mark.column + 1}" if mark is not None else ""
        reason = getattr(error, "problem", None) or one_line(error)
        raise UsageError(f"{one_line(path)}{place}: not YAML or JSON: {reason}") from None
    if document is None:
        return {}
    if not isinstance(document, dict) or not all(isinstance(name, str) for name in document):
        raise UsageError(f"{one_line(path)}: expected names with values, such as: alpha: 0.1")
    return document


class _Loader(yaml.SafeLoader):
    """A loader that leaves dates as texts, as papermill passes them."""


# Neither JSON nor the literals of all kernels have dates.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, regex) for tag, regex in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


# --- the cell -------------------------------------------------------------------------------------


def inject(node: Any, values: Mapping[str, Value], language: str | None) -> Injected:
    """Return a copy of a notebook with a cell that sets the values; without values, the notebook.

    ``language`` is that of the kernel; ``None`` counts as Python. Raises UsageError for a language
    without translation, a name that the language does not allow, and a value that it cannot hold.
    """
    if not values:
        return Injected(node, ())
    source = _source(values, language or "python")
    # The caller may still need the original, for a search or for the next run.
    changed = copy.deepcopy(node)
    cells = changed.cells
    cell = _cell(source, with_id=node.nbformat_minor >= IDS_SINCE)
    warnings = _warnings(node, values, language)
    injected, defaults = _tagged(cells, INJECTED_TAG), _tagged(cells, DEFAULTS_TAG)
    # The cell of an earlier run, papermill's or ours.
    if injected is not None:
        cells[injected] = cell
        return Injected(changed, warnings)
    # Below the defaults, because the last assignment counts.
    index = 0 if defaults is None else defaults + 1
    cells.insert(index, cell)
    return Injected(changed, warnings, inserted_at=index)


def _source(values: Mapping[str, Value], name: str) -> str:
    language = LANGUAGES.get(name.lower())
    if language is None:
        names = ", ".join(sorted(LANGUAGES))
        raise UsageError(
            f"-p: a kernel of the language {name!r} cannot be given parameters; known are {names}."
            " Pass the values as environment variables (--set-env)"
        )
    lines = [_assignment(language, name, *item) for item in values.items()]
    return "\n".join([f"{language.comment} Parameters", *lines, ""])


def _assignment(language: Language, of: str, name: str, value: Value) -> str:
    if not language.is_name(name):
        raise UsageError(
            f"-p {one_line(name)}: not the name of a variable in {of}; it has letters, digits and _,"
            " begins with a letter and is no keyword"
        )
    try:
        literal = language.literal(value)
    except ValueError as error:
        raise UsageError(f"-p {name}: {error}") from None
    return language.assignment.format(name=name, value=literal)


def _cell(source: str, *, with_id: bool) -> Any:
    from nbformat import NotebookNode

    cell = NotebookNode(
        cell_type="code",
        execution_count=None,
        metadata=NotebookNode(tags=[INJECTED_TAG]),
        outputs=[],
        source=source,
    )
    if with_id:
        # Not random, so that equal runs produce equal notebooks.
        cell["id"] = hashlib.sha256(source.encode()).hexdigest()[:8]
    return cell


def _warnings(node: Any, values: Mapping[str, Value], language: str | None) -> tuple[str, ...]:
    if _tagged(node.cells, DEFAULTS_TAG) is None:
        return (WITHOUT_DEFAULTS,)
    declared = [parameter.name for parameter in declared_parameters(node, language)]
    # A misspelt parameter would be set and never read, and the notebook would pass.
    unknown = [name for name in values if name not in declared]
    return tuple(_unknown(name, declared) for name in unknown)


def _unknown(name: str, declared: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, declared, n=1)
    if near:
        return f"unknown parameter {name!r}: did you mean {near[0]!r}?"
    hint = f"it sets {', '.join(declared)}" if declared else "it sets none"
    return f"unknown parameter {name!r}: the cell with the tag 'parameters' does not set it; {hint}"


def _tagged(cells: Sequence[Any], tag: str) -> int | None:
    return next((n for n, cell in enumerate(cells) if tag in cell.metadata.get("tags", ())), None)


# --- the parameters that a notebook declares ------------------------------------------------------


def declared_parameters(node: Any, language: str | None) -> tuple[Parameter, ...]:
    """Return the variables that the cell with the tag ``parameters`` sets, in order."""
    index = _tagged(node.cells, DEFAULTS_TAG)
    if index is None or node.cells[index].cell_type != "code":
        return ()
    source = node.cells[index].source
    if (language or "python").lower() == "python":
        return tuple(_python_parameters(_valid_python(source)))
    return tuple(_line_parameters(source))


def _valid_python(source: str) -> str:
    """Return the source without lines that are no Python, such as a magic or a broken statement."""
    if _parses(source):
        return source
    lines = source.splitlines()[:_MOST_LINES]
    valid: list[str] = []
    start = 0
    while start < len(lines):
        # The shortest piece that parses; a statement may take several lines.
        ends = range(start + 1, min(len(lines), start + _LONGEST_STATEMENT) + 1)
        end = next((end for end in ends if _parses("\n".join(lines[start:end]))), None)
        valid += lines[start : end or start]
        start = end or start + 1
    return "\n".join(valid)


def _parses(source: str) -> bool:
    try:
        ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _python_parameters(source: str) -> list[Parameter]:
    comments = _comments(source)
    parameters = []
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
            target, annotation, value = statement.targets[0], "", statement.value
        elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
            target, value = statement.target, statement.value
            annotation = _text(source, statement.annotation).strip("\"'")
        else:
            continue
        if isinstance(target, ast.Name):
            # The comment of an assignment over several lines follows its last line.
            comment = comments.get(statement.end_lineno or statement.lineno, "")
            type_comment, help_text = _split_comment(comment)
            parameters.append(
                Parameter(target.id, annotation or type_comment, _text(source, value), help_text)
            )
    return parameters


def _text(source: str, node: ast.expr) -> str:
    return ast.get_source_segment(source, node) or ""


def _comments(source: str) -> dict[int, str]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    try:
        return {
            token.start[0]: token.string.lstrip("# ")
            for token in tokens
            if token.type == tokenize.COMMENT
        }
    except (tokenize.TokenError, IndentationError):
        return {}


def _split_comment(comment: str) -> tuple[str, str]:
    match = _TYPE_COMMENT.match(comment)
    return (match[1], match[2]) if match else ("", comment)


def _line_parameters(source: str) -> list[Parameter]:
    parameters = []
    # Without a parser for the language, only assignments on one line are recognised.
    for line in source.splitlines():
        comment = _COMMENT.search(line)
        match = _ASSIGNMENT.match(line[: comment.start()] if comment else line)
        if match:
            type_comment, help_text = _split_comment(comment[1] if comment else "")
            parameters.append(Parameter(match[1], type_comment, match[2], help_text))
    return parameters
