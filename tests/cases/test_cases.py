"""Every dead-kernel case gets its status, cause, activity, crash cell, line and signal, and then its culprits and a reproduction; real
kernels, each in a folder of its own.

A search for culprits takes longer than a run. Cases for it are drawn by a seed, as many as should fit into SAFE_EXEC_CASES_MINUTES at two at
a time (ten, where it is not set; ``inf`` for all). pytest says the seed, and SAFE_EXEC_CASES_SEED draws the same again.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.cases.table import PROPERTY, Row
from tests.support import Outcome, orphaned_groups, private_directory, run_notebook, wait_until

HERE = Path(__file__).parent
CASES: list[dict[str, Any]] = json.loads((HERE / "cases.json").read_text())["cases"]


def row(case: dict[str, Any]) -> Any:
    """A case as a row of a table of tests, with the bed that its kernel needs."""
    kernel = json.loads((HERE / "notebooks" / f"{case['id']}.ipynb").read_text())["metadata"].get("kernelspec", {}).get("name")
    return pytest.param(case, id=case["id"], marks=[pytest.mark.bed(kernel)] if kernel == "bash" else [])


def holds_here(case: dict[str, Any]) -> bool:
    """Whether a case's answer is meant for this version of Python (``"<3.12"``)."""
    wanted = case.get("python")
    return wanted is None or sys.version_info[:2] < tuple(int(part) for part in wanted.removeprefix("<").split("."))


RUNNABLE = [case for case in CASES if holds_here(case)]
SEARCHED = [case for case in RUNNABLE if case["expected"]["culprits"]]


def agrees(expected: Any, found: Any) -> bool:
    """A value, a list of values that are all right, or null where nothing is asked."""
    return expected is None or found == expected or (isinstance(expected, list) and found in expected)


def run_case(case: dict[str, Any], base: Path, name: str, *options: str, notebook: Path | None = None, **env: str) -> Outcome:
    """Run a case's notebook, or another one in its place, in a folder as the case needs it."""
    work = base / "work"
    work.mkdir(parents=True)
    for file, text in case.get("files", {}).items():
        path = base / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    path = Path(shutil.copy(notebook or HERE / "notebooks" / f"{case['id']}.ipynb", work / name))
    env |= {key: value.format(base=base) for key, value in case.get("env", {}).items()}
    return run_notebook(path, *options, env=env, cwd=work)


def check_cause(case: dict[str, Any], outcome: Outcome) -> None:
    cause = outcome.verdict["cause"] or {}
    crash = outcome.verdict["crash_cell"] or {}
    found = {
        "status": outcome.verdict["status"],
        "cause": cause.get("kind"),
        "activity": cause.get("activity"),
        "signal": cause.get("signal"),
        "cell": crash.get("code_index"),
        "line": crash.get("line"),
    }
    wrong = {key: (case["expected"][key], value) for key, value in found.items() if not agrees(case["expected"][key], value)}
    assert not wrong, f"expected, found: {wrong}\n{outcome.stdout}\n{json.dumps(cause, indent=1)}"


@pytest.mark.cases
@pytest.mark.parametrize("case", [row(case) for case in RUNNABLE])
def test_case(case: dict[str, Any], tmp_path: Path) -> None:
    check_cause(case, run_case(case, tmp_path, "case.ipynb", *case["options"], "--no-bisect"))


# --- culprits ---------------------------------------------------------------------------------------------------

NOT_BLAMED_FIRST = {
    "b2-two-tables": "two tables of one size and a sort that needs as much: it names the sort, which asked for the most",
    "d5-numba-oob-read": "compiled code leaves no frame: it names the call, not the wrong lag or the function without a check",
    "e2-strided-write": "the heap was spoilt by an earlier cell: it names the one in which glibc noticed",
    "f4-chain-growth": "the chain that grew is no memory worth naming: it names the cell that walked it",
    "i2-int-divide": "it names the cell of the function in which it died, not the one with the zero or the call",
}
"""Cases whose cell to look at first is none of those that a person would name, and why."""
STAY_IN = tuple(NOT_BLAMED_FIRST)
"""Cases that are in every draw: whatever has failed in one is added here."""
SECONDS = {"timeout": 35.0, "other": 12.0}
"""What a case takes, roughly: run, search, reproduction."""


