"""Where the time of a real run went."""

from __future__ import annotations

import re
from pathlib import Path

from tests.support import make_notebook, run_notebook

LOOP = """\
def work(n):
    total = 0
    for i in range(n):
        total += i * i
    return total"""
ENDLESS = "x = 1\nwhile True:\n    work(10**5)"


def test_a_timeout_says_where_the_time_went(tmp_path: Path) -> None:
    path = make_notebook(tmp_path / "nb.ipynb", LOOP, ENDLESS)
    outcome = run_notebook(path, "--no-bisect", "--cell-timeout", "3")
    rows = {(r["code_index"], r["line"]): r for r in outcome.verdict["profile"]}
    hottest = max(rows.values(), key=lambda row: row["own_seconds"])
    assert (hottest["code_index"], hottest["line"]) in {(0, 3), (0, 4)}
    caller = rows[1, 3]
    assert caller["seconds"] >= hottest["seconds"] > caller["own_seconds"]
    assert hottest["seconds"] <= outcome.verdict["usage"]["wall_seconds"]
    said = " ".join(outcome.stdout.split())
    assert re.search(r"% of \S+ s in code cell 1, line [34], called from code cell 2, line 3", said)
