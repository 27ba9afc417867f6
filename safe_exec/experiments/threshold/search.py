"""Finds the threshold of a limit: the smallest value that passes and the largest one that fails.

The search knows values only as numbers. It yields a :class:`ProbeQuery`, receives a
:class:`ProbeResult` and returns a :class:`Bracket`.

It has three steps. *Find a pass*: start with the given value and double it as long as this limit
ends the run. *Close in*: the peak of the passing run suggests where the threshold is. One step
above and one below settle most cases. Otherwise the steps double, and the interval is bisected by
its geometric mean down to the precision. *Confirm*: run the passing value again, since measurements
vary. If it fails then, the bracket is widened and marked.

Pure; imports no other module of safe-exec.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from enum import StrEnum

from msgspec import Struct

# How often a value that passed and then failed is given up for a higher one.
CLIMBS = 3
# The value that is named in the end has passed this often.
ENOUGH = 2
# Bisection stops at the precision, up to the rounding errors of the products.
ROUNDING = 1e-9
# The factor by which to go up from a failure, and away from a mere guess.
FACTOR = 2.0


class ProbeOutcome(StrEnum):
    """The ways in which a run with a given value can end."""

    PASSED = "passed"
    # This limit ended the run.
    STRUCK = "struck"
    # Failed in a way that too small a value may or may not explain.
    OTHERWISE = "otherwise"
    # Failed in a way that a larger value does not change.
    UNRELATED = "unrelated"


class StopReason(StrEnum):
    """The reasons for a missing bracket, or for one wider than requested."""

    BUDGET = "budget"
    CANCELLED = "cancelled"
    # It fails with all that there is.
    MOST = "most"
    # It passes with next to nothing.
    LEAST = "least"
    # It fails for another reason.
    UNRELATED = "unrelated"


class ProbeCancelled(Exception):  # noqa: N818 - no error: thrown into a search to end it
    """Thrown into the search generator to stop it; the search then returns its bracket so far."""


class ProbeQuery(Struct, frozen=True, kw_only=True):
    """Asks whether a run with this value passes.

    The run may take ``time_budget`` seconds at most. Infinity means no limit.
    """

    value: float
    time_budget: float


class ProbeResult(Struct, frozen=True, kw_only=True):
    """The answer to a query and its cost in seconds.

    ``peak`` is the run's highest use of the resource. ``cut`` is true if the run exceeded its time
    budget.
    """

    outcome: ProbeOutcome
    seconds: float
    peak: float | None = None
    cut: bool = False


class ProbeProblem(Struct, frozen=True, kw_only=True):
    """The search problem. The first run uses ``initial``.

    All others lie between ``least`` and ``most``.

    ``precision`` is relative; integral values are found exactly. ``fit`` rounds a value up to one
    that can be set. ``guess`` is the starting point if a passing run reports no peak. ``budget`` is
    in seconds.
    """

    # The value of the first run; all others lie between `least` and `most`.
    initial: float
    least: float
    most: float
    # The starting point if a passing run reports no peak.
    guess: float
    # Relative; integral values are found exactly.
    precision: float = 0.05
    is_integral: bool = False
    # Rounds a value up to one that can be set.
    fit: Callable[[float], float] = float
    # In seconds.
    budget: float = math.inf


class Bracket(Struct, frozen=True, kw_only=True):
    """The result of the search.

    Every run with ``passes`` or more passed (infinity: without a limit), and every run with
    ``fails`` or less failed; either is ``None`` if there was no such run. ``wavers`` is true if,
    between the two, a run failed with a value at least as large as one that passed. ``ended`` is
    ``None`` for a search that was completed.
    """

    # Every run with this value or more passed; infinity means without a limit.
    passes: float | None
    # Every run with this value or less failed; None if none did.
    fails: float | None
    # Between the two, some runs passed and others failed with as much or more.
    wavers: bool
    runs: int
    seconds: float
    # None for a search that was completed.
    ended: StopReason | None

    @property
    def found(self) -> bool:
        """Whether the search was completed, with a passing and a failing value."""
        return self.ended is None and self.passes is not None and self.fails is not None


Search = Generator[ProbeQuery, ProbeResult, Bracket]
_Run = Generator[ProbeQuery, ProbeResult, ProbeResult]
_Part = Generator[ProbeQuery, ProbeResult, None]


class _Stop(Exception):  # noqa: N818 - leaves the search from within
    def __init__(self, ended: StopReason) -> None:
        super().__init__(ended)
        self.ended = ended


class _Searcher:
    """The state of one search.

    ``low`` is the largest value that failed (0 if none did), ``high`` the smallest that passed.
    """

    def __init__(self, question: ProbeProblem) -> None:
        self.question = question
        self.low, self.high = 0.0, math.inf
        self.peak: float | None = None
        self.result: dict[float, list[bool]] = {}
        self.elapsed = self.longest = 0.0

    def run_steps(self) -> _Part:
        yield from self.find_a_pass()
        yield from self.close_in()
        yield from self.once_more()

    def run(self, value: float) -> _Run:
        """Run a value once and count it. Raises _Stop if the run would not fit into the budget."""
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
        """Run a value between ``low`` and ``high``, and move one of them to it.

        Tells whether the run passed. A larger value is known to pass, so any failure counts.
        """
        result = yield from self.run(value)
        if result.outcome is ProbeOutcome.PASSED:
            self.high = value
        else:
            self.low = value
        return result.outcome is ProbeOutcome.PASSED

    # --- a run that passes ------------------------------------------------------------------------

    def find_a_pass(self) -> _Part:
        """Raise the value until a run passes.

        Raises _Stop if none does, or if raising it does not help.
        """
        value, others = self.question.initial, 0
        while (result := (yield from self.run(value))).outcome is not ProbeOutcome.PASSED:
            # A second failure of that kind means that a larger value does not help.
            others = others + 1 if result.outcome is ProbeOutcome.OTHERWISE else 0
            self.low = value
            at_most = value >= self.question.most
            # A failure that may come from too small a value gets one run with a larger one.
            if result.outcome is ProbeOutcome.UNRELATED or others > 1 or (others and at_most):
                raise _Stop(StopReason.UNRELATED)
            if at_most:
                raise _Stop(StopReason.MOST)
            value = min(self.question.most, self.question.fit(value * FACTOR))
        self.high, self.peak = value, result.peak

    # --- close in ---------------------------------------------------------------------------------

    def close_in(self) -> _Part:
        """Narrow the gap between the largest value that fails and the smallest that passes.

        Starts at the peak or at a guess, steps away from it with growing steps, then bisects.
        """
        start, step = self.start()
        if self.low < start < self.high and not (yield from self.ask(start)):
            yield from self.up(step)
        elif not self.is_near():
            yield from self.down(step)
        yield from self.halve()

    def start(self) -> tuple[float, float]:
        """Return the starting value, and the first step as a multiple of the smallest step."""
        question = self.question
        # One smallest step above the peak should pass.
        if self.peak is not None and self.peak > 0:
            return self.within(self.peak if question.is_integral else self.moved(self.peak, 1)), 1
        guess = self.within(question.guess)
        return guess, guess if question.is_integral else math.log(FACTOR) / math.log1p(
            question.precision
        )

    def within(self, value: float) -> float:
        return min(self.question.most, max(self.question.least, self.question.fit(value)))

    def moved(self, value: float, steps: float) -> float:
        """Move a value by a number of smallest steps, and round it to one that can be set."""
        if self.question.is_integral:
            return value + steps
        try:
            return self.question.fit(value * math.exp(math.log1p(self.question.precision) * steps))
        except OverflowError:
            return math.inf

    def up(self, step: float) -> _Part:
        """Go up from a failing value until a run passes or the passing side is reached."""
        while not self.is_near():
            if self.low >= self.question.most:
                raise _Stop(StopReason.MOST)
            value = min(self.question.most, self.moved(self.low, step))
            if not self.low < value < self.high or (yield from self.ask(value)):
                return
            step *= 2

    def down(self, step: float) -> _Part:
        """Go down from a passing value until a run fails or the failing side is reached."""
        first = True
        while not self.is_near():
            if self.high <= self.question.least or math.isinf(step):
                raise _Stop(StopReason.LEAST)
            value = max(self.question.least, min(self.question.most, self.moved(self.high, -step)))
            if value >= self.high:
                # A step that is finer than what can be set.
                step *= 2
                continue
            if value <= self.low or not (yield from self.ask(value)):
                return
            # Where a peak is not sharp (a time, say) the threshold is often right below it.
            step, first = (step if first else step * 2), False

    def halve(self) -> _Part:
        while not self.is_near():
            value = self.middle()
            if not self.low < value < self.high:
                # Nothing that can be set lies between.
                return
            yield from self.ask(value)

    def middle(self) -> float:
        # The geometric mean needs positive, finite sides.
        low, high = max(self.low, self.question.least), min(self.high, self.question.most)
        return (
            (low + high) // 2
            if self.question.is_integral
            else self.question.fit(math.sqrt(low * high))
        )

    def is_near(self) -> bool:
        """Tell whether the passing and the failing value differ by no more than the precision."""
        if not self.low or math.isinf(self.high):
            return False
        if self.question.is_integral:
            return self.high - self.low <= 1
        return self.high <= self.low * (1 + self.question.precision) * (1 + ROUNDING)

    # --- once more --------------------------------------------------------------------------------

    def once_more(self) -> _Part:
        """Confirm the passing value; if it fails now, confirm a higher one instead.

        If the time runs out, the results so far remain valid.
        """
        # Measurements vary, so the passing value may fail now.
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

    # --- the answer -------------------------------------------------------------------------------

    def bracket(self, ended: StopReason | None) -> Bracket:
        # A value can appear in both lists if its runs differ.
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
    """Search for the threshold. Equal answers lead to equal queries."""
    # The total time never exceeds the budget, as long as no run exceeds its own time budget.
    searcher = _Searcher(question)
    ended: StopReason | None = None
    try:
        yield from searcher.run_steps()
    except _Stop as stop:
        ended = stop.ended
    except ProbeCancelled:
        ended = StopReason.CANCELLED
    return searcher.bracket(ended)
