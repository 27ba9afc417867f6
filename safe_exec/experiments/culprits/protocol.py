"""What a culprit search is asked, asks and answers. Pure; imports model only."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from enum import StrEnum

from msgspec import Struct, field

from safe_exec.model.verdict import Stopped

PASSED = "passed"
"""How a run ended that had no cause to end."""


class Outcome(StrEnum):
    """What a trial of some cells showed, measured by the failure that is searched for."""

    FAIL = "fail"
    PASS = "pass"  # noqa: S105 - no password
    UNRESOLVED = "unresolved"


class SearchCancelled(Exception):  # noqa: N818 - no error: thrown into a search to end it
    """Thrown into the generator: it returns the best so far."""


class Query(Struct, frozen=True, kw_only=True):
    """A question: do exactly these cells, in order, fail? At most ``time_budget`` seconds may be spent on the answer.

    ``fresh``: run it, whatever is known; it is to confirm, or to count how often. For a display: ``undecided`` is how many cells are
    not settled yet, ``best`` the smallest set so far that failed.
    """

    cells: tuple[int, ...]
    time_budget: float
    fresh: bool = False
    undecided: int = 0
    best: tuple[int, ...] = ()


class Reply(Struct, frozen=True, kw_only=True):
    """An answer and what it cost in seconds (0 from a cache).

    ``stopped_at`` is the cell at which an unresolved trial ended and ``names`` those it missed. ``peak`` is how much of the
    scarce thing the trial used at most, in the unit of ``Problem.resource_use``. ``cut``: ended since it took longer than was allowed.
    ``another_form``: an unresolved trial ended in the crash cell in a way akin to the failure. ``ended`` says how the trial ended, in a word.
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
    """What is known before the first trial.

    ``cells`` are those that ran, ascending, the crash cell last. ``slice`` is its backward slice. ``needs`` are the direct dependencies of each cell.
    ``predicted_stop`` says at which cell a run of a set surely ends for a missing name, before it could fail. ``side_effect_risk``
    orders the rest. ``resource_use`` is what each cell kept of what ran out in the end, ``limit`` how much there is of it; ``seconds``
    what each cell took, ``start_seconds`` a kernel's start and end. ``erratic``: failures of this kind often come and go.
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
        """The crash cell."""
        return self.cells[-1]


class Result(Struct, frozen=True, kw_only=True):
    """The set found, in order; empty where nothing failed again.

    ``reproduced``: of how many runs of this very set how many failed, (k, n). ``dynamic_deps`` are the cells that only trials showed to be
    needed. ``method`` names the way in a word or two. ``endings`` counts how the runs of this set ended (of all cells, if nothing failed).
    ``several_forms``: what was akin to the failure counted as the failure, since the same cells ended in both ways.
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
