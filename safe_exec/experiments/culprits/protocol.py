"""The types that a culprit search exchanges with its driver. Pure; imports model only."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from enum import StrEnum

from msgspec import Struct, field

from safe_exec.model.verdict import Stopped

# The word for the ending of a run without a failure.
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
    # The seconds that the answer may take.
    time_budget: float
    # Run the cells even if the answer is known: to confirm it, or to count how often it occurs.
    fresh: bool = False
    # For display only: the cells that may still be removed, and the smallest failing set.
    undecided: int = 0
    best: tuple[int, ...] = ()


class Reply(Struct, frozen=True, kw_only=True):
    """The answer to a query and its cost in seconds (0 for an answer from the cache).

    ``stopped_at`` is the cell at which an unresolved run ended, and ``names`` are the names that
    were undefined there. ``peak`` is the run's highest use of the exhausted resource, in the unit
    of ``Problem.resource_use``. ``cut`` is true if the run was ended because it exceeded its time
    budget. ``another_form`` is true if an unresolved run ended in the crash cell with an error
    similar to the failure. ``ended`` is the cause kind of the ending, or ``passed``.
    """

    answer: Outcome
    # 0 for an answer from the cache.
    seconds: float
    # The cell at which an unresolved run ended, and the names that were undefined there.
    stopped_at: int | None = None
    names: frozenset[str] = frozenset()
    # The highest use of the exhausted resource, in the unit of Problem.resource_use.
    peak: float | None = None
    # The run was ended because it exceeded its time budget, so it says nothing about the cells.
    cut: bool = False
    # An unresolved run that ended in the crash cell with an error similar to the failure.
    another_form: bool = False
    # The cause kind of the ending, or PASSED.
    ended: str = ""
    # Found in a quicker way than by a run from scratch to the end: it counts for the search, and
    # not among the runs that show how often a set fails.
    from_scratch: bool = True
    # The line in the crash cell, and whether it is known exactly: not from a sample.
    line: int | None = None
    exact_line: bool = False


def _no_prediction(_cells: frozenset[int]) -> int | None:
    return None


def _no_definers(_name: str, _cell: int) -> tuple[int, ...]:
    return ()


class Problem(Struct, frozen=True, kw_only=True):
    """Everything that is known before the first trial.

    Without ``confirms`` the caller confirms the result from scratch.

    ``cells`` are the cells that ran, in order, with the crash cell last. ``slice`` is the backward
    slice of the crash cell, and ``needs`` the direct dependencies of each cell. ``predicted_stop``
    returns the cell at which a run of a set is certain to stop because of an undefined name. Cells
    outside the slice are tried in the order of ``side_effect_risk``. ``resource_use`` is each
    cell's share of the exhausted resource, and ``limit`` the amount that was available. ``seconds``
    is each cell's run time, ``start_seconds`` the time to start and stop a kernel, and
    ``fresh_seconds`` the further time that a run in a fresh kernel takes. ``erratic`` is true if
    failures of this kind often do not recur.
    """

    # The cells that ran, in order, with the crash cell last.
    cells: tuple[int, ...]
    # The backward slice of the crash cell: where the search starts.
    slice: frozenset[int] = frozenset()
    # The direct dependencies of each cell.
    needs: Mapping[int, frozenset[int]] = field(default_factory=dict)
    # Returns the cells that may define a name before a cell, the likeliest first.
    definers: Callable[[str, int], tuple[int, ...]] = _no_definers
    # Returns the cell at which a run of a set is certain to stop for an undefined name. Such a set
    # needs no trial.
    predicted_stop: Callable[[frozenset[int]], int | None] = _no_prediction
    # Cells outside the slice are tried in descending order of this risk.
    side_effect_risk: Mapping[int, float] = field(default_factory=dict)
    # Each cell's share of the exhausted resource, if the failure is that one ran out.
    resource_use: Mapping[int, float] | None = None
    # The amount of the resource that was available.
    limit: float | None = None
    # Each cell's run time in the first run.
    seconds: Mapping[int, float] = field(default_factory=dict)
    # The time to start and stop a kernel.
    start_seconds: float = 0.0
    # The further time that a fresh run takes: other runs recognise a hang before its time is up.
    fresh_seconds: float = 0.0
    # Failures of this kind often do not recur.
    erratic: bool = False
    # The seconds that the whole search may take.
    budget: float = math.inf
    # Whether the search itself runs the result again from scratch; otherwise the caller does.
    confirms: bool = True

    @property
    def crash(self) -> int:
        """The crash cell: the last cell that ran."""
        return self.cells[-1]


class Result(Struct, frozen=True, kw_only=True):
    """The failing set, in order; empty if nothing failed again.

    ``reproduced`` is (k, n): of n runs of exactly this set, k failed. ``dynamic_deps`` are the
    cells that only trials showed to be needed. ``method`` names the strategy in a word or two.
    ``endings`` counts the endings of the runs of this set (of all cells, if nothing failed).
    ``several_forms`` is true if similar failures were counted as the same one, because the same
    cells produced both.
    """

    cells: tuple[int, ...]
    minimal: bool
    stopped: Stopped | None
    # (k, n): of n runs of exactly this set, k failed.
    reproduced: tuple[int, int]
    # The strategy, in a word or two.
    method: str
    # The cells that only trials showed to be needed.
    dynamic_deps: frozenset[int] = frozenset()
    # The endings of the runs of this set; of all cells, if nothing failed.
    endings: Mapping[str, int] = field(default_factory=dict)
    # Similar failures counted as the same one, since the same cells produced both.
    several_forms: bool = False
    # How often the set failed as well, but not in a run from scratch and to the end.
    quick: int = 0


Search = Generator[Query, Reply, Result]
