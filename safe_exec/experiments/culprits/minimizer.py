"""The culprit search: finds the smallest set of cells, in order, that still fails the same way.

The search knows cells only as numbers. It learns whether a set of cells passes or fails by yielding
a :class:`Query` and receiving a :class:`Reply`; it returns a :class:`Result`. The driver may run
trials, read a cache or, in tests, look the answers up in a table.

The search has three steps. *Find* a small set that fails: first the backward slice of the crash
cell, then more cells, the riskiest (or the largest, for a resource that adds up) first. Halving
finds one necessary cell after the other, as in QuickXplain (Junker, AAAI 2004). *Minimise* it:
remove chunks by the probability that they are needed, as in ProbDD (Wang et al., FSE 2021), then
single cells, until the set is 1-minimal in the sense of ddmin (Zeller and Hildebrandt, TSE 2002):
it no longer fails if any one cell is removed. *Confirm* the result from scratch.

A set that fails only sometimes is replaced by a larger set that always fails, if there is one. If
there is none, its failure rate determines how often a PASS has to be observed before the search
believes it.

A single odd run is not believed at once. A set that reached the crash cell and ended there in
another way is run again before cells are added to it. If the same cells end sometimes in one way
and sometimes in a similar one (another death of the kernel, for example), both count as the failure
from then on.

Pure; imports protocol, probdd and model.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Generator, Iterable

from msgspec import Struct, field

from safe_exec.experiments.culprits.probdd import chunk_of, learn, odds_of
from safe_exec.experiments.culprits.protocol import (
    Outcome,
    Problem,
    Query,
    Reply,
    Result,
    Search,
    SearchCancelled,
)
from safe_exec.model.verdict import Stopped

# A PASS of a failure that comes and goes is believed when the odds of being wrong are below this.
DOUBT = 0.05
MOST_REPEATS = 12
# How often the whole notebook is run again, after it did not fail, to measure how often it fails.
REPLAYS = 4
# How often a set of a failure that comes and goes is run in the end.
CONFIRMATIONS = 5
# A set that fails no more often than this gives way to one that always does.
SELDOM = 0.4
# A set that failed so often and did nothing else fails always.
ALWAYS = 5
# How often a set is run that ended in the crash cell in another way, before it is believed not to
# fail.
ODD_LOOKS = 2
# This many larger sets that passed show that it was no luck that the slice did.
ENOUGH_PASSES = 2
# The most larger sets that are tried, before all cells.
MOST_LARGER = 3

_Step = Generator[Query, Reply, bool]


class _Stop(Exception):  # noqa: N818 - leaves the search from within
    def __init__(self, stopped: Stopped) -> None:
        super().__init__(stopped)
        self.stopped = stopped


class _Tally(Struct):
    """The counts of one set's runs. ``forms`` counts endings that were similar to the failure."""

    fails: int = 0
    others: int = 0
    forms: int = 0
    # How many of the failing runs were not from scratch.
    quick: int = 0
    endings: Counter[str] = field(default_factory=Counter)


