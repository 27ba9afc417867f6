"""The variables that held the memory of a kernel that ran out of it, and the lines that allocated it.

Each case names the right answer: it was written before the case was run for the first time.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import Outcome, make_notebook, run_notebook

FILL = "filler = []\nwhile True:\n    filler.append(bytearray(1 << 20))"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A notebook, and its answer.

    ``name`` and ``summary`` are the largest holder's, ``line`` is the code cell and line that
    allocated most.
    """

    sources: tuple[str, ...]
    name: str | None
    summary: str
    line: tuple[int, int]
    memory: str = "300M"


CASES = {
    "growing-list": Case(
        sources=("rows = []", "for n in range(10**9):\n    rows.append([n] * 1000)"),
        name="rows",
        summary="list of",
        line=(1, 2),
    ),
    "pandas-copies": Case(
        sources=(
            "import numpy as np, pandas as pd\ntable = pd.DataFrame(np.ones((100_000, 14)))",
            "copies = []\nfor n in range(1000):\n    copies.append(table.copy())",
        ),
        name="copies",
        summary="DataFrame",
        line=(1, 3),
        memory="400M",
    ),
    "object-columns": Case(
        sources=(
            "import pandas as pd",
            (
                "customers = pd.DataFrame(\n"
                "    {'name': pd.Series([f'customer {n:050}' for n in range(1_500_000)], dtype=object)}\n"
                ")"
            ),
            FILL,
        ),
        name="customers",
        summary="object columns",
        line=(1, 2),
        memory="400M",
    ),
    "pyplot-figures": Case(
        sources=(
            (
                "import matplotlib\nmatplotlib.use('agg')\n"
                "import matplotlib.pyplot as plt, numpy as np"
            ),
            (
                "for n in range(1000):\n"
                "    picture = plt.figure()\n"
                "    picture.gca().imshow(np.full((1000, 1000), float(n)))"
            ),
        ),
        name="pyplot figures",
        summary="Figure",
        line=(1, 3),
    ),
    "output-history": Case(
        sources=(
            # A census may take one percent of the time that cells took, and some 2 ms before.
            "import numpy as np\nsum(range(20_000_000))\nnp.ones(16_000_000)",
            FILL,
        ),
        name="Out[1]",
        summary="ndarray 16,000,000 float64",
        line=(0, 3),
        memory="260M",
    ),
    "lru-cache": Case(
        sources=(
            (
                "import functools\n@functools.lru_cache(maxsize=None)\n"
                "def load(key):\n    return bytearray(4 << 20)"
            ),
            "for n in range(1000):\n    load(n)",
        ),
        name="load",
        summary="lru_cache",
        line=(0, 4),
    ),
    "sparse-to-dense": Case(
        sources=(
            "import scipy.sparse\nlinks = scipy.sparse.eye(9000, format='csr')",
            "dense = links.toarray(); dense += 1",
        ),
        name=None,
        summary="line 1",
        line=(1, 1),
        memory="400M",
    ),
    "memory-map": Case(
        sources=(
            "import numpy as np\nnp.ones(20_000_000).tofile('numbers.bin')",
            "mapped = np.memmap('numbers.bin')\ntotal = int(mapped[::4096].sum())",
            "data = np.ones(16_000_000)",
            FILL,
        ),
        name="data",
        summary="ndarray",
        line=(2, 1),
        memory="260M",
    ),
    "generator": Case(
        sources=(
            "def numbers():\n    buffer = bytearray(150 << 20)\n    yield len(buffer)",
            "source = numbers()\nfirst = next(source)",
            FILL,
        ),
        name="source",
        summary="generator numbers()",
        line=(0, 2),
    ),
}


def explained(outcome: Outcome) -> float:
    """The share of the peak that is attributed or declared native."""
    memory = outcome.verdict["memory"]
    return float(
        (memory["attributed_bytes"] + (memory["native_bytes"] or 0)) / memory["peak_bytes"]
    )


