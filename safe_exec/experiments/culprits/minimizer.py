"""The culprit search: the smallest set of cells, in order, that still fails the same way. Pure; imports problem and model.

It knows cells as numbers, and a function from a set of cells to FAIL, PASS or UNRESOLVED, which it calls by yielding: :func:`search`
is a generator that yields an :class:`Query`, takes a :class:`Reply` and returns a :class:`Result`. Whoever drives it runs trials, looks
into a cache, or makes the answers up.

In three steps. *Find* a small set that fails: the backward slice of the crash cell first, then more cells, most suspicious (or, for
what adds up, largest) first, by halving for one necessary cell after the other, as in QuickXplain (Junker, AAAI 2004).
*Minimise*: leave out chunks by the odds that they are needed, as in ProbDD (Wang et al., FSE 2021), then single cells, until the set
is 1-minimal in the sense of ddmin (Zeller and Hildebrandt, TSE 2002): without any one cell it does not fail. *Confirm* from scratch. A
set that fails at one time and not at another gives way to a larger one that always does, where there is one: without the cells between them
it was luck. Else it sets the rate, and with it how often a PASS has to be seen before it is believed.

One odd run is not believed at once: a set that reached the crash cell and ended there in another way is run again before anything is added
to it. If the same cells end now in one way and now in another that is akin to it (another death of the kernel, say), both count as the
failure from then on.
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

DOUBT = 0.05
"""A PASS of a failure that comes and goes is believed when the odds of being wrong are below this."""
MOST_REPEATS = 12
REPLAYS = 4
"""How often the whole is replayed, once it did not fail, to see how often it does."""
CONFIRMATIONS = 5
"""How often a set of a failure that comes and goes is run in the end."""
SELDOM = 0.4
"""A set that fails no more often than this gives way to one that always does."""
ALWAYS = 5
"""A set that failed so often and did nothing else fails always."""
ODD_LOOKS = 2
"""How often a set is run that ended in the crash cell in another way, before it is believed not to fail."""
MOST_LARGER = 3
"""Larger sets that are looked at, before all cells."""

_Step = Generator[Query, Reply, bool]


class _Stop(Exception):  # noqa: N818 - leaves the search from within
    def __init__(self, stopped: Stopped) -> None:
        super().__init__(stopped)
        self.stopped = stopped


class _Tally(Struct):
    """The runs of one set; ``forms`` are those among the others that ended in a way akin to the failure."""

    fails: int = 0
    others: int = 0
    forms: int = 0
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

    # --- asking -------------------------------------------------------------------------------------------------

    def fails(self, cells: frozenset[int]) -> _Step:
        """Whether a set fails: once is enough; that it does not takes as many runs as the rate asks for."""
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
        """How often a set must be seen not to fail before it is believed."""
        tally, reply = self.tallies.get(cells, _Tally()), self.replies.get(cells)
        reached = (
            reply is not None
            and reply.answer is Outcome.UNRESOLVED
            and reply.stopped_at == self.problem.crash
        )
        odd = tally.forms or (reached and cells == self.initial_set)
        return max(self.repeats, ODD_LOOKS) if odd else self.repeats

    def stops_at(self, cells: frozenset[int]) -> int | None:
        """The cell at which a run of a set surely ends for a missing name: by its source, or as trials have taught."""
        for cell in sorted(self.missing_names.keys() & cells):
            for name in self.missing_names[cell]:
                if not cells & set(self.problem.definers(name, cell)):
                    return cell
        return self.problem.predicted_stop(cells)

    def lacks_a_name(self, cells: frozenset[int]) -> bool:
        """Whether a run of the set ended for a missing name: so will every other."""
        reply = self.replies.get(cells)
        return reply is not None and reply.answer is Outcome.UNRESOLVED and bool(reply.names)

    def run(self, cells: frozenset[int], *, fresh: bool) -> _Step:
        """One run of a set, counted. Raises _Stop when it would not fit the budget."""
        time_budget = self.problem.budget - self.elapsed
        if self.cost(cells) > time_budget:
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
        """Count a run; whether it failed."""
        tally = self.tallies.setdefault(cells, _Tally())
        tally.endings[reply.ended] += 1
        failed = reply.answer is Outcome.FAIL or (self.several_forms and reply.another_form)
        tally.fails += failed
        tally.others += not failed
        tally.forms += reply.another_form and not failed
        if tally.forms and (tally.fails or cells == self.all):
            self.count_all_forms()
        if tally.fails and (self.best is None or len(cells) < len(self.best)):
            self.best = cells
        return failed or (self.several_forms and reply.another_form)

    def count_all_forms(self) -> None:
        """The same cells ended in two ways that are akin: both are the failure, in what was seen so far as well."""
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
        """What a run of these cells should take, in seconds."""
        return self.problem.start_seconds + sum(
            self.problem.seconds.get(cell, 0.0) for cell in cells
        )

    def settled_as_passing(self, cells: frozenset[int]) -> bool:
        """Whether it is settled that a set does not fail."""
        tally = self.tallies.get(cells, _Tally())
        if cells in self.disregarded:
            return True
        settled = tally.others >= self.required_runs(cells) or (
            tally.others > 0 and self.lacks_a_name(cells)
        )
        return not tally.fails and (settled or self.stops_at(cells) is not None)

    # --- step one: a small set that fails -----------------------------------------------------------------------

    def find(self) -> Generator[Query, Reply, frozenset[int]]:
        """A set that fails. Raises _Stop when there is none to be had."""
        base = self.close({self.problem.crash, *(self.problem.slice & self.all)})
        base = yield from self.repair(base)
        self.initial_set = base
        while not (yield from self.fails(base)):
            candidates = self.ranked(base)
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
        """The cells and all that they are known to need."""
        closed: set[int] = set()
        waiting = list(cells)
        while waiting:
            cell = waiting.pop()
            if cell not in closed:
                closed.add(cell)
                waiting.extend(self.problem.needs.get(cell, frozenset()) & self.all)
        return frozenset(closed)

    def repair(self, base: frozenset[int]) -> Generator[Query, Reply, frozenset[int]]:
        """Add the definitions that trials find missing, as long as they do."""
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
        """The cells outside of a set, those most likely to be needed first."""
        resource_use, side_effect_risk = (
            self.problem.resource_use or {},
            self.problem.side_effect_risk,
        )
        worth = (self.problem.limit or 0) / 100

        def rank(cell: int) -> tuple[float, float, int]:
            use = resource_use.get(cell, 0.0)
            return (-use if use > worth else 0.0, -side_effect_risk.get(cell, 0.0), -cell)

        return sorted(self.all - base, key=rank)

    def shortest(self, base: frozenset[int], candidates: list[int]) -> Generator[Query, Reply, int]:
        """The smallest count of ``candidates`` with which the set fails: up by steps until it does, then halving.

        Raises _Stop when not even the whole fails.
        """
        upper = next(
            (
                n
                for n in range(1, len(candidates))
                if self.has_failed(self.with_first(base, candidates, n))
            ),
            len(candidates),
        )
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
            middle = (low + high) // 2
            if (yield from self.fails(self.with_first(base, candidates, middle))):
                high = middle
            else:
                low = middle
        return high

    def with_first(self, base: frozenset[int], candidates: list[int], count: int) -> frozenset[int]:
        return self.close({*base, *candidates[:count]})

    def steps(self, base: frozenset[int], candidates: list[int], upper: int) -> list[int]:
        """The counts to try, each larger: a guess for what adds up, then whole classes of suspicion, at last all of them."""
        classes = [math.floor(self.problem.side_effect_risk.get(cell, 0.0)) for cell in candidates]
        ends = {n for n in range(1, len(candidates)) if classes[n] < min(classes[:n])}
        steps = {self.guess(base, candidates), *ends, upper} if len(candidates) > 1 else {upper}
        return sorted(step for step in steps if 0 < step <= upper)

    def guess(self, base: frozenset[int], candidates: list[int]) -> int:
        """How many of the rest it may take: for what adds up, until what the base used and they kept fills the limit."""
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
        """Whether a set has failed after all, in a form that was not known to be one when it was run."""
        return cells not in self.disregarded and self.has_failed(cells)

    def has_failed(self, cells: frozenset[int]) -> bool:
        """Whether a run of a set has failed before."""
        tally = self.tallies.get(cells)
        return tally is not None and tally.fails > 0

    # --- failures that come and go ------------------------------------------------------------------------------

    def rate_of(self, cells: frozenset[int]) -> Generator[Query, Reply, None]:
        """A set that should fail did not: run it again to see how often it does, and set how often a PASS must be seen.

        Raises _Stop when it never does, or too rarely for the budget.
        """
        yield from self.replay(cells)
        self.expect(cells)

    def replay(self, cells: frozenset[int]) -> Generator[Query, Reply, None]:
        """Run a set some more times, to see how often it fails."""
        for _ in range(REPLAYS):
            yield from self.run(cells, fresh=True)

    def expect(self, cells: frozenset[int]) -> None:
        """From how often a set has failed: how often a PASS must be seen. Raises _Stop as ``rate_of`` does."""
        tally = self.tallies[cells]
        if not tally.fails:
            raise _Stop(Stopped.NOT_REPRODUCED)
        self.rate = tally.fails / (tally.fails + tally.others)
        required_runs = math.ceil(math.log(DOUBT) / math.log(1 - self.rate)) if self.rate < 1 else 1
        self.repeats = max(self.repeats + 1, required_runs)
        if (
            self.repeats > MOST_REPEATS
            or self.repeats * self.cost(cells) > self.problem.budget - self.elapsed
        ):
            raise _Stop(Stopped.TOO_RARE)

    def steadier(self, cells: frozenset[int]) -> Generator[Query, Reply, frozenset[int] | None]:
        """A larger set that always fails, where this one seldom does: then it and what lies between them are taken for luck."""
        tally = self.tallies[cells]
        if tally.fails > SELDOM * (tally.fails + tally.others):
            return None
        failed = (
            more
            for more, runs in self.tallies.items()
            if more > cells and runs.fails and not runs.others
        )
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

    # --- step two: nothing that can be left out -----------------------------------------------------------------

    def minimise(self, cells: frozenset[int]) -> Generator[Query, Reply, frozenset[int]]:
        """A 1-minimal subset that fails."""
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
        """The set without a chunk and without what would surely stop for want of it; ``None`` where that is the crash cell."""
        remaining = cells - set(chunk)
        while (stop := self.stops_at(remaining)) is not None:
            if stop == self.problem.crash:
                return None
            remaining -= {stop}
        return remaining

    # --- step three ---------------------------------------------------------------------------------------------

    def confirm(self, cells: frozenset[int]) -> _Step:
        """Run the result again, from scratch; whether it failed as often as one that always fails does."""
        required_runs = CONFIRMATIONS if self.repeats > 1 else 2
        tally = self.tallies[cells]
        self.undecided, steady = 0, True
        while tally.fails + tally.others < required_runs:
            steady = (yield from self.run(cells, fresh=True)) and steady
        return steady or self.repeats > 1

    def slice_passes_again(self) -> _Step:
        """Whether the slice that did not fail does not fail again: all that was added to it rests on that one run."""
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
        return not (yield from self.run(base, fresh=True))

    def whole_notebook(self) -> Generator[Query, Reply, bool]:
        """All steps; whether the result in ``best`` is minimal."""
        cells = yield from self.find()
        while True:
            cells = yield from self.minimise(cells)
            self.best, one_form = cells, not self.several_forms
            try:
                steady = yield from self.confirm(cells)
                steady = steady and (yield from self.slice_passes_again())
            except _Stop:
                return True  # what was asked for is known: only one more look at it did not fit
            if one_form and self.several_forms:
                continue  # a smaller set may have failed in a form that counts only now
            if steady:
                return True
            # It came and went: what was taken for a FAIL may have been luck, and if not that, what was taken for a PASS.
            yield from self.replay(cells)
            larger = yield from self.steadier(cells)
            if larger is None:
                self.expect(cells)
                larger = yield from self.find()
            cells = larger


def search(problem: Problem) -> Search:
    """Search for the culprits. Drive it with :func:`drive`, or by hand: ``next``, then ``send`` a Reply for each Ask.

    The same answers give the same questions. The sum of the replies' seconds never exceeds the budget, if no reply takes
    longer than it was allowed to.
    """
    searcher = _Searcher(problem)
    stopped: Stopped | None = None
    minimal = False
    try:
        minimal = yield from searcher.whole_notebook()
    except _Stop as stop:
        stopped = stop.stopped
    except SearchCancelled:
        stopped = Stopped.CANCELLED
    best = searcher.best
    if best is None and stopped in (Stopped.NOT_REPRODUCED, Stopped.TOO_RARE):
        best = searcher.all
    tally = searcher.tallies.get(best, _Tally()) if best is not None else _Tally()
    return Result(
        cells=tuple(sorted(best)) if best is not None and tally.fails else (),
        minimal=minimal,
        stopped=stopped,
        reproduced=(tally.fails, tally.fails + tally.others),
        method=_method(searcher),
        dynamic_deps=frozenset(best or ()) - problem.slice if tally.fails else frozenset(),
        endings=dict(tally.endings),
        several_forms=searcher.several_forms,
    )


def _method(searcher: _Searcher) -> str:
    way = "slice" if len(searcher.problem.slice) > 1 else "search"
    if searcher.extended:
        way += " + amounts" if searcher.problem.resource_use else " + growth"
    return way if searcher.rate is None else f"{way}, repeated"
