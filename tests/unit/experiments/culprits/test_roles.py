"""What each culprit did, in words from evidence, and which to read first: small notebooks by table."""

from __future__ import annotations

import msgspec
import msgspec.structs
import pytest
from msgspec.structs import replace

from safe_exec.experiments.culprits.roles import (
    CulpritSet,
    culprits_of,
    first_line,
    kept_by,
    look_first,
)
from safe_exec.experiments.static_analysis.dependencies import Dependencies
from safe_exec.model.evidence import Frame
from safe_exec.model.verdict import CellRecord, CellStatus, Culprit, Role
from tests.unit.builders import make_crash

MIB = 1 << 20
GIB = 1 << 30
UNSEEN = "must run before; the reason is not visible"
CRASH = (Role.CRASH, "running when it happened")


class Notebook(msgspec.Struct, frozen=True, kw_only=True):
    """Code cells, all of which ran; the last one crashed. ``markdown`` cells come before the code cells.

    ``culprits`` count the code cells, ``dynamic_deps`` are those that only trials showed to be needed.
    """

    sources: tuple[str, ...]
    culprits: tuple[int, ...]
    dynamic_deps: frozenset[int] = frozenset()
    kept: dict[int, int] = msgspec.field(default_factory=dict)
    limit: int | None = None
    markdown: int = 0
    stack: tuple[int | None, ...] = ()
    """Of each frame the code cell, innermost first."""
    setting: str = ""

    @property
    def of(self) -> CulpritSet:
        at = self.markdown
        order = tuple(range(at, at + len(self.sources)))
        frames = tuple(
            Frame(function="f", line=1, cell=None if cell is None else cell + at)
            for cell in self.stack
        )
        return CulpritSet(
            cells=tuple(cell + at for cell in self.culprits),
            dynamic_deps=frozenset(cell + at for cell in self.dynamic_deps),
            order=order,
            dependencies=Dependencies.of_sources(self.sources, language="python"),
            sources=dict(zip(order, self.sources, strict=True)),
            records={
                index: CellRecord(
                    index=index,
                    code_index=n,
                    id=f"id-{n}",
                    status=CellStatus.PASSED,
                    memory_kept=self.kept.get(n),
                )
                for n, index in enumerate(order)
            },
            memory_limit=self.limit,
            crash=make_crash(index=order[-1], stack=frames),
            setting=self.setting,
        )


def roles(notebook: Notebook) -> list[tuple[Role, str]]:
    return [(culprit.role, culprit.note) for culprit in culprits_of(notebook.of)]


def defines(names: str, *users: int) -> tuple[Role, str]:
    """As the note says it; users count from 0 here and from 1 there."""
    cells = "code cell" if len(users) == 1 else "code cells"
    return (
        Role.DEFINITION,
        f"defines {names}, used by {cells} {', '.join(str(user + 1) for user in users)}",
    )


def acts(called: str) -> str:
    return f"calls `{called}`, which affects the whole process"


