"""The files of tests/cases: well formed, complete, and without leftovers. No kernel."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import nbformat
import pytest

from tests.cases import test_cases
from tests.cases.catalogue import NOTEBOOKS, Case, read, read_all
from tests.support import ROOT

CASES = read_all()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_case_has_a_notebook_and_cells_that_exist(case: Case) -> None:
    cells = nbformat.read(case.notebook, as_version=4).cells
    code = sum(cell.cell_type == "code" for cell in cells)
    sets = case.expected.get("culprits") or []
    named = [
        case.expected.get("cell"),
        *(c for s in sets for c in s),
        *(case.expected.get("blame") or []),
    ]
    assert all(0 <= cell < code for cell in named if cell is not None)
    assert all(list(cells) == sorted(cells) for cells in sets)
    assert set(case.places) <= set(case.every_place)


def test_no_notebook_is_without_a_case() -> None:
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == {case.id for case in CASES}


def test_packages_of_cases_are_installed_for_the_tests() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    dev = {re.split(r"[<>=\[]", name)[0] for name in project["optional-dependencies"]["dev"]}
    assert {package for case in CASES for package in case.packages} <= dev


def test_cases_that_are_not_right_yet_and_exceptions_exist() -> None:
    ids = {case.id for case in CASES}
    assert ids >= test_cases.NOT_YET
    assert set(test_cases.NOT_BLAMED_FIRST) <= ids


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ({"sayz": []}, "unknown keys sayz"),
        ({"places": ["moon"]}, "moon"),
        ({"wrote": {"a": "maybe"}}, "maybe"),
        ({"alternatives": [{"place": "moon", "expected": {}}]}, "moon"),
        ({"alternatives": [{"planet": "moon", "expected": {}}]}, "planet"),
    ],
)
def test_a_wrong_key_or_value_is_refused(
    entry: dict[str, object], complaint: str, tmp_path: Path
) -> None:
    case = {"id": "a", "title": "", "source": "variant", "expected": {}, **entry}
    (tmp_path / "kind.json").write_text(json.dumps({"cases": [case]}))
    with pytest.raises(ValueError, match=complaint):
        read(tmp_path / "kind.json")


def test_an_id_is_used_once(tmp_path: Path) -> None:
    case = {"id": "a", "title": "", "source": "variant", "expected": {}}
    for name in ("one.json", "two.json"):
        (tmp_path / name).write_text(json.dumps({"cases": [case]}))
    with pytest.raises(ValueError, match="called a"):
        read_all(tmp_path)


def test_an_answer_may_depend_on_the_version_of_python() -> None:
    case = Case(
        id="a",
        title="",
        source="variant",
        expected={"status": "kernel_died", "cell": 1},
        python=">=3.12",
        alternatives=({"python": ">=3.14", "expected": {"status": "cell_error"}},),
    )
    assert [case.holds_for(version) for version in ("3.11", "3.12", "3.14")] == [False, True, True]
    assert case.for_version("3.12").expected["status"] == "kernel_died"
    assert case.for_version("3.14").expected == {"status": "cell_error", "cell": 1}


def test_an_answer_may_depend_on_the_place() -> None:
    case = Case(
        id="a",
        title="",
        source="variant",
        expected={"status": "kernel_died", "cell": 1},
        alternatives=({"place": "user", "expected": {"status": "cell_error"}},),
    )
    assert case.for_version("3.12") == case.at("root") == case
    assert case.at("user").expected == {"status": "cell_error", "cell": 1}