class _Searcher:
    """The state of one search."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.all = frozenset(problem.cells)
        self.tallies: dict[frozenset[int], _Tally] = {}
        self.replies: dict[frozenset[int], Reply] = {}
        self.elapsed = 0.0
        self.best: frozenset[int] | None = None
        self.repeats = 1
        self.rate: float | None = None
        self.dynamic_deps: set[int] = set()
        self.extended = False
        self.undecided = len(problem.cells)
        self.missing_names: dict[int, set[str]] = {}
        self.initial_set: frozenset[int] | None = None
        self.disregarded: set[frozenset[int]] = set()
        self.several_forms = False

    # --- asking -----------------------------------------------------------------------------------

    def fails(self, cells: frozenset[int]) -> _Step:
        """Decide whether a set fails: one failing run is enough, a PASS takes ``required_runs``."""
        # All runs of a set are counted, also those that another step requested.
        tally = self.tallies.setdefault(cells, _Tally())
        if cells in self.disregarded or (not tally.fails and self.stops_at(cells) is not None):
            return False
        while (
            not tally.fails
            and tally.others < self.required_runs(cells)
            and not self.lacks_a_name(cells)
        ):
            yield from self.run(cells, fresh=tally.others > 0)
        return tally.fails > 0

    def required_runs(self, cells: frozenset[int]) -> int:
        """Return how many runs without a failure prove that a set does not fail."""
        tally, reply = self.tallies.get(cells, _Tally()), self.replies.get(cells)
        reached = (
            reply is not None
            and reply.answer is Outcome.UNRESOLVED
            and reply.stopped_at == self.problem.crash
        )
        odd = tally.forms or (reached and cells == self.initial_set)
        return max(self.repeats, ODD_LOOKS) if odd else self.repeats

    def stops_at(self, cells: frozenset[int]) -> int | None:
        """Return the cell at which a run of the set is certain to stop for lack of a name.

        This follows from the source code, or from names that were undefined in earlier trials.
        """
        for cell in sorted(self.missing_names.keys() & cells):
            for name in self.missing_names[cell]:
                if not cells & set(self.problem.definers(name, cell)):
                    return cell
        return self.problem.predicted_stop(cells)

    def lacks_a_name(self, cells: frozenset[int]) -> bool:
        """Tell whether a run of the set ended because of an undefined name.

        Every other run of the set then ends in the same way.
        """
        # The last reply is enough: an undefined name is deterministic.
        reply = self.replies.get(cells)
        return reply is not None and reply.answer is Outcome.UNRESOLVED and bool(reply.names)

    def run(self, cells: frozenset[int], *, fresh: bool) -> _Step:
        """Run a set once and count it. Raises _Stop if the run would not fit into the budget."""
        time_budget = self.problem.budget - self.elapsed
        extra = self.problem.fresh_seconds if fresh else 0.0
        if self.cost(cells) + extra > time_budget:
            raise _Stop(Stopped.BUDGET)
        reply = yield Query(
            cells=tuple(sorted(cells)),
            time_budget=time_budget,
            fresh=fresh,
            undecided=self.undecided,
            best=tuple(sorted(self.best or ())),
        )
        self.elapsed += reply.seconds
        if reply.cut:
            raise _Stop(Stopped.BUDGET)
        self.replies[cells] = reply
        if reply.answer is Outcome.UNRESOLVED and reply.stopped_at is not None and reply.names:
            self.missing_names.setdefault(reply.stopped_at, set()).update(
                name
                for name in reply.names
                if set(self.problem.definers(name, reply.stopped_at)) & self.all
            )
        return self.count(cells, reply)

    def count(self, cells: frozenset[int], reply: Reply) -> bool:
        """Count a run; tell whether it failed."""
        tally = self.tallies.setdefault(cells, _Tally())
        tally.endings[reply.ended] += reply.from_scratch
        failed = reply.answer is Outcome.FAIL or (self.several_forms and reply.another_form)
        tally.fails += failed
        tally.quick += failed and not reply.from_scratch
        tally.others += not failed
        tally.forms += reply.another_form and not failed
        if tally.forms and (tally.fails or cells == self.all):
            self.count_all_forms()
        if tally.fails and (self.best is None or len(cells) < len(self.best)):
            self.best = cells
        return failed or (self.several_forms and reply.another_form)

    def count_all_forms(self) -> None:
        """Count all forms as the failure from now on, and in earlier results too.

        The same cells have produced several forms.
        """
        self.several_forms = True
        for cells, tally in self.tallies.items():
            tally.fails, tally.others, tally.forms = (
                tally.fails + tally.forms,
                tally.others - tally.forms,
                0,
            )
            if tally.fails and (self.best is None or len(cells) < len(self.best)):
                self.best = cells

    def cost(self, cells: Iterable[int]) -> float:
        """Estimate how many seconds a run of these cells takes."""
        return self.problem.start_seconds + sum(
            self.problem.seconds.get(cell, 0.0) for cell in cells
        )

    def settled_as_passing(self, cells: frozenset[int]) -> bool:
        """Tell whether enough runs have shown that a set does not fail."""
        tally = self.tallies.get(cells, _Tally())
        if cells in self.disregarded:
            return True
        settled = tally.others >= self.required_runs(cells) or (
            tally.others > 0 and self.lacks_a_name(cells)
        )
        return not tally.fails and (settled or self.stops_at(cells) is not None)

    # --- step one: a small set that fails ---------------------------------------------------------

    def find(self) -> Generator[Query, Reply, frozenset[int]]:
        """Find a set that fails. Raises _Stop if no set does."""
        # Without its dependencies the crash cell would stop for an undefined name.
        base = self.close({self.problem.crash, *(self.problem.slice & self.all)})
        base = yield from self.repair(base)
        self.initial_set = base
        while not (yield from self.fails(base)):
            candidates = self.ranked(base)
            # Even all cells did not fail: the failure comes and goes.
            if not candidates:
                yield from self.rate_of(base)
                continue
            self.extended = True
            count = yield from self.shortest(base, candidates)
            if self.counts_as_failing(base):
                continue
            added = self.close({candidates[count - 1]}) | base
            self.dynamic_deps.add(candidates[count - 1])
            base = added
        return base

    def close(self, cells: Iterable[int]) -> frozenset[int]:
        """Return the cells together with everything that they are known to need."""
        # A worklist, since dependencies may be chained over many cells.
        closed: set[int] = set()
        waiting = list(cells)
        while waiting:
            cell = waiting.pop()
            if cell not in closed:
                closed.add(cell)
                waiting.extend(self.problem.needs.get(cell, frozenset()) & self.all)
        return frozenset(closed)

    def repair(self, base: frozenset[int]) -> Generator[Query, Reply, frozenset[int]]:
        """Add the definitions that trials report as missing, until none is missing."""
        while not (yield from self.fails(base)):
            reply = self.replies.get(base)
            missing = (
                {}
                if reply is None or reply.stopped_at is None
                else dict.fromkeys(reply.names, reply.stopped_at)
            )
            more = {
                next(
                    (
                        c
                        for c in self.problem.definers(name, cell)
                        if c not in base and c in self.all
                    ),
                    None,
                )
                for name, cell in missing.items()
            } - {None}
            if not more:
                break
            base = self.close({*base, *(cell for cell in more if cell is not None)})
        return base

    def ranked(self, base: frozenset[int]) -> list[int]:
        """Return the cells outside the set, those most likely to be needed first."""
        resource_use, side_effect_risk = (
            self.problem.resource_use or {},
            self.problem.side_effect_risk,
        )
        # Smaller amounts are noise of the measurement.
        worth = (self.problem.limit or 0) / 100

        def rank(cell: int) -> tuple[float, float, int]:
            use = resource_use.get(cell, 0.0)
            return (-use if use > worth else 0.0, -side_effect_risk.get(cell, 0.0), -cell)

        return sorted(self.all - base, key=rank)

    def shortest(self, base: frozenset[int], candidates: list[int]) -> Generator[Query, Reply, int]:
        """Return the smallest number of ``candidates`` with which the set fails.

        The number grows step by step until the set fails, and is then found by halving. Raises
        _Stop if the set does not fail even with all candidates.
        """
        upper = next(
            (
                n
                for n in range(1, len(candidates))
                if self.has_failed(self.with_first(base, candidates, n))
            ),
            len(candidates),
        )
        # Invariant: `low` candidates pass, `high` candidates fail.
        low, high, one_form = 0, upper, not self.several_forms
        for count in self.steps(base, candidates, upper):
            if (yield from self.fails(self.with_first(base, candidates, count))):
                high = count
                break
            low = count
        else:
            yield from self.rate_of(self.all)
            low = 0
        while high - low > 1:
            if (
                one_form and self.several_forms
            ):  # what was taken for another failure above may have been this one
                return (
                    1
                    if self.counts_as_failing(base)
                    else (yield from self.shortest(base, candidates))
                )
            # Bisection finds the last cell that is needed.
            middle = (low + high) // 2
            if (yield from self.fails(self.with_first(base, candidates, middle))):
                high = middle
            else:
                low = middle
        return high

    def with_first(self, base: frozenset[int], candidates: list[int], count: int) -> frozenset[int]:
        return self.close({*base, *candidates[:count]})

    def steps(self, base: frozenset[int], candidates: list[int], upper: int) -> list[int]:
        """Return how many candidates to add in each try, in ascending order.

        First comes an estimate for a resource that adds up, then whole classes of risk, then all of
        them.
        """
        classes = [math.floor(self.problem.side_effect_risk.get(cell, 0.0)) for cell in candidates]
        ends = {n for n in range(1, len(candidates)) if classes[n] < min(classes[:n])}
        steps = {self.guess(base, candidates), *ends, upper} if len(candidates) > 1 else {upper}
        return sorted(step for step in steps if 0 < step <= upper)

    def guess(self, base: frozenset[int], candidates: list[int]) -> int:
        """Estimate how many candidates exhaust the limit, from each one's own use of it."""
        reply, resource_use, limit = (
            self.replies.get(base),
            self.problem.resource_use,
            self.problem.limit,
        )
        if resource_use is None or limit is None or reply is None or reply.peak is None:
            return 0
        total = reply.peak
        for count, cell in enumerate(candidates, 1):
            total += max(0.0, resource_use.get(cell, 0.0))
            if total >= limit:
                return count
        return 0

    def counts_as_failing(self, cells: frozenset[int]) -> bool:
        """Tell whether a set failed in a form that was recognised only later."""
        return cells not in self.disregarded and self.has_failed(cells)

    def has_failed(self, cells: frozenset[int]) -> bool:
        """Tell whether an earlier run of the set failed."""
        tally = self.tallies.get(cells)
        return tally is not None and tally.fails > 0

    def passes_in_fork(self, cells: frozenset[int]) -> bool:
        """Tell whether a set passed in a fork, and never failed."""
        reply, tally = self.replies.get(cells), self.tallies[cells]
        passed = reply is not None and reply.answer is Outcome.PASS and not reply.from_scratch
        return passed and not tally.fails

    # --- failures that come and go ----------------------------------------------------------------

    def rate_of(self, cells: frozenset[int]) -> Generator[Query, Reply, None]:
        """Measure the failure rate of a set that should fail, and derive ``repeats`` from it.

        Raises _Stop if the set never fails, or fails too rarely for the budget.
        """
        yield from self.replay(cells)
        self.expect(cells)

    def replay(self, cells: frozenset[int]) -> Generator[Query, Reply, None]:
        """Run a set several times to measure how often it fails."""
        for _ in range(REPLAYS):
            yield from self.run(cells, fresh=True)

    def expect(self, cells: frozenset[int]) -> None:
        """Derive from a set's failure rate how often a PASS must be observed.

        Raises _Stop if the set never failed, or fails too rarely for the budget.
        """
        tally = self.tallies[cells]
        if not tally.fails:
            raise _Stop(Stopped.NOT_REPRODUCED)
        self.rate = tally.fails / (tally.fails + tally.others)
        required_runs = math.ceil(math.log(DOUBT) / math.log(1 - self.rate)) if self.rate < 1 else 1
        # Each surprise at least raises the number by one, so the search cannot loop.
        self.repeats = max(self.repeats + 1, required_runs)
        if (
            self.repeats > MOST_REPEATS
            or self.repeats * self.cost(cells) > self.problem.budget - self.elapsed
        ):
            raise _Stop(Stopped.TOO_RARE)

    def steadier(self, cells: frozenset[int]) -> Generator[Query, Reply, frozenset[int] | None]:
        """Return a larger set that always fails, if this one fails rarely.

        The set itself and the sets between it and the larger one are then disregarded: they failed
        by chance.
        """
        tally = self.tallies[cells]
        if tally.fails > SELDOM * (tally.fails + tally.others):
            return None
        failed = (
            more
            for more, runs in self.tallies.items()
            if more > cells and runs.fails and not runs.others
        )
        # Sets in between failed by chance as well, if this one did.
        between = {cells}
        for larger in (*sorted(failed, key=len)[:MOST_LARGER], self.all):
            larger_tally = self.tallies.setdefault(larger, _Tally())
            while not larger_tally.others and larger_tally.fails < ALWAYS:
                yield from self.run(larger, fresh=True)
            if not larger_tally.others:
                self.disregarded |= between
                self.best = larger
                return larger
            between.add(larger)
        return None

    # --- step two: nothing that can be left out ---------------------------------------------------

    def minimise(self, cells: frozenset[int]) -> Generator[Query, Reply, frozenset[int]]:
        """Return a 1-minimal subset that fails."""
        # The probabilities are reset, since they refer to this set.
        odds = odds_of(self.problem, cells, frozenset(self.dynamic_deps))
        while True:
            loose = [
                cell
                for cell in odds
                if cell in cells and not self.settled_as_passing(cells - {cell})
            ]
            if not loose:
                return cells
            self.undecided = len(loose)
            chunk = chunk_of(loose, odds)
            smaller = self.without(cells, chunk)
            if smaller is None or self.settled_as_passing(smaller):
                smaller = cells - set(chunk)
            if (yield from self.fails(smaller)):
                cells = smaller
                self.best = (
                    smaller if self.best is None or len(smaller) < len(self.best) else self.best
                )
            else:
                learn(chunk, odds)

    def without(self, cells: frozenset[int], chunk: list[int]) -> frozenset[int] | None:
        """Return the set without a chunk and without the cells that would then lack a name.

        Returns ``None`` if the crash cell would lack a name.
        """
        remaining = cells - set(chunk)
        while (stop := self.stops_at(remaining)) is not None:
            if stop == self.problem.crash:
                return None
            remaining -= {stop}
        return remaining

    # --- step three -------------------------------------------------------------------------------

    def confirm(self, cells: frozenset[int]) -> _Step:
        """Run the result again from scratch; tell whether it failed as reliably as before."""
        required_runs = CONFIRMATIONS if self.repeats > 1 else 2
        tally = self.tallies[cells]
        self.undecided, steady = 0, True
        while tally.fails + tally.others < required_runs:
            steady = (yield from self.run(cells, fresh=True)) and steady
        return steady or self.repeats > 1

    def slice_passes_again(self) -> _Step:
        """Check that the slice, which passed once, passes again.

        Every added cell was chosen because of that single run.
        """
        base = self.initial_set
        if (
            not self.problem.erratic
            or not self.extended
            or self.repeats > 1
            or base is None
            or self.stops_at(base) is not None
        ):
            return True
        if base not in self.replies or self.lacks_a_name(base):
            return True
        # Larger sets that passed show the same, in forks of one kernel with the same memory.
        larger_passes = sum(self.passes_in_fork(more) for more in self.tallies if more > base)
        if self.passes_in_fork(base) and larger_passes >= ENOUGH_PASSES:
            return True
        return not (yield from self.run(base, fresh=True))

    def run_steps(self) -> Generator[Query, Reply, bool]:
        """Run all steps; tell whether the set in ``best`` is minimal."""
        cells = yield from self.find()
        while True:
            cells = yield from self.minimise(cells)
            self.best, one_form = cells, not self.several_forms
            if not self.problem.confirms:
                return True
            try:
                steady = yield from self.confirm(cells)
                steady = steady and (yield from self.slice_passes_again())
            except _Stop:
                # The result is known: only another run to confirm it did not fit into the budget.
                return True
            if one_form and self.several_forms:
                # A smaller set may have failed in a form that counts only now.
                continue
            if steady:
                return True
            # The failure came and went: what was taken for a FAIL may have been luck, and if not
            # that, what was taken for a PASS.
            yield from self.replay(cells)
            # A larger set that always fails is the better answer for a user.
            larger = yield from self.steadier(cells)
            if larger is None:
                self.expect(cells)
                larger = yield from self.find()
            cells = larger


