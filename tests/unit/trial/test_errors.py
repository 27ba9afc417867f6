"""The error of a cell that is done: what it answered, and what it shows."""

from __future__ import annotations

from typing import Any

import pytest

from safe_exec.trial.errors import error_of

OK: dict[str, Any] = {"status": "ok"}
TEXT = {"output_type": "stream", "name": "stdout", "text": "x"}
STDIN_IN_A_DEBUGGER = [
    "StdinNotImplementedError                  Traceback (most recent call last)",
    "File \x1b[36m.../IPython/core/interactiveshell.py:2294\x1b[39m, in \x1b[36mInteractiveShell.showtraceback\x1b[39m(self)",
    "-> 2294     self.debugger(force=True)",
]


def shown(ename: str) -> dict[str, Any]:
    return {"output_type": "error", "ename": ename, "evalue": "", "traceback": []}


def answered(ename: str, *traceback: str) -> dict[str, Any]:
    return {"status": "error", "ename": ename, "evalue": "", "traceback": list(traceback)}


@pytest.mark.parametrize(
    ("reply", "outputs", "ename", "debugger"),
    [
        (OK, [], None, None),
        (OK, [TEXT], None, None),
        ({}, [], None, None),
        (OK, [TEXT, shown("A"), shown("B")], "A", False),
        (answered("A"), [], "A", False),
        (answered("A"), [shown("A")], "A", False),
        (answered("B"), [shown("A"), shown("B")], "B", False),  # what stopped the cell
        (answered("NoneType"), [shown("A")], "A", False),
        (answered("StdinNotImplementedError", *STDIN_IN_A_DEBUGGER), [shown("A")], "A", True),
        (
            answered("StdinNotImplementedError", *STDIN_IN_A_DEBUGGER),
            [],
            "StdinNotImplementedError",
            False,
        ),
        (
            answered("StdinNotImplementedError"),
            [shown("A")],
            "StdinNotImplementedError",
            False,
        ),  # %run, then input()
    ],
)
def test_the_error_of_a_cell(
    reply: dict[str, Any], outputs: list[Any], ename: str | None, debugger: bool | None
) -> None:
    found = error_of(reply, outputs)
    assert (found and found.error.ename, found and found.debugger) == (ename, debugger)
