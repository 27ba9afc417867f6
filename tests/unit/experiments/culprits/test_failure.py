"""What counts as the same failure, what a trial answers, and which runs are searched by themselves."""

from __future__ import annotations

import pytest

from safe_exec.experiments.culprits.failure import (
    HEAP_WORDS,
    LIMIT_ERRORS,
    Failure,
    answer,
    is_another_form,
    is_ours,
    why_not_searched,
)
from safe_exec.experiments.culprits.protocol import Outcome
from safe_exec.model.ending import (
    Cancelled,
    CellError,
    CellFailed,
    Died,
    Ending,
    InternalError,
    LimitHit,
    Passed,
    StartFailed,
    TimedOut,
)
from safe_exec.model.limits import LimitName
from safe_exec.model.verdict import Cause, CauseKind, Confidence, Status, Verdict
from tests.unit.builders import every_verdict, make_cause, make_fact, make_verdict, name_of

CELL = 4
K = CauseKind


ASKED = (make_fact(fact="asked to exit", value=True),)


def raised(text: str, kind: CauseKind = K.EXCEPTION) -> Cause:
    """A cause with what the cell raised."""
    return make_cause(kind, evidence=(make_fact(fact="raised", value=text),))


def aborted(words: str) -> Cause:
    return make_cause(K.ABORT, evidence=(make_fact(fact="last message", value=words),))


def cell_failed(name: str, text: str = "", cell: int = CELL) -> CellFailed:
    return CellFailed(cell=cell, error=CellError(ename=name, evalue=text))


# --- the same ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CauseKind)
def test_a_failure_is_the_same_as_itself_and_no_other(kind: CauseKind) -> None:
    cause = make_cause(kind)
    failure = Failure.of(cause, CELL)
    assert (failure.kind, failure.signal, failure.exit_code, failure.cell) == (
        kind,
        cause.signal,
        cause.exit_code,
        CELL,
    )
    assert not failure.moves
    assert failure.is_same(cause, CELL)
    assert not failure.is_same(None, CELL)
    assert not failure.is_same(cause, CELL - 1)
    assert not failure.is_same(cause, None)
    assert not any(
        failure.is_same(make_cause(other), CELL) for other in CauseKind if other is not kind
    )


@pytest.mark.parametrize(
    ("first", "then", "same"),
    [
        # Signal and exit code are part of it, whatever the words say.
        (
            make_cause(K.EXIT, exit_code=3),
            make_cause(K.EXIT, exit_code=3, summary="in other words"),
            True,
        ),
        (make_cause(K.EXIT, exit_code=3), make_cause(K.EXIT, exit_code=4), False),
        # A kernel that was asked to end left by itself in the run, and is killed at the end of a hasty trial.
        (
            make_cause(K.EXIT, exit_code=0, evidence=ASKED),
            make_cause(K.EXIT, signal=-9, evidence=ASKED),
            True,
        ),
        (make_cause(K.EXIT, exit_code=0, evidence=ASKED), make_cause(K.EXIT, exit_code=0), False),
        (make_cause(K.KILLED, signal=-9), make_cause(K.KILLED, signal=-15), False),
        (make_cause(K.BUS_ERROR), make_cause(K.BUS_ERROR, signal=None), False),
        # Overwritten memory: glibc finds it, or it is used first.
        (make_cause(K.SEGFAULT), aborted("free(): invalid pointer"), True),
        (aborted("corrupted size vs. prev_size"), make_cause(K.SEGFAULT), True),
        (
            make_cause(K.SEGFAULT),
            aborted("terminate called after throwing an instance of 'x'"),
            False,
        ),
        (
            aborted("terminate called after throwing an instance of 'x'"),
            make_cause(K.SEGFAULT),
            False,
        ),
        (make_cause(K.BUS_ERROR), aborted("free(): invalid pointer"), False),
        # A stack that nobody could look at may have been full.
        (
            make_cause(K.STACK_OVERFLOW, signal=-11),
            make_cause(K.SEGFAULT, signal=-11, confidence=Confidence.LIKELY),
            True,
        ),
        (make_cause(K.STACK_OVERFLOW, signal=-11), make_cause(K.SEGFAULT, signal=-11), False),
        (make_cause(K.SEGFAULT, signal=-11), make_cause(K.STACK_OVERFLOW, signal=-11), False),
        # Of an exception the name, and not what it says.
        (raised("ValueError: 3"), raised("ValueError: 4"), True),
        (raised("ValueError: 3"), raised("ValueError"), True),
        (raised("ValueError: 3"), raised("KeyError: 3"), False),
        (raised("ValueError: 3"), make_cause(K.EXCEPTION), False),
        # What is told by its kind may be raised by any name.
        (
            raised("MemoryError: ", K.MEMORY_ERROR),
            raised("numpy._ArrayMemoryError: x", K.MEMORY_ERROR),
            True,
        ),
        (
            raised("OSError: full", K.DISK_FULL),
            raised("sqlite3.OperationalError: full", K.DISK_FULL),
            True,
        ),
    ],
)
def test_what_is_the_same(first: Cause, then: Cause, same: bool) -> None:
    assert Failure.of(first, CELL).is_same(then, CELL) is same


