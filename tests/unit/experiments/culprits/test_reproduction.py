"""The notebook that reproduces: the culprits alone, with all that the run depended on, and the notebook it is from untouched."""

from __future__ import annotations

import copy
from typing import Any

import nbformat
import pytest

from safe_exec.experiments.culprits.reproduction import build, is_reproduction
from safe_exec.limits import profiles
from safe_exec.model.limits import Limits
from safe_exec.model.verdict import CauseKind
from safe_exec.notebook import notebook
from tests.unit.builders import make_cause

MIB = 1 << 20
LIMITS = Limits(
    memory=100 * MIB, cpus=1.5, cpu_time=10.0, cell_timeout=3.0, timeout=9.0, start_timeout=60.0, processes=20, open_files=50,
    file_size=MIB, cell_output=MIB, output=4 * MIB, interrupt_grace=0.5,
)  # fmt: skip


def source(**metadata: Any) -> Any:
    """Markdown, three code cells with outputs, one of them with limits of its own."""
    new = nbformat.v4
    cells = [
        new.new_markdown_cell("# title", id="m"),
        new.new_code_cell(
            "x = 1", id="a", execution_count=1, outputs=[new.new_output("stream", text="said")]
        ),
        new.new_code_cell(
            "y = 2",
            id="b",
            execution_count=2,
            metadata={"tags": ["t"], "safe_exec": {"limits": {"timeout": 5}}},
        ),
        new.new_code_cell(
            "z = 3\ncrash(x)",
            id="c",
            execution_count=3,
            outputs=[new.new_output("error", ename="E", evalue="", traceback=[])],
        ),
    ]
    return new.new_notebook(cells=cells, metadata=metadata)


def built(node: Any, cells: tuple[int, ...] = (1, 3), **changes: Any) -> Any:
    usual = {
        "limits": LIMITS,
        "kernel": "python3",
        "allow_errors": False,
        "origin": "nb.ipynb",
        "cause": make_cause(),
    }
    return build(node, cells, **{**usual, **changes})


def test_it_holds_the_culprits_alone() -> None:
    node = source()
    before = copy.deepcopy(node)
    made = built(node)
    nbformat.validate(made)
    assert [(cell.id, cell.source, cell.outputs, cell.execution_count) for cell in made.cells] == [
        ("a", "x = 1", [], None),
        ("c", "z = 3\ncrash(x)", [], None),
    ]
    assert node == before
    made.cells[0]["source"] = "changed"
    made.cells[0].metadata["changed"] = True
    assert node == before


def test_parts_of_cells_replace_them() -> None:
    made = built(source(), sources={3: "crash(1)"})
    assert [cell.source for cell in made.cells] == ["x = 1", "crash(1)"]


def test_what_cells_carry_stays() -> None:
    made = built(source(), (2, 3))
    assert made.cells[0].metadata == {"tags": ["t"], "safe_exec": {"limits": {"timeout": 5}}}


def test_it_says_what_it_is_and_where_it_is_from() -> None:
    made = built(source(title="mine"), allow_errors=True)
    limits = {name: value for name, value in LIMITS.as_dict().items() if name != "interrupt_grace"}
    assert made.metadata == {
        "title": "mine",
        "kernelspec": {"name": "python3", "display_name": "python3"},
        "safe_exec": {
            "limits": limits,
            "reproduces": {"notebook": "nb.ipynb", "cells": [1, 3], "cause": "out_of_memory"},
        },
        "execution": {"allow_errors": True},
    }


@pytest.mark.parametrize(
    ("metadata", "changes", "expected"),
    [
        # The kernel it ran with, be it another than the notebook names.
        ({"kernelspec": {"name": "old", "display_name": "Old", "language": "R"}}, {"kernel": "ir"},
         {"kernelspec": {"name": "ir", "display_name": "Old", "language": "R"}}),
        # A time of the notebook's would count after the limits that are carried.
        ({"execution": {"timeout": 3, "other": 1}}, {}, {"execution": {"other": 1, "allow_errors": False}}),
        ({"execution": None}, {}, {"execution": {"allow_errors": False}}),
        # States of widgets belong to outputs.
        ({"widgets": {"state": {}}}, {}, {"widgets": None}),
        ({"language_info": {"name": "python"}}, {}, {"language_info": {"name": "python"}}),
    ],
)  # fmt: skip
def test_metadata(
    metadata: dict[str, Any], changes: dict[str, Any], expected: dict[str, Any]
) -> None:
    node = source(**metadata)
    before = copy.deepcopy(node)
    made = built(node, **changes)
    assert {key: made.metadata.get(key) for key in expected} == expected
    assert node == before


def test_limits_of_the_notebook_give_way_to_those_of_the_run() -> None:
    node = source(safe_exec={"limits": {"memory": "1 GiB", "disk": "9 GiB"}, "note": "mine"})
    ours = built(node).metadata["safe_exec"]
    assert ours["limits"]["memory"] == 100 * MIB
    assert ours["note"] == "mine"
    assert node.metadata["safe_exec"]["limits"] == {"memory": "1 GiB", "disk": "9 GiB"}


def test_a_cause_that_is_not_known() -> None:
    assert built(source(), cause=None).metadata["safe_exec"]["reproduces"]["cause"] is None
    assert (
        built(source(), cause=make_cause(CauseKind.SEGFAULT)).metadata["safe_exec"]["reproduces"][
            "cause"
        ]
        == "segfault"
    )


@pytest.mark.parametrize("limits", [LIMITS, Limits(memory=5 * MIB), Limits()])
def test_run_without_options_it_has_the_limits_of_then(limits: Limits) -> None:
    """Where it may have them: its metadata is the notebook's word, which may loosen the default profile. Those of none too."""
    made = nbformat.reads(notebook.dumps(built(source(), limits=limits)).decode(), as_version=4)
    resolved = profiles.resolve(metadata=made.metadata, machine_memory=16 << 30)
    assert {**resolved.limits.as_dict(), "interrupt_grace": 0} == {
        **limits.as_dict(),
        "interrupt_grace": 0,
    }


def test_built_of_itself_it_is_the_same() -> None:
    made = built(source())
    again = built(made, (0, 1))
    assert again.cells == made.cells
    assert is_reproduction(again)


@pytest.mark.parametrize(
    ("ours", "known"),
    [
        ({"reproduces": {"notebook": "nb.ipynb"}}, True),
        ({"reproduces": {}}, True),
        ({"reproduces": "yes"}, False),
        ({"reproduces": None}, False),
        ({"limits": {}}, False),
        ({}, False),
        ("text", False),
        (None, False),
    ],
)
def test_a_reproduction_is_known(ours: Any, known: bool) -> None:
    assert is_reproduction(source(safe_exec=ours)) is known
    assert not is_reproduction(source())
    assert is_reproduction(built(source()))
    assert is_reproduction(notebook.strip_annotations(built(source())))
