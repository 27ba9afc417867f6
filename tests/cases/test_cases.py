"""Every case gets its status, cause, activity, crash cell, line and signal, and then its culprits
and a reproduction; real kernels, each in a folder of its own. README.md describes the cases.

`make test` runs each case as root, and as an ordinary user or with Landlock alone if the case names
that place. SAFE_EXEC_CASES_PLACES=all runs each case in every place where its answer holds.

A search for culprits takes longer than a run. Cases for it are drawn by a seed, as many as should
fit into SAFE_EXEC_CASES_MINUTES at two at a time (ten, if it is not set; ``inf`` for all). pytest
prints the seed, and SAFE_EXEC_CASES_SEED draws the same again. SAFE_EXEC_ANSWERS_MINUTES does the
same for the runs without a search; cases whose answer depends on the version of Python always stay.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from safe_exec.kernel.launch import has_pystack
from safe_exec.kernel.native_stack import TOO_SLOW
from safe_exec.model.limits import Mechanism
from safe_exec.sandbox.planner import CHOOSABLE
from tests.cases.catalogue import Case, Place, read_all, runnable
from tests.cases.table import PROPERTY, Row
from tests.support import (
    NOBODY,
    Outcome,
    ordinary_user_with_namespaces,
    orphaned_groups,
    private_directory,
    run_notebook,
    wait_until,
)

RUNNABLE = runnable(read_all())
SEARCHED = [case for case in RUNNABLE if case.expected.get("culprits")]
NOT_YET: frozenset[str] = frozenset({})
"""Cases whose answer is still wrong. They run, and pytest lists each that has become right (XPASS)."""

EVERYWHERE = os.environ.get("SAFE_EXEC_CASES_PLACES") == "all"
WITHOUT_BUBBLEWRAP = ",".join(m.value for m in CHOOSABLE if m is not Mechanism.BUBBLEWRAP)
BEDS_OF_PLACES: dict[Place, tuple[str, ...]] = {
    "root": (),
    "user": ("ordinary-user", "user-namespaces"),
    "landlock": ("landlock",),
    "user-landlock": ("ordinary-user", "landlock"),
}


def row(case: Case, place: Place = "root") -> Any:
    """A case in a place as a row of a table of tests, with the beds that it needs."""
    marks = [pytest.mark.bed(*case.beds, *BEDS_OF_PLACES[place])]
    if case.id in NOT_YET:
        marks.append(pytest.mark.xfail(reason="not right yet", strict=False))
    name = case.id if place == "root" else f"{case.id}-{place}"
    return pytest.param(case.at(place), place, id=name, marks=marks)


def rows(cases: list[Case]) -> list[Any]:
    """The cases in the places that this run asks for."""
    return [row(c, place) for c in cases for place in (c.every_place if EVERYWHERE else c.places)]


def agrees(expected: Any, actual: Any) -> bool:
    """Compare with a value, a list of acceptable values, or null if nothing is asked."""
    return (
        expected is None
        or actual == expected
        or (isinstance(expected, list) and actual in expected)
    )


@pytest.fixture
def folder() -> Iterator[Path]:
    """A directory that an ordinary user may enter, too: pytest's own are for root alone."""
    with private_directory() as path:
        yield path


