"""What the end of a trial answers, and whether the answer may be kept."""

from __future__ import annotations

import signal

import pytest
from msgspec.structs import replace

from safe_exec.experiments.culprits.oracle.judgement import Judgement, is_other_death, judge
from safe_exec.experiments.culprits.oracle.subject import Subject
from safe_exec.experiments.culprits.protocol import Outcome, Query, Reply
from safe_exec.experiments.rerun import RerunFailed
from safe_exec.model.ending import (
    Cancelled,
    Died,
    Ending,
    InternalError,
    Passed,
    StartFailed,
    TimedOut,
)
from safe_exec.model.evidence import CellLocation
from safe_exec.model.limits import Limits
from safe_exec.model.verdict import CauseKind
from safe_exec.trial.request import Cancellation
from tests.unit.experiments.culprits.oracle.subjects import CRASH, cause_of_kind, result, subject

QUERY = Query(cells=(0, CRASH), time_budget=50.0)
DIED = Died(cell=CRASH, exit=None)
HUNG = TimedOut(cell=CRASH, whole_notebook=False, allowed=600.0)


def judged(
    subject: Subject,
    ending: Ending,
    *,
    query: Query = QUERY,
    timeout: float | None = None,
    location: CellLocation | None = None,
    crash: int | None = None,
) -> Judgement:
    """Judge the end of a trial that was given ``timeout`` seconds and took three."""
    request = replace(subject.request, limits=replace(subject.request.limits, timeout=timeout))
    return judge(subject, query, request, result(ending, location), crash=crash, seconds=3.0)


def failing(kind: CauseKind = CauseKind.SEGFAULT, limits: Limits | None = None) -> Subject:
    return subject(kind, cause=cause_of_kind(kind), limits=limits)


def test_a_trial_that_fails_the_same_way() -> None:
    location = CellLocation(cell=CRASH, line=4, source="fault")
    judgement = judged(failing(), DIED, location=location)
    reply = judgement.reply
    assert judgement.keep and reply.from_scratch and not reply.cut
    assert (reply.answer, reply.ended, reply.seconds) == (Outcome.FAIL, "segfault", 3.0)
    assert (reply.line, reply.exact_line) == (4, True)


@pytest.mark.parametrize(
    ("location", "line"),
    [
        (CellLocation(cell=0, line=4, source="fault"), None),
        (CellLocation(cell=CRASH, line=4, source="sample"), 4),
        (None, None),
    ],
)
def test_a_line_that_is_not_certain(location: CellLocation | None, line: int | None) -> None:
    reply = judged(failing(), DIED, location=location).reply
    assert (reply.line, reply.exact_line) == (line, False)


def test_a_trial_that_passes() -> None:
    judgement = judged(subject(), Passed())
    assert judgement.keep
    assert (judgement.reply.answer, judgement.reply.ended) == (Outcome.PASS, "passed")


def test_the_crash_cell_of_another_notebook() -> None:
    assert judged(failing(), Died(cell=0, exit=None), crash=0).reply.answer is Outcome.FAIL
    assert judged(failing(), Died(cell=0, exit=None)).reply.answer is Outcome.UNRESOLVED


@pytest.mark.parametrize(
    ("own_timeout", "timeout", "budget", "cut"),
    [
        (None, 49.0, 50.0, True),
        (100.0, 49.0, 50.0, True),
        (40.0, 40.0, 50.0, False),
        (None, 49.0, float("inf"), False),
    ],
)
def test_only_the_budget_of_the_search_cuts_a_trial(
    own_timeout: float | None, timeout: float, budget: float, cut: bool
) -> None:
    kind = CauseKind.NOTEBOOK_TIMEOUT
    ending = TimedOut(cell=CRASH, whole_notebook=True, allowed=timeout)
    judgement = judged(
        failing(kind, Limits(timeout=own_timeout)),
        ending,
        timeout=timeout,
        query=replace(QUERY, time_budget=budget),
    )
    assert (judgement.reply.cut, judgement.keep) == (cut, not cut)


def test_a_recognised_hang_is_not_kept() -> None:
    judgement = judged(failing(CauseKind.CELL_TIMEOUT), replace(HUNG, recognised=True))
    assert judgement.reply.answer is Outcome.FAIL
    assert not judgement.reply.from_scratch and not judgement.keep
    judgement = judged(failing(CauseKind.CELL_TIMEOUT), HUNG)
    assert judgement.reply.from_scratch and judgement.keep


def test_a_signal_to_us_cuts_a_trial() -> None:
    cancellation = Cancellation()
    cancellation.arrive(signal.SIGINT)
    one = subject(cause=cause_of_kind(CauseKind.UNKNOWN))
    one = replace(one, request=replace(one.request, cancellation=cancellation))
    judgement = judged(one, Cancelled(signal=signal.SIGINT, cell=0))
    assert judgement.reply.cut and not judgement.keep


@pytest.mark.parametrize(
    ("ending", "text"),
    [
        (Cancelled(signal=signal.SIGINT, cell=0), "without a signal"),
        (InternalError(message="no room"), "could not be run: no room"),
        (StartFailed(reason="no kernel"), "could not be run: no kernel"),
    ],
)
def test_a_trial_that_answers_nothing(ending: Ending, text: str) -> None:
    with pytest.raises(RerunFailed, match=text):
        judged(subject(), ending)


REPLY = Reply(answer=Outcome.UNRESOLVED, seconds=1.0, ended="abort")


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (REPLY, True),
        (replace(REPLY, cut=True), False),
        (replace(REPLY, ended="exception"), False),
        (replace(REPLY, ended="passed"), False),
        (replace(REPLY, answer=Outcome.FAIL), False),
    ],
)
def test_deaths_that_the_user_should_know_of(reply: Reply, expected: bool) -> None:
    assert is_other_death(reply) == expected
