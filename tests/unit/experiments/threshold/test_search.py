"""The threshold of a limit against made-up notebooks: how many runs it takes, and what is true of every answer."""

from __future__ import annotations

import math
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from safe_exec.experiments.threshold.search import (
    Bracket,
    ProbeCancelled,
    ProbeOutcome,
    ProbeProblem,
    ProbeQuery,
    ProbeResult,
    StopReason,
    search,
)
from tests.unit.driving import drive_sync

INF = math.inf
QUESTION = ProbeProblem(initial=INF, least=1, most=1e12, guess=64)
COUNTS = replace(QUESTION, is_integral=True, most=32768)


class World(msgspec.Struct):
    """A notebook that needs ``needs`` of a limit, and is seen to use ``peak`` of it."""

    needs: float
    peak: float | None = None
    below: ProbeOutcome = ProbeOutcome.STRUCK
    seconds: float = 1.0
    values: list[float] = msgspec.field(default_factory=list)

    def run(self, query: ProbeQuery) -> ProbeResult:
        self.values.append(query.value)
        if query.value < self.needs:
            return ProbeResult(outcome=self.below, seconds=min(self.seconds, query.time_budget))
        cut = self.seconds > query.time_budget
        return ProbeResult(
            outcome=ProbeOutcome.PASSED,
            seconds=min(self.seconds, query.time_budget),
            peak=self.peak,
            cut=cut,
        )


def found(world: World, question: ProbeProblem = QUESTION) -> Bracket:
    return drive_sync(search(question), world.run)


def scripted(*fates: ProbeOutcome) -> Callable[[ProbeQuery], ProbeResult]:
    """Answers in turn, the last one for ever."""
    waiting = list(fates)
    return lambda _: ProbeResult(
        outcome=waiting.pop(0) if len(waiting) > 1 else waiting[0], seconds=1.0
    )


# --- how many runs ----------------------------------------------------------------------------------------------

ROWS = [
    ("the peak is right", World(400, 396), QUESTION, 4),
    ("it needs a little more than was seen", World(430, 396), QUESTION, 4),
    ("it needs just what was seen, as times do", World(396, 396), QUESTION, 5),
    ("it needs twice as much", World(800, 396), QUESTION, 10),
    ("it needs much less", World(300, 396), QUESTION, 9),
    ("nothing is measured", World(396), QUESTION, 10),
    ("far from the guess", World(5e9), QUESTION, 16),
    ("the first run fails", World(400, 396), replace(QUESTION, initial=100), 5),
    ("the first run fails by far", World(40000, 39600), replace(QUESTION, initial=100), 13),
    ("as tight as can be", World(400, 396), replace(QUESTION, initial=400), 3),
    ("finer", World(400, 396), replace(QUESTION, precision=0.01), 4),
    ("a count", World(17, 17), COUNTS, 4),
    ("a count that was not seen whole", World(20, 17), COUNTS, 6),
    ("a count of which nothing is known", World(90), replace(COUNTS, initial=64), 9),
]


@pytest.mark.parametrize(
    ("world", "question", "runs"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS]
)
def test_so_many_runs(world: World, question: ProbeProblem, runs: int) -> None:
    world = replace(world, values=[])
    bracket = found(world, question)
    assert bracket.found and bracket.passes is not None and bracket.fails is not None
    assert bracket.fails < world.needs <= bracket.passes
    assert bracket.runs == len(world.values) == runs, world.values


def test_the_first_run_is_with_the_value_as_given_and_the_next_from_the_peak() -> None:
    world = World(400, 396)
    found(world, replace(QUESTION, initial=1000))
    assert world.values == [1000, pytest.approx(415.8), pytest.approx(396), pytest.approx(415.8)]


# --- no bracket -------------------------------------------------------------------------------------------------


def test_another_reason_ends_it_at_once() -> None:
    bracket = drive_sync(search(replace(QUESTION, initial=100)), scripted(ProbeOutcome.UNRELATED))
    assert (bracket.ended, bracket.runs, bracket.passes, bracket.fails) == (
        StopReason.UNRELATED,
        1,
        None,
        100,
    )


