"""Answers the search's queries by running trials.

Trials are independent of each other. Each gets the folder as it was before the first run, a fresh
kernel, sandbox, control group, /dev/shm and /tmp, and the original limits. There are quicker ways
to an answer, and each has a file of its own: answers of earlier trials (``cached_answers.py``),
forks of a live kernel (``forks.py``), a run from scratch that was begun along with them
(``companion.py``), and hangs that are recognised (``hang_recognition.py``) in trials that go on
(``hang_runs.py``). A complete run confirms or refutes what was only found quickly
(``unconfirmed.py``).

May import trial, notebook, sandbox and the pure parts of the culprit search.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from safe_exec.experiments.culprits.oracle.cached_answers import CachedAnswers
from safe_exec.experiments.culprits.oracle.companion import Companions
from safe_exec.experiments.culprits.oracle.fork_answers import Cells, ForkAnswer, reply_of
from safe_exec.experiments.culprits.oracle.forks import REFUTED, Forks
from safe_exec.experiments.culprits.oracle.hang_recognition import (
    HangWatch,
    recognition_seconds,
)
from safe_exec.experiments.culprits.oracle.hang_runs import HangRuns
from safe_exec.experiments.culprits.oracle.judgement import Judgement, is_other_death, judge
from safe_exec.experiments.culprits.oracle.memory_trial import ObservedTrial, observe_memory
from safe_exec.experiments.culprits.oracle.running_trial import RunningTrial
from safe_exec.experiments.culprits.oracle.spare_kernel import SpareKernel
from safe_exec.experiments.culprits.oracle.subject import Subject
from safe_exec.experiments.culprits.oracle.trial_requests import request_of, with_timeout
from safe_exec.experiments.culprits.oracle.unconfirmed import UnconfirmedFailures
from safe_exec.experiments.culprits.protocol import Outcome, Query, Reply
from safe_exec.experiments.trial_cache import TrialCache
from safe_exec.experiments.workspace import WorkspaceFactory

# The kinds of trials that go on when their hang is recognised.
OF_CELLS, OF_STATEMENTS = "cells", "statements"


class _Question(Struct, frozen=True, kw_only=True):
    """A query and how to run it; see ``Oracle.answer``."""

    query: Query
    cells: Cells
    node: Any | None
    crash: int | None
    # It is about whole cells, not about parts of them.
    of_cells: bool
    hang_seconds: float | None
    start_time: float

    def seconds(self) -> float:
        """Return the seconds since the question was asked."""
        return time.monotonic() - self.start_time


class Oracle:
    """Runs the trials of one subject."""

    def __init__(
        self, subject: Subject, workspaces: WorkspaceFactory, cache: TrialCache | None
    ) -> None:
        self.subject, self.workspaces = subject, workspaces
        # How the queries were answered: by trials, from the cache, in forks, by recognised hangs.
        self.trials = self.cached = self.forked = self.recognised = 0
        # The endings of unresolved trials by cause, and those that may be forms of the failure.
        self.others: Counter[str] = Counter()
        self.forms: Counter[str] = Counter()
        self._unconfirmed = UnconfirmedFailures()
        self._cached_answers = CachedAnswers(subject, workspaces.snapshot.fingerprint(), cache)
        self._spare = SpareKernel(subject, workspaces)
        self._forks = Forks(subject, workspaces)
        self._companions = Companions(subject, self._spare)
        self._hang_runs = HangRuns(subject.request.cancellation)

    async def close(self) -> None:
        """End all kernels: those of forks and of trials that go on, and one that no query took."""
        await self._forks.close()
        await self._hang_runs.close()
        await self._companions.close()
        await self._spare.close()

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
        reply = self._cached_answers.get(query, node)
        if reply is not None:
            self.cached += 1
            return reply
        question = _Question(
            query=query,
            cells=self._cells_of(query, node, origins),
            node=node,
            crash=crash,
            of_cells=origins is None,
            hang_seconds=hang_seconds,
            start_time=time.monotonic(),
        )
        forked = await self._ask_fork(question)
        if forked is not None and self._forks.is_believed(forked):
            return self._of_fork(question, forked)
        judgement = (
            await self._confirm_hang(question)
            or await self._from_companion(question)
            or await self._run(question)
        )
        await self._compare(question, judgement.reply, forked)
        if judgement.keep:
            self._cached_answers.put(query, node, judgement.reply)
        return judgement.reply

    async def observe(self, node: Any, time_budget: float) -> ObservedTrial | None:
        """Run a notebook once more to observe its memory; ``None`` if it cannot be run."""
        return await observe_memory(self.subject, self.workspaces, node, time_budget)

    # --- what the search asks besides -------------------------------------------------------------

    @property
    def misled(self) -> bool:
        """Whether an answer of a fork, or a recognised hang, has led the search astray."""
        return self._unconfirmed.misled

    @property
    def disagreements(self) -> int:
        """The number of quick answers that a run to the end contradicted."""
        return self._unconfirmed.disagreements

    @property
    def fork_note(self) -> str | None:
        """The reason why forks gave no answers, or why not from all states."""
        return self._forks.note

    def recognition_seconds(self) -> float | None:
        """Return how long a trial takes to recognise the hang; ``None`` if it runs to the end."""
        return recognition_seconds(self.subject) if self._unconfirmed.trusts_pictures else None

    def is_recognised_only(self, cells: tuple[int, ...]) -> bool:
        """Tell whether the hang of a set was recognised and never confirmed by a run to the end."""
        return self._unconfirmed.is_recognised_only(self._forks.cells_of(cells))

    def is_forked_only(self, cells: tuple[int, ...]) -> bool:
        """Tell whether a set failed in a fork, and never in a run from scratch."""
        return self._unconfirmed.is_forked_only(self._forks.cells_of(cells))

    def is_hanging(self, cells: tuple[int, ...]) -> bool:
        """Tell whether a trial of a set hangs and still runs."""
        return self._hang_runs.has(self._forks.cells_of(cells))

    # --- the ways to an answer --------------------------------------------------------------------

    def _cells_of(self, query: Query, node: Any | None, origins: tuple[int, ...] | None) -> Cells:
        """Return the cells of a query as a fork runs them; a confirmation runs the same ones."""
        if origins is None or node is None:
            return self._forks.cells_of(query.cells)
        return self._forks.cells_of(origins, [str(cell.source) for cell in node.cells])

    async def _ask_fork(self, question: _Question) -> ForkAnswer | None:
        query, forks = question.query, self._forks
        if question.of_cells:
            will_ask = not query.fresh and forks.may_answer(question.cells)
            await self._companions.accompany(query, is_needed=will_ask and not forks.has_failed)
        if query.fresh:
            return None
        answer = await forks.answer(question.cells, query.time_budget)
        if forks.is_running and not self._companions.is_running:
            # The result is confirmed from scratch: that kernel can start meanwhile.
            await self._spare.prepare()
        return answer

    def _of_fork(self, question: _Question, answer: ForkAnswer) -> Reply:
        self.forked += 1
        if answer.outcome is Outcome.FAIL:
            self._unconfirmed.add_forked(question.cells)
        return reply_of(answer, min(question.seconds(), question.query.time_budget))

    async def _confirm_hang(self, question: _Question) -> Judgement | None:
        """Wait for the end of a running trial of these cells; ``None`` if there is none."""
        run = await self._hang_runs.end_of(question.cells) if question.query.fresh else None
        return None if run is None else self._judge(question, run, question.seconds())

    async def _from_companion(self, question: _Question) -> Judgement | None:
        """Let the companion run these cells to the end; ``None`` if it cannot."""
        run = await self._companions.take(question.query.cells) if question.of_cells else None
        if run is None:
            return None
        self.trials += 1
        await self._spare.prepare()
        if not await run.is_done(self.subject.request.cancellation):
            return None
        return self._judge(question, run, question.seconds())

    async def _run(self, question: _Question) -> Judgement:
        """Run a trial until it ends, or until its hang is recognised and it continues."""
        self.trials += 1
        cell = self.subject.failure.cell if question.crash is None else question.crash
        watch = HangWatch(cell, self._spare.has_room)
        run = self._begin(question, cell, watch)
        is_continuing = await watch.is_continuing(run)
        seconds = question.seconds()
        if not is_continuing:
            await run.task
            return self._judge(question, run, seconds)
        kind = OF_CELLS if question.node is None else OF_STATEMENTS
        await self._hang_runs.add(kind, question.cells, run)
        self._note_recognised(question)
        failure = self.subject.failure.kind.value
        reply = Reply(
            answer=Outcome.FAIL,
            seconds=min(seconds, question.query.time_budget),
            ended=failure,
            from_scratch=False,
            line=watch.line(),
        )
        return Judgement(reply=reply, keep=False)

    def _begin(self, question: _Question, cell: int, watch: HangWatch) -> RunningTrial:
        # The result is confirmed by a run to the end.
        watches = not question.query.fresh and self._unconfirmed.trusts_pictures
        started = self._spare.take()
        request = request_of(self.subject, started.request, question.query, question.node)
        request = replace(
            request,
            hang=watch.recognition(self.subject) if watches else None,
            cell_limits=with_timeout(
                request.cell_limits, request.node.cells[cell], question.hang_seconds
            ),
        )
        task = asyncio.create_task(started.trial.run(request))
        return RunningTrial(task=task, request=request, crash=question.crash)

    # --- the end of a trial -----------------------------------------------------------------------

    def _judge(self, question: _Question, run: RunningTrial, seconds: float) -> Judgement:
        judgement = judge(
            self.subject,
            question.query,
            run.request,
            run.task.result(),
            crash=run.crash,
            seconds=seconds,
        )
        reply = judgement.reply
        if is_other_death(reply):
            (self.forms if reply.another_form else self.others)[reply.ended] += 1
        if not reply.from_scratch:
            self._note_recognised(question)
        return judgement

    def _note_recognised(self, question: _Question) -> None:
        self.recognised += 1
        self._unconfirmed.add_recognised(question.cells)

    async def _compare(self, question: _Question, reply: Reply, forked: ForkAnswer | None) -> None:
        """Compare a complete run with the earlier answer of a fork or of a recognised hang."""
        if self._unconfirmed.refutes_forks(
            question.cells,
            reply,
            forked,
            is_confirmation=question.query.fresh,
            of_cells=question.of_cells,
        ):
            await self._forks.end(REFUTED)