@pytest.mark.parametrize(
    ("cause", "moves"),
    [
        *((aborted(f"python: {word} went wrong"), True) for word in HEAP_WORDS),
        (aborted("terminate called after throwing an instance of 'std::bad_alloc'"), False),
        (make_cause(K.ABORT), False),
        (
            make_cause(
                K.ABORT, evidence=(make_fact(fact="stderr", value="free(): invalid pointer"),)
            ),
            False,
        ),
        (make_cause(K.SEGFAULT, evidence=(make_fact(fact="last message", value="malloc"),)), False),
    ],
)
def test_only_a_damaged_heap_moves(cause: Cause, moves: bool) -> None:
    """It is found wherever the next ``free`` is: then any cell will do, as long as kind and signal are the same."""
    failure = Failure.of(cause, CELL)
    assert failure.moves is moves
    assert failure.is_same(cause, CELL + 1) is moves
    assert failure.is_same(cause, None) is moves
    other = make_cause(K.SEGFAULT if cause.kind is K.ABORT else K.ABORT)
    assert failure.is_same(other, CELL) is moves
    assert not failure.is_same(other, CELL + 1)


# --- other forms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "ending", "then", "akin"),
    [
        (K.SEGFAULT, Died(cell=CELL, exit=None), K.ABORT, True),
        (K.ABORT, Died(cell=CELL, exit=None), K.BUS_ERROR, True),
        (K.OUT_OF_MEMORY, Died(cell=CELL, exit=None), K.SEGFAULT, True),
        (K.EXIT, Died(cell=CELL, exit=None), K.TERMINATED, True),
        # In another cell, or not the kernel's death at all.
        (K.SEGFAULT, Died(cell=CELL - 1, exit=None), K.ABORT, False),
        (K.SEGFAULT, Died(cell=CELL, exit=None, asked_to_exit=True), K.EXIT, False),
        (K.SEGFAULT, cell_failed("ValueError"), K.EXCEPTION, False),
        (K.EXCEPTION, Died(cell=CELL, exit=None), K.SEGFAULT, False),
        (K.SEGFAULT, Passed(), None, False),
        # The same is no other form.
        (K.SEGFAULT, Died(cell=CELL, exit=None), K.SEGFAULT, False),
        # Memory that runs out is refused, or somebody is killed for it.
        (K.OUT_OF_MEMORY, cell_failed("MemoryError"), K.MEMORY_ERROR, True),
        (K.MEMORY_ERROR, Died(cell=CELL, exit=None), K.OUT_OF_MEMORY, True),
        (K.MEMORY_ERROR, Died(cell=CELL, exit=None), K.SEGFAULT, False),
        (K.DISK_FULL, cell_failed("MemoryError"), K.MEMORY_ERROR, False),
        # Time is over, whatever the kernel did.
        (
            K.CELL_TIMEOUT,
            TimedOut(cell=CELL, whole_notebook=False, allowed=1.0),
            K.UNRESPONSIVE,
            True,
        ),
        (
            K.CELL_TIMEOUT,
            TimedOut(cell=CELL - 1, whole_notebook=False, allowed=1.0),
            K.UNRESPONSIVE,
            False,
        ),
        (K.CELL_TIMEOUT, Died(cell=CELL, exit=None), K.SEGFAULT, False),
        (K.SEGFAULT, TimedOut(cell=CELL, whole_notebook=False, allowed=1.0), K.CELL_TIMEOUT, False),
    ],
)
def test_what_is_another_form(
    first: CauseKind, ending: Ending, then: CauseKind | None, akin: bool
) -> None:
    failure = Failure.of(make_cause(first), CELL)
    cause = None if then is None else make_cause(then)
    assert is_another_form(failure, ending, cause) is akin


