"""The culprit search in forks of a live kernel: fewer runs from scratch, the same cells, and nothing left behind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.integration.test_search import Place, code_cells
from tests.support import private_directory

BOX = ("class Box: pass\nbox = Box()\nbox.items = []", "box.items.append(1)", "box.items.append(2)")
CRASH = "import ctypes\nif len(box.items) == 2: ctypes.string_at(base)"
# A cell that takes long enough for a snapshot after it.
WORK = "import time\nend = time.monotonic() + 0.3\nwhile time.monotonic() < end: pass\nbase = 0"


@pytest.fixture
def place() -> Iterator[Place]:
    with private_directory() as base:
        yield Place(base=base)


def counted(path: Path) -> str:
    """Code that counts how often it runs, past what is known to write files."""
    return f"import os\nf = os.open({str(path)!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)\nos.write(f, b'x')\nos.close(f)\n"


@pytest.mark.kills
def test_a_long_cell_runs_once_for_all_answers_and_once_to_confirm_them(place: Place) -> None:
    runs = place.outside / "runs"
    later = [f"v{n} = {n}" for n in range(20)]
    later[3], later[7], later[13] = BOX
    path = place.notebook(counted(runs) + WORK, *later, CRASH)
    search = place.run(path, "--bisect-budget", "120").verdict["culprits"]
    assert [culprit["code_index"] for culprit in search["cells"]] == [0, 4, 8, 14, 21]
    assert search["minimal"]
    assert search["method"] == "slice, forks"
    assert search["forked"] >= 4
    assert (search["fork_note"], search["disagreements"]) == (None, 0)
    assert search["reproduced"] == [1, 1]
    # The run itself, once for the forks, and once in the trial beside them, which is the only one. The
    # reproduction goes without it.
    assert len(runs.read_text()) == 3


@dataclass(frozen=True, kw_only=True)
class Row:
    """A state that the crash needs; ``note`` is what the verdict says about its forks."""

    name: str
    state: str
    note: str | None = None
    crash: str = "ctypes.string_at(base)"


ROWS = [
    Row(
        name="random numbers go on",
        state="import random; random.seed(7); state = random.Random(7)",
        crash="random.random() == state.random() and ctypes.string_at(base)",
    ),
    Row(
        name="thread",
        state="import threading; state = threading.Thread(target=threading.Event().wait, daemon=True); state.start()",
        note="states that do not survive a fork: threads",
    ),
    Row(
        name="child that lives on",
        state="import os; state = os.posix_spawn('/bin/sleep', ['sleep', '60'], os.environ)",
        note="states that do not survive a fork: child processes",
    ),
    Row(
        name="file that a cell leaves",
        state="import os; state = os.open('made', os.O_CREAT)",
        note="cells change files",
    ),
    Row(
        name="process that knows its number",
        state="import os; state = os.getpid()",
        crash="os._exit(3 if state == os.getpid() else 0)",
    ),
    Row(
        name="exception",
        state="state = {}",
        crash="state['missing']",
    ),
]


@pytest.mark.kills
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_state_is_forked_or_declined_and_the_cells_are_the_same(row: Row, place: Place) -> None:
    path = place.notebook(
        row.state,
        # Long enough for a snapshot after it (LEAST_SECONDS) on a fast machine, too.
        "base = 0 * sum(range(40_000_000))",
        "box = []",
        "box.append(1)",
        "other = 1",
        "box.append(2)",
        f"import ctypes; state, base, (len(box) == 2 and {row.crash})",
    )
    verdict = place.run(path, "--bisect", "always").verdict
    search = verdict["culprits"]
    assert code_cells(verdict) == [0, 1, 2, 3, 5, 6]
    assert search["minimal"]
    assert (search["fork_note"], search["disagreements"]) == (row.note, 0)
    assert search["forked"] > 0
    assert search["reproduced"][0] == search["reproduced"][1] >= 1
