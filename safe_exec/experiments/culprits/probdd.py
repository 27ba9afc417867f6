"""How likely each cell of a failing set is needed, and what to leave out next. Pure; imports problem.

The odds and their use are those of ProbDD (Wang et al., FSE 2021).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from safe_exec.experiments.culprits.protocol import Problem

NEEDED = {"slice": 0.9, "found": 0.95, "other": 0.4}
"""How likely a cell of a failing set is needed, by how it came in: guesses that only order the work."""
FEW = 4
"""So many cells are tried one by one at once: chunks would save nothing."""
MOST = 0.99
"""Never certain by the odds alone: only a run without the very cell is."""


def odds_of(
    problem: Problem, cells: Iterable[int], dynamic_deps: frozenset[int]
) -> dict[int, float]:
    """The odds to begin with of all cells but the crash cell; ``dynamic_deps`` were added since the set did not fail without them."""

    def came_by(cell: int) -> str:
        if cell in dynamic_deps:
            return "found"
        return "slice" if cell in problem.slice else "other"

    return {cell: NEEDED[came_by(cell)] for cell in cells if cell != problem.crash}


def chunk_of(loose: list[int], odds: Mapping[int, float]) -> list[int]:
    """The cells to leave out next: as many of the least needed as promise most (the expected gain)."""
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
    """One of the chunk is needed: Bayes' rule. A single cell stays in the list by what is known of the set without it."""
    free = math.prod(1 - odds[cell] for cell in chunk)
    for cell in chunk:
        odds[cell] = min(MOST, odds[cell] / max(1e-9, 1 - free)) if len(chunk) > 1 else MOST
