"""The crash cell of a verdict: which frames of its stack are told, with which lines."""

from __future__ import annotations

import nbformat

from safe_exec.diagnosis.verdict import crash_cell, without_plumbing
from safe_exec.model.ending import CellError, CellFailed
from safe_exec.model.evidence import CellLocation, Frame

MAGICS = Frame(function="time", line=1335, file="/lib/IPython/core/magics/execution.py")
SHELL = Frame(function="run_cell", line=540, file="/lib/ipykernel/zmqshell.py")
BODY = Frame(function="<module>", line=2, file="<timed exec>", cell=0)
CELL = Frame(function="<module>", line=1, file="/tmp/1.py", cell=0)
LIBRARY = Frame(function="merge", line=812, file="/lib/pandas/core/frame.py")


def test_what_runs_a_body_is_left_out_and_what_the_body_called_is_not() -> None:
    assert without_plumbing((LIBRARY, BODY, MAGICS, SHELL, CELL)) == (LIBRARY, BODY, CELL)
    assert without_plumbing((MAGICS, SHELL, CELL)) == (MAGICS, SHELL, CELL), (
        "there it happened in IPython itself"
    )
    assert without_plumbing((MAGICS, SHELL)) == (MAGICS, SHELL)
    assert without_plumbing((BODY, LIBRARY, CELL)) == (BODY, LIBRARY, CELL)


def test_frames_of_cells_come_with_their_lines() -> None:
    node = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("%%time\nf()")])
    stack = (
        LIBRARY,
        BODY,
        CELL,
        Frame(function="f", line=3, cell=0),
        Frame(function="f", line=1, cell=7),
    )
    place = CellLocation(cell=0, line=2, source="traceback", stack=stack)
    crash = crash_cell(CellFailed(cell=0, error=CellError(ename="E", evalue="")), place, node)
    assert crash is not None and crash.source_line == "f()"
    assert [frame.source_line for frame in crash.stack] == [None, "f()", "%%time", None, None]
