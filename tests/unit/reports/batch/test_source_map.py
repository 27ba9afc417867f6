"""Where a line of a cell stands in the notebook's file, however the file is laid out."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import nbformat
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safe_exec.notebook import notebook
from safe_exec.reports.annotated_notebook import annotate
from safe_exec.reports.batch import source_map
from tests.unit.builders import make_verdict

SOURCES = (
    "import os\n\nprint('ä\\n\u2028 \"quoted\"')\n",
    "x = 1",
    "",
    "def f():\r\n    return '''\n{[\n'''\n\nf()",
)


def make_node(*sources: str) -> Any:
    cells: list[Any] = [nbformat.v4.new_markdown_cell('# "Title" {[\n\nsource: "no"')]
    for number, source in enumerate(sources):
        output = nbformat.v4.new_output("stream", text='"source": ["]}\n')
        cells.append(
            nbformat.v4.new_code_cell(
                source, id=f"cell-{number}", outputs=[output], metadata={"source": ["x\n"]}
            )
        )
    return nbformat.v4.new_notebook(cells=cells)


def one_text(node: Any) -> Any:
    """The same notebook with each source in one piece."""
    document = json.loads(nbformat.writes(node))
    for cell in document["cells"]:
        cell["source"] = "".join(cell["source"])
    return document


def raw_lines(text: str) -> list[str]:
    return text.split("\n")


def check(text: str, sources: tuple[str, ...]) -> None:
    """Each line of each cell is found where the file has it."""
    found = source_map.placed(text, range(1, len(sources) + 1))
    assert [found[n + 1].source for n in range(len(sources))] == list(sources)
    file = raw_lines(text)
    for placed in found.values():
        words = placed.source.split("\n")
        assert len(placed.lines) == len(words)
        for line, said in zip(placed.lines, words, strict=True):
            begins = (said.splitlines() or [""])[0]  # nbformat cuts at more than line feeds
            assert any(
                json.dumps(begins, ensure_ascii=escape)[1:-1] in file[line - 1]
                for escape in (True, False)
            )


LAYOUTS = {
    "as nbformat writes it": nbformat.writes,
    "on one line": lambda node: json.dumps(json.loads(nbformat.writes(node))),
    "without blanks": lambda node: json.dumps(
        json.loads(nbformat.writes(node)), separators=(",", ":")
    ),
    "each source in one piece": lambda node: json.dumps(one_text(node), indent=2),
    "in one piece on one line": lambda node: json.dumps(one_text(node)),
    "indented with tabs, ascii": lambda node: json.dumps(
        json.loads(nbformat.writes(node)), indent="\t", ensure_ascii=True
    ),
    "with the line ends of another system": lambda node: nbformat.writes(node).replace(
        "\n", "\r\n"
    ),
}


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_every_line_is_found_in_every_layout(layout: str) -> None:
    check(LAYOUTS[layout](make_node(*SOURCES)), SOURCES)


def test_the_very_line() -> None:
    text = nbformat.writes(make_node("a = 1\nb = 2\nc = 3"))
    placed = source_map.placed(text, [1])[1]
    assert [raw_lines(text)[line - 1].strip() for line in placed.lines] == [
        '"a = 1\\n",',
        '"b = 2\\n",',
        '"c = 3"',
    ]


def test_a_line_in_several_pieces_stands_where_it_begins() -> None:
    text = '{"cells": [{"cell_type": "code", "metadata": {},\n"source": [\n"a = ",\n"1\\nb",\n" = 2\\n",\n"",\n"c"]}], "nbformat": 4}'
    placed = source_map.placed(text, [0])[0]
    assert (placed.source, placed.lines) == ("a = 1\nb = 2\nc", (3, 4, 6))


@pytest.mark.parametrize(
    ("source", "said", "lines"),
    [
        ("[]", "", (3,)),
        ('""', "", (3,)),
        ('["a\\n"]', "a\n", (3, 3)),
        ('[ "a\\n",\n"b\\n"\n]', "a\nb\n", (3, 4, 4)),
    ],
)
def test_sources_at_the_edge(source: str, said: str, lines: tuple[int, ...]) -> None:
    placed = source_map.placed(
        f'{{\n"cells": [\n{{"source": {source}, "metadata": {{}} }}\n]\n}}', [0]
    )[0]
    assert (placed.source, placed.lines) == (said, lines)


def test_laid_out_by_hand() -> None:
    text = """
      { "nbformat" : 4 , "metadata":{"cells": [{"source": "no"}], "a": -1.5e3, "b": null, "c": true},
        "cells":[ {"cell_type":"code","source"
           :
           ["first\\n"  ,
            "second"] ,
           "metadata":{ } , "outputs" : [ ] }
        , { "source" : "other" , "outputs": [{"text": "\\"]}\\\\"}] } ] }
    """
    found = source_map.placed(text, range(9))
    assert {index: (cell.source, cell.lines) for index, cell in found.items()} == {
        0: ("first\nsecond", (5, 6)),
        1: ("other", (8,)),
    }


def test_of_two_members_with_one_name_the_last_counts() -> None:
    text = '{"cells": [], "cells": [\n{"source": "a",\n"source": "b"}]}'
    assert json.loads(text)["cells"][0]["source"] == "b"
    assert source_map.placed(text, [0])[0] == source_map.Placed(source="b", lines=(3,))


def test_nbformat_3() -> None:
    code = {
        "cell_type": "code",
        "language": "python",
        "metadata": {},
        "outputs": [],
        "prompt_number": 1,
    }
    sheets = [
        {
            "cells": [
                {"cell_type": "heading", "level": 1, "metadata": {}, "source": ["Title"]},
                {**code, "input": ["a\n", "b"]},
            ]
        },
        {"cells": [{**code, "input": "c"}], "metadata": {}},
    ]
    text = json.dumps(
        {"metadata": {"name": ""}, "nbformat": 3, "nbformat_minor": 0, "worksheets": sheets},
        indent=1,
    )
    found = source_map.placed(text, [0, 1, 2])
    assert [found[index].source for index in range(3)] == ["Title", "a\nb", "c"]
    assert [raw_lines(text)[line - 1].strip() for line in found[1].lines] == ['"a\\n",', '"b"']
    node = nbformat.reads(text, as_version=4)
    assert [cell.source.removeprefix("# ") for cell in node.cells] == ["Title", "a\nb", "c"]


def test_cells_that_are_ours_do_not_count() -> None:
    node = make_node("a = 1\nb = 2", "boom()", "d")
    verdict = make_verdict()
    annotated = annotate(node, verdict)
    assert notebook.is_banner(annotated.cells[0])
    text = nbformat.writes(annotated)
    assert source_map.placed(text, [1])[1].source == "a = 1\nb = 2"
    tagged = copy.deepcopy(node)
    tagged.cells[0].metadata.tags = ["safe-exec"]  # a user's own word
    assert source_map.placed(nbformat.writes(tagged), [1])[1].source == "a = 1\nb = 2"


def test_what_is_not_there_is_left_out() -> None:
    assert source_map.placed('{"cells": [{"cell_type": "raw"}], "nbformat": 4}', [0, 1]) == {}
    assert source_map.placed('{"nbformat": 4}', [0]) == {}


TEXTS = st.lists(
    st.text(alphabet=st.sampled_from('ab"\\{}[],:\n\r\tä\u2028\U0001f600'), max_size=12),
    min_size=1,
    max_size=4,
)


@settings(deadline=None)
@given(TEXTS, st.sampled_from([None, 0, 1]), st.booleans(), st.booleans())
def test_any_source_in_any_layout(
    sources: list[str], indent: int | None, whole: bool, ascii_only: bool
) -> None:
    node = make_node(*sources)
    document = one_text(node) if whole else json.loads(nbformat.writes(node))
    check(json.dumps(document, indent=indent, ensure_ascii=ascii_only), tuple(sources))


# --- reading ----------------------------------------------------------------------------------------------------


def test_only_the_notebook_that_was_run_is_read(tmp_path: Path) -> None:
    path = tmp_path / "nb.ipynb"
    data = b"\xef\xbb\xbf{}"
    path.write_bytes(data)
    assert source_map.read_as_run(path, hashlib.sha256(data).hexdigest()) == "{}"
    assert source_map.read_as_run(path, hashlib.sha256(b"{}").hexdigest()) is None
    assert source_map.read_as_run(path, None) is None
    assert source_map.read_as_run(tmp_path / "gone.ipynb", hashlib.sha256(data).hexdigest()) is None


def test_a_giant_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "nb.ipynb"
    path.write_bytes(b"{}   ")
    monkeypatch.setattr(source_map, "MOST_BYTES", 4)
    assert source_map.read_as_run(path, hashlib.sha256(b"{}   ").hexdigest()) is None
