"""On a notebook that passes, safe-exec keeps what nbclient keeps.

The notebooks are the files under ``cells/``: code cells one after the other, divided by lines of ``# %%``. Those of
``raising/`` are tagged ``raises-exception`` throughout.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import nbformat
import pytest

from tests.parity.compare import assert_same, by_stream, notebook_of, run_both

CELLS = Path(__file__).parent / "cells"
FILES = sorted(CELLS.glob("*/*.txt"))
BELOW_PYTHON = CELLS / "below" / "descriptors.txt"


def sources_of(path: Path) -> list[str]:
    return path.read_text().removesuffix("\n").split("\n# %%\n")


def beside(work: Path) -> None:
    """Files that a notebook uses."""
    (work / "data.txt").write_text("data beside the notebook")
    (work / "helper.py").write_text(
        "VALUE = 42\ndef double(x):\n    print('worker', x, flush=True)\n    return 2 * x\n"
    )
    (work / "script.py").write_text("import sys\nprint(sys.argv, __name__)\n")
    (work / "sub").mkdir()


@pytest.mark.parametrize(
    "path", [p for p in FILES if p != BELOW_PYTHON], ids=lambda p: f"{p.parent.name}-{p.stem}"
)
def test_same(path: Path, tmp_path: Path) -> None:
    sources = sources_of(path)
    raising = path.parent.name == "raising"
    tags = {n: ["raises-exception"] for n in range(len(sources))} if raising else None
    assert_same(run_both(tmp_path, notebook_of(*sources, tags=tags), prepare=beside))


def test_what_is_written_below_python_stands_in_its_own_cell(tmp_path: Path) -> None:
    """ipykernel reads descriptors 1 and 2 in a thread: under nbclient a line may come a cell late, or after a result.

    Under both it may even come between a printed text and its newline, which Python writes on its own: so no line is compared.
    """
    sources = sources_of(BELOW_PYTHON)
    pair = run_both(tmp_path, notebook_of(*sources))
    assert pair.outcome.verdict["status"] == "passed"
    plain, ours = (
        [by_stream(cell.outputs) for cell in node.cells] for node in (pair.plain, pair.ours)
    )
    for stream in ("stdout", "stderr"):
        kept, theirs = (
            Counter("".join(text.get(stream, "") for text in texts)) for texts in (ours, plain)
        )
        assert theirs - kept == Counter()
    for source, text in zip(sources, ours, strict=True):
        wanted = [
            line.removeprefix("# -> ") for line in source.splitlines() if line.startswith("# -> ")
        ]
        assert [line for line in wanted if line not in "".join(text.values())] == [], source


def test_allow_errors_as_an_option_lets_all_cells_run(tmp_path: Path) -> None:
    assert_same(
        run_both(
            tmp_path, notebook_of("1 / 0", "print('second')", "[][0]", "'last'"), allow_errors=True
        )
    )


def test_cells_of_every_kind(tmp_path: Path) -> None:
    document = notebook_of(
        "print('runs')",
        "",
        "   \n\t\n",
        "# only a comment",
        "# a comment\n\n# and another\n",
        "'''only a string'''",
        "pass",
        "print('skipped')",
        "raise ValueError('skipped as well')",
        ";",
        "_ih, len(Out)",
        tags={
            7: ["skip-execution"],
            8: ["skip-execution", "raises-exception"],
            0: ["any", "parameters"],
        },
        custom={"kept": [1, {"deep": True}]},
        title="Näme",
    )
    picture = {"dot.png": {"image/png": "iVBORw0KGgo="}}
    document.cells.insert(
        1,
        nbformat.v4.new_markdown_cell(
            "# Title\n![dot](attachment:dot.png)", attachments=picture, id="m1"
        ),
    )
    document.cells.insert(
        3, nbformat.v4.new_raw_cell("raw *text*", metadata={"format": "text/x-rst"}, id="r1")
    )
    first, empty, skipped = document.cells[0], document.cells[2], document.cells[9]
    first.metadata.update(
        {"collapsed": True, "jupyter": {"source_hidden": True}, "own": {"a": 1}, "name": "a name"}
    )
    for number, cell in enumerate((first, empty, skipped)):
        cell.outputs = [nbformat.v4.new_output("stream", text="from an earlier run")]
        cell.execution_count = 40 + number

    pair = run_both(tmp_path, document)

    assert_same(pair)
    kept = [(cell.cell_type, cell.source, cell.get("attachments")) for cell in pair.ours.cells]
    assert kept == [
        (cell.cell_type, cell.source, cell.get("attachments")) for cell in document.cells
    ]
