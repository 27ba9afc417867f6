"""``safe-exec debug``: what it refuses before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from safe_exec.cli.main import call
from safe_exec.model.verdict import Status
from safe_exec.reports import verdict_json
from tests.support import make_notebook
from tests.unit.builders import make_verdict


def test_without_a_verdict_a_cell_must_be_chosen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_notebook(tmp_path / "nb.ipynb", "x = 1")
    assert call(["debug", str(path)]) == 2
    assert "no verdict beside it" in capsys.readouterr().err
    assert call(["debug", str(path), "--at", "2"]) == 2
    assert "--at 2: the notebook has 1 code cell" in capsys.readouterr().err
    assert call(["debug", str(path), "--at", "1", "--culprits"]) == 2
    assert "--culprits: the verdict names none" in capsys.readouterr().err
    assert call(["debug", str(path), "--at", "1", "--before", "--python"]) == 2
    assert "leave out --before" in capsys.readouterr().err


def test_a_run_that_passed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "nb.verdict.json"
    path.write_bytes(verdict_json.dumps(make_verdict(Status.PASSED)))
    assert call(["debug", str(path)]) == 2
    assert "no cell failed in this run" in capsys.readouterr().err