def search(problem: Problem) -> Search:
    """Search for the culprits. :func:`safe_exec.experiments.driver.drive` answers its queries.

    Equal answers lead to equal queries. The total time of the replies never exceeds the budget, as
    long as no reply exceeds its own time budget.
    """
    searcher = _Searcher(problem)
    stopped: Stopped | None = None
    minimal = False
    try:
        minimal = yield from searcher.run_steps()
    except _Stop as stop:
        stopped = stop.stopped
    except SearchCancelled:
        stopped = Stopped.CANCELLED
    best = searcher.best
    if best is None and stopped in (Stopped.NOT_REPRODUCED, Stopped.TOO_RARE):
        # Report the rate of the whole notebook if nothing smaller failed.
        best = searcher.all
    tally = searcher.tallies.get(best, _Tally()) if best is not None else _Tally()
    return Result(
        cells=tuple(sorted(best)) if best is not None and tally.fails else (),
        minimal=minimal,
        stopped=stopped,
        reproduced=(tally.fails - tally.quick, tally.fails + tally.others - tally.quick),
        method=_method(searcher),
        dynamic_deps=frozenset(best or ()) - problem.slice if tally.fails else frozenset(),
        endings=dict(+tally.endings),
        several_forms=searcher.several_forms,
        quick=tally.quick,
    )


def _method(searcher: _Searcher) -> str:
    way = "slice" if len(searcher.problem.slice) > 1 else "search"
    if searcher.extended:
        way += " + amounts" if searcher.problem.resource_use else " + growth"
    return way if searcher.rate is None else f"{way}, repeated"