def test_what_may_be_for_want_of_it_gets_one_chance_with_more() -> None:
    question = replace(QUESTION, initial=100)
    assert drive_sync(search(question), scripted(ProbeOutcome.OTHERWISE)).runs == 2
    assert (
        drive_sync(search(question), scripted(ProbeOutcome.OTHERWISE)).ended is StopReason.UNRELATED
    )
    bracket = found(World(150, 148, below=ProbeOutcome.OTHERWISE), question)
    assert bracket.found and bracket.fails is not None and 140 < bracket.fails < 150


def test_without_a_limit_there_is_no_more_to_give() -> None:
    assert drive_sync(search(QUESTION), scripted(ProbeOutcome.OTHERWISE)).runs == 1
    assert drive_sync(search(QUESTION), scripted(ProbeOutcome.STRUCK)).ended is StopReason.MOST


def test_up_to_the_most_that_there_is() -> None:
    world = World(INF)
    bracket = found(world, replace(QUESTION, initial=100, most=1000))
    assert world.values == [100, 200, 400, 800, 1000]
    assert (bracket.ended, bracket.passes, bracket.fails) == (StopReason.MOST, None, 1000)


def test_it_passes_without_a_limit_alone() -> None:
    bracket = found(replace(World(INF), needs=2e12), QUESTION)
    assert (bracket.ended, bracket.passes) == (StopReason.MOST, INF)


def test_down_to_the_least_that_can_be_set() -> None:
    bracket = found(World(0, 64), QUESTION)
    assert (bracket.ended, bracket.passes, bracket.fails) == (StopReason.LEAST, 1, None)


def test_the_budget_ends_it_with_what_is_known() -> None:
    world = World(300, 396, seconds=10)
    bracket = found(world, replace(QUESTION, budget=35))
    assert (bracket.ended, bracket.runs, bracket.seconds) == (StopReason.BUDGET, 3, 30)
    assert bracket.passes is not None and bracket.passes < 400


def test_a_run_that_is_cut_says_nothing() -> None:
    bracket = found(World(1, 1, seconds=60), replace(QUESTION, budget=35))
    assert (bracket.ended, bracket.runs, bracket.passes, bracket.fails) == (
        StopReason.BUDGET,
        0,
        None,
        None,
    )


def test_time_that_ends_while_the_answer_is_checked_does_not_take_it_away() -> None:
    bracket = found(World(400, 396, seconds=10), replace(QUESTION, budget=35))
    assert bracket.found and bracket.runs == 3


@pytest.mark.parametrize("after", range(4))
def test_cancelled(after: int) -> None:
    world, searching = World(400, 396), search(QUESTION)
    query = next(searching)
    for _ in range(after):
        query = searching.send(world.run(query))
    with pytest.raises(StopIteration) as stopped:
        searching.throw(ProbeCancelled())
    bracket: Bracket = stopped.value.value
    assert (bracket.ended, bracket.runs) == (StopReason.CANCELLED, after)
    assert bracket.passes == [None, INF, pytest.approx(415.8), pytest.approx(415.8)][after]


# --- measures that differ from run to run -----------------------------------------------------------------------


def test_a_value_that_passes_and_fails_is_told_and_given_up() -> None:
    seen: list[float] = []

    def run(query: ProbeQuery) -> ProbeResult:
        seen.append(query.value)
        again = seen.count(query.value) > 1
        passed = query.value > 420 or (query.value > 400 and not again)
        return ProbeResult(
            outcome=ProbeOutcome.PASSED if passed else ProbeOutcome.STRUCK, seconds=1, peak=396
        )

    bracket = drive_sync(search(QUESTION), run)
    assert bracket.found and bracket.wavers
    assert (
        bracket.fails == pytest.approx(396)
        and bracket.passes is not None
        and 420 < bracket.passes < 440
    )
    assert len(seen) == 6


def test_a_value_that_passes_by_chance_alone_does_not_go_round_for_ever() -> None:
    turn = [0]

    def run(query: ProbeQuery) -> ProbeResult:
        turn[0] += 1
        passed = math.isinf(query.value) or turn[0] % 2 == 1
        return ProbeResult(
            outcome=ProbeOutcome.PASSED if passed else ProbeOutcome.STRUCK, seconds=1, peak=100
        )

    bracket = drive_sync(search(QUESTION), run)
    assert bracket.wavers and bracket.runs < 20


# --- what is always true ------------------------------------------------------------------------------------------