def cost_of(case: dict[str, Any]) -> float:
    return SECONDS["timeout" if "timeout" in case["expected"]["status"] else "other"]


def drawn(cases: list[dict[str, Any]], seed: str, minutes: float) -> list[dict[str, Any]]:
    """Those that stay in, and others by chance while there is time, in the order of the table."""
    others = [case for case in cases if case["id"] not in STAY_IN]
    random.Random(seed).shuffle(others)
    chosen = [case for case in cases if case["id"] in STAY_IN]
    while others and sum(map(cost_of, [*chosen, others[-1]])) <= 2 * 60 * minutes:
        chosen.append(others.pop())
    return [case for case in cases if case in chosen]


DRAWN = drawn(SEARCHED, os.environ["SAFE_EXEC_CASES_SEED"], float(os.environ.get("SAFE_EXEC_CASES_MINUTES", "10")))


@pytest.mark.cases
@pytest.mark.parametrize("case", [row(case) for case in DRAWN])
def test_culprits(case: dict[str, Any], tmp_path: Path, record_property: Any) -> None:
    with private_directory() as runtime:
        outcome = run_case(case, tmp_path / "first", "case.ipynb", *case["options"], XDG_RUNTIME_DIR=str(runtime))
        assert [path for path in runtime.rglob("*") if path != runtime / "safe-exec"] == []
    wait_until(lambda: orphaned_groups() == [], 10, f"no control group without a keeper: {orphaned_groups()}")
    check_cause(case, outcome)
    verdict = outcome.verdict
    said = f"{outcome.stdout}\n{outcome.stderr}"
    found = verdict["culprits"]
    assert found is not None, said
    code = {cell["index"]: cell["code_index"] for cell in verdict["cells"]}
    look_first = code.get(found["look_first"])
    cells = [culprit["code_index"] for culprit in found["cells"]]
    record_property(PROPERTY, asdict(row_of(case, verdict, cells, look_first)))

    assert cells in case["expected"]["culprits"], said
    assert found["minimal"], said
    assert found["reproduced"][0] >= 1, said
    blamed = look_first in case["expected"]["blame"]
    assert blamed == (case["id"] not in NOT_BLAMED_FIRST), f"look first: {look_first}\n{said}"
    check_reproduction(case, verdict, tmp_path / "again")


def check_reproduction(case: dict[str, Any], verdict: dict[str, Any], base: Path) -> None:
    """By itself, in a folder as the first run found it, the reproduction ends the same way in its last cell."""
    repro = Path(verdict["culprits"]["repro_notebook"])
    assert verdict["outputs"]["repro"] == str(repro)
    again = run_case(case, base, "case.repro.ipynb", notebook=repro)
    assert again.verdict["cause"] is not None, again.stdout
    assert again.verdict["cause"]["kind"] == verdict["cause"]["kind"], again.stdout
    assert again.verdict["culprits"] is None, again.stdout
    last = sum(cell.cell_type == "code" for cell in again.notebook.cells) - 1
    if not on_the_heap(verdict):
        assert again.verdict["crash_cell"]["code_index"] == last, again.stdout


def on_the_heap(verdict: dict[str, Any]) -> bool:
    """Whether glibc found its heap spoilt: in which cell depends on where memory lies."""
    said = [str(fact["value"]) for fact in verdict["cause"]["evidence"] if fact["fact"] == "last words"]
    return any(re.search(r"free\(\)|malloc|corrupt|munmap_chunk|unlink_chunk|realloc\(\)", words) for words in said)


def row_of(case: dict[str, Any], verdict: dict[str, Any], cells: list[int], look_first: int | None) -> Row:
    """A line of the table."""
    found = verdict["culprits"]
    return Row(
        case=case["id"],
        cells=sum(cell["status"] != "not_run" for cell in verdict["cells"]),
        culprits=tuple(cells),
        trials=found["trials"],
        seconds=found["seconds"],
        runs=found["seconds"] / verdict["usage"]["wall_seconds"],
        method=found["method"],
        look_first=look_first,
        blamed=look_first in case["expected"]["blame"],
    )
