"""Notebooks of other formats and kernels, and what stands in their metadata."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pytest

from tests.parity.compare import assert_same, notebook_of, run_both


def old_cell(source: str) -> dict[str, object]:
    return {
        "cell_type": "code",
        "collapsed": False,
        "input": source,
        "language": "python",
        "metadata": {},
        "outputs": [],
    }


def test_nbformat_4_4_has_no_ids(tmp_path: Path) -> None:
    document = notebook_of("print('one')", "2 + 2", "%%html\n<i>h</i>")
    document.nbformat_minor = 4
    for cell in document.cells:
        del cell["id"]
    pair = run_both(tmp_path, json.dumps(document))
    assert_same(pair)
    assert pair.ours.nbformat_minor == 4
    assert not any("id" in cell for cell in pair.ours.cells)


@pytest.mark.parametrize("minor", [0, 1, 2, 3])
def test_older_minor_formats_stay_what_they_are(minor: int, tmp_path: Path) -> None:
    document = notebook_of("print('one')", "import sys\nsys.version_info[0]")
    document.nbformat_minor = minor
    for cell in document.cells:
        del cell["id"]
    assert_same(run_both(tmp_path, json.dumps(document)))


def test_nbformat_3_is_upgraded(tmp_path: Path) -> None:
    cells = [
        {"cell_type": "heading", "level": 2, "metadata": {}, "source": ["A heading"]},
        {"cell_type": "markdown", "metadata": {"own": 1}, "source": ["text *here*"]},
        old_cell("print('from an old notebook')\n6 * 7"),
        old_cell("print('second')"),
        {"cell_type": "raw", "metadata": {}, "source": "raw"},
    ]
    document = {
        "metadata": {"name": "old"},
        "nbformat": 3,
        "nbformat_minor": 0,
        "worksheets": [{"cells": cells, "metadata": {}}],
    }
    pair = run_both(tmp_path, json.dumps(document))
    for node in (pair.plain, pair.ours):
        for cell in node.cells:
            cell.pop("id", None)  # nbformat makes up random ones, safe-exec the same ones each time
    assert_same(pair)


def test_a_document_without_optional_parts(tmp_path: Path) -> None:
    cell: dict[str, object] = {
        "cell_type": "code",
        "metadata": {},
        "source": ["print(1)\n", "2"],
        "outputs": [],
        "execution_count": None,
        "id": "a",
    }
    document = {"metadata": {}, "nbformat": 4, "nbformat_minor": 5, "cells": [cell]}
    assert_same(run_both(tmp_path, json.dumps(document)))


def test_multiline_outputs_and_sources_as_lists(tmp_path: Path) -> None:
    stale = {"output_type": "stream", "name": "stdout", "text": ["old\n", "output\n"]}
    cells = [
        {
            "cell_type": "code",
            "id": "a",
            "metadata": {},
            "source": ["x = 1\n", "x\n"],
            "outputs": [stale],
            "execution_count": 3,
        },
        {
            "cell_type": "code",
            "id": "b",
            "metadata": {},
            "source": [],
            "outputs": [],
            "execution_count": 1,
        },
        {"cell_type": "markdown", "id": "c", "metadata": {}, "source": ["# a\n", "b"]},
    ]
    assert_same(
        run_both(
            tmp_path,
            json.dumps({"metadata": {}, "nbformat": 4, "nbformat_minor": 5, "cells": cells}),
        )
    )


def test_allow_errors_in_the_metadata(tmp_path: Path) -> None:
    sources = ("1 / 0", "print('goes on')", "raise ValueError('twice')")
    plain = run_both(tmp_path, notebook_of(*sources), allow_errors=True)
    (tmp_path / "by-metadata").mkdir()
    ours = run_both(
        tmp_path / "by-metadata",
        notebook_of(*sources, execution={"allow_errors": True}),
        allow_errors=True,
    )
    assert [dict(cell) for cell in ours.ours.cells] == [dict(cell) for cell in plain.plain.cells]
    assert ours.outcome.verdict["status"] == "passed"


def test_metadata_of_the_user_is_left_alone(tmp_path: Path) -> None:
    document = notebook_of(
        "print(1)",
        authors=[{"name": "Ä"}],
        toc={"base": 1},
        kept={"deep": {"list": [1, None, 1.5, "x"]}},
    )
    document.metadata["safe_exec"] = {"limits": {"memory": "900M"}}
    document.cells[0].metadata["safe_exec"] = {"limits": {"cell_timeout": "50s"}}
    pair = run_both(tmp_path, document)
    assert_same(pair)
    written = nbformat.read(tmp_path / "ours" / "notebook.out.ipynb", as_version=4)
    assert written.metadata.safe_exec.limits == {"memory": "900M"}
    assert written.cells[0].metadata.safe_exec.limits == {"cell_timeout": "50s"}


@pytest.mark.bed("bash")
def test_bash(tmp_path: Path) -> None:
    sources = (
        "echo one; echo two >&2",
        "x=5",
        "echo $x $((x * 2))",
        "printf 'no newline'",
        "# only a comment",
        "for n in 1 2 3; do echo line $n; done",
        "cd /; pwd; cd - > /dev/null",
        "echo 'ümläut 😀'",
        "seq 1 20",  # of a longer one bash_kernel itself leaves a carriage return in a line here and there, by chance
        'f() { echo from f "$@"; }; f a b',
        "cat <<END\nhere\ndocument\nEND",
        "true; echo $?",
        "printf 'a\\rb\\n'",
        "set -o pipefail; echo x | cat",
    )
    document = notebook_of(*sources, kernel="bash")
    document.metadata["kernelspec"]["language"] = "bash"
    assert_same(run_both(tmp_path, document, kernel="bash"))


@pytest.mark.bed("bash")
def test_bash_that_fails_where_it_may(tmp_path: Path) -> None:
    document = notebook_of(
        "false",
        "ls /no-such-file",
        "echo on",
        tags={0: ["raises-exception"], 1: ["raises-exception"]},
    )
    assert_same(run_both(tmp_path, document, kernel="bash"))


def test_spawned_workers_import_what_lies_beside_the_notebook(tmp_path: Path) -> None:
    def beside(work: Path) -> None:
        (work / "helper.py").write_text("def double(x):\n    return 2 * x\n")

    sources = (
        "import multiprocessing\nfrom helper import double\nspawn = multiprocessing.get_context('spawn')",
        "with spawn.Pool(1) as pool:\n    print(pool.map(double, [1, 2]))",
        "process = spawn.Process(target=double, args=(3,))\nprocess.start()\nprocess.join()\nprint(process.exitcode)",
        "server = multiprocessing.get_context('forkserver')\nwith server.Pool(1) as pool:\n    print(pool.map(abs, [-1]))",
        # What a child writes itself comes in a thread of the kernel: where it then stands is chance under nbclient.
        "import subprocess, sys\nprint(subprocess.check_output([sys.executable, '-c', 'import sys; print(sys.argv)', 'x'], text=True))",
    )
    assert_same(run_both(tmp_path, notebook_of(*sources), prepare=beside))