ROLES: dict[str, tuple[Notebook, list[tuple[Role, str]]]] = {
    "the crash cell alone": (Notebook(sources=("x = 1", "crash()"), culprits=(1,)), [CRASH]),
    "a definition": (
        Notebook(sources=("x = 1", "print(x)"), culprits=(0, 1)),
        [defines("`x`", 0 + 1), CRASH],
    ),
    "a definition used by two": (
        Notebook(sources=("x = 1", "y = x", "z = 1", "f(x, y)"), culprits=(0, 1, 3)),
        [defines("`x`", 1, 3), defines("`y`", 3), CRASH],
    ),
    "used by no culprit": (
        Notebook(sources=("x = 1", "y = x", "f()"), culprits=(0, 2)),
        [(Role.SETUP, UNSEEN), CRASH],
    ),
    "three names": (
        Notebook(sources=("a = b = c = 1", "f(c, b, a)"), culprits=(0, 1)),
        [defines("`a`, `b`, `c`", 1), CRASH],
    ),
    "four names": (
        Notebook(sources=("a = b = c = d = 1", "f(a, b, c, d)"), culprits=(0, 1)),
        [defines("`a`, `b`, `c` and more", 1), CRASH],
    ),
    "used late": (
        Notebook(sources=("x = 1", "def f(): return x", "f()"), culprits=(0, 1, 2)),
        [defines("`x`", 1), defines("`f`", 2), CRASH],
    ),
    "bound anew by another culprit": (
        Notebook(sources=("x = 1", "x = x + 1", "f(x)"), culprits=(0, 1, 2)),
        [defines("`x`", 1), defines("`x`", 2), CRASH],
    ),
    "bound anew by a cell that is not needed": (
        Notebook(sources=("x = 1", "x = 2", "f(x)"), culprits=(0, 2)),
        [defines("`x`", 2), CRASH],
    ),
    "what cannot be read defines what nobody else does": (
        Notebook(sources=("from lib import *", "print(array)"), culprits=(0, 1)),
        [defines("`array`", 1), CRASH],
    ),
    "but nobody takes print from it": (
        Notebook(sources=("from lib import *", "print(len('x'))"), culprits=(0, 1)),
        [(Role.SETUP, UNSEEN), CRASH],
    ),
    "a name of Python's own that is bound anew": (
        Notebook(sources=("def print(*_): pass", "print(1)"), culprits=(0, 1)),
        [defines("`print`", 1), CRASH],
    ),
    # What changes the process.
    "a trap": (
        Notebook(sources=("import signal\nsignal.alarm(1)", "f()"), culprits=(0, 1)),
        [(Role.TRIGGER, acts("signal.alarm")), CRASH],
    ),
    "a trap found by trials": (
        Notebook(
            sources=("import os\nos.environ['A'] = '1'", "f()"),
            culprits=(0, 1),
            dynamic_deps=frozenset({0}),
        ),
        [(Role.TRIGGER, "changes `os.environ`"), CRASH],
    ),
    "a trap whose module is used": (
        Notebook(sources=("import os\nos.chdir('/')", "os.listdir()"), culprits=(0, 1)),
        [defines("`os`", 1), CRASH],
    ),
    "the same, found by trials": (
        Notebook(
            sources=("import os\nos.chdir('/')", "os.listdir()"),
            culprits=(0, 1),
            dynamic_deps=frozenset({0}),
        ),
        [(Role.TRIGGER, acts("os.chdir")), CRASH],
    ),
    "harmless, and found by trials": (
        Notebook(sources=("x = 1", "f()"), culprits=(0, 1), dynamic_deps=frozenset({0})),
        [(Role.SETUP, UNSEEN), CRASH],
    ),
    "found by trials, and used": (
        Notebook(sources=("x = g()", "f(x)"), culprits=(0, 1), dynamic_deps=frozenset({0})),
        [defines("`x`", 1), CRASH],
    ),
    # Each kind of effect has words of its own.
    "an object that is changed": (
        Notebook(sources=("d = load()", "d['x'] = 1", "f(d)"), culprits=(0, 1, 2)),
        [defines("`d`", 1, 2), (Role.SETUP, "changes `d`; `d` is used by code cell 3"), CRASH],
    ),
    "a method that may change its object": (
        Notebook(
            sources=("con = connect()", "con.execute('create')", "con.df()"), culprits=(0, 1, 2)
        ),
        [
            defines("`con`", 1, 2),
            (Role.SETUP, "calls `con.execute()`; `con` is used by code cell 3"),
            CRASH,
        ],
    ),
    "a method that was found by trials": (
        Notebook(
            sources=("b = open()", "b.release()", "g()"),
            culprits=(0, 1, 2),
            dynamic_deps=frozenset({1}),
        ),
        [defines("`b`", 1), (Role.TRIGGER, "calls `b.release()`"), CRASH],
    ),
    "a file": (
        Notebook(
            sources=("a = 1", "a.tofile('x')", "g()"),
            culprits=(0, 1, 2),
            dynamic_deps=frozenset({1}),
        ),
        [defines("`a`", 1), (Role.TRIGGER, "writes a file (`a.tofile`)"), CRASH],
    ),
    "a function that sets a limit, and its call": (
        Notebook(
            sources=(
                "import resource",
                "def modest():\n    old = resource.getrlimit(9)\n    resource.setrlimit(9, old)",
                "modest()\nprint(resource.getrlimit(9))",
                "f()",
            ),
            culprits=(0, 1, 2, 3),
            dynamic_deps=frozenset({0, 1, 2}),
        ),
        [
            defines("`resource`", 1, 2),
            defines("`modest`", 2),
            (Role.TRIGGER, f"calls `modest()`, which {acts('resource.setrlimit')}"),
            CRASH,
        ],
    ),
    "a trace function that is left on, in a cell whose names are used": (
        Notebook(
            sources=("import sys\ndef tidy(x): return x\nsys.settrace(print)", "tidy(1)"),
            culprits=(0, 1),
        ),
        [(Role.TRIGGER, acts("sys.settrace")), CRASH],
    ),
    "imports keep memory and accumulate nothing": (
        Notebook(
            sources=("import pandas as pd", "f(pd)"),
            culprits=(0, 1),
            kept={0: 612 * MIB},
            limit=GIB,
        ),
        [defines("`pd`", 1), CRASH],
    ),
    # What was kept.
    "kept much": (
        Notebook(
            sources=("x = 1", "y = 1", "f(x, y)"),
            culprits=(0, 1, 2),
            kept={0: 612 * MIB, 1: 10 * MIB, 2: 300 * MIB},
            limit=GIB,
        ),
        [(Role.ACCUMULATOR, "+612 MiB kept"), defines("`y`", 2), CRASH],
    ),
    "kept much, with nothing to fill": (
        Notebook(sources=("x = 1", "f(x)"), culprits=(0, 1), kept={0: 612 * MIB}),
        [defines("`x`", 1), CRASH],
    ),
    "a trap that kept much": (
        Notebook(
            sources=("import signal\nsignal.alarm(1)", "f()"),
            culprits=(0, 1),
            kept={0: 612 * MIB},
            limit=GIB,
        ),
        [(Role.ACCUMULATOR, "+612 MiB kept"), CRASH],
    ),
    "cells that are no code before": (
        Notebook(sources=("x = 1", "y = 2", "f(x)"), culprits=(0, 2), markdown=3),
        [defines("`x`", 2), CRASH],
    ),
}