@st.composite
def questions(draw: st.DrawFn) -> ProbeProblem:
    whole = draw(st.booleans())
    grid = draw(st.sampled_from([1e-3, 0.5, 7.0]))
    return ProbeProblem(
        initial=draw(st.one_of(st.just(INF), st.integers(1, 20_000))),
        least=1 if whole else grid,
        most=draw(st.integers(50, 10_000)),
        guess=draw(st.integers(1, 5_000)),
        precision=draw(st.sampled_from([0.001, 0.01, 0.05, 0.5, 1.0])),
        is_integral=whole,
        fit=(lambda value: float(math.ceil(value)))
        if whole
        else (lambda value: max(grid, math.ceil(value / grid) * grid)),
        budget=draw(st.one_of(st.just(INF), st.floats(0, 60))),
    )


PEAKS = st.one_of(st.none(), st.floats(0, 30_000))


@settings(deadline=None, max_examples=400)
@example(
    question=ProbeProblem(
        initial=4844,
        least=7.0,
        most=4843,
        guess=593,
        precision=0.05,
        is_integral=False,
        fit=lambda value: max(7.0, math.ceil(value / 7.0) * 7.0),
    ),
    needs=4843.0,
    peak=None,
)
@given(question=questions(), needs=st.floats(0.001, 12_000), peak=PEAKS)
def test_the_bracket_is_right_for_any_threshold(
    question: ProbeProblem, needs: float, peak: float | None
) -> None:
    question = replace(question, budget=INF)
    world = World(needs, peak)
    bracket = found(world, question)
    assert not bracket.wavers
    assert bracket.passes is None or bracket.passes >= needs
    assert bracket.fails is None or bracket.fails < needs
    assert len(world.values) < 120
    # The user's own value may lie above ``most``: it is asked first, and once more to confirm that it passes.
    assert all(
        question.least <= value <= question.most or value == question.initial
        for value in world.values[1:]
    )
    if bracket.found:
        assert bracket.passes is not None and bracket.fails is not None
        near = (
            bracket.passes - bracket.fails <= 1
            if question.is_integral
            else bracket.passes <= bracket.fails * (1.001 + question.precision)
        )
        between = question.fit(math.sqrt(bracket.passes * bracket.fails))
        assert near or not bracket.fails < between < bracket.passes
    elif bracket.ended is StopReason.MOST:
        assert needs > min(question.most, question.initial) and (
            bracket.passes is None or bracket.passes > question.most
        )
    else:
        assert bracket.ended is StopReason.LEAST and needs <= question.least


@settings(deadline=None, max_examples=400)
@given(
    question=questions(), needs=st.floats(0.001, 12_000), peak=PEAKS, seconds=st.floats(0.01, 90)
)
def test_the_budget_is_never_exceeded(
    question: ProbeProblem, needs: float, peak: float | None, seconds: float
) -> None:
    world = World(needs, peak, seconds=seconds)
    bracket = found(world, question)
    assert bracket.seconds <= question.budget * (1 + 1e-9)


@settings(deadline=None, max_examples=400)
@given(question=questions(), data=st.data())
def test_whatever_the_answers_it_comes_to_an_end(
    question: ProbeProblem, data: st.DataObject
) -> None:
    asked: list[float] = []
    answers: list[tuple[float, bool]] = []

    def run(query: ProbeQuery) -> ProbeResult:
        asked.append(query.value)
        assert query.time_budget > 0 and len(asked) < 200
        fate = data.draw(
            st.sampled_from(
                [
                    ProbeOutcome.PASSED,
                    ProbeOutcome.PASSED,
                    ProbeOutcome.STRUCK,
                    ProbeOutcome.OTHERWISE,
                ]
            )
        )
        cut = data.draw(st.integers(0, 40)) == 0
        if not cut:
            answers.append((query.value, fate is ProbeOutcome.PASSED))
        seconds = data.draw(st.floats(0, 2))
        return ProbeResult(
            outcome=fate, seconds=min(seconds, query.time_budget), peak=data.draw(PEAKS), cut=cut
        )

    bracket = drive_sync(search(question), run)
    assert bracket.runs == len(answers)
    if bracket.passes is not None:
        assert all(passed for value, passed in answers if value >= bracket.passes)
    if bracket.fails is not None:
        assert not any(passed for value, passed in answers if value <= bracket.fails)
    contradicted = any(p and not q and v <= w for v, p in answers for w, q in answers)
    assert bracket.wavers == contradicted
