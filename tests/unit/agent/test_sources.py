"""Lines of code that IPython and its magics make of a cell, traced back to the lines of the cell."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from IPython.core.inputtransformer2 import TransformerManager

from safe_exec.agent import sources
from safe_exec.kernel.cell_code import CellCode, Source, source_of

line_of: Any = sources.line_of
map_cell: Any = sources.map_cell
map_body: Any = sources.map_body
make_transformer: Any = TransformerManager


def transformed(text: str) -> str:
    return str(make_transformer().transform_cell(text))


def all_lines(line_map: list[list[int]], code: str) -> list[int]:
    return [line_of(line_map, number) for number in range(1, len(code.splitlines()) + 1)]


CELLS = [
    ("as it is", "a = 1\nb = 2\n", [1, 2]),
    ("blank lines first", "\n\n  \na = 1\n\nb = 2", [4, 5, 6]),
    ("indented", "    a = 1\n    if a:\n        b = 2", [1, 2, 3]),
    ("prompts", ">>> a = 1\n>>> if a:\n...     b = 2", [1, 2, 3]),
    ("numbered prompts", "In [1]: a = 1\n   ...: b = 2", [1, 2]),
    ("a shell command over lines", "!echo \\\n  a \\\n  b\nc = 2\n1 / 0", [1, 4, 5]),
    ("magics", "\n%matplotlib inline\nx = !ls\nx?\n!!ls\nf(x)", [2, 3, 4, 5, 6]),
    ("a cell magic after a blank line", "\n\n%%time\n\na = 1", [3]),
]


@pytest.mark.parametrize(
    ("cell", "lines"), [row[1:] for row in CELLS], ids=[row[0] for row in CELLS]
)
def test_the_code_of_a_whole_cell(cell: str, lines: list[int]) -> None:
    code = transformed(cell)
    assert all_lines(map_cell(cell, code), code) == lines
    assert line_of(map_cell(cell, code), len(lines) + 1) == 0, "nothing is known beyond the code"


BODIES = [
    ("as it is", "%%time\na = 1\nb = 2", "a = 1\nb = 2\n", [2, 3]),
    (
        "blank lines and a comment first",
        "%%capture\n\n# a\nb = 2",
        transformed("\n# a\nb = 2"),
        [3, 4],
    ),
    ("a blank line before the magic", "\n%%time\na = 1", "a = 1", [3]),
    ("what prun compiles", "%%prun -q\na = 1\n\nb = 2", transformed("\na = 1\n\nb = 2"), [2, 3, 4]),
    (
        "a statement on the line of the magic",
        "%%prun a = 0\nb = 1\nc = 2",
        "a = 0\nb = 1\nc = 2",
        [0, 2, 3],
    ),
    (
        "the inner of two magics",
        "%%capture\n%%time\n\na = 1\nb = 2",
        transformed("\na = 1\nb = 2"),
        [4, 5],
    ),
    ("the call of the inner one", "%%capture\n%%time\na = 1", transformed("%%time\na = 1"), [2]),
    ("only a shell command", "%%time\n!sleep 1", transformed("!sleep 1"), [2]),
    (
        "magics between",
        "%%time\na = 1\n%run \\\n x.py\n!ls\nb = 2",
        transformed("a = 1\n%run \\\n x.py\n!ls\nb = 2"),
        [2, 3, 5, 6],
    ),
    (
        "within a function",
        "%%wrap\na = 1\nb = 2\nc = 3",
        "def f():\n    a = 1\n    b = 2\n    c = 3\nf()",
        [0, 2, 3, 4, 0],
    ),
    (
        "much around little",
        "%%wrap\na = 1\nb = 2",
        "import os\ndef f():\n  try:\n    a = 1\n    b = 2\n  finally:\n    os\nf()",
        [0, 0, 0, 2, 3, 0, 0, 0],
    ),
    ("a part of it", "%%parts\na = 1\n\nb = 2\nc = 3", "b = 2\nc = 3", [4, 5]),
    (
        "a line that stands there twice",
        "%%time\nx += 1\ny = x\nx += 1\nz = x",
        "x += 1\ny = x\nx += 1\nz = x",
        [2, 3, 4, 5],
    ),
    ("prompts", "%%time\n>>> a = 1\n>>> b = 2", transformed(">>> a = 1\n>>> b = 2"), [2, 3]),
    ("other text", "%%time\nexec(text)", "one = 1\ntwo = 2", None),
    (
        "text of a library",
        "%%time\nT = namedtuple('T', 'a')",
        "lambda _cls, a: _tuple_new(_cls, (a,))",
        None,
    ),
    ("no cell magic", "exec('a = 1')\na = 1", "a = 1", None),
    ("no text", "%%time\na = 1", "", None),
    ("no body", "%%time", "a = 1", None),
    ("an empty cell", "\n \n", "a = 1", None),
]


@pytest.mark.parametrize(
    ("cell", "code", "lines"), [row[1:] for row in BODIES], ids=[row[0] for row in BODIES]
)
def test_the_code_of_a_body(cell: str, code: str, lines: list[int] | None) -> None:
    line_map = map_body(cell, code)
    assert (line_map and all_lines(line_map, code)) == lines


LINES = st.sampled_from(
    [
        "",
        "# note",
        "a = 1",
        "    b = a",
        "!echo a",
        "%precision 3",
        "c = !ls",
        "x?",
        "%lsmagic \\\n   more",
        "if a:\n    b = 2",
    ]
)


@given(
    before=st.lists(LINES, max_size=6), after=st.lists(LINES, max_size=6), magics=st.integers(0, 3)
)
def test_a_line_keeps_its_place_whatever_stands_around_it(
    before: list[str], after: list[str], magics: int
) -> None:
    marked = "marked = 99"
    body = "\n".join([*before, marked, *after])
    cell = "".join(f"%%magic{n}\n" for n in range(magics)) + body
    code = transformed(body)
    made = code.splitlines()
    assert made.count(marked) == 1
    line_map = map_body(cell, code) if magics else map_cell(cell, code)
    assert line_map is not None
    assert line_of(line_map, made.index(marked) + 1) == cell.splitlines().index(marked) + 1


@given(cell=st.text(max_size=80), code=st.text(max_size=80))
def test_any_two_texts(cell: str, code: str) -> None:
    count = len(cell.splitlines())
    for line_map in (map_cell(cell, code), map_body(cell, code)):
        if line_map is not None:
            assert all(0 <= line <= count for line in all_lines(line_map, code))


# --- outside ----------------------------------------------------------------------------------------------------


def cell_code() -> CellCode:
    """Cells 1 to 3 as inside; the notebook's indexes are ten times as large, and cell 9 is not known."""
    code = CellCode(lambda number: 10 * number if number < 9 else None)
    code.add("/tmp/1.py", Source(cell=1, line_map=[[1, 1]]))
    code.add("/tmp/2.py", Source(cell=2, line_map=[[1, 3], [5, 0]]))
    first = (("<module>", 1, 4), ("load", 2, 3))
    code.add("<timed exec>", Source(cell=2, line_map=[[1, 2], [5, 0]], functions=first))
    code.add(
        "<timed exec>", Source(cell=3, line_map=[[1, 3], [4, 0]], functions=(("<module>", 1, 3),))
    )
    code.add("/tmp/1.py", Source(cell=9, line_map=[[1, 1]]))
    return code