def run_case(
    case: Case,
    place: Place,
    folder: Path,
    name: str,
    *options: str,
    notebook: Path | None = None,
    **env: str,
) -> Outcome:
    """Run a case's notebook, or another one instead of it, in a folder as the case needs it."""
    home = folder / "home"
    base = home / "project" if case.home else folder / "base"
    work = base / "work"
    for path in (home, work):
        path.mkdir(parents=True)
    for file, text in case.files.items():
        path = base / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    if case.git:
        make_repository(base)
    path = Path(shutil.copy(notebook or case.notebook, work / name))
    env |= {key: value.format(base=base) for key, value in case.env.items()}
    if case.home or "user" in place:
        env["HOME"] = str(home)
    # As in an environment that is activated: Debian has no `python` of its own, which `%%python` runs.
    env.setdefault("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    prefix: list[str] = []
    if "user" in place:
        prefix = ordinary_user_with_namespaces()
        for entry in (folder, *folder.rglob("*")):
            os.chown(entry, NOBODY, NOBODY)
    if "landlock" in place:
        options = (*options, "--mechanisms", WITHOUT_BUBBLEWRAP)
    return run_notebook(path, *options, env=env, prefix=prefix, cwd=work)


def make_repository(base: Path) -> None:
    """An empty git repository, all that git itself asks of one."""
    for part in ("objects", "refs"):
        (base / ".git" / part).mkdir(parents=True)
    (base / ".git" / "HEAD").write_text("ref: refs/heads/main\n")


def check_cause(case: Case, outcome: Outcome) -> None:
    """Check the verdict's cause and crash cell, and the texts that must or must not appear."""
    cause = outcome.verdict["cause"] or {}
    crash = outcome.verdict["crash_cell"] or {}
    actual = {
        "status": outcome.verdict["status"],
        "cause": cause.get("kind"),
        "activity": cause.get("activity"),
        "signal": cause.get("signal"),
        "cell": crash.get("code_index"),
        "line": crash.get("line"),
    }
    expected = {key: case.expected.get(key) for key in actual}
    wrong = {k: (expected[k], v) for k, v in actual.items() if not agrees(expected[k], v)}
    report = (
        f"{outcome.stdout}\n{outcome.stderr}\n{json.dumps(cause, indent=1, ensure_ascii=False)}"
    )
    assert not wrong, f"expected, actual: {wrong}\n{report}"
    # The files of the run are listed by name, whatever the diagnosis says.
    diagnosis = {key: value for key, value in outcome.verdict.items() if key != "files"}
    text = "\n".join([outcome.stdout, outcome.stderr, *strings_in(diagnosis)])
    wanted = (*case.says, *(case.search_says if outcome.verdict["culprits"] else ()))
    missing = [words for words in wanted if words not in text]
    assert not missing, f"does not say {missing}\n{report}\n{outcome.verdict['warnings']}"
    forbidden = [words for words in case.never_says if words in text]
    assert not forbidden, f"says {forbidden}\n{report}\n{outcome.verdict['warnings']}"


def check_memory(case: Case, place: Place, outcome: Outcome) -> None:
    """Check the largest holder, the line that allocated most, and that nearly all is explained."""
    if case.memory is None:
        return
    memory = outcome.verdict["memory"]
    if not case.memory["held"]:
        # An allocation that was refused was itself too large.
        assert "held by" not in outcome.stdout, outcome.stdout
        return
    # Where rlimits refuse an allocation, the memory may have been nearly empty.
    if memory is None or memory["peak_bytes"] < 0.9 * outcome.verdict["limits"]["memory"]:
        assert outcome.verdict["cause"]["kind"] == "memory_error", outcome.stdout
        return
    known = memory["attributed_bytes"] + (memory["native_bytes"] or 0)
    assert known >= 0.9 * memory["peak_bytes"], memory
    first = memory["holders"][0]
    assert (first["name"] or first["type"]) in case.memory["held"], memory["holders"]
    sums: Counter[tuple[int, int]] = Counter()
    for row in memory["lines"]:
        sums[row["code_index"], row["line"]] += row["bytes"]
    # Another line may have allocated nearly as much.
    lines = [list(line) for line, size in sums.items() if size >= 0.9 * max(sums.values())]
    # Where a watchdog looks, the last line may have taken more than the limit.
    if case.memory["line"] is not None and place == "root":
        assert case.memory["line"] in lines, memory["lines"]


def check_native(case: Case, outcome: Outcome) -> None:
    """Check the C function to blame, or its library, or that the verdict says why there is none."""
    crash = outcome.verdict["crash_cell"]
    if not case.native or not has_pystack():
        return
    places = [
        f"{frame['function'] or '?'} in {Path(frame['library'] or '?').name}"
        for frame in crash["native"]
        if frame["python"] is None
    ]
    # On a busy machine there may be no time to unwind, and a fault without a report has no stack.
    is_cut = not crash["native"] or crash["native_error"] == TOO_SLOW
    if not any(re.search(case.native, place) for place in places):
        assert is_cut and crash["native_error"], (crash["native"], crash["native_error"])


def strings_in(value: Any) -> Iterator[str]:
    """All texts and keys of a JSON document."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield key
            yield from strings_in(part)
    elif isinstance(value, list):
        for part in value:
            yield from strings_in(part)


def check_files(case: Case, base: Path, outcome: Outcome) -> None:
    """Check the files that the run was to leave."""
    for name, wanted in case.wrote.items():
        exists = (base / name).exists()
        if wanted == "or-not-passed":
            assert exists or outcome.code != 0, (
                f"{name} is gone, and the run passed\n{outcome.stdout}"
            )
        else:
            assert exists is wanted, (
                f"{name} {'exists' if exists else 'is missing'}\n{outcome.stdout}"
            )


# --- the draw -----------------------------------------------------------------------------------


def drawn(
    cases: list[Case], minutes: float, *, stay: Collection[str], seconds: Mapping[str, float]
) -> list[Case]:
    """Cases that stay in, and others by chance while there is time, in the order of the table.

    ``minutes`` is the time for all at two at a time, ``seconds`` the time for one.
    """

    def cost_of(case: Case) -> float:
        return seconds["timeout" if "timeout" in (case.expected["status"] or "") else "other"]

    others = [case for case in cases if case.id not in stay]
    random.Random(os.environ["SAFE_EXEC_CASES_SEED"]).shuffle(others)
    chosen = [case for case in cases if case.id in stay]
    while others and sum(map(cost_of, [*chosen, others[-1]])) <= 2 * 60 * minutes:
        chosen.append(others.pop())
    return [case for case in cases if case in chosen]


ANSWERED = drawn(
    RUNNABLE,
    float(os.environ.get("SAFE_EXEC_ANSWERS_MINUTES", "inf")),
    stay={
        case.id for case in RUNNABLE if case.python or any("python" in a for a in case.alternatives)
    },
    seconds={"timeout": 8.0, "other": 3.0},
)


@pytest.mark.cases
@pytest.mark.parametrize(("case", "place"), rows(ANSWERED))
def test_case(case: Case, place: Place, folder: Path) -> None:
    outcome = run_case(case, place, folder, "case.ipynb", *case.options, "--no-bisect")
    check_cause(case, outcome)
    check_memory(case, place, outcome)
    check_native(case, outcome)
    check_files(case, folder / ("home/project" if case.home else "base"), outcome)


# --- culprits -----------------------------------------------------------------------------------

NOT_BLAMED_FIRST = {
    "b2-two-tables": "two tables of one size and a sort that needs as much: it names the sort, which asked for the most",
    "d5-numba-oob-read": "compiled code leaves no frame: it names the call, not the wrong lag or the function without a check",
    "f4-chain-growth": "the chain that grew is no memory worth naming: it names the cell that walked it",
    "i2-int-divide": "it names the cell of the function in which it died, not the one with the zero or the call",
}
"""Cases whose cell to look at first is none of those that a person would name, and why."""
STAY_IN = tuple(NOT_BLAMED_FIRST)
"""Cases that are in every draw: whatever has failed in one is added here."""
DRAWN = drawn(
    SEARCHED,
    float(os.environ.get("SAFE_EXEC_CASES_MINUTES", "10")),
    stay=STAY_IN,
    # The run, the search and the reproduction.
    seconds={"timeout": 35.0, "other": 12.0},
)


@pytest.mark.cases
@pytest.mark.parametrize(("case", "place"), rows([replace(c, places=("root",)) for c in DRAWN]))
def test_culprits(case: Case, place: Place, folder: Path, record_property: Any) -> None:
    with private_directory() as runtime:
        outcome = run_case(
            case, place, folder / "first", "case.ipynb", *case.options, XDG_RUNTIME_DIR=str(runtime)
        )
        assert [path for path in runtime.rglob("*") if path != runtime / "safe-exec"] == []
    wait_until(
        lambda: orphaned_groups() == [],
        10,
        f"no control group without a keeper: {orphaned_groups()}",
    )
    check_cause(case, outcome)
    check_memory(case, place, outcome)
    check_native(case, outcome)
    verdict = outcome.verdict
    report = f"{outcome.stdout}\n{outcome.stderr}"
    culprits = verdict["culprits"]
    assert culprits is not None, report
    code = {cell["index"]: cell["code_index"] for cell in verdict["cells"]}
    look_first = code.get(culprits["look_first"])
    cells = [culprit["code_index"] for culprit in culprits["cells"]]
    if place == "root":
        record_property(PROPERTY, asdict(row_of(case, verdict, cells, look_first)))

    assert cells in case.expected["culprits"], report
    assert culprits["minimal"], report
    assert culprits["reproduced"][0] >= 1, report
    if case.expected.get("blame"):
        blamed = look_first in case.expected["blame"]
        assert blamed == (case.id not in NOT_BLAMED_FIRST), f"look first: {look_first}\n{report}"
    check_reproduction(case, place, verdict, folder / "again")


def check_reproduction(case: Case, place: Place, verdict: dict[str, Any], folder: Path) -> None:
    """By itself, in a folder as the first run found it, it ends the same way in its last cell."""
    repro = Path(verdict["culprits"]["repro_notebook"])
    assert verdict["outputs"]["repro"] == str(repro)
    again = run_case(case, place, folder, "case.repro.ipynb", notebook=repro)
    assert again.verdict["cause"] is not None, again.stdout
    kind, expected = again.verdict["cause"]["kind"], case.expected["cause"]
    # A list names the forms in which this failure was observed.
    assert kind == verdict["cause"]["kind"] or (isinstance(expected, list) and kind in expected), (
        again.stdout
    )
    assert again.verdict["culprits"] is None, again.stdout
    last = sum(cell.cell_type == "code" for cell in again.notebook.cells) - 1
    if not on_the_heap(verdict):
        assert again.verdict["crash_cell"]["code_index"] == last, again.stdout


def on_the_heap(verdict: dict[str, Any]) -> bool:
    """Whether glibc found its heap spoilt: in which cell depends on where memory lies."""
    facts = verdict["cause"]["evidence"]
    messages = [str(fact["value"]) for fact in facts if fact["fact"] == "last message"]
    marks = r"free\(\)|malloc|corrupt|munmap_chunk|unlink_chunk|realloc\(\)"
    return any(re.search(marks, message) for message in messages)


def row_of(case: Case, verdict: dict[str, Any], cells: list[int], look_first: int | None) -> Row:
    """A line of the table."""
    culprits = verdict["culprits"]
    return Row(
        case=case.id,
        cells=sum(cell["status"] != "not_run" for cell in verdict["cells"]),
        culprits=tuple(cells),
        trials=culprits["trials"],
        seconds=culprits["seconds"],
        runs=culprits["seconds"] / verdict["usage"]["wall_seconds"],
        method=culprits["method"],
        look_first=look_first,
        blamed=not case.expected.get("blame") or look_first in case.expected["blame"],
    )
