"""What makes two failures the same, and what a trial says of it. Pure; imports model and search's answers.

The same failure is the same cause kind, with the same signal or exit code, in the same crash cell. Memory that was overwritten has
several forms: where it lies decides whether glibc finds it and aborts, or whether it is used first and ends in a segmentation fault. In
the crash cell both count. An abort of glibc's counts in any cell: ``free()`` finds the damage wherever the layout of the heap has put it,
and to leave out a cell moves that place (``Failure.moves``).

Another death in the crash cell is another *form*: the search decides by what it sees whether that is the same failure.
"""

from __future__ import annotations

import re

from msgspec import Struct

from safe_exec.experiments.culprits.protocol import Outcome
from safe_exec.model.ending import (
    CellFailed,
    Died,
    Ending,
    InternalError,
    Passed,
    StartFailed,
    TimedOut,
)
from safe_exec.model.verdict import Cause, CauseKind, Confidence, Status, Verdict

LIMIT_ERRORS = frozenset(
    {
        CauseKind.MEMORY_ERROR,
        CauseKind.WORKER_OUT_OF_MEMORY,
        CauseKind.DISK_FULL,
        CauseKind.TOO_MANY_OPEN_FILES,
        CauseKind.TOO_MANY_PROCESSES,
        CauseKind.FILE_TOO_LARGE,
        CauseKind.OUTPUT_FLOOD,
    }
)
"""What a cell error must be caused by to be searched for without being asked."""
HEAP_WORDS = (
    "free()",
    "malloc",
    "double free",
    "corrupt",
    "munmap_chunk",
    "realloc()",
    "unlink_chunk",
)
"""glibc's last message about a heap that is not what it should be (malloc/malloc.c, ``malloc_printerr``)."""
MEMORY = frozenset(
    {CauseKind.OUT_OF_MEMORY, CauseKind.MEMORY_ERROR, CauseKind.WORKER_OUT_OF_MEMORY}
)
"""Ways in which memory runs out: what allocates decides whether it is refused or killed."""
TIMES = frozenset(
    {
        CauseKind.CELL_TIMEOUT,
        CauseKind.NOTEBOOK_TIMEOUT,
        CauseKind.UNRESPONSIVE,
        CauseKind.STDIN,
        CauseKind.OUTPUT_FLOOD,
    }
)
"""Ways in which a cell goes on for too long."""
DEATHS = frozenset(
    {
        CauseKind.OUT_OF_MEMORY,
        CauseKind.SEGFAULT,
        CauseKind.STACK_OVERFLOW,
        CauseKind.ABORT,
        CauseKind.ILLEGAL_INSTRUCTION,
        CauseKind.BUS_ERROR,
        CauseKind.FLOATING_POINT_EXCEPTION,
        CauseKind.EXIT,
        CauseKind.KILLED,
        CauseKind.TERMINATED,
        CauseKind.CPU_TIME,
        CauseKind.BAD_SYSTEM_CALL,
        CauseKind.UNKNOWN,
    }
)
"""Ways in which a kernel ends."""
ASKED_TO_EXIT = "asked to exit"
_MISSING = re.compile(r"name '([^']+)' is not defined")


class Failure(Struct, frozen=True, kw_only=True):
    """The failure that is searched for. ``error`` is the name of the exception where it is nothing more than that.

    ``missing`` are the names that a NameError missed.
    """

    kind: CauseKind
    signal: int | None
    exit_code: int | None
    cell: int
    error: str | None = None
    moves: bool = False
    missing: tuple[str, ...] = ()

    @classmethod
    def of(cls, cause: Cause, cell: int) -> Failure:
        """The failure of a run with this cause and crash cell."""
        return cls(
            kind=cause.kind,
            signal=_signal_and_exit_code(cause)[0],
            exit_code=_signal_and_exit_code(cause)[1],
            cell=cell,
            error=_exception_name(cause),
            missing=tuple(
                sorted(
                    {
                        name
                        for fact in cause.evidence
                        if fact.fact == "raised"
                        for name in _MISSING.findall(str(fact.value))
                    }
                )
            ),
            moves=_aborted_by_glibc(cause),
        )

    def is_same(self, cause: Cause | None, cell: int | None) -> bool:
        """Whether a trial with this cause in this cell failed the same way."""
        if cause is None:
            return False
        if self.moves and self.is_like(cause):
            return True
        return cell == self.cell and self.has_form(cause)

    def is_like(self, cause: Cause) -> bool:
        """Whether a cause is the failure's own: kind, signal or exit code, and the name of an exception."""
        if (cause.kind, *_signal_and_exit_code(cause)) != (self.kind, self.signal, self.exit_code):
            return False
        return (
            self.kind not in (CauseKind.EXCEPTION, CauseKind.ISOLATION)
            or _exception_name(cause) == self.error
        )

    def has_form(self, cause: Cause) -> bool:
        """Whether a cause is the failure's own, or one that is known to be another form of it."""
        if self.is_like(cause):
            return True
        if self.kind is CauseKind.SEGFAULT and _aborted_by_glibc(cause):
            return True
        if self.moves and cause.kind is CauseKind.SEGFAULT:
            return True
        # Nobody could look at the stack of one of them: it may have been full, or not.
        unseen = cause.kind is CauseKind.SEGFAULT and cause.confidence is not Confidence.CERTAIN
        return (
            self.kind is CauseKind.STACK_OVERFLOW
            and unseen
            and _signal_and_exit_code(cause)[0] == self.signal
        )


