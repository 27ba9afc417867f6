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
    Cancel,
    Ended,
    Fate,
    Question,
    Tried,
    Try,
    drive,
    search,
)

INF = math.inf
QUESTION = Question(given=INF, least=1, most=1e12, guess=64)
COUNTS = replace(QUESTION, whole=True, most=32768)


class World(msgspec.Struct):
    """A notebook that needs ``needs`` of a limit, and is seen to use ``peak`` of it."""

    needs: float
    peak: float | None = None
    below: Fate = Fate.STRUCK
    seconds: float = 1.0
    values: list[float] = msgspec.field(default_factory=list)

    def run(self, attempt: Try) -> Tried:
        self.values.append(attempt.value)
        if attempt.value < self.needs:
            return Tried(fate=self.below, seconds=min(self.seconds, attempt.allowed))
        cut = self.seconds > attempt.allowed
        return Tried(
            fate=Fate.PASSED, seconds=min(self.seconds, attempt.allowed), peak=self.peak, cut=cut
        )


def found(world: World, question: Question = QUESTION) -> Bracket:
    return drive(search(question), world.run)


def scripted(*fates: Fate) -> Callable[[Try], Tried]:
    """Answers in turn, the last one for ever."""
    waiting = list(fates)
    return lambda _: Tried(fate=waiting.pop(0) if len(waiting) > 1 else waiting[0], seconds=1.0)


# --- how many runs ----------------------------------------------------------------------------------------------

ROWS = [
    ("the peak is right", World(400, 396), QUESTION, 4),
    ("it needs a little more than was seen", World(430, 396), QUESTION, 4),
    ("it needs just what was seen, as times do", World(396, 396), QUESTION, 5),
    ("it needs twice as much", World(800, 396), QUESTION, 10),
    ("it needs much less", World(300, 396), QUESTION, 9),
    ("nothing is measured", World(396), QUESTION, 10),
    ("far from the guess", World(5e9), QUESTION, 16),
    ("the first run fails", World(400, 396), replace(QUESTION, given=100), 5),
    ("the first run fails by far", World(40000, 39600), replace(QUESTION, given=100), 13),
    ("as tight as can be", World(400, 396), replace(QUESTION, given=400), 3),
    ("finer", World(400, 396), replace(QUESTION, precision=0.01), 4),
    ("a count", World(17, 17), COUNTS, 4),
    ("a count that was not seen whole", World(20, 17), COUNTS, 6),
    ("a count of which nothing is known", World(90), replace(COUNTS, given=64), 9),
]


@pytest.mark.parametrize(
    ("world", "question", "runs"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS]
)
def test_so_many_runs(world: World, question: Question, runs: int) -> None:
    world = replace(world, values=[])
    bracket = found(world, question)
    assert bracket.found and bracket.passes is not None and bracket.fails is not None
    assert bracket.fails < world.needs <= bracket.passes
    assert bracket.runs == len(world.values) == runs, world.values


def test_the_first_run_is_with_the_value_as_given_and_the_next_from_the_peak() -> None:
    world = World(400, 396)
    found(world, replace(QUESTION, given=1000))
    assert world.values == [1000, pytest.approx(415.8), pytest.approx(396), pytest.approx(415.8)]


# --- no bracket -------------------------------------------------------------------------------------------------


def test_another_reason_ends_it_at_once() -> None:
    bracket = drive(search(replace(QUESTION, given=100)), scripted(Fate.UNRELATED))
    assert (bracket.ended, bracket.runs, bracket.passes, bracket.fails) == (
        Ended.UNRELATED,
        1,
        None,
        100,
    )


def test_what_may_be_for_want_of_it_gets_one_chance_with_more() -> None:
    question = replace(QUESTION, given=100)
    assert drive(search(question), scripted(Fate.OTHERWISE)).runs == 2
    assert drive(search(question), scripted(Fate.OTHERWISE)).ended is Ended.UNRELATED
    bracket = found(World(150, 148, below=Fate.OTHERWISE), question)
    assert bracket.found and bracket.fails is not None and 140 < bracket.fails < 150


def test_without_a_limit_there_is_no_more_to_give() -> None:
    assert drive(search(QUESTION), scripted(Fate.OTHERWISE)).runs == 1
    assert drive(search(QUESTION), scripted(Fate.STRUCK)).ended is Ended.MOST


def test_up_to_the_most_that_there_is() -> None:
    world = World(INF)
    bracket = found(world, replace(QUESTION, given=100, most=1000))
    assert world.values == [100, 200, 400, 800, 1000]
    assert (bracket.ended, bracket.passes, bracket.fails) == (Ended.MOST, None, 1000)


def test_it_passes_without_a_limit_alone() -> None:
    bracket = found(replace(World(INF), needs=2e12), QUESTION)
    assert (bracket.ended, bracket.passes) == (Ended.MOST, INF)


def test_down_to_the_least_that_can_be_set() -> None:
    bracket = found(World(0, 64), QUESTION)
    assert (bracket.ended, bracket.passes, bracket.fails) == (Ended.LEAST, 1, None)


def test_the_budget_ends_it_with_what_is_known() -> None:
    world = World(300, 396, seconds=10)
    bracket = found(world, replace(QUESTION, budget=35))
    assert (bracket.ended, bracket.runs, bracket.seconds) == (Ended.BUDGET, 3, 30)
    assert bracket.passes is not None and bracket.passes < 400


