"""Kernels that are not ipykernel, really killed: the same verdicts, and what nobody can know there is left out and said to be."""

from __future__ import annotations

from pathlib import Path

import pytest

from safe_exec.model.verdict import Status
from tests.integration.languages import ROWS, Row
from tests.parity.compare import assert_same, notebook_of, run_both
from tests.support import Outcome, make_notebook, run_notebook

pytestmark = pytest.mark.kills

LANGUAGES = {"ir": "R", "deno": "typescript", "bash": "bash"}
BED = {"ir": "R", "deno": "deno", "bash": "bash"}


def run(
    folder: Path,
    kernel: str,
    cells: tuple[str, ...],
    *options: str,
    env: dict[str, str] | None = None,
) -> Outcome:
    path = make_notebook(folder / "nb.ipynb", *cells, kernel=kernel, language=LANGUAGES[kernel])
    return run_notebook(path, *options, env=env)


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=row.id, marks=pytest.mark.bed(BED[row.kernel], *row.beds))
        for row in ROWS
    ],
)
def test_kill(row: Row, tmp_path: Path) -> None:
    outcome = run(tmp_path, row.kernel, row.cells, *row.options, "--no-bisect", env=dict(row.env))
    verdict, cause = outcome.verdict, outcome.verdict["cause"] or {}
    report = f"{outcome.stdout}\n{outcome.stderr}\n{cause}"
    assert (verdict["status"], cause.get("kind")) == (row.status, row.cause), report
    assert verdict["environment"]["python"] is None and verdict["environment"]["packages"] is None
    if row.status is Status.START_FAILED:
        assert "RLIMIT_DATA" in cause["advice"], report
    elif row.status is not Status.PASSED:
        crash = verdict["crash_cell"]
        assert (crash["code_index"], crash["stack"]) == (row.cell, []), report
        if (
            row.id != "R-quit"
        ):  # what it quit for is told by the reply, whose line nobody knows but of a single one
            assert crash["line"] == row.line, report
        missing = (
            "no stack is known" if crash["line"] is not None else "neither line nor stack is known"
        )
        assert f"kernel {row.kernel} is not ipykernel: {missing}" in verdict["warnings"], verdict[
            "warnings"
        ]
    assert cause.get("activity") == row.activity or row.kernel == "bash", report
    if row.signal is not None:
        assert cause["signal"] == row.signal, report
    if row.exit_code is not None:
        assert cause["exit_code"] == row.exit_code, report
    assert row.words in cause.get("summary", ""), report
    assert "sys.exit" not in cause.get("advice", "") and "os.kill" not in cause.get("advice", ""), (
        report
    )
    if row.saved is not None:
        texts = [o.get("text", "") for c in outcome.notebook.cells for o in c.get("outputs", [])]
        assert any(row.saved in text for text in texts), texts


SEARCHES = {
    "R": (
        "ir",
        ("size <- 1L", "other <- 'no matter'", "tools::pskill(Sys.getpid(), 10 + size)"),
        [0, 2],
        "segfault",
    ),
    "R-quit": ("ir", ("x <- 1", "quit()", "print(x)"), [1], "exit"),
    "deno": ("deno", ("const code = 7;", "const other = 1;", "Deno.exit(code)"), [0, 2], "exit"),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.bed(BED[row[0]])) for name, row in SEARCHES.items()],
)
def test_culprits_are_found_by_running_again(name: str, tmp_path: Path) -> None:
    """Nothing is known of what a cell of another language defines and uses: subsets are run."""
    kernel, cells, wanted, kind = SEARCHES[name]
    outcome = run(tmp_path, kernel, cells, "--bisect-budget", "200s")
    culprits = outcome.verdict["culprits"]
    assert outcome.verdict["cause"]["kind"] == kind, outcome.stdout
    assert [cell["code_index"] for cell in culprits["cells"]] == wanted, outcome.stdout
    assert culprits["minimal"] and "slic" not in culprits["method"], culprits
    repro = tmp_path / "nb.repro.ipynb"
    again = run_notebook(repro, "--no-bisect")
    assert again.verdict["cause"]["kind"] == kind
    assert again.verdict["notebook"]["kernel"] == kernel


SAME = (
    "x <- 1:3\nprint(x)",
    "sum(x)",
    "cat('text\\n')",
    "message('to stderr')",
    "data.frame(a = 1:2, b = c('x', 'y'))",
    "invisible(3)",
)


@pytest.mark.bed("R")
def test_outputs_are_those_of_nbclient(tmp_path: Path) -> None:
    """Not of Deno: it sends what a cell put out after it said that the cell is done, and nbclient misses it by chance."""
    document = notebook_of(*SAME, kernel="ir")
    document.metadata["kernelspec"]["language"] = "R"
    assert_same(run_both(tmp_path, document, kernel="ir"))
