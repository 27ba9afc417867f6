"""Answers the search's queries by running trials.

Trials are independent of each other. Each gets the folder as it was before the first run, a fresh
kernel, sandbox, control group, /dev/shm and /tmp, and the original limits. Each cell gets a
deadline derived from its earlier run time: a cell that hangs because another one is missing must
not cost the whole cell timeout. A hang that is searched for is recognised by its picture, and the
trial goes on to confirm that (``hang_runs.py``). Where forks of a live kernel can tell the failure,
they answer first (``forks.py``). Answers of trials are cached under everything that they depend on.

May import trial, notebook, sandbox and the pure parts of this package.
"""

from __future__ import annotations

import asyncio
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
from safe_exec.cache import key_of
from safe_exec.diagnosis.verdict import without_plumbing
from safe_exec.experiments.culprits import failure as failures
from safe_exec.experiments.culprits.companion import Companion
from safe_exec.experiments.culprits.failure import TIMES, Failure
from safe_exec.experiments.culprits.fork_answers import ForkAnswer, ForkCell
from safe_exec.experiments.culprits.forks import Forks
from safe_exec.experiments.culprits.hang import HangPicture, line_in, seconds_until_recognised
from safe_exec.experiments.culprits.hang_runs import HangRun, HangRuns, end, is_done
from safe_exec.experiments.culprits.protocol import PASSED, Outcome, Query, Reply
from safe_exec.experiments.rerun import (
    SETTLE_SECONDS,
    RerunFailed,
    isolated_request,
    peak_of,
    why_not_run,
)
from safe_exec.experiments.trial_cache import TrialCache
from safe_exec.experiments.workspace import WorkspaceFactory
from safe_exec.kernel.allocation_file import AllocationFile
from safe_exec.model.ending import Cancelled, TimedOut
from safe_exec.model.evidence import ActivityObservation
from safe_exec.model.limits import LimitName, Limits
from safe_exec.model.verdict import Cause, CauseKind
from safe_exec.trial.request import HangRecognition, TrialRequest, TrialResult
from safe_exec.trial.run import Trial

# A cell that took t seconds may take so many times t and so much more before a trial is given up.
SLACK_FACTOR, SLACK_SECONDS = 10.0, 5.0
# The least a crash cell is given: what killed it early in the first run may be gone, and what comes
# after takes its time.
CRASH_SECONDS = 10.0

# With a single processor a second kernel would only slow down the running trial.
TWO_PROCESSORS = 2
# What must be free beside the limit on memory (beside as much again, where there is none) before a
# second kernel is started: it only starts.
ROOM_BYTES = 1 << 30

# The sources of a location that name the very line; others saw the kernel some time before.
EXACT_SOURCES = frozenset({"traceback", "fault", "only line"})

CauseOf = Callable[[TrialResult, TrialRequest], Cause | None]

# The kinds of trials that go on when their hang is recognised.
OF_CELLS, OF_STATEMENTS = "cells", "statements"


class Subject(Struct, frozen=True, kw_only=True):
    """The notebook to search.

    Its stripped form, each cell's seconds, the failure, and how to run it.

    ``environment`` is whatever else the answers depend on: the kernel, its packages, versions.
    """

    node: Any
    request: TrialRequest
    failure: Failure
    # The cells' run times in the first run; the deadlines of a trial's cells derive from them.
    seconds: Mapping[int, float]
    # Whatever else the answers depend on: the kernel, its packages, versions.
    environment: Mapping[str, object]
    # The diagnosis is passed in, so that this module does not depend on it.
    cause_of: CauseOf
    # The picture of the hang that is searched for, if the failure is one.
    hang: HangPicture | None = None