def test_a_run_that_is_cut_says_nothing() -> None:
    bracket = found(World(1, 1, seconds=60), replace(QUESTION, budget=35))
    assert (bracket.ended, bracket.runs, bracket.passes, bracket.fails) == (
        Ended.BUDGET,
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
    attempt = next(searching)
    for _ in range(after):
        attempt = searching.send(world.run(attempt))
    with pytest.raises(StopIteration) as stopped:
        searching.throw(Cancel())
    bracket: Bracket = stopped.value.value
    assert (bracket.ended, bracket.runs) == (Ended.CANCELLED, after)
    assert bracket.passes == [None, INF, pytest.approx(415.8), pytest.approx(415.8)][after]


# --- measures that differ from run to run -----------------------------------------------------------------------


def test_a_value_that_passes_and_fails_is_told_and_given_up() -> None:
    seen: list[float] = []

    def run(attempt: Try) -> Tried:
        seen.append(attempt.value)
        again = seen.count(attempt.value) > 1
        passed = attempt.value > 420 or (attempt.value > 400 and not again)
        return Tried(fate=Fate.PASSED if passed else Fate.STRUCK, seconds=1, peak=396)

    bracket = drive(search(QUESTION), run)
    assert bracket.found and bracket.wavers
    assert (
        bracket.fails == pytest.approx(396)
        and bracket.passes is not None
        and 420 < bracket.passes < 440
    )
    assert len(seen) == 6


def test_a_value_that_passes_by_chance_alone_does_not_go_round_for_ever() -> None:
    turn = [0]

    def run(attempt: Try) -> Tried:
        turn[0] += 1
        passed = math.isinf(attempt.value) or turn[0] % 2 == 1
        return Tried(fate=Fate.PASSED if passed else Fate.STRUCK, seconds=1, peak=100)

    bracket = drive(search(QUESTION), run)
    assert bracket.wavers and bracket.runs < 20


# --- what is always true ------------------------------------------------------------------------------------------


@st.composite
def questions(draw: st.DrawFn) -> Question:
    whole = draw(st.booleans())
    grid = draw(st.sampled_from([1e-3, 0.5, 7.0]))
    return Question(
        given=draw(st.one_of(st.just(INF), st.integers(1, 20_000))),
        least=1 if whole else grid,
        most=draw(st.integers(50, 10_000)),
        guess=draw(st.integers(1, 5_000)),
        precision=draw(st.sampled_from([0.001, 0.01, 0.05, 0.5, 1.0])),
        whole=whole,
        fit=(lambda value: float(math.ceil(value)))
        if whole
        else (lambda value: max(grid, math.ceil(value / grid) * grid)),
        budget=draw(st.one_of(st.just(INF), st.floats(0, 60))),
    )


PEAKS = st.one_of(st.none(), st.floats(0, 30_000))


@settings(deadline=None, max_examples=400)
@example(
    question=Question(
        given=4844,
        least=7.0,
        most=4843,
        guess=593,
        precision=0.05,
        whole=False,
        fit=lambda value: max(7.0, math.ceil(value / 7.0) * 7.0),
    ),
    needs=4843.0,
    peak=None,
)
@given(question=questions(), needs=st.floats(0.001, 12_000), peak=PEAKS)
def test_the_bracket_is_right_for_any_threshold(
    question: Question, needs: float, peak: float | None
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
        question.least <= value <= question.most or value == question.given
        for value in world.values[1:]
    )
    if bracket.found:
        assert bracket.passes is not None and bracket.fails is not None
        near = (
            bracket.passes - bracket.fails <= 1
            if question.whole
            else bracket.passes <= bracket.fails * (1.001 + question.precision)
        )
        between = question.fit(math.sqrt(bracket.passes * bracket.fails))
        assert near or not bracket.fails < between < bracket.passes
    elif bracket.ended is Ended.MOST:
        assert needs > min(question.most, question.given) and (
            bracket.passes is None or bracket.passes > question.most
        )
    else:
        assert bracket.ended is Ended.LEAST and needs <= question.least


@settings(deadline=None, max_examples=400)
@given(
    question=questions(), needs=st.floats(0.001, 12_000), peak=PEAKS, seconds=st.floats(0.01, 90)
)
def test_the_budget_is_never_exceeded(
    question: Question, needs: float, peak: float | None, seconds: float
) -> None:
    world = World(needs, peak, seconds=seconds)
    bracket = found(world, question)
    assert bracket.seconds <= question.budget * (1 + 1e-9)


@settings(deadline=None, max_examples=400)
@given(question=questions(), data=st.data())
def test_whatever_the_answers_it_comes_to_an_end(question: Question, data: st.DataObject) -> None:
    asked: list[float] = []
    answers: list[tuple[float, bool]] = []

    def run(attempt: Try) -> Tried:
        asked.append(attempt.value)
        assert attempt.allowed > 0 and len(asked) < 200
        fate = data.draw(st.sampled_from([Fate.PASSED, Fate.PASSED, Fate.STRUCK, Fate.OTHERWISE]))
        cut = data.draw(st.integers(0, 40)) == 0
        if not cut:
            answers.append((attempt.value, fate is Fate.PASSED))
        seconds = data.draw(st.floats(0, 2))
        return Tried(
            fate=fate, seconds=min(seconds, attempt.allowed), peak=data.draw(PEAKS), cut=cut
        )

    bracket = drive(search(question), run)
    assert bracket.runs == len(answers)
    if bracket.passes is not None:
        assert all(passed for value, passed in answers if value >= bracket.passes)
    if bracket.fails is not None:
        assert not any(passed for value, passed in answers if value <= bracket.fails)
    contradicted = any(p and not q and v <= w for v, p in answers for w, q in answers)
    assert bracket.wavers == contradicted
