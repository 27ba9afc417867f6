"""What a person sees in JupyterLab when a kernel dies: the reason in the cell, and a kernel again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support import safe_exec
from tools.jupyterlab import DEATHS, jupyterlab, prepare_deaths

pytestmark = pytest.mark.kills

WORDS = {
    "memory": ("SafeExec: out_of_memory", "----> 3     rows.append(bytearray(b'x') * size)"),
    "segfault": ("SafeExec: segfault", "----> 1 ctypes.string_at(address)"),
    "timeout": ("SafeExec: cell_timeout", "----> 3     total += step"),
}


def test_the_reason_is_in_the_cell_and_the_kernel_comes_back(tmp_path: Path) -> None:
    folder, state = tmp_path / "notebooks", tmp_path / "state"
    folder.mkdir()
    prepare_deaths(folder, tmp_path)
    diagnoses = {}
    with jupyterlab(folder, state, tmp_path) as lab:
        for name in DEATHS:
            notebook = lab.open(f"{name}.ipynb")
            notebook.run_all()
            diagnoses[name] = notebook.error(3)
            if name != "timeout":
                assert "It will restart automatically" in notebook.close_dialog()
            notebook.wait_for_kernel("Idle")
            # After a timeout the kernel lives on; after a death it is a fresh one.
            left = notebook.run_in_new_cell("print('label' in dir())")
            assert left.strip() == str(name == "timeout")
    for name, (title, line) in WORDS.items():
        assert title in diagnoses[name] and line in diagnoses[name]
        session = diagnoses[name].rpartition("safe-exec bisect ")[2].strip()
        # Of the loop without an end, each trial takes its whole cell timeout.
        if name != "timeout":
            done = safe_exec("bisect", "--json", session)
            cells = json.loads(done.stdout)["culprits"]["cells"]
            assert [cell["code_index"] for cell in cells] == [0, 2], name
