"""Estimates how likely each cell of a failing set is needed, and picks the next chunk to remove.

The probabilities and their update follow ProbDD (Wang et al., FSE 2021). Pure; imports protocol.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from safe_exec.experiments.culprits.protocol import Problem

# How likely a cell of a failing set is needed, by how it came in: guesses that only order the work.
NEEDED = {"slice": 0.9, "found": 0.95, "other": 0.4}
# So many cells are tried one by one at once: chunks would save nothing.
FEW = 4
# The odds alone never make a cell certain to be needed: only a run without that very cell does.
MOST = 0.99


def odds_of(
    problem: Problem, cells: Iterable[int], dynamic_deps: frozenset[int]
) -> dict[int, float]:
    """Return the initial probabilities of all cells but the crash cell.

    ``dynamic_deps`` are the cells that were added because the set did not fail without them.
    """

    def came_by(cell: int) -> str:
        if cell in dynamic_deps:
            return "found"
        return "slice" if cell in problem.slice else "other"

    return {cell: NEEDED[came_by(cell)] for cell in cells if cell != problem.crash}


def chunk_of(loose: list[int], odds: Mapping[int, float]) -> list[int]:
    """Return the cells to remove next: a chunk whose removal promises the highest gain.

    The chunk has the cells that are least likely to be needed. Its gain is their number, times the
    probability that none of them is needed.
    """
    ordered = sorted(loose, key=lambda cell: (odds[cell], cell))
    if len(ordered) <= FEW:
        return ordered[:1]
    best, gain, free = 1, 0.0, 1.0
    for count, cell in enumerate(ordered, 1):
        free *= 1 - odds[cell]
        if count * free > gain:
            best, gain = count, count * free
    return ordered[:best]


def learn(chunk: list[int], odds: dict[int, float]) -> None:
    """Raise the probabilities of a chunk that could not be removed (Bayes' rule).

    At least one cell of the chunk is needed. If the chunk is a single cell, that cell is needed.
    """
    free = math.prod(1 - odds[cell] for cell in chunk)
    for cell in chunk:
        odds[cell] = min(MOST, odds[cell] / max(1e-9, 1 - free)) if len(chunk) > 1 else MOST
