"""What is said of workers that were killed in earlier cells, and of memory that child processes had."""

from __future__ import annotations

from typing import Any

import msgspec.structs
import pytest

from safe_exec.diagnosis.rules import Context, find_cause
from safe_exec.model.ending import (
    CellError,
    CellFailed,
    Died,
    Ending,
    ExitStatus,
    LimitHit,
    StartFailed,
    TerminationReason,
    TimedOut,
)
from safe_exec.model.evidence import ActivityObservation, Evidence
from safe_exec.model.limits import LimitName, Limits
from safe_exec.model.verdict import CauseKind, CellRecord, CellStatus, Confidence

MIB = 1 << 20
CELLS = tuple(
    CellRecord(index=2 * n, code_index=n, id=None, status=CellStatus.PASSED) for n in range(4)
)
FAILED = CellFailed(
    cell=6, error=CellError(ename="FileNotFoundError", evalue="result.txt", traceback=())
)
KILLED = Died(cell=6, exit=ExitStatus(9))


def context(ending: Ending, **facts: Any) -> Context:
    error = getattr(ending, "error", None)
    evidence = Evidence(**{"error": error, "exit": getattr(ending, "exit", None), **facts})
    return Context(
        ending=ending, evidence=evidence, limits=Limits(memory=100 * MIB), cells=CELLS, current=6
    )


@pytest.mark.parametrize(
    ("ending", "kind"),
    [
        (FAILED, CauseKind.EXCEPTION),
        (
            TimedOut(cell=6, whole_notebook=False, allowed=3.0, answered=True),
            CauseKind.CELL_TIMEOUT,
        ),
        (Died(cell=6, exit=ExitStatus(11)), CauseKind.SEGFAULT),
    ],
    ids=["error", "timeout", "death"],
)
def test_a_worker_killed_earlier_is_named_and_changes_neither_kind_nor_confidence(
    ending: Ending, kind: CauseKind
) -> None:
    plain = find_cause(context(ending, oom_kills=3, oom_kills_cell=0))
    cause = find_cause(
        context(ending, oom_kills=3, oom_kills_cell=0, oom_kills_earlier=((0, 1), (4, 2)))
    )
    assert plain is not None and cause is not None
    assert (
        (cause.kind, cause.confidence) == (plain.kind, plain.confidence) == (kind, cause.confidence)
    )
    assert (
        "3 processes" in cause.summary
        and "killed for memory in code cell 1 and code cell 3" in cause.summary
    )
    assert cause.advice.startswith(
        "Look at code cell 1 and code cell 3 first"
    ) and cause.advice.endswith(plain.advice)
    assert [fact.value for fact in cause.evidence if "killed by the system in" in fact.fact] == [
        1,
        2,
    ]


INTERRUPTED = TimedOut(cell=6, whole_notebook=False, allowed=3.0, answered=True)
FAILED_PROGRAM = CellError(ename="CalledProcessError", evalue="status 1", traceback=())
WAITS = ActivityObservation(state="S", cpu_share=0.0, syscall="wait4", stack=(), children=1)
READS = ActivityObservation(state="S", cpu_share=0.0, syscall="read", stack=())
COMPUTES = ActivityObservation(
    state="R", cpu_share=1.0, syscall=None, stack=(), runnable=1.0, window=0.4
)


@pytest.mark.parametrize(
    ("observation", "error", "says"),
    [
        (WAITS, None, "and the cell waited for it forever"),
        (WAITS, FAILED_PROGRAM, "and the cell waited for it forever"),
        (READS, FAILED_PROGRAM, "and its error came when its 3.0 s were over"),
        (COMPUTES, FAILED_PROGRAM, "and its error came when its 3.0 s were over"),
        (COMPUTES, None, "and the cell ran past its 3.0 s"),
    ],
)
def test_a_cell_waits_for_a_killed_worker_only_if_it_was_seen_waiting(
    observation: ActivityObservation, error: CellError | None, says: str
) -> None:
    cause = find_cause(
        context(
            INTERRUPTED,
            observation=observation,
            error=error,
            oom_kills=1,
            oom_kills_cell=1,
            oom_kills_in_time=1,
        )
    )
    assert cause is not None and cause.kind is CauseKind.WORKER_OUT_OF_MEMORY
    assert says in cause.summary
    assert cause.activity is None or "waited" in cause.summary or error is None


def test_a_worker_killed_after_the_time_was_up_is_not_why_it_was_up() -> None:
    cause = find_cause(
        context(INTERRUPTED, observation=WAITS, oom_kills=1, oom_kills_cell=1, oom_kills_in_time=0)
    )
    assert cause is not None and cause.kind is CauseKind.CELL_TIMEOUT


def test_one_worker_is_one() -> None:
    cause = find_cause(context(FAILED, oom_kills=1, oom_kills_cell=0, oom_kills_earlier=((0, 1),)))
    assert (
        cause is not None and "a process that the notebook had started was killed" in cause.summary
    )


def test_where_all_cells_ran_the_kill_itself_is_the_cause_and_is_named_once() -> None:
    ending = LimitHit(limit=LimitName.MEMORY, cell=0)
    cause = find_cause(context(ending, oom_kills=1, oom_kills_cell=0, oom_kills_earlier=((0, 1),)))
    assert cause is not None and cause.kind is CauseKind.WORKER_OUT_OF_MEMORY
    assert "earlier" not in cause.summary


WATCHED = {"termination": TerminationReason.MEMORY, "memory_peak": 110 * MIB}
COUNTED = {"oom_kills": 1, "oom_kills_cell": 1, "memory_peak": 100 * MIB}


@pytest.mark.parametrize("facts", [WATCHED, COUNTED], ids=["watchdog", "control group"])
@pytest.mark.parametrize(
    ("children", "speaks"),
    [(None, False), (10 * MIB, False), (40 * MIB, False), (70 * MIB, True), (105 * MIB, True)],
)
def test_the_advice_speaks_of_the_processes_that_had_the_memory(
    facts: dict[str, Any], children: int | None, speaks: bool
) -> None:
    cause = find_cause(context(KILLED, memory_children=children, **facts))
    assert cause is not None and cause.kind is CauseKind.OUT_OF_MEMORY
    assert ("processes that the notebook had started" in cause.advice) == speaks
    assert ("load and keep less" in cause.advice) != speaks
    assert (
        any(
            fact.fact == "memory of child processes" and fact.value == children
            for fact in cause.evidence
        )
        == speaks
    )


def test_a_kill_by_what_may_have_been_counted_twice_is_not_certain() -> None:
    sure = find_cause(context(KILLED, **WATCHED))
    doubtful = find_cause(context(KILLED, **WATCHED, memory_upper_bound=True))
    assert sure is not None and doubtful is not None
    assert (sure.confidence, doubtful.confidence) == (Confidence.CERTAIN, Confidence.LIKELY)
    assert "counted twice" in doubtful.summary and "counted twice" not in sure.summary
    assert (
        msgspec.structs.replace(
            doubtful, confidence=sure.confidence, summary=sure.summary, evidence=sure.evidence
        )
        == sure
    )


def test_a_kernel_that_passes_a_limit_at_its_start_says_which() -> None:
    ending = StartFailed(reason="the kernel ended before it was ready: SIGKILL", exit=ExitStatus(9))
    cause = find_cause(context(ending, termination=TerminationReason.MEMORY))
    assert cause is not None and cause.kind is CauseKind.KERNEL_START_FAILED
    assert "limit of memory" in cause.summary and "--memory" in cause.advice
