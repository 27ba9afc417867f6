"""Derives the answer to a query from the end of a trial, and tells whether to cache it. Pure."""

from __future__ import annotations

from msgspec import Struct
from msgspec.structs import replace

from safe_exec.experiments.culprits import failure as failures
from safe_exec.experiments.culprits.oracle.subject import Subject
from safe_exec.experiments.culprits.protocol import PASSED, Outcome, Query, Reply
from safe_exec.experiments.rerun import RerunFailed, peak_of, why_not_run
from safe_exec.model.ending import Cancelled, TimedOut
from safe_exec.model.limits import LimitName
from safe_exec.model.verdict import CauseKind
from safe_exec.trial.request import TrialRequest, TrialResult

# The sources of a location that name the very line; others saw the kernel some time before.
EXACT_SOURCES = frozenset({"traceback", "fault", "only line"})


class Judgement(Struct, frozen=True, kw_only=True):
    """The reply to a query, and whether it may be cached."""

    reply: Reply
    keep: bool


def judge(
    subject: Subject,
    query: Query,
    request: TrialRequest,
    result: TrialResult,
    *,
    crash: int | None,
    seconds: float,
) -> Judgement:
    """Return the answer of a trial that took ``seconds``.

    ``crash`` is the index of the crash cell if it is not that of the first run. Raises RerunFailed
    if the trial answers nothing.
    """
    if isinstance(result.ending, Cancelled) and not request.cancellation.signals:
        raise RerunFailed("a trial was cancelled without a signal")
    # A failure of the sandbox must not count as an answer.
    trouble = why_not_run(result)
    if trouble is not None:
        raise RerunFailed(f"a trial could not be run: {trouble}")
    # The same rules as for the first run, so that the causes are comparable.
    cause = subject.cause_of(result, request)
    failure = subject.failure if crash is None else replace(subject.failure, cell=crash)
    answer, stopped_at, names = failures.answer(failure, result.ending, cause)
    another_form = answer is Outcome.UNRESOLVED and failures.is_another_form(
        failure, result.ending, cause
    )
    cut = _was_cut(subject, query, request, result)
    location = result.location if _cell_of(result) == failure.cell else None
    recognised = isinstance(result.ending, TimedOut) and result.ending.recognised
    reply = Reply(
        answer=answer,
        from_scratch=not recognised or answer is not Outcome.FAIL,
        seconds=min(seconds, query.time_budget),
        stopped_at=stopped_at,
        names=names,
        peak=_peak(failure.kind, result),
        cut=cut,
        another_form=another_form,
        ended=PASSED if cause is None else cause.kind.value,
        line=location.line if location is not None else None,
        exact_line=location is not None and location.source in EXACT_SOURCES,
    )
    # What was only recognised is no answer to keep.
    keep = not cut and not recognised and not isinstance(result.ending, Cancelled)
    return Judgement(reply=reply, keep=keep)


def is_other_death(reply: Reply) -> bool:
    """Tell whether a trial ended in a failure, other than an exception, that answers no query."""
    return (
        reply.answer is Outcome.UNRESOLVED
        and not reply.cut
        and reply.ended not in (PASSED, CauseKind.EXCEPTION.value)
    )


def _was_cut(subject: Subject, query: Query, request: TrialRequest, result: TrialResult) -> bool:
    """Tell whether the search's budget, not the notebook's own timeout, ended a trial."""
    if isinstance(result.ending, Cancelled):
        return True
    notebook_timeout = subject.request.limits.timeout
    ours = notebook_timeout is None or (request.limits.timeout or 0.0) < notebook_timeout
    return (
        isinstance(result.ending, TimedOut)
        and result.ending.whole_notebook
        and ours
        and query.time_budget < float("inf")
    )


def _cell_of(result: TrialResult) -> int | None:
    return result.location.cell if result.location is not None else None


def _peak(kind: CauseKind, result: TrialResult) -> float | None:
    if kind is CauseKind.NOTEBOOK_TIMEOUT:
        return result.metrics.wall_seconds
    return peak_of(LimitName.CPU_TIME if kind is CauseKind.CPU_TIME else LimitName.MEMORY, result)