def _aborted_by_glibc(cause: Cause) -> bool:
    """Whether glibc found its heap damaged, and aborted."""
    message = " ".join(str(fact.value) for fact in cause.evidence if fact.fact == "last message")
    return cause.kind is CauseKind.ABORT and any(word in message for word in HEAP_WORDS)


def _signal_and_exit_code(cause: Cause) -> tuple[int | None, int | None]:
    """Signal and exit code. A kernel that was asked to end had the time to in the run, and is killed at the end of a hasty trial."""
    exit_requested = any(fact.fact == ASKED_TO_EXIT for fact in cause.evidence)
    return (None, None) if exit_requested else (cause.signal, cause.exit_code)


def _exception_name(cause: Cause) -> str | None:
    """The name of the exception, where there is one."""
    fact = next((str(fact.value) for fact in cause.evidence if fact.fact == "raised"), None)
    return fact.partition(":")[0] if fact is not None else None


def why_not_searched(verdict: Verdict, *, always: bool) -> str | None:
    """Why no search follows a run by itself, in a few words; ``None`` where one does. Silent (empty) where nobody would expect one."""
    if verdict.cause is None or verdict.status in (
        Status.PASSED,
        Status.CANCELLED,
        Status.INTERNAL_ERROR,
        Status.START_FAILED,
    ):
        return ""
    if verdict.crash_cell is None:
        return "no cell was running when it happened"
    if (
        verdict.status is Status.CELL_ERROR
        and verdict.cause.kind not in LIMIT_ERRORS
        and not always
    ):
        return ""
    return None


def answer(
    failure: Failure, ending: Ending, cause: Cause | None
) -> tuple[Outcome, int | None, frozenset[str]]:
    """What a trial says: the answer, the cell at which an unresolved one stopped, and the names it missed.

    A missing name teaches a dependency. Another death is recorded by whoever asked, and never followed.
    """
    cell = getattr(ending, "cell", None)
    if isinstance(ending, Passed):
        return Outcome.PASS, None, frozenset()
    missing = _missing(ending)
    # A NameError that the first run did not have comes from what was left out, whatever it is that is searched for.
    if failure.is_same(cause, cell) and not (
        failure.kind is CauseKind.EXCEPTION and missing - set(failure.missing)
    ):
        return Outcome.FAIL, None, frozenset()
    return Outcome.UNRESOLVED, cell, missing


def is_another_form(failure: Failure, ending: Ending, cause: Cause | None) -> bool:
    """Whether a trial ended in the crash cell in a way akin to the failure: the kernel died, memory or time ran out there."""
    if cause is None or getattr(ending, "cell", None) != failure.cell or failure.has_form(cause):
        return False
    if failure.kind in MEMORY and cause.kind in MEMORY:
        return True
    if failure.kind in TIMES and isinstance(ending, TimedOut):
        return cause.kind in TIMES
    return failure.kind in DEATHS and isinstance(ending, Died) and not ending.asked_to_exit


def _missing(ending: Ending) -> frozenset[str]:
    if not isinstance(ending, CellFailed) or ending.error.ename not in (
        "NameError",
        "UnboundLocalError",
    ):
        return frozenset()
    return frozenset(_MISSING.findall(ending.error.evalue))


def is_ours(ending: Ending) -> bool:
    """Whether a trial failed by our doing rather than the notebook's: no answer at all."""
    return isinstance(ending, InternalError | StartFailed)
