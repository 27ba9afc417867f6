"""The reduction of culprit cells, with an oracle that executes what remains in this process."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from safe_exec.experiments.culprits.protocol import Outcome, Query, Reply
from safe_exec.experiments.culprits.reduction import Reduction
from tests.unit.driving import drive_sync


class Crash(BaseException):
    """Stands for the death of the kernel."""


def crash() -> None:
    raise Crash


def execute(texts: Mapping[int, str]) -> Reply:
    """Run cells as a kernel would; the last one is the crash cell."""
    names: dict[str, Any] = {"crash": crash}
    for cell, text in texts.items():
        try:
            exec(compile(text, f"cell {cell}", "exec"), names)
        except Crash as death:
            frames = traceback.extract_tb(death.__traceback__)
            line = next((f.lineno for f in frames if f.filename == f"cell {max(texts)}"), None)
            answer = Outcome.FAIL if cell == max(texts) else Outcome.UNRESOLVED
            return Reply(answer=answer, seconds=1.0, line=line, exact_line=True)
        except NameError as error:
            lacking = frozenset({str(error.name)} if error.name else ())
            return Reply(answer=Outcome.UNRESOLVED, seconds=1.0, stopped_at=cell, names=lacking)
        except Exception:  # noqa: BLE001 - any other failure of the cell
            return Reply(answer=Outcome.UNRESOLVED, seconds=1.0, stopped_at=cell)
    return Reply(answer=Outcome.PASS, seconds=1.0)


class Run:
    """A reduction of some cells that crash, and its number of trials."""

    def __init__(self, *cells: str, budget: float = 1000.0, confirms: bool = True) -> None:
        self.sources = dict(enumerate(cells))
        self.trials, self.budget = 0, budget
        whole = execute(self.sources)
        assert whole.answer is Outcome.FAIL and whole.line is not None
        self.reduction = Reduction(
            self.sources,
            crash=len(cells) - 1,
            crash_line=whole.line,
            lines={len(cells) - 1: {whole.line}},
            language="python",
            confirms=confirms,
        )
        drive_sync(self.reduction.steps(start_seconds=1.0, remaining=self.remaining), self.ask)
        self.texts = self.reduction.texts(self.reduction.selection)

    def remaining(self) -> float:
        return self.budget - self.trials

    def ask(self, query: Query) -> Reply:
        self.trials += 1
        selection = self.reduction.selected(query)
        reply = self.reduction.judge(selection, execute(self.reduction.texts(selection)))
        # Nothing is seen to the end if somebody else confirms the whole.
        certain = self.reduction.confirms or reply.answer is not Outcome.FAIL
        return replace(reply, from_scratch=certain)


NOISE = "a = 1\nb = [a]\nprint(b, end='')\n"
# The cells, what remains of them, and the most trials that it takes.
TABLE: dict[str, tuple[list[str], list[str], int]] = {
    "one line": (["crash()"], ["crash()"], 0),
    "around the line": ([NOISE + "crash()\n" + NOISE], ["crash()"], 2),
    "what it uses stays, with its comment": (
        [NOISE + "# how often\nn = 1\nm = 2\n", NOISE + "for i in range(n):\n    crash()"],
        ["# how often\nn = 1", "for i in range(n):\n    crash()"],
        2,
    ),
    "inside the block of the line": (
        ["for i in range(3):\n    x = i\n    print(x, end='')\n    crash()\n    y = x"],
        ["for i in range(3):\n    crash()"],
        2,
    ),
    "inside a function that is called": (
        [
            "def load(n):\n    '''Load.'''\n    rows = []\n    rows.append(n)\n    extra = 5\n    return rows\n",
            "rows = load(2)\nif rows[0] == 2:\n    crash()\nelse:\n    print('no')",
        ],
        [
            "def load(n):\n    rows = []\n    rows.append(n)\n    return rows",
            "rows = load(2)\nif rows[0] == 2:\n    crash()",
        ],
        14,
    ),
    "a function that nothing calls any more": (
        [
            "def used(n):\n    return n\n",
            "def g():\n    used(1)\n    crash()\ng()",
        ],
        ["def used(n):\n    return n", "def g():\n    crash()\ng()"],
        8,
    ),
    "clauses": (
        ["try:\n    a = 1\nfinally:\n    crash()\n"],
        ["try:\n    a = 1\nfinally:\n    crash()"],
        2,
    ),
    "another crash is no substitute": (
        ["n = 0\nif n:\n    crash()\nn = 1\nif n:\n    crash()"],
        ["n = 1\nif n:\n    crash()"],
        4,
    ),
    "another language": (["%%bash\nls", "x = 1\ncrash()"], ["%%bash\nls", "crash()"], 2),
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in TABLE if name != "another language"])
def test_table(name: str) -> None:
    cells, expected, most = TABLE[name]
    run = Run(*cells)
    assert list(run.texts.values()) == expected
    assert run.trials <= most


def test_a_cell_in_another_language_stays_whole() -> None:
    cells = dict(enumerate(TABLE["another language"][0]))
    reduction = Reduction(cells, crash=1, crash_line=2, lines={1: {2}}, language="python")
    assert reduction.texts(frozenset(reduction.selection))[0] == cells[0]
    assert {piece.cell for piece in reduction.pieces} == {1}


def test_no_trial_beyond_the_budget() -> None:
    cells = ["\n".join(f"x{n} = {n}" for n in range(40)) + "\nassert x3 + x29\ncrash()"]
    whole, cut = Run(*cells), Run(*cells, budget=3.0)
    assert whole.texts[0].splitlines()[-1] == cut.texts[0].splitlines()[-1] == "crash()"
    assert cut.trials <= 3 < len(cells[0].splitlines())
    assert whole.trials <= 45


def test_a_sampled_line_may_be_another_of_the_same_statement() -> None:
    source = "x = 1\nwhile True:\n    a()\n    b()\nc()"
    reduction = Reduction({0: source}, crash=0, crash_line=3, lines={0: {3}}, language="python")
    kept = frozenset(n for n in reduction.selection if 1 < reduction.pieces[n].span.first < 5)
    assert reduction.numbers(kept, 0) == [2, 3, 4]
    assert reduction.is_same_line(kept, 2, exact=True)
    assert not reduction.is_same_line(kept, 3, exact=True)
    assert reduction.is_same_line(kept, 3, exact=False)
    assert not reduction.is_same_line(kept, None, exact=False)
    assert not reduction.is_same_line(kept, 9, exact=False)


STATEMENTS = st.sampled_from(
    [
        "a = 1",
        "b = a if 'a' in dir() else 2",
        "# note",
        "",
        "for i in range(2):\n    c = i\n    d = c",
        "def f(n):\n    # inside\n    g = n\n    return g",
        "if True:\n    h = 1\nelse:\n    h = 2",
        "try:\n    k = [][0]\nexcept IndexError:\n    k = 3",
        "e = 1; e2 = 2",
    ]
)
CRASHES = st.sampled_from(
    [
        "crash()",
        "if a or not a:\n    x = 1\n    crash()",
        "for n in (f(1), 2):\n    crash()\n    b = n",
    ]
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(STATEMENTS, min_size=1, max_size=6), max_size=3), CRASHES)
def test_any_notebook(parts: list[list[str]], end: str) -> None:
    cells = ["a = 0\ndef f(n):\n    return n\n" + "\n".join(part) for part in parts] or ["pass"]
    cells[-1] = "a = 0\ndef f(n):\n    return n\n" + cells[-1] + "\n" + end
    run = Run(*cells)
    last = max(run.sources)
    reply = execute(run.texts)
    assert reply.answer is Outcome.FAIL
    kept_line = run.texts[last].splitlines()[(reply.line or 0) - 1]
    assert kept_line == run.sources[last].splitlines()[run.reduction.crash_line - 1]
    for cell, text in run.texts.items():
        users_lines = iter(run.sources[cell].splitlines())
        assert all(line in users_lines for line in text.splitlines()), "a subset, in order"
        assert len(text) <= len(run.sources[cell])


def test_without_confirmations_the_same_remains_after_fewer_trials() -> None:
    cells, remainder, most = TABLE["inside a function that is called"]
    confirmed, run = Run(*cells), Run(*cells, confirms=False)
    assert list(run.texts.values()) == remainder
    assert run.trials < confirmed.trials <= most