@pytest.mark.kills
@pytest.mark.parametrize("name", CASES)
def test_the_right_variable_and_line(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    path = make_notebook(tmp_path / "nb.ipynb", *case.sources)
    outcome = run_notebook(path, "--memory", case.memory, "--no-bisect")
    assert outcome.verdict["cause"]["kind"] == "out_of_memory"
    memory = outcome.verdict["memory"]
    (holder, *_) = [row for row in memory["holders"] if case.name is None or row["name"]]
    # Another line may have allocated as much again since.
    lines = [(row["code_index"], row["line"]) for row in memory["lines"][:2]]
    assert holder["name"] == case.name
    assert case.line in lines
    assert case.summary in holder["summary"]
    assert explained(outcome) >= 0.9


LOCALS = """\
def build(count):
    rows = []
    for n in range(count):
        rows.append(fetch(n))
    return rows

def fetch(n):
    return bytearray(1 << 20)"""


@pytest.mark.kills
def test_a_trial_of_the_culprits_names_local_variables_and_callers(tmp_path: Path) -> None:
    path = make_notebook(tmp_path / "nb.ipynb", "import json", LOCALS, "x = 1", "build(10**6)")
    outcome = run_notebook(path, "--memory", "256M")
    memory = outcome.verdict["memory"]
    # The trial has two of the four cells; the verdict has the notebook's numbers.
    assert [cell["code_index"] for cell in outcome.verdict["culprits"]["cells"]] == [1, 3]
    rows, line = memory["holders"][0], memory["lines"][0]
    assert rows["name"] == "rows in build()"
    assert "bytearray" in rows["summary"]
    assert (line["code_index"], line["line"], line["function"]) == (1, 8, "fetch")
    assert line["callers"] == [
        {"code_index": 1, "line": 4, "function": "build"},
        {"code_index": 3, "line": 1, "function": "<module>"},
    ]
    assert explained(outcome) >= 0.9
    assert "held by     rows in build()" in outcome.stdout


def test_an_allocation_that_was_refused_names_what_held_the_memory(tmp_path: Path) -> None:
    source = "def ask():\n    rows = [bytearray(1 << 20) for _ in range(40)]\n    return bytearray(1 << 60)"
    path = make_notebook(tmp_path / "nb.ipynb", "data = bytearray(60 << 20)", source, "ask()")
    outcome = run_notebook(path, "--memory", "400M", "--no-bisect")
    assert outcome.verdict["cause"]["kind"] == "memory_error"
    names = [row["name"] for row in outcome.verdict["memory"]["holders"]]
    assert names[:2] == ["data", "ask() in the last traceback"]


def test_a_run_that_passed_near_its_limit_names_what_held_the_memory(tmp_path: Path) -> None:
    fill = "data = bytearray(1 << 20) * 200"
    path = make_notebook(tmp_path / "nb.ipynb", fill, "del data", "x = 1")
    outcome = run_notebook(path, "--memory", "245M")
    assert outcome.verdict["status"] == "passed"
    assert outcome.verdict["memory"]["holders"][0]["name"] == "data"


HOSTILE = """\
class Hostile(dict):
    def call(self, *args):
        open("called", "w").close()
        raise SystemExit
    __sizeof__ = __len__ = __iter__ = __repr__ = __getattribute__ = items = values = call
    __eq__ = __bool__ = __class__ = property(call)

trap = Hostile()
dict.__setitem__(trap, 1, bytearray(60 << 20))"""


def test_a_hostile_object_is_measured_and_not_called(tmp_path: Path) -> None:
    path = make_notebook(
        tmp_path / "nb.ipynb",
        HOSTILE,
        "rows = [bytearray(1 << 20) for _ in range(120)]",
        "bytearray(1 << 60)",
    )
    outcome = run_notebook(path, "--memory", "400M", "--no-bisect")
    memory = outcome.verdict["memory"]
    assert [row["name"] for row in memory["holders"][:2]] == ["rows", "trap"]
    assert not (tmp_path / "called").exists()


# Each cell notes the kernel's processor time and its highest memory (KiB) at its begin and its end:
# in between lie the censuses.
VAST = [
    (
        "import gc, resource, time\nmarks = []\ndef mark():\n"
        "    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "    marks.append((time.process_time(), highest))\nmark()"
    ),
    (
        "mark()\nfor number in range(100_000): globals()[f'name{number}'] = [number]\n"
        "del number\nmark()"
    ),
    (
        "mark()\ngc.disable()\nouter = []\nfor _ in range(400_000):\n"
        "    ring = [outer]\n    ring.append([ring, 0.5])\n    outer.append(ring)\nmark()"
    ),
    (
        "mark()\npairs = list(zip(marks[::2], marks[1::2]))\n"
        "print(*(max(begin[n] - end[n] for end, begin in pairs) for n in range(2)))"
    ),
    "bytearray(1 << 60)",
]


def test_a_hundred_thousand_names_and_a_million_objects_in_cycles_stay_in_the_budget(
    tmp_path: Path,
) -> None:
    path = make_notebook(tmp_path / "nb.ipynb", *VAST)
    outcome = run_notebook(path, "--memory", "320M", "--no-bisect")
    assert outcome.verdict["cause"]["kind"] == "memory_error"
    memory = outcome.verdict["memory"]
    assert not memory["complete"]
    assert memory["attributed_bytes"] + (memory["native_bytes"] or 0) <= memory["peak_bytes"]
    # The names of the rings and their elements, or the many names: whichever it had time for.
    assert all(holder["bytes"] <= memory["peak_bytes"] for holder in memory["holders"])
    seconds, kibibytes = map(float, outcome.notebook.cells[-2].outputs[0].text.split())
    # 50 ms is the most for a census; a step of the walk may take longer.
    assert seconds < 0.5
    assert kibibytes < 16 << 10
