"""Answers the search's questions by trials. May import trial, notebook, sandbox and the pure parts of this package.

Each trial is independent: the folder as it was before the first run, a fresh kernel, sandbox, control group, /dev/shm and /tmp, the original
limits. Cells get a deadline of their own, scaled to what they took before: one that hangs for want of another shall not cost the cell
timeout. Answers are kept by all that they depend on.
"""

from __future__ import annotations

import copy
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import psutil
from msgspec import Struct
from msgspec.structs import asdict, replace

from safe_exec._version import __version__
from safe_exec.experiments.culprits import failure as failures
from safe_exec.experiments.culprits.failure import TIMES, Failure
from safe_exec.experiments.culprits.protocol import PASSED, Answer, Ask, Reply
from safe_exec.experiments.rerun import SETTLE_SECONDS, NoTrial, enclosed, peak_of, why_not_run
from safe_exec.experiments.trial_cache import TrialCache, key_of
from safe_exec.experiments.workspace import Views
from safe_exec.model.ending import Cancelled, TimedOut
from safe_exec.model.limits import LimitName, Limits
from safe_exec.model.verdict import Cause, CauseKind
from safe_exec.trial.request import TrialRequest, TrialResult
from safe_exec.trial.run import Trial

SLACK_FACTOR, SLACK_SECONDS = 10.0, 5.0
"""A cell that took t seconds may take so many times t and so much more before a trial is given up."""
CRASH_SECONDS = 10.0
"""The least a crash cell is given: what killed it early in the first run may be gone, and what comes after takes its time."""

TWO_PROCESSORS = 2
ROOM_BYTES = 1 << 30
"""What must be free beside the limit on memory (beside as much again, where there is none) before a second kernel is started: it only starts."""

CauseOf = Callable[[TrialResult, TrialRequest], Cause | None]


SearchFailed = NoTrial
"""Trials cannot be run; the text says why."""


class Subject(Struct, frozen=True, kw_only=True):
    """What is searched: a stripped notebook, what its cells took (seconds by index), the failure, and how to run it.

    ``environment`` is what else the answers depend on (kernel, its packages, versions).
    """

    node: Any
    request: TrialRequest
    failure: Failure
    seconds: Mapping[int, float]
    environment: Mapping[str, object]
    cause_of: CauseOf


class Trialled(Struct, frozen=True, kw_only=True):
    """One trial as it is remembered: the reply, and what happened in a few words."""

    reply: Reply
    happened: str
    cached: bool = False


class _Started(Struct, frozen=True, kw_only=True):
    """A trial whose kernel is on its way, and the request that made its sandbox."""

    trial: Trial
    request: TrialRequest


