"""The threshold of a limit: the smallest value with which a run passes and the largest with which it fails. Pure; imports nothing of ours.

It knows values as numbers, and a function from a value to passed or not, which it calls by yielding: :func:`search` is a generator
that yields a :class:`ProbeQuery`, takes a :class:`ProbeResult` and returns a :class:`Bracket`.

In three steps. *A run that passes*: with the value as given, else with twice as much again and again, as long as it is this limit that
ends the run. *Close in*: what that run used at most says where the threshold should be; one step above it and one below settle most
cases, else the steps grow (each twice the one before), and what lies between is halved, by the geometric mean, down to the precision.
*Once more*: the value that passed is run again, since measures differ from run to run; where it fails then, the bracket is widened
and says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from enum import StrEnum

from msgspec import Struct

CLIMBS = 3
"""How often a value that passed and then failed is given up for a higher one."""
ENOUGH = 2
"""So many passes of the value that is named in the end."""
ROUNDING = 1e-9
FACTOR = 2.0
"""By what to go up from a failure, and away from a mere guess."""


class ProbeOutcome(StrEnum):
    """How a run with some value ended."""

    PASSED = "passed"
    STRUCK = "struck"  # by this limit
    OTHERWISE = "otherwise"  # failed in a way that may, or may not, be for want of it
    UNRELATED = "unrelated"  # failed in a way that more of it does not change


class StopReason(StrEnum):
    """Why there is no bracket, or a wider one than was asked for."""

    BUDGET = "budget"
    CANCELLED = "cancelled"
    MOST = "most"  # it fails with all that there is
    LEAST = "least"  # it passes with next to nothing
    UNRELATED = "unrelated"  # it fails for another reason


class ProbeCancelled(Exception):  # noqa: N818 - no error: thrown into a search to end it
    """Thrown into the generator: it returns the bracket so far."""


class ProbeQuery(Struct, frozen=True, kw_only=True):
    """A question: does a run with this value pass? At most ``time_budget`` seconds may be spent. Infinity is no limit at all."""

    value: float
    time_budget: float


class ProbeResult(Struct, frozen=True, kw_only=True):
    """An answer, and what it cost. ``peak`` is the most that the run used; ``cut``: ended since it took longer than was allowed."""

    outcome: ProbeOutcome
    seconds: float
    peak: float | None = None
    cut: bool = False


class ProbeProblem(Struct, frozen=True, kw_only=True):
    """What is looked for. The first run is with ``initial``; no other leaves ``least`` to ``most``, which can be set.

    ``precision`` is relative; ``is_integral`` values are found to 1. ``fit`` gives the next value, at or above, that can be set. ``guess`` is where
    to begin if a run that passes tells no peak. ``budget`` is in seconds.
    """

    initial: float
    least: float
    most: float
    guess: float
    precision: float = 0.05
    is_integral: bool = False
    fit: Callable[[float], float] = float
    budget: float = math.inf


class Bracket(Struct, frozen=True, kw_only=True):
    """What is known in the end.

    From ``passes`` on every run passed (infinity: without a limit), up to ``fails`` every run failed, ``None`` where none did.
    ``wavers``: between them some runs passed that failed with as much or more. ``ended`` is ``None`` for a search that came to its end.
    """

    passes: float | None
    fails: float | None
    wavers: bool
    runs: int
    seconds: float
    ended: StopReason | None

    @property
    def found(self) -> bool:
        """Whether the search came to its end with both sides."""
        return self.ended is None and self.passes is not None and self.fails is not None


Search = Generator[ProbeQuery, ProbeResult, Bracket]
_Run = Generator[ProbeQuery, ProbeResult, ProbeResult]
_Part = Generator[ProbeQuery, ProbeResult, None]


class _Stop(Exception):  # noqa: N818 - leaves the search from within
    def __init__(self, ended: StopReason) -> None:
        super().__init__(ended)
        self.ended = ended


class _Searcher:
    """The state of one search. ``low`` failed (0: nothing did), ``high`` passed."""

    def __init__(self, question: ProbeProblem) -> None:
        self.question = question
        self.low, self.high = 0.0, math.inf
        self.peak: float | None = None
        self.result: dict[float, list[bool]] = {}
        self.elapsed = self.longest = 0.0

    def is_integral(self) -> _Part:
        yield from self.find_a_pass()
        yield from self.close_in()
        yield from self.once_more()

    def run(self, value: float) -> _Run:
        """One run, counted. Raises _Stop when it would not fit the budget."""
        time_budget = self.question.budget - self.elapsed
        if time_budget <= 0 or self.longest > time_budget:
            raise _Stop(StopReason.BUDGET)
        result = yield ProbeQuery(value=value, time_budget=time_budget)
        self.elapsed += result.seconds
        self.longest = max(self.longest, result.seconds)
        if result.cut:
            raise _Stop(StopReason.BUDGET)
        self.result.setdefault(value, []).append(result.outcome is ProbeOutcome.PASSED)
        return result

    def ask(self, value: float) -> Generator[ProbeQuery, ProbeResult, bool]:
        """A run between the two sides, one of which it moves; whether it passed. Something passes with more: any failure counts."""
        result = yield from self.run(value)
        if result.outcome is ProbeOutcome.PASSED:
            self.high = value
        else:
            self.low = value
        return result.outcome is ProbeOutcome.PASSED

    # --- a run that passes --------------------------------------------------------------------------------------

    def find_a_pass(self) -> _Part:
        """Up from the value as given until a run passes. Raises _Stop when none does, or more of it does not help."""
        value, others = self.question.initial, 0
        while (result := (yield from self.run(value))).outcome is not ProbeOutcome.PASSED:
            others = others + 1 if result.outcome is ProbeOutcome.OTHERWISE else 0
            self.low = value
            at_most = value >= self.question.most
            # What may be for want of it is given one chance with more.
            if result.outcome is ProbeOutcome.UNRELATED or others > 1 or (others and at_most):
                raise _Stop(StopReason.UNRELATED)
            if at_most:
                raise _Stop(StopReason.MOST)
            value = min(self.question.most, self.question.fit(value * FACTOR))
        self.high, self.peak = value, result.peak

    # --- close in -----------------------------------------------------------------------------------------------

    def close_in(self) -> _Part:
        """From the peak, or a guess: first one step, then ever larger ones, then halves."""
        start, step = self.start()
        if self.low < start < self.high and not (yield from self.ask(start)):
            yield from self.up(step)
        elif not self.is_near():
            yield from self.down(step)
        yield from self.halve()

    def start(self) -> tuple[float, float]:
        """Where to begin, and how many of the smallest steps the first one is."""
        question = self.question
        if self.peak is not None and self.peak > 0:
            return self.within(self.peak if question.is_integral else self.moved(self.peak, 1)), 1
        guess = self.within(question.guess)
        return guess, guess if question.is_integral else math.log(FACTOR) / math.log1p(
            question.precision
        )

    def within(self, value: float) -> float:
        return min(self.question.most, max(self.question.least, self.question.fit(value)))

    def moved(self, value: float, steps: float) -> float:
        """A value so many of the smallest steps up or down, as it can be set."""
        if self.question.is_integral:
            return value + steps
        try:
            return self.question.fit(value * math.exp(math.log1p(self.question.precision) * steps))
        except OverflowError:
            return math.inf

    def up(self, step: float) -> _Part:
        """Up from what failed, until something passes or what passed before is next."""
        while not self.is_near():
            if self.low >= self.question.most:
                raise _Stop(StopReason.MOST)
            value = min(self.question.most, self.moved(self.low, step))
            if not self.low < value < self.high or (yield from self.ask(value)):
                return
            step *= 2

    def down(self, step: float) -> _Part:
        """Down from what passed, until something fails or what failed before is next."""
        first = True
        while not self.is_near():
            if self.high <= self.question.least or math.isinf(step):
                raise _Stop(StopReason.LEAST)
            value = max(self.question.least, min(self.question.most, self.moved(self.high, -step)))
            if value >= self.high:
                step *= 2  # a step that is finer than what can be set
                continue
            if value <= self.low or not (yield from self.ask(value)):
                return
            # Where a peak is not sharp (a time, say) the threshold is often right below it.
            step, first = (step if first else step * 2), False

    def halve(self) -> _Part:
        while not self.is_near():
            value = self.middle()
            if not self.low < value < self.high:
                return  # nothing that can be set lies between
            yield from self.ask(value)

    def middle(self) -> float:
        low, high = max(self.low, self.question.least), min(self.high, self.question.most)
        return (
            (low + high) // 2
            if self.question.is_integral
            else self.question.fit(math.sqrt(low * high))
        )

    def is_near(self) -> bool:
        """Whether the two sides are as near as was asked for."""
        if not self.low or math.isinf(self.high):
            return False
        if self.question.is_integral:
            return self.high - self.low <= 1
        return self.high <= self.low * (1 + self.question.precision) * (1 + ROUNDING)

    # --- once more ----------------------------------------------------------------------------------------------

    def once_more(self) -> _Part:
        """The value that passed, again; where it fails, a higher one in its place. What is known stays known if time runs out."""
        value, climbs = self.high, 0
        try:
            while sum(self.result.get(value, ())) < ENOUGH:
                result = yield from self.run(value)
                if result.outcome is ProbeOutcome.PASSED:
                    continue
                if climbs == CLIMBS:
                    return
                value = min(self.question.most, self.moved(value, 2**climbs))
                climbs += 1
        except _Stop:
            return

    # --- the answer ---------------------------------------------------------------------------------------------

    def bracket(self, ended: StopReason | None) -> Bracket:
        passed = [value for value, runs in self.result.items() if any(runs)]
        failed = [value for value, runs in self.result.items() if not all(runs)]
        least_pass, most_fail = min(passed, default=math.inf), max(failed, default=0.0)
        return Bracket(
            passes=min((value for value in passed if value > most_fail), default=None),
            fails=max(
                (value for value in failed if value < least_pass or not passed), default=None
            ),
            wavers=bool(passed) and least_pass <= most_fail,
            runs=sum(map(len, self.result.values())),
            seconds=self.elapsed,
            ended=ended,
        )


def search(question: ProbeProblem) -> Search:
    """Search for the threshold. The same answers give the same questions.

    The sum of the seconds never exceeds the budget, if no run takes longer than it was allowed to.
    """
    searcher = _Searcher(question)
    ended: StopReason | None = None
    try:
        yield from searcher.is_integral()
    except _Stop as stop:
        ended = stop.ended
    except ProbeCancelled:
        ended = StopReason.CANCELLED
    return searcher.bracket(ended)
