"""Outputs compared with stored ones: nbval judges the same notebooks, cell by cell."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import nbformat
import pytest

from safe_exec.notebook.comparison import markers
from tests.support import run_notebook
from tests.support import safe_exec as command

SANITIZERS = "[numbers]\nregex: random \\d+\nreplace: RANDOM\n"


def text(words: str, name: str = "stdout") -> Any:
    return nbformat.v4.new_output("stream", name=name, text=words)


def value(words: str, **more: str) -> Any:
    return nbformat.v4.new_output(
        "execute_result", data={"text/plain": words, **more}, execution_count=1
    )


def raised(name: str, words: str) -> Any:
    return nbformat.v4.new_output("error", ename=name, evalue=words, traceback=["gone"])


class Row:
    """A cell as it is stored, and whether its new outputs differ."""

    def __init__(
        self,
        source: str,
        *outputs: Any,
        differs: bool,
        tags: tuple[str, ...] = (),
        count: int | None = 1,
    ) -> None:
        self.source, self.outputs, self.differs = source, outputs, differs
        self.tags, self.count = tags, count

    def cell(self) -> Any:
        return nbformat.v4.new_code_cell(
            self.source,
            outputs=list(self.outputs),
            execution_count=self.count,
            metadata={"tags": list(self.tags)},
        )


ROWS = (
    Row("print('same')", text("same\n"), differs=False),
    Row("print('new')", text("old\n"), differs=True),
    Row("print('ignored')  # x\n# NBVAL_IGNORE_OUTPUT", text("old\n"), differs=False),
    Row("print('ignored')", text("old\n"), tags=("nbval-ignore-output",), differs=False),
    Row("# NBVAL_CHECK_OUTPUT\nprint('new')", text("old\n"), tags=("nbval-ignore-output",), differs=True),
    Row("print('one'); print('two')", text("one\n"), text("two\n"), differs=False),
    Row("import sys\nprint('x', file=sys.stderr)", text("x\n"), differs=True),
    Row("print('10%\\r100%')", text("50%\r100%\n"), differs=False),
    Row("6 * 7", value("42"), differs=False),
    Row("6 * 8", value("42"), differs=True),
    Row("6 * 9", differs=True),
    Row("pass", value("42"), differs=True),
    Row("print('never run')", count=None, differs=False),
    Row("print('never run')", text("x\n"), count=None, differs=True),
    Row("# NBVAL_RAISES_EXCEPTION\n1 / 0", raised("ZeroDivisionError", "division by zero"), differs=False),
    Row("[][1]", raised("IndexError", "other words"), tags=("raises-exception",), differs=True),
    Row("# NBVAL_SKIP\nraise SystemError", text("x\n"), differs=False),
    Row("import random\nprint('random', random.randint(0, 10 ** 12))", text("random 5\n"), differs=False),
    Row(
        "from IPython.display import display, HTML\ndisplay(HTML('<b>x</b>'), 1)",
        nbformat.v4.new_output("display_data", data={"text/plain": "<IPython.core.display.HTML object>", "text/html": "<b>x</b>"}),
        nbformat.v4.new_output("display_data", data={"text/plain": "1"}),
        differs=False,
    ),
    Row("print('last')", text("last\n"), differs=False),
)  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    node = nbformat.v4.new_notebook(cells=[row.cell() for row in ROWS])
    node.metadata["kernelspec"] = {"name": "python3", "display_name": "P", "language": "python"}
    nbformat.write(node, tmp_path / "nb.ipynb")
    (tmp_path / "sanitize.cfg").write_text(SANITIZERS)
    return tmp_path / "nb.ipynb"


def judged_by_nbval(path: Path, *options: str) -> list[bool]:
    """Whether each cell failed."""
    report = path.with_suffix(".xml")
    subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:safe_exec",
            f"--junitxml={report}", "--nbval-sanitize-with", str(path.parent / "sanitize.cfg"), *options, str(path),
        ],
        cwd=path.parent, capture_output=True, timeout=180, check=False,
    )  # fmt: skip
    return [
        any(child.tag in ("failure", "error") for child in case)
        for case in ET.parse(report).getroot().iter("testcase")
    ]


def judged_by_us(path: Path, option: str) -> list[bool]:
    run = run_notebook(path, option, "--sanitize-with", str(path.parent / "sanitize.cfg"))
    cells = {difference["code_index"] for difference in run.verdict["differences"]}
    assert (run.code, run.verdict["cause"]["kind"]) == (1, "output_differs")
    assert run.verdict["crash_cell"]["code_index"] == min(cells)
    return [index in cells for index in range(len(ROWS))]


def test_nbval_says_the_same_of_each_cell(path: Path) -> None:
    ours = judged_by_us(path, "--compare")
    assert ours == [row.differs for row in ROWS]
    assert ours == judged_by_nbval(path, "--nbval")


def test_nbval_says_the_same_if_only_marked_cells_count(path: Path) -> None:
    ours = judged_by_us(path, "--compare-lax")
    wanted = [row.differs and bool(markers(row.cell()).check) for row in ROWS]
    # A cell with outputs that was never run fails in nbval whether it is checked or not.
    wanted[[row.count for row in ROWS].index(None) + 1] = False
    assert ours == wanted
    theirs = judged_by_nbval(path, "--nbval-lax")
    assert [one for one, row in zip(theirs, ROWS, strict=True) if row.count] == [
        one for one, row in zip(ours, ROWS, strict=True) if row.count
    ]


def test_every_report_shows_the_difference(path: Path) -> None:
    run = run_notebook(path, "--compare")
    for shown in (run.stdout, run.notebook.cells[0].source):
        assert "-old" in shown and "+new" in shown, shown
    out = path.parent / "out"
    done = command("batch", path, "--out", out, "--compare")
    assert done.returncode == 1
    assert "+new" in (out / "junit.xml").read_text()
    plugin = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--safe-exec", "--safe-exec-compare", str(path)],
        cwd=path.parent, capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert plugin.returncode == 1 and "+new" in plugin.stdout, plugin.stdout


def test_outputs_that_are_the_same_pass(tmp_path: Path) -> None:
    node = nbformat.v4.new_notebook(cells=[row.cell() for row in ROWS[:1]])
    node.metadata["kernelspec"] = {"name": "python3", "display_name": "P", "language": "python"}
    nbformat.write(node, tmp_path / "nb.ipynb")
    run = run_notebook(tmp_path / "nb.ipynb", "--compare")
    assert run.code == 0 and run.verdict["differences"] == []
    done = command("run", tmp_path / "nb.ipynb", "--compare-tolerance", "1")
    assert done.returncode == 2 and "nothing is compared; add --compare" in done.stderr
