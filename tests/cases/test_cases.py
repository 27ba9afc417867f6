"""Every dead-kernel case gets its status, cause, activity, crash cell, line and signal; real kernels, each in a folder of its own."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import run_notebook

HERE = Path(__file__).parent
CASES: list[dict[str, Any]] = json.loads((HERE / "cases.json").read_text())["cases"]


def holds_here(case: dict[str, Any]) -> bool:
    """Whether a case's answer is meant for this version of Python (``"<3.12"``)."""
    wanted = case.get("python")
    return wanted is None or sys.version_info[:2] < tuple(int(part) for part in wanted.removeprefix("<").split("."))


RUNNABLE = [case for case in CASES if not case.get("needs_isolation") and holds_here(case)]


def agrees(expected: Any, found: Any) -> bool:
    """A value, a list of values that are all right, or null where nothing is asked."""
    return expected is None or found == expected or (isinstance(expected, list) and found in expected)


@pytest.mark.cases
@pytest.mark.parametrize("case", RUNNABLE, ids=[case["id"] for case in RUNNABLE])
def test_case(case: dict[str, Any], tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    for name, text in case.get("files", {}).items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    path = Path(shutil.copy(HERE / "notebooks" / f"{case['id']}.ipynb", work))
    env = {name: value.format(base=tmp_path) for name, value in case.get("env", {}).items()}

    outcome = run_notebook(path, *case["options"], env=env, cwd=work)

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
