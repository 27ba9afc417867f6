"""Work grows no faster than the input. Executed lines are counted, not seconds."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from tempfile import mkdtemp
from types import FrameType
from typing import Any

import nbformat
import pytest
from msgspec.structs import replace

from safe_exec.experiments.static_analysis.dependencies import Dependencies
from safe_exec.experiments.workspace import take
from safe_exec.model.verdict import CellStatus, Status, Verdict
from safe_exec.notebook import notebook
from safe_exec.reports import annotated_notebook, terminal, verdict_json
from safe_exec.reports.batch import junit, summary_json
from safe_exec.reports.batch.ci import github, gitlab
from safe_exec.reports.batch.html import page
from safe_exec.reports.batch.results import BatchResult
from tests.unit.batches import make_batch, make_entry
from tests.unit.builders import make_records, make_verdict

FACTOR = 5
# Fixed costs make the ratio smaller, a logarithm a little larger.
SLACK = 1.1


def executed_lines(work: Callable[[], object]) -> int:
    """The lines of Python that ``work`` executes; each turn of a loop counts again."""
    count = 0

    def trace(_frame: FrameType, event: str, _argument: object) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def check_growth(prepare: Callable[[int], Callable[[], object]], size: int) -> None:
    """Compare the work for ``size`` with that for five times as much."""
    for warm in (prepare(2), prepare(2)):  # imports and caches
        warm()
    small, large = executed_lines(prepare(size)), executed_lines(prepare(FACTOR * size))
    assert small > size, "the work was not seen"
    assert large <= SLACK * FACTOR * small, f"{small} lines for {size}, {large} for {FACTOR * size}"


def test_the_count_sees_what_grows_faster() -> None:
    def prepare(size: int) -> Callable[[], object]:
        return lambda: [None for _ in range(size) for _ in range(size)]

    with pytest.raises(AssertionError, match="lines for"):
        check_growth(prepare, 40)


# --- a notebook of many cells -----------------------------------------------------------------------------------


def sources(size: int) -> list[str]:
    """Cells that build on each other, as a long notebook has them."""
    return [f"import module_{n % 20}\nvalue_{n} = value_{max(0, n - 1)} + {n}" for n in range(size)]


def long_notebook(size: int) -> Any:
    cells = [nbformat.v4.new_code_cell(source) for source in sources(size)]
    for cell in cells:
        cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text="a line\n")]
    return nbformat.v4.new_notebook(cells=cells)


def long_verdict(size: int) -> Verdict:
    passed = make_records(CellStatus.PASSED)[0]
    cells = tuple(replace(passed, index=n, code_index=n, id=f"c{n}") for n in range(size))
    return replace(make_verdict(), cells=cells)


def test_dependencies_of_many_cells() -> None:
    def prepare(size: int) -> Callable[[], object]:
        cells = sources(size)
        return lambda: Dependencies.of_sources(cells, language="python")

    check_growth(prepare, 100)


def test_reading_and_writing_a_long_notebook() -> None:
    def prepare(size: int) -> Callable[[], object]:
        node = long_notebook(size)
        return lambda: notebook.dumps(node)

    check_growth(prepare, 100)


def test_the_documents_of_a_long_run() -> None:
    def prepare(size: int) -> Callable[[], object]:
        node, verdict = long_notebook(size), long_verdict(size)

        def work() -> None:
            annotated_notebook.annotate(node, verdict)
            verdict_json.dumps(verdict)
            list(terminal.diagnosis(verdict, terminal.Style()))

        return work

    check_growth(prepare, 100)


# --- a batch of many notebooks ----------------------------------------------------------------------------------


def many(root: Path, size: int) -> BatchResult:
    folder = root / str(size)
    folder.mkdir(exist_ok=True)
    kinds = cycle((make_verdict(Status.PASSED), make_verdict()))
    return make_batch(folder, [make_entry(folder, f"{n}.ipynb", next(kinds)) for n in range(size)])


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(page.write, id="page"),
        pytest.param(junit.write, id="junit"),
        pytest.param(gitlab.write, id="gitlab"),
        pytest.param(summary_json.write, id="summary"),
        pytest.param(lambda batch, _path: list(github.annotations(batch)), id="annotations"),
        pytest.param(lambda batch, _path: github.summary(batch), id="github"),
    ],
)
def test_the_reports_of_a_long_batch(write: Callable[..., object], tmp_path: Path) -> None:
    def prepare(size: int) -> Callable[[], object]:
        batch = many(tmp_path, size)
        return lambda: write(batch, batch.out / "report")

    check_growth(prepare, 12)


# --- a folder of many files -------------------------------------------------------------------------------------


def test_the_copy_of_a_large_folder(tmp_path: Path) -> None:
    def prepare(size: int) -> Callable[[], object]:
        base = Path(mkdtemp(dir=tmp_path))
        folder, scratch = base / "folder", base / "scratch"
        folder.mkdir()
        scratch.mkdir()
        for number in range(size):
            (folder / f"{number}.txt").touch()
        return lambda: take(folder, scratch)

    check_growth(prepare, 100)