class CachedAnswer(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An answer as stored in the cache; ``seconds`` is the cost of its trial."""

    answer: Outcome
    seconds: float
    stopped_at: int | None
    names: tuple[str, ...]
    peak: float | None
    another_form: bool
    ended: str
    line: int | None
    exact_line: bool


class ObservedTrial(Struct, frozen=True, kw_only=True):
    """A trial that was run to observe its memory, and its request."""

    result: TrialResult
    request: TrialRequest


class _Watch:
    """Records that a trial's hang was recognised and that the trial continues."""

    def __init__(self, has_room: Callable[[], bool]) -> None:
        self._has_room = has_room
        self.recognised = asyncio.Event()
        self.observation: ActivityObservation | None = None

    def goes_on(self, observation: ActivityObservation) -> bool:
        """Tell whether the trial may continue."""
        if not self._has_room():
            return False
        self.observation = observation
        self.recognised.set()
        return True


class _Started(Struct, frozen=True, kw_only=True):
    """A trial whose kernel is starting, and the request that created its sandbox."""

    trial: Trial
    request: TrialRequest


class Oracle:
    """Runs the trials of one subject."""

    def __init__(
        self, subject: Subject, workspaces: WorkspaceFactory, cache: TrialCache | None
    ) -> None:
        self.subject, self.workspaces, self.cache = subject, workspaces, cache
        self.trials = 0
        self.cached = 0
        self.others: Counter[str] = Counter()
        self.forms: Counter[str] = Counter()
        # The hangs that were recognised early, the sets of cells concerned, and the trials that
        # contradicted one of them by running to the end.
        self.recognised = 0
        self.disagreements = 0
        self.recognises = True
        self._recognised_sets: set[tuple[ForkCell, ...]] = set()
        self._hang_runs = HangRuns(subject.request.cancellation)
        # The answers that came from forks, and the sets that failed in one; whether such an answer,
        # or a recognised hang, has led the search astray.
        self.forked = 0
        self.misled = False
        self._forked_sets: set[tuple[ForkCell, ...]] = set()
        self._forks = Forks(subject, workspaces)
        self._folder = workspaces.snapshot.fingerprint()
        self._next: _Started | None = None
        self._companion: Companion | None = None

    async def close(self) -> None:
        """End all kernels: of the forks, of trials that go on, and of a query that never came."""
        await self._forks.close()
        await self._hang_runs.close()
        await self._end_companion()
        started, self._next = self._next, None
        if started is not None:
            await started.trial.discard()

    async def answer(
        self,
        query: Query,
        *,
        node: Any | None = None,
        crash: int | None = None,
        origins: tuple[int, ...] | None = None,
        hang_seconds: float | None = None,
    ) -> Reply:
        """Answer a query from the cache, in a fork or by a trial.

        With ``node``, the trial runs the whole of that other notebook, in which ``crash`` is the
        index of the crash cell. If its cells are parts of the notebook's, ``origins`` are the
        indexes of those. ``hang_seconds`` is the time of the crash cell if it is to be less than
        its limit. Raises RerunFailed if trials cannot be run.
        """
        # The key covers everything that an answer depends on, so entries never become stale.
        key = self._key(query, node)
        entry = None if query.fresh or self.cache is None else self.cache.get(key, CachedAnswer)
        if entry is not None:
            self.cached += 1
            return _from_cache(entry)
        start_time = time.monotonic()
        cells = self._cells_of(query, node, origins)
        if origins is None:
            await self._accompany(query, may_ask=not query.fresh and self._forks.may_answer(cells))
        forked = None if query.fresh else await self._ask_fork(cells, query.time_budget)
        if forked is not None and self._is_believed(forked):
            if forked.outcome is Outcome.FAIL:
                self._forked_sets.add(cells)
            return self._from_fork(query, forked, time.monotonic() - start_time)
        reply, keep = (
            await self._confirm_hang(query, cells, start_time)
            or (origins is None and await self._from_companion(query, cells, start_time))
            or await self._run(
                query, node, crash, cells, start_time=start_time, hang_seconds=hang_seconds
            )
        )
        await self._compare(query, reply, cells, forked, of_cells=origins is None)
        if keep and self.cache is not None:
            self.cache.put(key, _to_cache(reply))
        return reply

    async def observe(self, node: Any, time_budget: float) -> ObservedTrial | None:
        """Run a notebook once more with a thorough census of the memory, and recorded allocations.

        ``None`` if it cannot be run. It answers no query: recording takes time and memory.
        """
        try:
            template = isolated_request(self.subject.request, self.workspaces, node=node)
            timeout = template.limits.timeout
            budget = time_budget if timeout is None else min(timeout, time_budget)
            # The reader of the record is native code, and runs outside of the walls.
            records = not template.plan.walls
            scratch = self.workspaces.snapshot.scratch
            with AllocationFile(scratch, records=records) as allocations:
                limits = replace(template.limits, timeout=budget)
                request = replace(template, allocations=allocations, limits=limits)
                result = await Trial(request).run()
        except (OSError, RerunFailed):
            # No space for the file or the folder. The culprits are known all the same.
            return None
        return ObservedTrial(result=result, request=template)

    def recognition_seconds(self) -> float | None:
        """Return how long a trial takes to recognise the hang; ``None`` if it runs to the end."""
        subject = self.subject
        if subject.hang is None or not self.recognises:
            return None
        cell = subject.node.cells[subject.failure.cell]
        return seconds_until_recognised(subject.request.cell_limits(cell).cell_timeout)

    def hang_timeout(self) -> float | None:
        """Return the timeout of the crash cell in seconds; ``None`` without one."""
        subject = self.subject
        return subject.request.cell_limits(subject.node.cells[subject.failure.cell]).cell_timeout

    def is_recognised_only(self, cells: tuple[int, ...]) -> bool:
        """Tell whether the hang of a set was recognised and never confirmed by a run to the end."""
        return tuple(self._forks.cells_of(cells)) in self._recognised_sets

    def is_hanging(self, cells: tuple[int, ...]) -> bool:
        """Tell whether a trial of a set hangs and still runs."""
        return self._hang_runs.has(tuple(self._forks.cells_of(cells)))

    def is_forked_only(self, cells: tuple[int, ...]) -> bool:
        """Tell whether a set failed in a fork, and never in a run from scratch."""
        return tuple(self._forks.cells_of(cells)) in self._forked_sets

    @property
    def fork_note(self) -> str | None:
        """Why forks gave no answers, or not from all states."""
        return self._forks.note

    def _cells_of(
        self, query: Query, node: Any | None, origins: tuple[int, ...] | None
    ) -> tuple[ForkCell, ...]:
        """Return the cells of a query as a fork runs them; a confirmation runs the same ones."""
        if origins is None or node is None:
            return tuple(self._forks.cells_of(query.cells))
        return tuple(self._forks.cells_of(origins, [str(cell.source) for cell in node.cells]))

    async def _ask_fork(self, cells: tuple[ForkCell, ...], time_budget: float) -> ForkAnswer | None:
        answer = await self._forks.answer(cells, time_budget)
        if self._forks.is_running and self._companion is None:
            # The result is confirmed from scratch: that kernel can start meanwhile.
            await self._start_next()
        return answer

    # --- the run that goes along with the forks ---------------------------------------------------

    async def _accompany(self, query: Query, *, may_ask: bool) -> None:
        """Run the cells from scratch beside the forks, if their answer may need it.

        ``may_ask``: forks will be asked.
        """
        companion = self._companion
        if companion is not None and query.best and not companion.fits(query.best):
            # The result will be another set.
            await self._end_companion()
        if not may_ask or self._forks.has_failed:
            return
        if companion is not None and companion.fits(query.cells):
            return
        await self._end_companion()
        if not self._has_room():
            return
        started, self._next = self._next or self._start(), None
        companion = self._companion = Companion(query.cells, self.subject.seconds)
        companion.request = replace(
            self._request(started.request, query, None),
            cells=None,
            is_wanted=companion.is_wanted,
            before_cells=None,
        )
        companion.task = asyncio.create_task(started.trial.run(companion.request))

    async def _from_companion(
        self, query: Query, cells: tuple[ForkCell, ...], start_time: float
    ) -> tuple[Reply, bool] | None:
        """Let the companion run these cells to the end; ``None`` if it cannot."""
        companion, self._companion = self._companion, None
        if companion is None or companion.task is None or companion.request is None:
            return None
        if not companion.fits(query.cells):
            await end(companion.task)
            return None
        companion.decide(query.cells)
        self.trials += 1
        await self._start_next()
        if not await is_done(companion.task, self.subject.request.cancellation):
            return None
        return self._judge(
            companion.task.result(),
            companion.request,
            query,
            None,
            cells,
            seconds=time.monotonic() - start_time,
        )

    async def _end_companion(self) -> None:
        companion, self._companion = self._companion, None
        if companion is not None and companion.task is not None:
            await end(companion.task)

    def _is_believed(self, answer: ForkAnswer) -> bool:
        """Tell whether an answer from a fork counts without a trial from scratch."""
        # Before any run has failed in a fork, nobody knows whether this failure can.
        return self._forks.has_failed or bool(answer.names)

    def _from_fork(self, query: Query, answer: ForkAnswer, seconds: float) -> Reply:
        self.forked += 1
        return Reply(
            answer=answer.outcome,
            seconds=min(seconds, query.time_budget),
            stopped_at=answer.stopped_at,
            names=answer.names,
            ended=answer.ended,
            from_scratch=False,
            line=answer.line,
        )

    async def _compare(
        self,
        query: Query,
        reply: Reply,
        cells: tuple[ForkCell, ...],
        forked: ForkAnswer | None,
        *,
        of_cells: bool,
    ) -> None:
        """Compare a complete run with the earlier answer of a fork or of a recognised hang."""
        if reply.cut:
            return
        fails = reply.answer is Outcome.FAIL or reply.another_form
        if forked is not None and fails != (forked.outcome is Outcome.FAIL):
            self.disagreements += 1
            await self._forks.end("a run from scratch ended in another way")
        if not query.fresh:
            return
        if cells in self._recognised_sets and not fails:
            # The cell is slow and does not hang: what looks the same here is not the same.
            self.disagreements += 1
            if of_cells:
                self.recognises, self.misled = False, True
        if cells in self._forked_sets and not fails:
            self.disagreements += 1
            self.misled = True
            await self._forks.end("a run from scratch ended in another way")
        self._recognised_sets.discard(cells)
        self._forked_sets.discard(cells)

    # --- one trial --------------------------------------------------------------------------------

    async def _run(
        self,
        query: Query,
        other: Any | None,
        crash: int | None,
        cells: tuple[ForkCell, ...],
        *,
        start_time: float,
        hang_seconds: float | None,
    ) -> tuple[Reply, bool]:
        self.trials += 1
        # Take the prestarted kernel, so that its sandbox is never used twice.
        started, self._next = self._next or self._start(), None
        watch = _Watch(self._has_room)
        request = self._request(started.request, query, other)
        cell = self.subject.failure.cell if crash is None else crash
        request = replace(
            request,
            # The result is confirmed by a run to the end.
            hang=None if query.fresh else self._recognition(cell, watch),
            cell_limits=_with_timeout(request.cell_limits, request.node.cells[cell], hang_seconds),
        )
        task = asyncio.create_task(started.trial.run(request))
        recognised = asyncio.create_task(watch.recognised.wait())
        try:
            await asyncio.wait({task, recognised}, return_when=asyncio.FIRST_COMPLETED)
        except BaseException:
            task.cancel()
            await asyncio.wait({task})
            raise
        finally:
            recognised.cancel()
        seconds = time.monotonic() - start_time
        if not task.done() and watch.observation is not None:
            kind = OF_CELLS if other is None else OF_STATEMENTS
            await self._hang_runs.add(kind, cells, HangRun(task=task, request=request, crash=crash))
            self._note_recognised(cells)
            line = line_in(without_plumbing(watch.observation.stack), cell)
            return self._of_picture(query, line, seconds), False
        return self._judge(await task, request, query, crash, cells, seconds=seconds)

    async def _confirm_hang(
        self,
        query: Query,
        cells: tuple[ForkCell, ...],
        start_time: float,
    ) -> tuple[Reply, bool] | None:
        """Wait for the end of a running trial of these cells; ``None`` if there is none."""
        run = await self._hang_runs.end_of(cells) if query.fresh else None
        if run is None:
            return None
        seconds = time.monotonic() - start_time
        return self._judge(run.task.result(), run.request, query, run.crash, cells, seconds=seconds)

    def _note_recognised(self, cells: tuple[ForkCell, ...]) -> None:
        self.recognised += 1
        self._recognised_sets.add(cells)

    def _of_picture(self, query: Query, line: int | None, seconds: float) -> Reply:
        """Return the answer of a trial whose hang was recognised and which continues."""
        kind = self.subject.failure.kind.value
        return Reply(
            answer=Outcome.FAIL,
            seconds=min(seconds, query.time_budget),
            ended=kind,
            from_scratch=False,
            line=line,
        )

    def _has_room(self) -> bool:
        """Tell whether the machine has room for one more kernel."""
        required_bytes = (self.subject.request.limits.memory or ROOM_BYTES) + ROOM_BYTES
        processors = os.cpu_count() or 1
        return processors >= TWO_PROCESSORS and psutil.virtual_memory().available > required_bytes

    def _start(self) -> _Started:
        """Start a kernel in a sandbox and folder of its own before its query is known."""
        request = isolated_request(self.subject.request, self.workspaces, node=self.subject.node)
        request = replace(request, before_cells=self._start_next)
        trial = Trial(request)
        trial.warm()
        return _Started(trial=trial, request=request)

    async def _start_next(self) -> None:
        """Start the next trial's kernel while this one's cells run, if the machine has capacity."""
        if self._next is None and self._has_room():
            self._next = self._start()

    def _request(self, template: TrialRequest, query: Query, other: Any | None) -> TrialRequest:
        node = copy.deepcopy(self.subject.node if other is None else other)
        deadlines = (
            {id(cell): self._deadline(index) for index, cell in enumerate(node.cells)}
            if other is None
            else {}
        )
        notebook_timeout = template.limits.timeout
        time_budget = max(1.0, query.time_budget - SETTLE_SECONDS)

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
            cells=frozenset(query.cells) if other is None else None,
            limits=replace(
                template.limits,
                timeout=time_budget
                if notebook_timeout is None
                else min(notebook_timeout, time_budget),
            ),
            cell_limits=cell_limits,
            started=time.monotonic(),
        )

    def _recognition(self, cell: int, watch: _Watch) -> HangRecognition | None:
        """Return how to recognise the hang in a cell; ``None`` if trials run to the end."""
        picture, seconds = self.subject.hang, self.recognition_seconds()
        if picture is None or seconds is None:
            return None

        def is_known(observation: ActivityObservation, node: Any) -> bool:
            stack = without_plumbing(observation.stack)
            return HangPicture.of_observation(observation, stack, cell, node) == picture

        return HangRecognition(cell=cell, is_known=is_known, seconds=seconds, goes_on=watch.goes_on)

    def _deadline(self, index: int) -> float | None:
        """Return the seconds that a cell may take in a trial; ``None`` keeps its original limit."""
        failure = self.subject.failure
        if index == failure.cell and failure.kind in TIMES:
            return None
        # Without its killer, the crash cell may run much longer than it did.
        least = CRASH_SECONDS if index == failure.cell else 0.0
        return max(least, SLACK_FACTOR * self.subject.seconds.get(index, 0.0) + SLACK_SECONDS)

    def _judge(
        self,
        result: TrialResult,
        request: TrialRequest,
        query: Query,
        crash: int | None,
        cells: tuple[ForkCell, ...],
        *,
        seconds: float,
    ) -> tuple[Reply, bool]:
        """Return the answer, and whether it may be cached."""
        if isinstance(result.ending, Cancelled) and not request.cancellation.signals:
            raise RerunFailed("a trial was cancelled without a signal")
        # A failure of the sandbox must not count as an answer.
        trouble = why_not_run(result)
        if trouble is not None:
            raise RerunFailed(f"a trial could not be run: {trouble}")
        # The same rules as for the first run, so that the causes are comparable.
        cause = self.subject.cause_of(result, request)
        failure = (
            self.subject.failure if crash is None else replace(self.subject.failure, cell=crash)
        )
        answer, stopped_at, names = failures.answer(failure, result.ending, cause)
        another_form = answer is Outcome.UNRESOLVED and failures.is_another_form(
            failure, result.ending, cause
        )
        cut = self._was_cut(result, request, query)
        location = result.location if _cell_of(result) == failure.cell else None
        if (
            answer is Outcome.UNRESOLVED
            and not cut
            and cause is not None
            and cause.kind is not CauseKind.EXCEPTION
        ):
            (self.forms if another_form else self.others)[cause.kind.value] += 1
        recognised = isinstance(result.ending, TimedOut) and result.ending.recognised
        reply = Reply(
            answer=answer,
            from_scratch=not recognised or answer is not Outcome.FAIL,
            seconds=min(seconds, query.time_budget),
            stopped_at=stopped_at,
            names=names,
            peak=self._peak(result),
            cut=cut,
            another_form=another_form,
            ended=PASSED if cause is None else cause.kind.value,
            line=location.line if location is not None else None,
            exact_line=location is not None and location.source in EXACT_SOURCES,
        )
        if recognised and answer is Outcome.FAIL:
            self._note_recognised(cells)
        # What was only recognised is no answer to keep.
        keep = not cut and not recognised and not isinstance(result.ending, Cancelled)
        return reply, keep

    def _was_cut(self, result: TrialResult, request: TrialRequest, query: Query) -> bool:
        """Tell whether the search's budget, not the notebook's own timeout, ended a trial."""
        if isinstance(result.ending, Cancelled):
            return True
        notebook_timeout = self.subject.request.limits.timeout
        ours = notebook_timeout is None or (request.limits.timeout or 0.0) < notebook_timeout
        return (
            isinstance(result.ending, TimedOut)
            and result.ending.whole_notebook
            and ours
            and query.time_budget < float("inf")
        )

    def _peak(self, result: TrialResult) -> float | None:
        kind = self.subject.failure.kind
        if kind is CauseKind.NOTEBOOK_TIMEOUT:
            return result.metrics.wall_seconds
        return peak_of(
            LimitName.CPU_TIME if kind is CauseKind.CPU_TIME else LimitName.MEMORY, result
        )

    # --- what an answer depends on ----------------------------------------------------------------

    def _key(self, query: Query, node: Any | None) -> str:
        of = self.subject.node if node is None else node
        chosen = set(query.cells)
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