class Oracle:
    """Runs trials of one subject."""

    def __init__(self, subject: Subject, views: Views, cache: TrialCache | None) -> None:
        self.subject, self.views, self.cache = subject, views, cache
        self.trials = 0
        self.cached = 0
        self.others: Counter[str] = Counter()
        self.forms: Counter[str] = Counter()
        self._folder = views.snapshot.fingerprint()
        self._next: _Started | None = None

    async def close(self) -> None:
        """End the kernel that was started for a question which did not come."""
        started, self._next = self._next, None
        if started is not None:
            await started.trial.discard()

    async def answer(
        self, ask: Ask, *, node: Any | None = None, crash: int | None = None
    ) -> Trialled:
        """The answer for a set of cells; with ``node`` for the whole of another notebook, whose ``crash`` cell is the crash cell.

        Raises SearchFailed when trials cannot be run, and asyncio's own when cancelled.
        """
        key = self._key(ask, node)
        known = None if ask.fresh or self.cache is None else self.cache.get(key)
        if known is not None and (found := _remembered(known)) is not None:
            self.cached += 1
            return found
        self.trials += 1
        trialled, keep = await self._run(ask, node, crash)
        if keep and self.cache is not None:
            self.cache.put(key, _kept(trialled))
        return trialled

    # --- one trial ----------------------------------------------------------------------------------------------

    async def _run(self, ask: Ask, other: Any | None, crash: int | None) -> tuple[Trialled, bool]:
        began = time.monotonic()
        started, self._next = self._next or self._start(), None
        request = self._request(started.request, ask, other)
        result = await started.trial.run(request)
        if isinstance(result.ending, Cancelled) and not request.cancellation.signals:
            raise SearchFailed("a trial was cancelled by nobody")
        return self._judge(result, request, ask, crash, time.monotonic() - began)

    def _start(self) -> _Started:
        """A kernel in a sandbox and a folder of its own, before anybody knows what it will run."""
        request = enclosed(self.subject.request, self.views, node=self.subject.node)
        request = replace(request, before_cells=self._start_next)
        trial = Trial(request)
        trial.warm()
        return _Started(trial=trial, request=request)

    async def _start_next(self) -> None:
        """The next trial's kernel starts while the cells of this one run, where there is room for two."""
        needed = (self.subject.request.limits.memory or ROOM_BYTES) + ROOM_BYTES
        room = (
            os.cpu_count() or 1
        ) >= TWO_PROCESSORS and psutil.virtual_memory().available > needed
        if self._next is None and room:
            self._next = self._start()

    def _request(self, template: TrialRequest, ask: Ask, other: Any | None) -> TrialRequest:
        node = copy.deepcopy(self.subject.node if other is None else other)
        deadlines = (
            {id(cell): self._deadline(index) for index, cell in enumerate(node.cells)}
            if other is None
            else {}
        )
        whole = template.limits.timeout
        allowed = max(1.0, ask.allowed - SETTLE_SECONDS)

        def cell_limits(cell: Any) -> Limits:
            limits = template.cell_limits(cell)
            deadline = deadlines.get(id(cell))
            if deadline is None or (
                limits.cell_timeout is not None and limits.cell_timeout <= deadline
            ):
                return limits
            return replace(limits, cell_timeout=deadline, interrupt_grace=0.0)

        return replace(
            template,
            node=node,
            cells=frozenset(ask.cells) if other is None else None,
            limits=replace(
                template.limits, timeout=allowed if whole is None else min(whole, allowed)
            ),
            cell_limits=cell_limits,
            started=time.monotonic(),
        )

    def _deadline(self, index: int) -> float | None:
        """How long a cell may take in a trial; ``None`` for as long as in the first run."""
        failure = self.subject.failure
        if index == failure.cell and failure.kind in TIMES:
            return None
        least = CRASH_SECONDS if index == failure.cell else 0.0
        return max(least, SLACK_FACTOR * self.subject.seconds.get(index, 0.0) + SLACK_SECONDS)

    def _judge(
        self,
        result: TrialResult,
        request: TrialRequest,
        ask: Ask,
        crash: int | None,
        seconds: float,
    ) -> tuple[Trialled, bool]:
        """The answer, and whether it may be remembered."""
        trouble = why_not_run(result)
        if trouble is not None:
            raise SearchFailed(f"a trial could not be run: {trouble}")
        cause = self.subject.cause_of(result, request)
        failure = (
            self.subject.failure if crash is None else replace(self.subject.failure, cell=crash)
        )
        answer, stopped_at, names = failures.answer(failure, result.ending, cause)
        another_form = answer is Answer.UNRESOLVED and failures.is_another_form(
            failure, result.ending, cause
        )
        cut = self._was_cut(result, request, ask)
        happened = cause.summary if cause is not None else "passed"
        if (
            answer is Answer.UNRESOLVED
            and not cut
            and cause is not None
            and cause.kind is not CauseKind.EXCEPTION
        ):
            (self.forms if another_form else self.others)[cause.kind.value] += 1
        reply = Reply(
            answer=answer,
            seconds=min(seconds, ask.allowed),
            stopped_at=stopped_at,
            names=names,
            peak=self._peak(result),
            cut=cut,
            another_form=another_form,
            ended=PASSED if cause is None else cause.kind.value,
        )
        return Trialled(reply=reply, happened=happened), not cut and not isinstance(
            result.ending, Cancelled
        )

    def _was_cut(self, result: TrialResult, request: TrialRequest, ask: Ask) -> bool:
        """Whether a trial ended for the search's budget and not for the notebook's own time."""
        if isinstance(result.ending, Cancelled):
            return True
        whole = self.subject.request.limits.timeout
        ours = whole is None or (request.limits.timeout or 0.0) < whole
        return (
            isinstance(result.ending, TimedOut)
            and result.ending.whole
            and ours
            and ask.allowed < float("inf")
        )

    def _peak(self, result: TrialResult) -> float | None:
        kind = self.subject.failure.kind
        if kind is CauseKind.NOTEBOOK_TIMEOUT:
            return result.ledger.wall_seconds
        return peak_of(
            LimitName.CPU_TIME if kind is CauseKind.CPU_TIME else LimitName.MEMORY, result
        )

    # --- what an answer depends on ------------------------------------------------------------------------------

    def _key(self, ask: Ask, node: Any | None) -> str:
        of = self.subject.node if node is None else node
        chosen = set(ask.cells)
        cells = [
            (
                index,
                cell.source,
                cell.metadata.get("tags", []),
                cell.metadata.get("safe_exec", {}).get("limits"),
            )
            for index, cell in enumerate(of.cells)
            if cell.cell_type == "code" and (node is not None or index in chosen)
        ]
        request = self.subject.request
        return key_of(
            {
                "safe_exec": __version__,
                "cells": cells,
                "limits": request.limits.as_dict(),
                "isolation": asdict(request.plan.isolation),
                "allow_errors": request.allow_errors,
                "folder": self._folder,
                "cwd": str(request.cwd),
                "failure": str(self.subject.failure),
                "environment": self.subject.environment,
            }
        )


def _kept(trialled: Trialled) -> dict[str, Any]:
    reply = trialled.reply
    return {
        "answer": reply.answer.value,
        "seconds": reply.seconds,
        "stopped_at": reply.stopped_at,
        "names": sorted(reply.names),
        "peak": reply.peak,
        "another_form": reply.another_form,
        "ended": reply.ended,
        "happened": trialled.happened,
    }


def _remembered(known: Mapping[str, Any]) -> Trialled | None:
    """What an entry of the cache says; ``None`` for one that is not ours. It costs nothing to ask again."""
    try:
        reply = Reply(
            answer=Answer(known["answer"]),
            seconds=0.0,
            stopped_at=known["stopped_at"],
            names=frozenset(known["names"]),
            peak=known["peak"],
            another_form=bool(known["another_form"]),
            ended=str(known["ended"]),
        )
        return Trialled(reply=reply, happened=str(known["happened"]), cached=True)
    except (KeyError, ValueError, TypeError):
        return None
