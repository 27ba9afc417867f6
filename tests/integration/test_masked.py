"""Secrets of the environment are in nothing that the commands print which run a notebook again."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import make_notebook, run_notebook, safe_exec

SECRET = "hunter2-Zq8vR3kLw1"
CELL = "import os\nraise RuntimeError('refused: ' + os.environ['MY_TOKEN'])"


@pytest.mark.parametrize("json", [(), ("--json",)], ids=["words", "json"])
def test_replay_and_probe(json: tuple[str, ...], tmp_path: Path) -> None:
    env = {"MY_TOKEN": SECRET}
    path = make_notebook(tmp_path / "nb.ipynb", CELL)
    assert run_notebook(path, "--no-bisect", env=env).code == 1
    replayed = safe_exec("replay", path.with_suffix(".verdict.json"), *json, env=env)
    probed = safe_exec("probe", path, "memory", "--budget", "1m", *json, env=env)
    assert (replayed.returncode, probed.returncode) == (0, 1), f"{replayed}\n{probed}"
    said = f"{replayed.stdout}{replayed.stderr}{probed.stdout}{probed.stderr}"
    assert SECRET not in said, said
    assert "***" in said, "it was said, and masked"