def _with_timeout(
    cell_limits: Callable[[Any], Limits], cell: Any, seconds: float | None
) -> Callable[[Any], Limits]:
    """Return the limits of cells, with a smaller timeout for one of them."""

    def limits_of(other: Any) -> Limits:
        limits = cell_limits(other)
        if other is not cell or seconds is None or limits.cell_timeout is None:
            return limits
        return replace(limits, cell_timeout=min(limits.cell_timeout, seconds))

    return limits_of


def _cell_of(result: TrialResult) -> int | None:
    return result.location.cell if result.location is not None else None


def _to_cache(reply: Reply) -> CachedAnswer:
    return CachedAnswer(
        answer=reply.answer,
        seconds=reply.seconds,
        stopped_at=reply.stopped_at,
        names=tuple(sorted(reply.names)),
        peak=reply.peak,
        another_form=reply.another_form,
        ended=reply.ended,
        line=reply.line,
        exact_line=reply.exact_line,
    )


def _from_cache(entry: CachedAnswer) -> Reply:
    """Convert a cache entry; its reply costs no seconds."""
    return Reply(
        answer=entry.answer,
        seconds=0.0,
        stopped_at=entry.stopped_at,
        names=frozenset(entry.names),
        peak=entry.peak,
        another_form=entry.another_form,
        ended=entry.ended,
        line=entry.line,
        exact_line=entry.exact_line,
    )
