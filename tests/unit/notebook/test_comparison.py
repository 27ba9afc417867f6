from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from safe_exec.errors import UsageError
from safe_exec.notebook.comparison import (
    ComparisonRules,
    Markers,
    differences,
    image_distance,
    markers,
    read_sanitizers,
)

STRICT = ComparisonRules()


def stream(text: str, name: str = "stdout") -> Any:
    return nbformat.v4.new_output("stream", name=name, text=text)


def result(**data: Any) -> Any:
    named = {key.replace("_", "/"): value for key, value in data.items()}
    return nbformat.v4.new_output("execute_result", data=named, execution_count=7)


def error(name: str, text: str) -> Any:
    return nbformat.v4.new_output("error", ename=name, evalue=text, traceback=["random"])


def cell(
    *outputs: Any, source: str = "1", tags: list[str] | None = None, count: int | None = 1
) -> Any:
    made = nbformat.v4.new_code_cell(source, outputs=list(outputs), execution_count=count)
    if tags is not None:
        made.metadata["tags"] = tags
    return made


def picture(shift: int) -> str:
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).ellipse((8 + shift, 8, 40 + shift, 40), fill="navy")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.mark.parametrize(
    ("stored", "new", "summaries"),
    [
        ([stream("a\n")], [stream("a\n")], []),
        ([stream("a\n")], [stream("b\n")], ["stdout differs"]),
        ([stream("a\n"), stream("b\n")], [stream("a\nb\n")], []),
        ([stream("10%\r100%\n")], [stream("50%\r100%\n")], []),
        ([stream("ab\x08c\n")], [stream("ac\n")], []),
        ([stream("a\n")], [], ["stdout is missing"]),
        ([], [stream("a\n", "stderr")], ["stderr is new"]),
        ([result(text_plain="1")], [result(text_plain="1")], []),
        ([result(text_plain=["1\n", "2"])], [result(text_plain="1\n2")], []),
        ([result(text_plain="1")], [result(text_plain="2")], ["text/plain differs"]),
        (
            [result(text_plain="1")],
            [result(text_plain="1"), result(text_plain="1")],
            ["text/plain differs (1 stored, 2 new)"],
        ),
        # Kinds may come in any order, outputs of one kind may not.
        ([stream("a"), result(text_plain="1")], [result(text_plain="1"), stream("a")], []),
        (
            [result(text_plain="1"), result(text_plain="2")],
            [result(text_plain="2"), result(text_plain="1")],
            ["text/plain differs"],
        ),
        (
            [result(application_json={"a": 1, "b": 2})],
            [result(application_json={"b": 2, "a": 1})],
            [],
        ),
        ([result(image_png="xx", text_plain="1")], [result(image_png="yy", text_plain="1")], []),
        ([error("E", "x")], [error("E", "x")], []),
        ([error("E", "x")], [error("E", "y")], ["evalue differs"]),
    ],
)
def test_outputs(stored: list[Any], new: list[Any], summaries: list[str]) -> None:
    assert [d.summary for d in differences(cell(*stored), new, STRICT)] == summaries


def test_a_difference_shows_both_sides() -> None:
    (difference,) = differences(cell(stream("a\nb\nc\n")), [stream("a\nx\nc\n")], STRICT)
    assert "-b" in difference.lines and "+x" in difference.lines and " a" in difference.lines


def test_a_long_difference_is_cut() -> None:
    long = "".join(f"{number}\n" for number in range(1000))
    (difference,) = differences(cell(stream(long)), [stream("")], STRICT)
    assert len(difference.lines) == 41 and difference.lines[-1].startswith("...")


@pytest.mark.parametrize(
    ("kwargs", "lax", "compared"),
    [
        ({}, False, True),
        ({}, True, False),
        ({"source": "# NBVAL_IGNORE_OUTPUT\n1"}, False, False),
        ({"source": "x = 1\n    #NBVAL_CHECK_OUTPUT"}, True, True),
        ({"tags": ["nbval-ignore-output"]}, False, False),
        ({"tags": ["nbval-check-output"]}, True, True),
        ({"tags": ["nbval-ignore-output"], "source": "# NBVAL_CHECK_OUTPUT"}, False, True),
        ({"source": "# NBVAL_CHECK_OUTPUT\n# NBVAL_IGNORE_OUTPUT"}, False, False),
        ({"source": "'# NBVAL_IGNORE_OUTPUT'"}, False, True),
    ],
)
def test_which_cells_are_compared(kwargs: Any, lax: bool, compared: bool) -> None:
    found = differences(cell(stream("a"), **kwargs), [stream("b")], ComparisonRules(lax=lax))
    assert bool(found) is compared


