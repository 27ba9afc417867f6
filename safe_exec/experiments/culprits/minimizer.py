"""The culprit search: the smallest set of cells, in order, that still fails the same way. Pure; imports problem and model.

It knows cells as numbers, and a function from a set of cells to FAIL, PASS or UNRESOLVED, which it calls by yielding: :func:`search`
is a generator that yields an :class:`Ask`, takes a :class:`Reply` and returns a :class:`Result`. Whoever drives it runs trials, looks
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
from collections.abc import Callable, Generator, Iterable

from msgspec import Struct, field

from safe_exec.experiments.culprits.probdd import chunk_of, learn, odds_of
from safe_exec.experiments.culprits.protocol import (
    Answer,
    Ask,
    Problem,
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

_Step = Generator[Ask, Reply, bool]


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
        self.spent = 0.0
        self.best: frozenset[int] | None = None
        self.repeats = 1
        self.rate: float | None = None
        self.found: set[int] = set()
        self.grew = False
        self.left = len(problem.cells)
        self.learned: dict[int, set[str]] = {}
        self.first: frozenset[int] | None = None
        self.luck: set[frozenset[int]] = set()
        self.several_forms = False

    # --- asking -------------------------------------------------------------------------------------------------

    def fails(self, cells: frozenset[int]) -> _Step:
        """Whether a set fails: once is enough; that it does not takes as many runs as the rate asks for."""
        tally = self.tallies.setdefault(cells, _Tally())
        if cells in self.luck or (not tally.fails and self.stops_at(cells) is not None):
            return False
        while not tally.fails and tally.others < self.looks(cells) and not self.lacks_a_name(cells):
            yield from self.run(cells, fresh=tally.others > 0)
        return tally.fails > 0

    def looks(self, cells: frozenset[int]) -> int:
        """How often a set must be seen not to fail before it is believed."""
        tally, reply = self.tallies.get(cells, _Tally()), self.replies.get(cells)
        reached = (
            reply is not None
            and reply.answer is Answer.UNRESOLVED
            and reply.stopped_at == self.problem.crash
        )
        odd = tally.forms or (reached and cells == self.first)
        return max(self.repeats, ODD_LOOKS) if odd else self.repeats

    def stops_at(self, cells: frozenset[int]) -> int | None:
        """The cell at which a run of a set surely ends for a missing name: by its source, or as trials have taught."""
        for cell in sorted(self.learned.keys() & cells):
            for name in self.learned[cell]:
                if not cells & set(self.problem.definers(name, cell)):
                    return cell
        return self.problem.surely_stops_at(cells)

    def lacks_a_name(self, cells: frozenset[int]) -> bool:
        """Whether a run of the set ended for a missing name: so will every other."""
        reply = self.replies.get(cells)
        return reply is not None and reply.answer is Answer.UNRESOLVED and bool(reply.names)

    def run(self, cells: frozenset[int], *, fresh: bool) -> _Step:
        """One run of a set, counted. Raises _Stop when it would not fit the budget."""
        allowed = self.problem.budget - self.spent
        if self.cost(cells) > allowed:
            raise _Stop(Stopped.BUDGET)
        reply = yield Ask(
            cells=tuple(sorted(cells)),
            allowed=allowed,
            fresh=fresh,
            left=self.left,
            best=tuple(sorted(self.best or ())),
        )
        self.spent += reply.seconds
        if reply.cut:
            raise _Stop(Stopped.BUDGET)
        self.replies[cells] = reply
        if reply.answer is Answer.UNRESOLVED and reply.stopped_at is not None and reply.names:
            self.learned.setdefault(reply.stopped_at, set()).update(
                name
                for name in reply.names
                if set(self.problem.definers(name, reply.stopped_at)) & self.all
            )
        return self.count(cells, reply)

    def count(self, cells: frozenset[int], reply: Reply) -> bool:
        """Count a run; whether it failed."""
        tally = self.tallies.setdefault(cells, _Tally())
        tally.endings[reply.ended] += 1
        failed = reply.answer is Answer.FAIL or (self.several_forms and reply.another_form)
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

    def known_not_to(self, cells: frozenset[int]) -> bool:
        """Whether it is settled that a set does not fail."""
        tally = self.tallies.get(cells, _Tally())
        if cells in self.luck:
            return True
        settled = tally.others >= self.looks(cells) or (
            tally.others > 0 and self.lacks_a_name(cells)
        )
        return not tally.fails and (settled or self.stops_at(cells) is not None)

    # --- step one: a small set that fails -----------------------------------------------------------------------

    def find(self) -> Generator[Ask, Reply, frozenset[int]]:
        """A set that fails. Raises _Stop when there is none to be had."""
        base = self.close({self.problem.crash, *(self.problem.slice & self.all)})
        base = yield from self.repair(base)
        self.first = base
        while not (yield from self.fails(base)):
            rest = self.ranked(base)
            if not rest:
                yield from self.rate_of(base)
                continue
            self.grew = True
            count = yield from self.shortest(base, rest)
            if self.counts_by_now(base):
                continue
            added = self.close({rest[count - 1]}) | base
            self.found.add(rest[count - 1])
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

    def repair(self, base: frozenset[int]) -> Generator[Ask, Reply, frozenset[int]]:
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
                        for c in self.problem.definers(name, before)
                        if c not in base and c in self.all
                    ),
                    None,
                )
                for name, before in missing.items()
            } - {None}
            if not more:
                break
            base = self.close({*base, *(cell for cell in more if cell is not None)})
        return base

    def ranked(self, base: frozenset[int]) -> list[int]:
        """The cells outside of a set, those most likely to be needed first."""
        amounts, suspicion = self.problem.amounts or {}, self.problem.suspicion
        worth = (self.problem.limit or 0) / 100

        def rank(cell: int) -> tuple[float, float, int]:
            kept = amounts.get(cell, 0.0)
            return (-kept if kept > worth else 0.0, -suspicion.get(cell, 0.0), -cell)

        return sorted(self.all - base, key=rank)

    def shortest(self, base: frozenset[int], rest: list[int]) -> Generator[Ask, Reply, int]:
        """The smallest count of ``rest`` with which the set fails: up by steps until it does, then halving.

        Raises _Stop when not even the whole fails.
        """
        known = next(
            (n for n in range(1, len(rest)) if self.has_failed(self.with_first(base, rest, n))),
            len(rest),
        )
        low, high, one_form = 0, known, not self.several_forms
        for count in self.steps(base, rest, known):
            if (yield from self.fails(self.with_first(base, rest, count))):
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
                return 1 if self.counts_by_now(base) else (yield from self.shortest(base, rest))
            middle = (low + high) // 2
            if (yield from self.fails(self.with_first(base, rest, middle))):
                high = middle
            else:
                low = middle
        return high

    def with_first(self, base: frozenset[int], rest: list[int], count: int) -> frozenset[int]:
        return self.close({*base, *rest[:count]})

    def steps(self, base: frozenset[int], rest: list[int], known: int) -> list[int]:
        """The counts to try, each larger: a guess for what adds up, then whole classes of suspicion, at last all of them."""
        classes = [math.floor(self.problem.suspicion.get(cell, 0.0)) for cell in rest]
        ends = {n for n in range(1, len(rest)) if classes[n] < min(classes[:n])}
        steps = {self.guess(base, rest), *ends, known} if len(rest) > 1 else {known}
        return sorted(step for step in steps if 0 < step <= known)

    def guess(self, base: frozenset[int], rest: list[int]) -> int:
        """How many of the rest it may take: for what adds up, until what the base used and they kept fills the limit."""
        reply, amounts, limit = self.replies.get(base), self.problem.amounts, self.problem.limit
        if amounts is None or limit is None or reply is None or reply.peak is None:
            return 0
        total = reply.peak
        for count, cell in enumerate(rest, 1):
            total += max(0.0, amounts.get(cell, 0.0))
            if total >= limit:
                return count
        return 0

    def counts_by_now(self, cells: frozenset[int]) -> bool:
        """Whether a set has failed after all, in a form that was not known to be one when it was run."""
        return cells not in self.luck and self.has_failed(cells)

    def has_failed(self, cells: frozenset[int]) -> bool:
        """Whether a run of a set has failed before."""
        tally = self.tallies.get(cells)
        return tally is not None and tally.fails > 0

    # --- failures that come and go ------------------------------------------------------------------------------

    def rate_of(self, cells: frozenset[int]) -> Generator[Ask, Reply, None]:
        """A set that should fail did not: run it again to see how often it does, and set how often a PASS must be seen.

        Raises _Stop when it never does, or too rarely for the budget.
        """
        yield from self.replay(cells)
        self.expect(cells)

    def replay(self, cells: frozenset[int]) -> Generator[Ask, Reply, None]:
        """Run a set some more times, to see how often it fails."""
        for _ in range(REPLAYS):
            yield from self.run(cells, fresh=True)

    def expect(self, cells: frozenset[int]) -> None:
        """From how often a set has failed: how often a PASS must be seen. Raises _Stop as ``rate_of`` does."""
        tally = self.tallies[cells]
        if not tally.fails:
            raise _Stop(Stopped.NOT_REPRODUCED)
        self.rate = tally.fails / (tally.fails + tally.others)
        wanted = math.ceil(math.log(DOUBT) / math.log(1 - self.rate)) if self.rate < 1 else 1
        self.repeats = max(self.repeats + 1, wanted)
        if (
            self.repeats > MOST_REPEATS
            or self.repeats * self.cost(cells) > self.problem.budget - self.spent
        ):
            raise _Stop(Stopped.TOO_RARE)

    def steadier(self, cells: frozenset[int]) -> Generator[Ask, Reply, frozenset[int] | None]:
        """A larger set that always fails, where this one seldom does: then it and what lies between them are taken for luck."""
        tally = self.tallies[cells]
        if tally.fails > SELDOM * (tally.fails + tally.others):
            return None
        failed = (
            more
            for more, seen in self.tallies.items()
            if more > cells and seen.fails and not seen.others
        )
        between = {cells}
        for larger in (*sorted(failed, key=len)[:MOST_LARGER], self.all):
            seen = self.tallies.setdefault(larger, _Tally())
            while not seen.others and seen.fails < ALWAYS:
                yield from self.run(larger, fresh=True)
            if not seen.others:
                self.luck |= between
                self.best = larger
                return larger
            between.add(larger)
        return None

    # --- step two: nothing that can be left out -----------------------------------------------------------------

    def minimise(self, cells: frozenset[int]) -> Generator[Ask, Reply, frozenset[int]]:
        """A 1-minimal subset that fails."""
        odds = odds_of(self.problem, cells, frozenset(self.found))
        while True:
            loose = [
                cell for cell in odds if cell in cells and not self.known_not_to(cells - {cell})
            ]
            if not loose:
                return cells
            self.left = len(loose)
            chunk = chunk_of(loose, odds)
            smaller = self.without(cells, chunk)
            if smaller is None or self.known_not_to(smaller):
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
        left = cells - set(chunk)
        while (stop := self.stops_at(left)) is not None:
            if stop == self.problem.crash:
                return None
            left -= {stop}
        return left

    # --- step three ---------------------------------------------------------------------------------------------

    def confirm(self, cells: frozenset[int]) -> _Step:
        """Run the result again, from scratch; whether it failed as often as one that always fails does."""
        wanted = CONFIRMATIONS if self.repeats > 1 else 2
        tally = self.tallies[cells]
        self.left, steady = 0, True
        while tally.fails + tally.others < wanted:
            steady = (yield from self.run(cells, fresh=True)) and steady
        return steady or self.repeats > 1

    def slice_passes_again(self) -> _Step:
        """Whether the slice that did not fail does not fail again: all that was added to it rests on that one run."""
        base = self.first
        if (
            not self.problem.erratic
            or not self.grew
            or self.repeats > 1
            or base is None
            or self.stops_at(base) is not None
        ):
            return True
        if base not in self.replies or self.lacks_a_name(base):
            return True
        return not (yield from self.run(base, fresh=True))

    def whole(self) -> Generator[Ask, Reply, bool]:
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
        minimal = yield from searcher.whole()
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
        found=frozenset(best or ()) - problem.slice if tally.fails else frozenset(),
        endings=dict(tally.endings),
        several_forms=searcher.several_forms,
    )


def _method(searcher: _Searcher) -> str:
    way = "slice" if len(searcher.problem.slice) > 1 else "search"
    if searcher.grew:
        way += " + amounts" if searcher.problem.amounts else " + growth"
    return way if searcher.rate is None else f"{way}, repeated"


def drive(searching: Search, oracle: Callable[[Ask], Reply]) -> Result:
    """Run a search to its end with a function that answers."""
    try:
        ask = next(searching)
        while True:
            ask = searching.send(oracle(ask))
    except StopIteration as done:
        result: Result = done.value
        return result