# --- what a trial answers -----------------------------------------------------------------------------------------------

OOM = make_cause(K.OUT_OF_MEMORY)
MEMORY_ERROR = make_cause(K.MEMORY_ERROR)
NAME_ERROR = "NameError: name 'x' is not defined"

ANSWERS: dict[str, tuple[Cause, Ending, Cause | None, Outcome, int | None, set[str]]] = {
    # The first run's cause, how a trial ended and why, and what that answers.
    "passed": (OOM, Passed(), None, Outcome.PASS, None, set()),
    "died the same way": (OOM, Died(cell=CELL, exit=None), OOM, Outcome.FAIL, None, set()),
    "died elsewhere": (OOM, Died(cell=2, exit=None), OOM, Outcome.UNRESOLVED, 2, set()),
    "died after the last cell": (OOM, Died(cell=None, exit=None), OOM, Outcome.UNRESOLVED, None, set()),
    "died another way": (OOM, Died(cell=CELL, exit=None), make_cause(K.SEGFAULT), Outcome.UNRESOLVED, CELL, set()),
    "nobody knows why": (OOM, Died(cell=CELL, exit=None), None, Outcome.UNRESOLVED, CELL, set()),
    "raised the same": (MEMORY_ERROR, cell_failed("MemoryError"), MEMORY_ERROR, Outcome.FAIL, None, set()),
    "ran out of time": (
        make_cause(K.CELL_TIMEOUT), TimedOut(cell=CELL, whole_notebook=False, allowed=1.0), make_cause(K.CELL_TIMEOUT), Outcome.FAIL, None, set(),
    ),
    "ran out of our time": (
        OOM, TimedOut(cell=1, whole_notebook=True, allowed=1.0), make_cause(K.NOTEBOOK_TIMEOUT), Outcome.UNRESOLVED, 1, set(),
    ),
    "hit the same limit": (
        make_cause(K.OUTPUT_FLOOD), LimitHit(limit=LimitName.OUTPUT, cell=CELL), make_cause(K.OUTPUT_FLOOD), Outcome.FAIL, None, set(),
    ),
    "cancelled": (OOM, Cancelled(signal=2, cell=3), None, Outcome.UNRESOLVED, 3, set()),
    "missed a name": (
        OOM, cell_failed("NameError", "name 'big' is not defined", 3), raised("NameError: x"), Outcome.UNRESOLVED, 3, {"big"},
    ),
    "missed a name, with a hint": (
        OOM, cell_failed("NameError", "name 'df' is not defined. Did you mean: 'pdf'?", 3), raised("x"), Outcome.UNRESOLVED, 3, {"df"},
    ),
    "a local name": (
        OOM, cell_failed("UnboundLocalError", "cannot access local variable 'n' where it is not associated with a value"),
        raised("UnboundLocalError: n"), Outcome.UNRESOLVED, CELL, set(),
    ),
    "another error that speaks of names": (
        OOM, cell_failed("ValueError", "name 'big' is not defined"), raised("ValueError: x"), Outcome.UNRESOLVED, CELL, set(),
    ),
    "the exception that is searched for": (raised("KeyError: 1"), cell_failed("KeyError"), raised("KeyError: 2"), Outcome.FAIL, None, set()),
    "an exception elsewhere": (raised("KeyError: 1"), cell_failed("KeyError", cell=1), raised("KeyError: 2"), Outcome.UNRESOLVED, 1, set()),
    "the name that was missing": (
        raised(NAME_ERROR), cell_failed("NameError", "name 'x' is not defined"), raised(NAME_ERROR), Outcome.FAIL, None, set(),
    ),
    "another name than was missing": (
        raised(NAME_ERROR), cell_failed("NameError", "name 'df' is not defined"), raised("NameError: name 'df' is not defined"),
        Outcome.UNRESOLVED, CELL, {"df"},
    ),
    "a damaged heap, found elsewhere": (
        aborted("free(): invalid pointer"), Died(cell=1, exit=None), aborted("corrupted size vs. prev_size"), Outcome.FAIL, None, set(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ANSWERS)
def test_answers(name: str) -> None:
    first, ending, cause, said, stopped_at, names = ANSWERS[name]
    assert answer(Failure.of(first, CELL), ending, cause) == (said, stopped_at, frozenset(names))


def test_what_is_not_the_notebooks_doing_is_no_answer() -> None:
    assert is_ours(InternalError(message="x"))
    assert is_ours(StartFailed(reason="x"))
    others: tuple[Ending, ...] = (
        Passed(),
        Died(cell=1, exit=None),
        cell_failed("E"),
        Cancelled(signal=2, cell=None),
    )
    assert not any(is_ours(ending) for ending in others)


# --- which runs are searched --------------------------------------------------------------------------------------------

SILENT = {Status.PASSED, Status.CANCELLED, Status.INTERNAL_ERROR, Status.START_FAILED}


@pytest.mark.parametrize("verdict", every_verdict(), ids=name_of)
@pytest.mark.parametrize("always", [False, True])
def test_which_runs_are_searched(verdict: Verdict, always: bool) -> None:
    reason = why_not_searched(verdict, always=always)
    if verdict.status in SILENT or verdict.cause is None:
        assert reason == ""
    elif verdict.cause.kind is K.OUTPUT_DIFFERS:
        assert reason == "", "a trial compares no outputs"
    elif verdict.crash_cell is None:
        assert reason == "no cell was running when it happened"
    elif verdict.status is Status.CELL_ERROR and not always:
        assert reason == (None if verdict.cause.kind in LIMIT_ERRORS else "")
    else:
        assert reason is None


@pytest.mark.parametrize(
    ("status", "kind", "reason"),
    [
        (Status.KERNEL_DIED, K.SEGFAULT, None),
        (Status.TIMEOUT, K.CELL_TIMEOUT, None),
        (Status.LIMIT_EXCEEDED, K.OUTPUT_FLOOD, None),
        (Status.CELL_ERROR, K.MEMORY_ERROR, None),
        (Status.CELL_ERROR, K.DISK_FULL, None),
        (Status.CELL_ERROR, K.EXCEPTION, ""),
        (Status.CELL_ERROR, K.STDIN, ""),
        (Status.CELL_ERROR, K.NETWORK_BLOCKED, ""),
    ],
)
def test_a_plain_exception_is_searched_for_only_when_asked(
    status: Status, kind: CauseKind, reason: str | None
) -> None:
    verdict = make_verdict(status, kind)
    assert why_not_searched(verdict, always=False) == reason
    assert why_not_searched(verdict, always=True) is None
