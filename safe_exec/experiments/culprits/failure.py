"""Decides whether two failures are the same, and evaluates the ending of a trial. Pure.

Two failures are the same if they have the same cause kind, the same signal or exit code, and the
same crash cell. Corrupted memory shows in several forms. Depending on its location, glibc may find
the damage and abort, or the program may use it first and end in a segmentation fault. In the crash
cell both count as the same failure. An abort by glibc counts in any cell: ``free()`` finds the
damage wherever the heap layout has put it, and leaving out a cell moves that place
(``Failure.moves``).

Any other death in the crash cell is another *form*. The search decides from its own observations
whether such a form is the same failure.
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

# The causes for which a cell error is searched without a request for it.
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
# glibc's last message about a heap that is not what it should be (malloc/malloc.c,
# `malloc_printerr`).
HEAP_WORDS = (
    "free()",
    "malloc",
    "double free",
    "corrupt",
    "munmap_chunk",
    "realloc()",
    "unlink_chunk",
)
# Ways in which memory runs out: what allocates decides whether it is refused or killed.
MEMORY = frozenset(
    {CauseKind.OUT_OF_MEMORY, CauseKind.MEMORY_ERROR, CauseKind.WORKER_OUT_OF_MEMORY}
)
# Ways in which a cell goes on for too long.
TIMES = frozenset(
    {
        CauseKind.CELL_TIMEOUT,
        CauseKind.NOTEBOOK_TIMEOUT,
        CauseKind.UNRESPONSIVE,
        CauseKind.STDIN,
        CauseKind.OUTPUT_FLOOD,
    }
)
# Ways in which a kernel ends.
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
# The fact by which a cause says that the kernel was asked to exit.
ASKED_TO_EXIT = "asked to exit"
_MISSING = re.compile(r"name '([^']+)' is not defined")


class Failure(Struct, frozen=True, kw_only=True):
    """The failure that is searched for.

    ``error`` is the name of the exception if the cause is an exception and nothing more.
    ``missing`` are the names that a NameError reported. ``moves`` is true if the failure may occur
    in any cell.
    """

    kind: CauseKind
    signal: int | None
    exit_code: int | None
    cell: int
    # The name of the exception, if the cause is an exception and nothing more.
    error: str | None = None
    # Heap corruption that glibc found may strike in any cell, so the crash cell is not compared.
    moves: bool = False
    # The names that a NameError reported.
    missing: tuple[str, ...] = ()

    @classmethod
    def of(cls, cause: Cause, cell: int) -> Failure:
        """Return the failure of a run with this cause and crash cell."""
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
        """Tell whether a trial with this cause in this cell failed the same way."""
        if cause is None:
            return False
        if self.moves and self.is_like(cause):
            return True
        return cell == self.cell and self.has_form(cause)

    def is_like(self, cause: Cause) -> bool:
        """Tell whether kind, signal or exit code, and exception name are those of the failure."""
        if (cause.kind, *_signal_and_exit_code(cause)) != (self.kind, self.signal, self.exit_code):
            return False
        return (
            self.kind not in (CauseKind.EXCEPTION, CauseKind.ISOLATION)
            or _exception_name(cause) == self.error
        )

    def has_form(self, cause: Cause) -> bool:
        """Tell whether a cause is the failure itself or a known form of it."""
        if self.is_like(cause):
            return True
        if self.kind is CauseKind.SEGFAULT and _aborted_by_glibc(cause):
            return True
        if self.moves and cause.kind is CauseKind.SEGFAULT:
            return True
        # The stack of one of the two could not be read: it may have been full, or not.
        unseen = cause.kind is CauseKind.SEGFAULT and cause.confidence is not Confidence.CERTAIN
        return (
            self.kind is CauseKind.STACK_OVERFLOW
            and unseen
            and _signal_and_exit_code(cause)[0] == self.signal
        )


def _aborted_by_glibc(cause: Cause) -> bool:
    """Tell whether glibc found its heap corrupted and aborted."""
    message = " ".join(str(fact.value) for fact in cause.evidence if fact.fact == "last message")
    return cause.kind is CauseKind.ABORT and any(word in message for word in HEAP_WORDS)


def _signal_and_exit_code(cause: Cause) -> tuple[int | None, int | None]:
    """Return signal and exit code; both ``None`` for a kernel that was asked to exit."""
    # In the first run such a kernel has time to exit; at the end of a hasty trial it is killed.
    exit_requested = any(fact.fact == ASKED_TO_EXIT for fact in cause.evidence)
    return (None, None) if exit_requested else (cause.signal, cause.exit_code)


def _exception_name(cause: Cause) -> str | None:
    fact = next((str(fact.value) for fact in cause.evidence if fact.fact == "raised"), None)
    return fact.partition(":")[0] if fact is not None else None


def why_not_searched(verdict: Verdict, *, always: bool) -> str | None:
    """Return the reason for not searching after a run, or ``None`` if a search follows.

    The reason is empty if no user would expect a search.
    """
    if verdict.cause is None or verdict.status in (
        Status.PASSED,
        Status.CANCELLED,
        Status.INTERNAL_ERROR,
        Status.START_FAILED,
    ):
        return ""
    # All cells ran: trials, which compare no outputs, would pass.
    if verdict.cause.kind is CauseKind.OUTPUT_DIFFERS:
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
    """Return a trial's outcome, the cell at which it stopped unresolved, and the undefined names.

    An undefined name reveals a dependency.
    """
    cell = getattr(ending, "cell", None)
    if isinstance(ending, Passed):
        return Outcome.PASS, None, frozenset()
    # A NameError tells which definition the set lacks.
    missing = _missing(ending)
    # A NameError that the first run did not have comes from what was left out, whatever it is that
    # is searched for.
    if failure.is_same(cause, cell) and not (
        failure.kind is CauseKind.EXCEPTION and missing - set(failure.missing)
    ):
        return Outcome.FAIL, None, frozenset()
    return Outcome.UNRESOLVED, cell, missing


def is_another_form(failure: Failure, ending: Ending, cause: Cause | None) -> bool:
    """Tell whether a trial ended in the crash cell in a way similar to the failure.

    Similar means that the kernel died too, or that memory or time ran out there too.
    """
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
    """Tell whether safe-exec, and not the notebook, made a trial fail.

    Such a trial says nothing about its cells.
    """
    return isinstance(ending, InternalError | StartFailed)
