from __future__ import annotations

from typing import Any

import nbformat
import pytest

from safe_exec.errors import UsageError
from safe_exec.notebook.inputs import CellSelection
from safe_exec.notebook.selection import skipped_cells


def notebook() -> Any:
    node = nbformat.v4.new_notebook()
    for tags in (["setup"], None, ["slow"], ["slow", "plot"], ["injected-parameters"]):
        node.cells.append(nbformat.v4.new_markdown_cell("text"))
        node.cells.append(
            nbformat.v4.new_code_cell("1", metadata={} if tags is None else {"tags": tags})
        )
    node.cells[5]["id"] = "third"
    return node


@pytest.mark.parametrize(
    ("selection", "skipped"),
    [
        (CellSelection(), []),
        (CellSelection(skip_tags=("slow",)), [5, 7]),
        (CellSelection(skip_tags=("plot", "setup")), [1, 7]),
        (CellSelection(only_tags=("slow",)), [1, 3]),
        (CellSelection(only_tags=("slow",), skip_tags=("plot",)), [1, 3, 7]),
        (CellSelection(until="2"), [5, 7, 9]),
        (CellSelection(until="third"), [7, 9]),
        (CellSelection(until="slow"), [9]),
        (CellSelection(until="5"), []),
    ],
)
def test_cells_that_are_left_out(selection: CellSelection, skipped: list[int]) -> None:
    assert sorted(skipped_cells(notebook(), selection).indexes) == skipped
    assert skipped_cells(notebook(), selection).warnings == ()


def test_a_tag_to_skip_that_no_cell_has_is_a_warning() -> None:
    skipped = skipped_cells(notebook(), CellSelection(skip_tags=("slwo", "slow")))
    assert sorted(skipped.indexes) == [5, 7]
    assert skipped.warnings == ("--skip-tag slwo: no code cell has this tag; did you mean 'slow'?",)


def test_among_many_notebooks_one_may_have_no_cell_to_run() -> None:
    skipped = skipped_cells(notebook(), CellSelection(only_tags=("zzz",), lenient=True))
    assert sorted(skipped.indexes) == [1, 3, 5, 7] and "no cell was run" in skipped.warnings[0]


@pytest.mark.parametrize(
    ("selection", "words"),
    [
        (CellSelection(only_tags=("zzz",)), "there are injected-parameters, plot, setup, slow"),
        (CellSelection(until="6"), "--until 6: the notebook has 5 code cells"),
        (CellSelection(until="0"), "--until 0"),
        (CellSelection(until="fourth"), "--until fourth: no code cell has this number, id or tag"),
    ],
)
def test_a_choice_of_nothing_is_refused(selection: CellSelection, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        skipped_cells(notebook(), selection)


def test_a_selection_that_leaves_nothing_out_is_false() -> None:
    assert not CellSelection() and CellSelection(until="1") and CellSelection(skip_tags=("a",))
