"""Measures how the search for culprits grows with the notebook: ``python -m benchmarks.growth [--cells N ...] [--culprits K ...]``.

What is measured is told in ``benchmarks/README.md``. Plain ddmin is not run but asked for the number of sets that it would try.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import safe_exec
from benchmarks.measure import notebook
from tests.unit.ddmin import ddmin

CELLS, CULPRITS = (30, 100, 200), (1, 2, 4)
BUDGET_SECONDS = 600.0
HEAD = "| cells | culprits | first run, s | trials | forks | search, s | first runs | ddmin: trials |\n|---|---|---|---|---|---|---|---|"


def planted_at(cells: int, culprits: int) -> tuple[int, ...]:
    """The places of the culprits: in the first third, far from the crash, and apart from each other."""
    return tuple(1 + cells * number // (3 * culprits) for number in range(culprits))


def sources_of(cells: int, culprits: int) -> list[str]:
    """A notebook whose last cell dies if some earlier cells ran whose names it does not use."""
    sources = [f"v{n} = [{n}] * 10\nprint(len(v{n}))" for n in range(cells - 1)]
    for number, place in enumerate(planted_at(cells, culprits)):
        sources[place] = f"import json\njson.setting_{number} = {number}"
    settings = [f"setting_{number}" for number in range(culprits)]
    crash = f"import ctypes, json\nif all(hasattr(json, name) for name in {settings}):\n    ctypes.string_at(0)"
    return [*sources, crash]


def row(cells: int, culprits: int, folder: Path) -> str:
    """Run one notebook with its search, and return its row of the table."""
    path = notebook(folder / f"{cells}-{culprits}", *sources_of(cells, culprits))
    verdict = safe_exec.run(path, bisect="always", bisect_budget=BUDGET_SECONDS)
    search, first_seconds = verdict.culprits, verdict.usage.wall_seconds
    needed = planted_at(cells, culprits)
    assert search is not None
    assert first_seconds
    assert [culprit.index for culprit in search.cells] == [*needed, cells - 1], search
    assert search.minimal, search
    _, tried = ddmin(
        range(cells - 1), lambda some: some >= {*needed}, always=frozenset({cells - 1})
    )
    figures = (cells, culprits, f"{first_seconds:.1f}", search.trials, search.forked)
    spent = (f"{search.seconds:.1f}", f"{search.seconds / first_seconds:.1f}", tried)
    return f"| {' | '.join(map(str, (*figures, *spent)))} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, nargs="+", default=CELLS)
    parser.add_argument("--culprits", type=int, nargs="+", default=CULPRITS)
    arguments = parser.parse_args()
    print(HEAD)
    with tempfile.TemporaryDirectory() as folder:
        for cells in arguments.cells:
            for culprits in arguments.culprits:
                print(row(cells, culprits, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
