from __future__ import annotations

import ast
import json
import math
import subprocess
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from papermill.translators import papermill_translators

from safe_exec.notebook import literals
from safe_exec.notebook.literals import LANGUAGES

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal, with NaN equal to itself."""
    if isinstance(one, float) and isinstance(other, float):
        return one == other or (math.isnan(one) and math.isnan(other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and bool(one == other)


@given(values)
def test_python_reads_its_literals_as_the_values(value: Any) -> None:
    literal = literals.python(value)
    assert "\n" not in literal
    assert same(eval(literal, {"float": float}), value)


@given(st.recursive(st.none() | st.booleans() | st.integers() | texts, st.lists, max_leaves=5))
def test_json_reads_literals_of_javascript_as_the_values(value: Any) -> None:
    assert same(json.loads(literals.javascript(value)), value)


@given(texts)
def test_a_shell_reads_its_literals_as_the_texts(text: str) -> None:
    # shlex splits as a shell does; that bash itself agrees is tested below.
    import shlex

    assert shlex.split(literals.bash(text)) == [text]


def test_bash_reads_its_literals_as_the_texts() -> None:
    wanted = ["", "a b", "it's", '"', "$HOME `id` $(id)", "*", "a\nb", "-n", "é"]
    script = "\n".join(f"v={literals.bash(text)}; printf '%s\\0' \"$v\"" for text in wanted)
    output = subprocess.run(["bash", "-c", script], capture_output=True, check=True).stdout
    assert output.decode().split("\0")[:-1] == wanted


def test_bash_reads_a_list_as_an_array() -> None:
    wanted = ["a b", "", "it's", "$HOME", "*"]
    script = f"v={literals.bash(wanted)}; printf '%s\\0' \"${{v[@]}}\""
    output = subprocess.run(["bash", "-c", script], capture_output=True, check=True).stdout
    assert output.decode().split("\0")[:-1] == wanted
    # As papermill writes them.
    assert literals.bash([1, 2.5, True]) == "(1 2.5 true)"
    assert literals.bash([]) == "()"


@pytest.mark.parametrize("value", [[[1]], [{"a": 1}], {"a": 1}])
def test_a_shell_variable_holds_no_nested_collection(value: Any) -> None:
    with pytest.raises(ValueError, match="no mapping and no nested list"):
        literals.bash(value)


@pytest.mark.parametrize("literal", [literals.python, literals.r, literals.bash])
def test_a_number_of_a_subclass_is_a_plain_literal(literal: Any) -> None:
    class Unit(float):
        def __repr__(self) -> str:
            return "Unit(0.5)"

    assert literal(Unit(0.5)) == "0.5"
    with pytest.raises(ValueError, match="object has no literal; pass a number"):
        literal(object())


SAMPLES: Sequence[Any] = (
    None, True, False, 0, -3, 1.5, 1e-20, "text", 'a "quoted" text', "back\\slash", "tab\t", "a\nb",
    [1, "a", None], {"a": 1, "b": [True, 2.5]}, [], {}, float("inf"), float("nan"), "$x",
)  # fmt: skip


@pytest.mark.parametrize("name", ["python", "R", "julia"])
@pytest.mark.parametrize("value", SAMPLES, ids=repr)
def test_the_same_value_as_papermill_gives(name: str, value: Any) -> None:
    translator = papermill_translators.find_translator("", name)
    theirs, ours = translator.translate(value), LANGUAGES[name.lower()].literal(value)
    if name == "python":
        assert same(eval(theirs, {"float": float}), eval(ours, {"float": float}))
        return
    # Neither language is parsed here: quotes and escapes may differ, the words may not.
    plain = {ord(char): None for char in " '\"\\"}
    renamed = (
        theirs.replace("raw", "").replace("float('nan')", "NaN").replace("float('inf')", "Inf")
    )
    if isinstance(value, float) and not math.isfinite(value):
        assert ours in ("NaN", "Inf")  # papermill writes Python here, which R and Julia refuse
    else:
        escapes = {"\\t": "\t", "\\n": "\n", "\\$": "$"}
        for escape, char in escapes.items():
            ours, renamed = ours.replace(escape, char), renamed.replace(escape, char)
        assert ours.translate(plain) == renamed.translate(plain)


@pytest.mark.parametrize(
    ("language", "good", "bad"),
    [
        ("python", "alpha_1", "class"),
        ("python", "größe", "1a"),
        ("r", "a.b", "_a"),
        ("bash", "A_1", "a-b"),
        ("julia", "a", "a b"),
        ("javascript", "a", "a.b"),
    ],
)
def test_names(language: str, good: str, bad: str) -> None:
    assert LANGUAGES[language].is_name(good)
    assert not LANGUAGES[language].is_name(bad)


def test_a_literal_of_python_is_one_expression() -> None:
    assert isinstance(ast.parse(literals.python("'''\"\"\"\\")).body[0], ast.Expr)