def test_markers() -> None:
    assert markers(cell(source="# NBVAL_SKIP")) == Markers(skip=True)
    assert markers(cell(tags=["nbval-raises-exception", "other"])) == Markers(raises=True)
    assert markers(cell()) == Markers()


def test_a_cell_that_was_never_run_is_not_compared_but_may_not_have_outputs() -> None:
    assert differences(cell(count=None), [stream("a")], STRICT) == ()
    (difference,) = differences(cell(stream("a"), count=None), [stream("a")], STRICT)
    assert "was not run" in difference.summary


def test_sanitizers(tmp_path: Path) -> None:
    path = tmp_path / "sanitize.cfg"
    path.write_text(
        "# comment\n[times]\nregex: \\d+:\\d+\nreplace: TIME\n\n[empty]\nregex: x+$\nreplace:\n"
    )
    rules = ComparisonRules(sanitizers=read_sanitizers(path))
    assert differences(cell(stream("at 10:30 xx")), [stream("at 11:45 xxx")], rules) == ()
    assert differences(cell(stream("at 10:30")), [stream("on 10:30")], rules)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("regex: (\nreplace: x", ":1: not a regular expression"),
        ("replace: x", ":1: expected 'regex:'"),
        ("regex: a\nregex: b\nreplace: c", ":2: expected 'replace:'"),
        ("regex: a", "has no 'replace:'"),
    ],
)
def test_sanitizers_that_are_wrong(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "sanitize.cfg"
    path.write_text(text)
    with pytest.raises(UsageError, match=re.escape(words)):
        read_sanitizers(path)


@pytest.mark.parametrize(
    ("old", "new", "equal"),
    [
        ("0.1", "0.1000001", True),
        ("[1.0, 2e3]", "[1.0000001, 2000.0]", True),
        ("a  1.50", "a 1.5000001", True),  # the width of a column follows from its numbers
        ("1.0", "1.1", False),
        ("1.0 x", "1.0 y", False),
        ("1.0", "1.0 2.0", False),
        ("nan inf", "nan inf", True),
        ("-1e-9", "1e-9", True),
    ],
)
def test_a_tolerance_for_numbers(old: str, new: str, equal: bool) -> None:
    rules = ComparisonRules(tolerance=1e-5)
    assert (
        differences(cell(result(text_plain=old)), [result(text_plain=new)], rules) == ()
    ) is equal


@given(st.text(), st.text(), st.floats(0, 1))
def test_a_tolerance_takes_any_text(old: str, new: str, tolerance: float) -> None:
    rules = ComparisonRules(tolerance=tolerance)
    assert differences(cell(result(text_plain=old)), [result(text_plain=old)], rules) == ()
    differences(cell(result(text_plain=old)), [result(text_plain=new)], rules)


def test_images_are_compared_by_their_look() -> None:
    rules = ComparisonRules(image_distance=4)
    assert image_distance(picture(0), picture(0)) == 0
    near, far = picture(1), picture(16)
    assert differences(cell(result(image_png=picture(0))), [result(image_png=near)], rules) == ()
    (difference,) = differences(cell(result(image_png=picture(0))), [result(image_png=far)], rules)
    assert difference.summary == "image/png differs"
    assert all(len(line) < 100 for line in difference.lines)


def test_a_broken_image_differs() -> None:
    rules = ComparisonRules(image_distance=64)
    assert differences(cell(result(image_png="xxxx")), [result(image_png=picture(0))], rules)


def test_a_later_rule_for_the_same_text_replaces_the_earlier_one(tmp_path: Path) -> None:
    path = tmp_path / "rules.cfg"
    path.write_text("regex: a\nreplace: 1\nregex: b\nreplace: 2\n[more]\nregex: a\nreplace: b\n")
    # In its place, as in nbval: what it writes is replaced in turn.
    assert [(regex.pattern, text) for regex, text in read_sanitizers(path)] == [
        ("a", "b"),
        ("b", "2"),
    ]
