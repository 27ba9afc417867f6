"""Cells are split into statements by whole lines, and joined again."""

from __future__ import annotations

import ast
import textwrap

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from safe_exec.experiments.culprits.statements import (
    is_valid,
    lines_of,
    remaining_lines,
    spans_of,
    text_of,
)

# A cell, and the first and last line and the depth of each span.
SPANS: dict[str, tuple[str, list[tuple[int, int, int]]]] = {
    "one by one": ("a = 1\nb = 2", [(1, 1, 0), (2, 2, 0)]),
    "a comment belongs to what follows": ("a\n\n# why\nb\n# end", [(1, 1, 0), (2, 4, 0)]),
    "several lines": ("a = [\n  1,\n]\nb", [(1, 3, 0), (4, 4, 0)]),
    "a block": ("for x in y:\n  a\n\n  b\nc", [(1, 4, 0), (2, 2, 1), (3, 4, 1), (5, 5, 0)]),
    "decorated": ("a\n@d(\n 1)\n@e\ndef f():\n  pass", [(1, 1, 0), (2, 6, 0), (6, 6, 1)]),
    "two on one line": ("a; b\nc", [(1, 1, 0), (2, 2, 0)]),
    "two on the last line of one": ("a = [\n1]; b = [\n2]\nc", [(1, 3, 0), (4, 4, 0)]),
    "after a backslash": ("a; \\\nb\nc", [(1, 2, 0), (3, 3, 0)]),
    "a block in the line of its header": ("if a: b\nc", [(1, 1, 0), (2, 2, 0)]),
    "a long header": ("def f(\n  # a\n  a,\n):\n  # b\n  b", [(1, 6, 0), (5, 6, 1)]),
    "else and elif": (
        "if a:\n  b\nelif c:\n  d\nelse:\n  e",
        [(1, 6, 0), (2, 2, 1), (3, 6, 1), (4, 4, 2), (5, 6, 2), (6, 6, 3)],
    ),
    "an if in an else": (
        "if a:\n  b\nelse:\n  if c:\n    d",
        [(1, 5, 0), (2, 2, 1), (3, 5, 1), (4, 5, 2), (5, 5, 3)],
    ),
    "try": (
        "try:\n  a\nexcept b:\n  c\nelse:\n  d\nfinally:\n  e",
        [(1, 8, 0), (2, 2, 1), (3, 4, 1), (4, 4, 2), (5, 6, 1), (6, 6, 2), (7, 8, 1), (8, 8, 2)],
    ),
    "match": (
        "match a:\n  case 1:\n    b\n  case _:\n    c",
        [(1, 5, 0), (2, 3, 1), (3, 3, 2), (4, 5, 1), (5, 5, 2)],
    ),
    "a text of several lines": ("a = '''\nb = 2\n'''\nc", [(1, 3, 0), (4, 4, 0)]),
    "signs that end no line": ("a = '\x0c\x1c\u2028\x85'\nb", [(1, 1, 0), (2, 2, 0)]),
    "lines of Windows": ("a = 1\r\nif b:\r\n  c\r\nd", [(1, 1, 0), (2, 3, 0), (3, 3, 1), (4, 4, 0)]),
    "a line magic": ("%matplotlib inline\na\n!ls", [(1, 1, 0), (2, 2, 0), (3, 3, 0)]),
    "a cell magic stays": ("%%time\na\nb", [(2, 2, 0), (3, 3, 0)]),
    "another language": ("%%bash\nls\npwd", []),
    "only a comment": ("# nothing", []),
    "nothing": ("", []),
    "no Python": ("def f(:", []),
}  # fmt: skip


@pytest.mark.parametrize("name", SPANS)
def test_spans(name: str) -> None:
    source, expected = SPANS[name]
    assert [(s.first, s.last, s.depth) for s in spans_of(source)] == expected


# A cell, the numbers of the spans that are removed, and what remains.
REMAINING: dict[str, tuple[str, list[int], str]] = {
    "nothing removed": ("a\n\nb", [], "a\n\nb"),
    "with its comment": ("# one\na\n# two\nb", [0], "# two\nb"),
    "the comment below the last one": ("a\n# end", [], "a"),
    "in a block": ("if a:\n  b\n  # c\n  c\nd", [2], "if a:\n  b\nd"),
    "a magic": ("%%time\n\na\nb", [0], "%%time\nb"),
}


@pytest.mark.parametrize("name", REMAINING)
def test_what_remains(name: str) -> None:
    source, removed, expected = REMAINING[name]
    spans = spans_of(source)
    assert text_of(source, remaining_lines(source, spans, [spans[n] for n in removed])) == expected


LINES = st.sampled_from(
    [
        *("a = 1", "# why", "", "if a:", "  b", "  if c:", "    d; e", "else:", "elif c:", "  # x"),
        *("try:", "except E:", "finally:", "def f(a,", "      b):", "@d", "%time x", "x = '''", "'''"),
        *("    return 1", "a; b", "a \\", "  for x in y: z", "with a as b:", "match a:", "  case 1:"),
    ]
)  # fmt: skip
PYTHON = st.lists(LINES, max_size=14).map("\n".join)
CELLS = PYTHON | st.text()


@settings(max_examples=400, deadline=None)
@given(CELLS, st.data())
def test_what_remains_is_a_part_of_the_users_lines(source: str, data: st.DataObject) -> None:
    spans, lines = spans_of(source), lines_of(source)
    assert all(1 <= span.first <= span.last <= len(lines) for span in spans)
    for outer in spans:
        for inner in spans:
            apart = outer.last < inner.first or inner.last < outer.first
            assert outer is inner or apart or outer.holds(inner) or inner.holds(outer)
    removed = data.draw(st.lists(st.sampled_from(spans), unique_by=id)) if spans else []
    numbers = remaining_lines(source, spans, removed)
    assert numbers == sorted(set(numbers)) and set(numbers) <= set(range(1, len(lines) + 1))
    assert not any(span.has(n) for span in removed for n in numbers)


@settings(max_examples=400, deadline=None)
@given(PYTHON)
@example("a \\\n# why")
@example("if 1:\n a \\\n# why")
@example("a \\\n\n# why")
@example("a \\\n\n\nb")
def test_without_removals_nothing_is_lost_but_comments(source: str) -> None:
    spans = spans_of(source)
    text = text_of(source, remaining_lines(source, spans, []))
    if spans and "%" not in source and source == textwrap.dedent(source):
        assert ast.dump(ast.parse(text)) == ast.dump(ast.parse(source))
    if spans:
        assert is_valid(text)


@pytest.mark.parametrize("depth", [30, 90, 400, 3000])
def test_however_deep_nothing_is_raised(depth: int) -> None:
    spans_of("".join(" " * k + "if 1:\n" for k in range(depth)) + " " * depth + "a")
    spans_of("if 1:\n  a\n" + "elif b:\n  c\n" * depth)
