from __future__ import annotations

import nbformat
import pytest

from safe_exec.errors import UsageError
from safe_exec.notebook.inputs import (
    CellSelection,
    ExitMeaning,
    NotebookInputs,
    apply,
    exit_meaning,
)


@pytest.mark.parametrize(
    ("until", "parameters", "skipped"),
    [
        ("1", {}, [1, 2]),
        ("2", {}, [2]),
        # The new cell stands at 2; numbers are those of the file, indexes those of the run.
        ("2", {"x": 1}, [3]),
        ("3", {"x": 1}, []),
        ("1", {"x": 1}, [1, 2, 3]),
    ],
)
def test_numbers_of_cells_are_those_of_the_file(
    until: str, parameters: dict[str, int], skipped: list[int]
) -> None:
    node = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(source) for source in ("a", "x = 0", "b")]
    )
    node.cells[1].metadata["tags"] = ["parameters"]
    inputs = NotebookInputs(parameters=parameters, selection=CellSelection(until=until))
    applied = apply(node, inputs, "python")
    assert sorted(applied.skipped) == skipped
    assert len(applied.node.cells) == 3 + bool(parameters)


def test_the_meaning_of_an_exit() -> None:
    assert exit_meaning("error") is ExitMeaning.ERROR
    with pytest.raises(UsageError, match="neither 'success' nor 'error'"):
        exit_meaning("ok")