@pytest.mark.parametrize(
    ("function", "line", "file", "place"),
    [
        ("f", 7, "/tmp/1.py", (10, 7)),
        ("<module>", 2, "/tmp/2.py", (20, 4)),
        ("<module>", 5, "/tmp/2.py", (None, 5)),
        ("<module>", 2, "<timed exec>", (30, 4)),  # the one that was compiled last
        ("<module>", 4, "<timed exec>", (20, 5)),  # it has no such line
        ("load", 3, "<timed exec>", (20, 4)),
        ("other", 3, "<timed exec>", (None, 3)),
        ("load", None, "<timed exec>", (None, None)),
        ("f", None, "/tmp/2.py", (20, None)),
        ("f", 3, "/usr/lib/x.py", (None, 3)),
    ],
)
def test_a_frame_belongs_to_a_cell(
    function: str, line: int | None, file: str, place: tuple[int | None, int | None]
) -> None:
    assert cell_code().locate(function, line, file) == place


def test_sources_are_bounded_and_facts_are_checked() -> None:
    assert source_of({"file": "x", "cell": 1}).line_map == [[1, 1]]
    told = source_of({"file": "x", "cell": 1, "lines": [[1, 2], [3, 0]], "codes": [["f", 1, 2]]})
    assert (told.line_map, told.functions) == ([[1, 2], [3, 0]], (("f", 1, 2),))
    for wrong in (
        {"lines": [[1]]},
        {"lines": 3},
        {"codes": [["f"]]},
        {"codes": [["f", "x", 1]]},
        {"lines": [["a", 2]]},
    ):
        with pytest.raises((ValueError, TypeError)):
            source_of({"file": "x", "cell": 1, **wrong})
