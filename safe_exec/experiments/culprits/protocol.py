"""The types that a culprit search exchanges with its driver. Pure; imports model only."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from enum import StrEnum

from msgspec import Struct, field

from safe_exec.model.verdict import Stopped

# How a run ended that had no cause to end.
PASSED = "passed"


class Outcome(StrEnum):
    """The outcome of running some of the cells, in the terms of delta debugging.

    ``FAIL`` is the failure that is searched for, ``PASS`` a run without any failure. ``UNRESOLVED``
    is every other ending: it says nothing about the set.
    """

    FAIL = "fail"
    PASS = "pass"  # noqa: S105 - no password
    UNRESOLVED = "unresolved"


class SearchCancelled(Exception):  # noqa: N818 - no error: thrown into a search to end it
    """Thrown into the search generator to stop it.

    The search then returns its best result so far.
    """


class Query(Struct, frozen=True, kw_only=True):
    """Asks whether a run of exactly these cells, in order, fails.

    The answer may take ``time_budget`` seconds at most. ``fresh`` asks for a new run even if the
    answer is known, to confirm it or to count how often it occurs. ``undecided`` (the number of
    cells that may still be removed) and ``best`` (the smallest failing set so far) are for display.
    """

    cells: tuple[int, ...]
    time_budget: float
    fresh: bool = False
    undecided: int = 0
    best: tuple[int, ...] = ()


class Reply(Struct, frozen=True, kw_only=True):
    """The answer to a query and its cost in seconds (0 for an answer from the cache).

    ``stopped_at`` is the cell at which an unresolved run ended, and ``names`` are the names that
    were undefined there. ``peak`` is the run's highest use of the exhausted resource, in the unit
    of ``Problem.resource_use``. ``cut``: the run was ended because it exceeded its time budget.
    ``another_form``: an unresolved run ended in the crash cell with an error similar to the
    failure. ``ended`` is the cause kind of the ending, or ``passed``.
    """

    answer: Outcome
    seconds: float
    stopped_at: int | None = None
    names: frozenset[str] = frozenset()
    peak: float | None = None
    cut: bool = False
    another_form: bool = False
    ended: str = ""


def _no_prediction(_cells: frozenset[int]) -> int | None:
    return None


def _no_definers(_name: str, _cell: int) -> tuple[int, ...]:
    return ()


class Problem(Struct, frozen=True, kw_only=True):
    """Everything that is known before the first trial.

    ``cells`` are the cells that ran, in order, with the crash cell last. ``slice`` is the backward
    slice of the crash cell, and ``needs`` the direct dependencies of each cell. ``predicted_stop``
    returns the cell at which a run of a set is certain to stop for an undefined name. Cells outside
    the slice are tried in the order of ``side_effect_risk``. ``resource_use`` is each cell's share
    of the exhausted resource, and ``limit`` the amount that was available; ``seconds`` is each
    cell's run time and ``start_seconds`` the time to start and stop a kernel. ``erratic``: failures
    of this kind often do not recur.
    """

    cells: tuple[int, ...]
    slice: frozenset[int] = frozenset()
    needs: Mapping[int, frozenset[int]] = field(default_factory=dict)
    definers: Callable[[str, int], tuple[int, ...]] = _no_definers
    predicted_stop: Callable[[frozenset[int]], int | None] = _no_prediction
    side_effect_risk: Mapping[int, float] = field(default_factory=dict)
    resource_use: Mapping[int, float] | None = None
    limit: float | None = None
    seconds: Mapping[int, float] = field(default_factory=dict)
    start_seconds: float = 0.0
    erratic: bool = False
    budget: float = math.inf

    @property
    def crash(self) -> int:
        """The crash cell: the last cell that ran."""
        return self.cells[-1]


class Result(Struct, frozen=True, kw_only=True):
    """The failing set, in order; empty if nothing failed again.

    ``reproduced`` is (k, n): of n runs of exactly this set, k failed. ``dynamic_deps`` are the
    cells that only trials showed to be needed. ``method`` names the strategy in a word or two.
    ``endings`` counts the endings of the runs of this set (of all cells, if nothing failed).
    ``several_forms``: similar failures were counted as the same one, since the same cells produced
    both.
    """

    cells: tuple[int, ...]
    minimal: bool
    stopped: Stopped | None
    reproduced: tuple[int, int]
    method: str
    dynamic_deps: frozenset[int] = frozenset()
    endings: Mapping[str, int] = field(default_factory=dict)
    several_forms: bool = False


Search = Generator[Query, Reply, Result]
