from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from papermill.cli import _resolve_type
from papermill.parameterize import parameterize_notebook

from safe_exec.errors import UsageError
from safe_exec.notebook.parameters import (
    Parameter,
    declared_parameters,
    inject,
    read_file,
    typed,
)

DEFAULTS = """\
# A comment
alpha = 0.1  # learning rate
name: str = "x"  # type: ignore
steps = 10  # type: int number of steps
files = [
    "a",
    "b",
]
print(alpha)
x, y = 1, 2
"""


def notebook(*cells: tuple[str, str]) -> Any:
    node = nbformat.v4.new_notebook()
    for tag, source in cells:
        metadata = {"tags": [tag]} if tag else {}
        node.cells.append(nbformat.v4.new_code_cell(source, metadata=metadata))
    return node


def sources(node: Any) -> list[str]:
    return [cell.source for cell in node.cells]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("-1", -1),
        ("1.5", 1.5),
        ("1e3", 1000.0),
        ("True", True),
        ("true", "true"),
        ("None", None),
        ("a b", "a b"),
        ("", ""),
        ("[1]", "[1]"),
    ],
)
def test_values_of_the_command_line_are_typed_as_papermill_does(text: str, value: Any) -> None:
    assert typed(text) == value and type(typed(text)) is type(value)
    theirs = _resolve_type(text)
    assert typed(text) == theirs and type(typed(text)) is type(theirs)


def test_without_values_nothing_changes() -> None:
    node = notebook(("", "1"))
    assert inject(node, {}, None).node is node


@pytest.mark.parametrize(
    "cells",
    [
        [("", "a"), ("parameters", "x = 1"), ("", "b")],
        [("", "a"), ("parameters", "x = 1"), ("injected-parameters", "x = 0"), ("", "b")],
        [("", "a"), ("injected-parameters", "x = 0"), ("", "b")],
        [("", "a"), ("", "b")],
        [],
    ],
)
def test_the_cell_stands_where_papermill_puts_it(cells: list[tuple[str, str]]) -> None:
    node = notebook(*cells)
    node.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "x"}
    node.metadata["papermill"] = {}
    for cell in node.cells:
        cell.metadata.setdefault("tags", [])  # papermill's reader sees to it
    theirs = parameterize_notebook(node, {"x": 2})
    ours = inject(node, {"x": 2}, "python").node
    assert sources(ours) == sources(theirs)
    assert [cell.metadata.get("tags") for cell in ours.cells] == [
        cell.metadata.get("tags") for cell in theirs.cells
    ]
    nbformat.validate(ours)


def test_the_notebook_itself_stays_and_the_cell_has_the_same_id_each_time() -> None:
    node = notebook(("parameters", "x = 1"))
    before = nbformat.writes(node)
    one, other = inject(node, {"x": 2}, None).node, inject(node, {"x": 2}, None).node
    assert nbformat.writes(node) == before
    assert one.cells[1].id == other.cells[1].id


def test_an_unknown_parameter_is_a_warning_with_the_nearest_name() -> None:
    node = notebook(("parameters", "alpha = 1"))
    (warning,) = inject(node, {"alfa": 2, "alpha": 3}, "python").warnings
    assert warning == "unknown parameter 'alfa': did you mean 'alpha'?"
    (warning,) = inject(node, {"zzz": 2}, "python").warnings
    assert "it sets alpha" in warning


def test_a_notebook_without_parameters_is_a_warning() -> None:
    (warning,) = inject(notebook(("", "1")), {"a": 1}, "python").warnings
    assert "no cell with the tag 'parameters'" in warning


@pytest.mark.parametrize(
    ("values", "language", "words"),
    [
        ({"a b": 1}, "python", "-p a b: not the name of a variable in python"),
        ({"a": 1}, "cobol", "language 'cobol'"),
        ({"a": [[1]]}, "bash", "-p a: a shell variable holds no mapping and no nested list"),
        ({"a": object()}, "python", "-p a: object has no literal"),
    ],
)
def test_what_cannot_be_set_is_refused(values: Any, language: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        inject(notebook(("", "1")), values, language)


def test_declared_parameters_of_python() -> None:
    node = notebook(("", "1"), ("parameters", DEFAULTS))
    assert declared_parameters(node, "python") == (
        Parameter("alpha", "", "0.1", "learning rate"),
        Parameter("name", "str", '"x"', ""),
        Parameter("steps", "int", "10", "number of steps"),
        Parameter("files", "", '[\n    "a",\n    "b",\n]', ""),
    )


@pytest.mark.parametrize(
    ("language", "source"),
    [
        ("R", "alpha <- 0.1 # rate\nbeta = 'x'"),
        ("julia", "alpha = 0.1 # rate\nbeta = 'x'"),
        ("typescript", "const alpha = 0.1; // rate\nlet beta = 'x';"),
        ("python", "%matplotlib inline\nalpha = 0.1 # rate\nbeta = 'x'"),
    ],
)
def test_declared_parameters_line_by_line(language: str, source: str) -> None:
    node = notebook(("parameters", source))
    assert declared_parameters(node, language) == (
        Parameter("alpha", "", "0.1", "rate"),
        Parameter("beta", "", "'x'", ""),
    )


def test_parameters_beside_a_broken_statement_are_declared() -> None:
    source = "a: float = 2.25 # Variable a\n%magic\nb = [\n    'x', # first\n] # type: list Nice\n= 2\nc = 1"
    assert declared_parameters(notebook(("parameters", source)), "python") == (
        Parameter("a", "float", "2.25", "Variable a"),
        Parameter("b", "list", "[\n    'x', # first\n]", "Nice"),
        Parameter("c", "", "1", ""),
    )


def test_no_parameters_are_declared() -> None:
    assert declared_parameters(notebook(("", "a = 1")), None) == ()


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("a: 1\nb: [x, 2.5]\n", {"a": 1, "b": ["x", 2.5]}),
        ('{"a": null, "b": {"c": true}}', {"a": None, "b": {"c": True}}),
        ("day: 2026-11-30\n", {"day": "2026-11-30"}),
        ("", {}),
    ],
)
def test_files(tmp_path: Path, text: str, values: Any) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(text)
    assert read_file(path) == values


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1", "p.yaml:1:6: not YAML or JSON"),
        ("- 1", "expected names with values"),
        ("1: 2", "expected names with values"),
        ("a: !!python/object:os.system x", "not YAML or JSON"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=words) as caught:
        read_file(path)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"p\.yaml"):
        read_file(tmp_path / "p.yaml")