@pytest.mark.parametrize("name", ROLES)
def test_roles(name: str) -> None:
    notebook, expected = ROLES[name]
    assert roles(notebook) == expected


def test_a_culprit_says_which_cell_it_is() -> None:
    notebook = Notebook(sources=("x = 1", "# why\ny = 2", "f(y)"), culprits=(1, 2), markdown=2)
    first, last = culprits_of(notebook.of)
    note = "defines `y`, used by code cell 3"
    assert first == Culprit(
        index=3, code_index=1, id="id-1", role=Role.DEFINITION, note=note, source_line="y = 2"
    )
    assert (last.index, last.code_index, last.role) == (4, 2, Role.CRASH)


def test_a_language_that_is_not_known_has_no_reasons() -> None:
    notebook = Notebook(sources=("x <- 1", "f(x)"), culprits=(0, 1))
    found = notebook.of
    other = CulpritSet(
        cells=found.cells, dynamic_deps=found.dynamic_deps, order=found.order, dependencies=Dependencies.of_sources(notebook.sources, language="R"),
        sources=found.sources, records=found.records, memory_limit=None, crash=found.crash,
    )  # fmt: skip
    assert [(culprit.role, culprit.note) for culprit in culprits_of(other)] == [
        (Role.SETUP, UNSEEN),
        CRASH,
    ]


@pytest.mark.parametrize(
    ("kept", "limit", "named"),
    [
        (8 * MIB, 100 * MIB, True),
        (8 * MIB - 1, 100 * MIB, False),
        (50 * MIB, 1000 * MIB, True),
        (50 * MIB - 1, 1000 * MIB, False),
        (-5 * MIB, 100 * MIB, False),
        (None, 100 * MIB, False),
        (50 * MIB, None, False),
    ],
)
def test_what_is_worth_naming(kept: int | None, limit: int | None, named: bool) -> None:
    """Eight MiB, and a twentieth of what there is."""
    notebook = Notebook(
        sources=("x = 1", "f(x)"),
        culprits=(0, 1),
        kept={} if kept is None else {0: kept},
        limit=limit,
    )
    assert kept_by(notebook.of, 0) == (kept if named else None)


