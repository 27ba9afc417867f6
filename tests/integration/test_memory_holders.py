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
            "import numpy as np\nnp.ones(16_000_000)",
            FILL,
        ),
        name="Out[1]",
        summary="ndarray 16,000,000 float64",
        line=(0, 2),
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
