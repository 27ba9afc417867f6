"""Failures that were only found quickly, and the complete runs that confirm or refute them."""

from __future__ import annotations

import pytest

from safe_exec.experiments.culprits.oracle.fork_answers import ForkAnswer, ForkCell
from safe_exec.experiments.culprits.oracle.unconfirmed import UnconfirmedFailures
from safe_exec.experiments.culprits.protocol import Outcome, Reply

CELLS = (ForkCell(index=0, source="x"), ForkCell(index=2, source="y"))
FAIL = Reply(answer=Outcome.FAIL, seconds=1.0)
PASS = Reply(answer=Outcome.PASS, seconds=1.0)
FORM = Reply(answer=Outcome.UNRESOLVED, seconds=1.0, another_form=True)
CUT = Reply(answer=Outcome.UNRESOLVED, seconds=1.0, cut=True)


def forked(outcome: Outcome) -> ForkAnswer:
    return ForkAnswer(outcome=outcome, ended="")


def compare(
    failures: UnconfirmedFailures,
    reply: Reply,
    answer: ForkAnswer | None = None,
    *,
    is_confirmation: bool = True,
    of_cells: bool = True,
) -> bool:
    return failures.refutes_forks(
        CELLS, reply, answer, is_confirmation=is_confirmation, of_cells=of_cells
    )


@pytest.mark.parametrize("reply", [FAIL, FORM])
def test_a_run_that_fails_confirms(reply: Reply) -> None:
    failures = UnconfirmedFailures()
    failures.add_forked(CELLS)
    failures.add_recognised(CELLS)
    assert failures.is_forked_only(CELLS) and failures.is_recognised_only(CELLS)
    assert not compare(failures, reply)
    assert not failures.is_forked_only(CELLS) and not failures.is_recognised_only(CELLS)
    assert (failures.disagreements, failures.misled, failures.trusts_pictures) == (0, False, True)


def test_a_run_that_was_cut_decides_nothing() -> None:
    failures = UnconfirmedFailures()
    failures.add_forked(CELLS)
    assert not compare(failures, CUT, forked(Outcome.FAIL))
    assert failures.is_forked_only(CELLS) and failures.disagreements == 0


def test_a_run_that_passes_refutes_a_fork() -> None:
    failures = UnconfirmedFailures()
    failures.add_forked(CELLS)
    assert compare(failures, PASS)
    assert (failures.disagreements, failures.misled, failures.trusts_pictures) == (1, True, True)
    assert not failures.is_forked_only(CELLS)


@pytest.mark.parametrize(("of_cells", "misled"), [(True, True), (False, False)])
def test_a_run_that_passes_refutes_pictures(of_cells: bool, misled: bool) -> None:
    """The cell is slow. A part of it says nothing of the search for cells."""
    failures = UnconfirmedFailures()
    failures.add_recognised(CELLS)
    assert not compare(failures, PASS, of_cells=of_cells)
    assert failures.disagreements == 1
    assert (failures.misled, failures.trusts_pictures) == (misled, not misled)


@pytest.mark.parametrize(
    ("reply", "outcome", "is_refuted"),
    [
        (PASS, Outcome.PASS, False),
        (FAIL, Outcome.FAIL, False),
        (FORM, Outcome.FAIL, False),
        (PASS, Outcome.FAIL, True),
        (FAIL, Outcome.UNRESOLVED, True),
    ],
)
def test_an_answer_that_was_not_believed_is_compared(
    reply: Reply, outcome: Outcome, is_refuted: bool
) -> None:
    failures = UnconfirmedFailures()
    assert compare(failures, reply, forked(outcome), is_confirmation=False) == is_refuted
    assert (failures.disagreements, failures.misled) == (int(is_refuted), False)


def test_only_a_confirmation_settles_a_set() -> None:
    failures = UnconfirmedFailures()
    failures.add_recognised(CELLS)
    compare(failures, PASS, is_confirmation=False)
    assert failures.is_recognised_only(CELLS) and failures.disagreements == 0