# --- which to read first ------------------------------------------------------------------------------------------------

PLAIN = Notebook(sources=("x = 1", "y = 2", "f(x, y)"), culprits=(0, 1, 2), markdown=1)
HOARD = Notebook(
    sources=("x = 1", "y = 2", "f(x, y)"),
    culprits=(0, 1, 2),
    kept={0: 300 * MIB, 1: 400 * MIB, 2: 900 * MIB},
    limit=GIB,
    markdown=1,
)
TRAPS = Notebook(
    sources=(
        "import signal\nsignal.alarm(1)",
        "import atexit\natexit.register(id)",
        "y = 1",
        "f(y)",
    ),
    culprits=(0, 1, 2, 3),
    kept={2: 900 * MIB},
    limit=GIB,
    markdown=1,
)
DEEP = Notebook(
    sources=("def f(): pass", "x = 2", "f()"), culprits=(0, 2), stack=(None, 0, 2), markdown=1
)

FIRST: dict[str, tuple[Notebook, int | None, int]] = {
    # A notebook, by how much the crash cell grew, and the code cell to read first.
    "the crash cell": (PLAIN, None, 2),
    "the last trap": (TRAPS, None, 1),
    "a trap before what kept most": (TRAPS, 0, 1),
    "what kept most": (HOARD, 100 * MIB, 1),
    "what kept most, growth not known": (HOARD, None, 1),
    "what grew more than any kept": (HOARD, 500 * MIB, 2),
    "as much is not more": (HOARD, 400 * MIB, 2),
    "the cell whose code ran": (DEEP, None, 0),
    "a cell whose code ran, but is no culprit": (
        Notebook(sources=("def f(): pass", "x = 2", "f()"), culprits=(1, 2), stack=(0, 2), markdown=1), None, 2,
    ),
    "no frame of a cell": (Notebook(sources=("x = 1", "f()"), culprits=(0, 1), stack=(None, None), markdown=1), None, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", FIRST)
def test_which_to_read_first(name: str) -> None:
    notebook, growth, first = FIRST[name]
    found = notebook.of
    assert look_first(found, culprits_of(found), growth) == first + notebook.markdown


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("x = 1\ny = 2", "x = 1"),
        ("\n\n   \n    x = 1", "x = 1"),
        ("# why\n\nx = 1", "x = 1"),
        ("# only\n# comments", "# only"),
        ("%%time\nx = 1", "%%time"),
        ("", None),
        (" \n\t\n", None),
        ("x" * 300, "x" * 200),
    ],
)
def test_the_first_line_that_says_something(source: str, line: str | None) -> None:
    assert first_line(source) == line


def test_the_cell_that_sets_an_engines_own_limit_is_read_first() -> None:
    sources = (
        "con = connect()",
        "con.run('SET memory_limit = 1')",
        "con.run('CREATE TABLE t')",
        "con.run('SELECT 1')",
    )
    notebook = Notebook(sources=sources, culprits=(0, 1, 2, 3), setting="memory_limit")
    culprits = culprits_of(notebook.of)
    assert (culprits[1].role, culprits[1].note) == (Role.TRIGGER, "sets memory_limit")
    assert look_first(notebook.of, culprits, None) == 1
    without = replace(notebook, setting="")
    assert look_first(without.of, culprits_of(without.of), None) != 1


def test_a_trigger_shows_the_line_that_sets_off() -> None:
    notebook = Notebook(
        sources=("import signal\nx = 1\nsignal.alarm(1)\ny = 2", "f()"),
        culprits=(0, 1),
        dynamic_deps=frozenset({0}),
    )
    assert culprits_of(notebook.of)[0].source_line == "signal.alarm(1)"


def test_memory_that_ran_out_is_not_set_off_by_a_changed_object() -> None:
    notebook = Notebook(
        sources=("d = 1", "d['x'] = 1", "f(d)"),
        culprits=(0, 1, 2),
        dynamic_deps=frozenset({1}),
        limit=GIB,
    )
    assert look_first(notebook.of, culprits_of(notebook.of), GIB) == 2
    assert (
        look_first(msgspec.structs.replace(notebook, limit=None).of, culprits_of(notebook.of), None)
        == 1
    )
