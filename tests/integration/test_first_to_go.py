"""Where memory runs out above a run's own limit, the kernel stands before the runner in what the system chooses to kill.

That it is chosen indeed: ``test_unified.py``, on a machine whose groups can be limited from above.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from safe_exec.keeper.keeper import OOM_SHARE
from tests.support import NOBODY, make_notebook, ordinary_user, private_directory, run_notebook

CELL = """
import os, subprocess
print(open("/proc/self/oom_score_adj").read().strip())
print(subprocess.run(["cat", "/proc/self/oom_score_adj"], capture_output=True, text=True).stdout.strip())
"""


@pytest.mark.bed("bubblewrap", "ordinary-user")
@pytest.mark.parametrize("options", [(), ("--no-network",)], ids=["no-walls", "bubblewrap"])
@pytest.mark.parametrize("user", [False, True], ids=["root", "user"])
def test_the_kernel_and_what_it_starts(user: bool, options: tuple[str, ...]) -> None:
    own = int(Path("/proc/self/oom_score_adj").read_text())
    with private_directory() as folder:
        path = make_notebook(folder / "nb.ipynb", CELL)
        if user:
            os.chown(folder, NOBODY, NOBODY)
        prefix = ordinary_user() if user else []
        outcome = run_notebook(path, *options, prefix=prefix, cwd=folder, env={"HOME": str(folder)})
    assert outcome.code == 0, outcome.stdout
    (output,) = outcome.notebook.cells[0].outputs
    assert output.text.split() == [str(min(1000, own + OOM_SHARE))] * 2
