"""Finds the culprits of a failed run.

Drives the search, and reduces the culprit cells. The pure search yields queries, and the oracle
answers them by running trials. May import the other parts of ``experiments``, trial
and notebook.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Awaitable, Callable, Generator, Mapping
from typing import Any, TypeVar

from msgspec import Struct, field
from msgspec.structs import replace

from safe_exec.diagnosis.memory_use import is_explained
from safe_exec.diagnosis.rules.engines import SETTING
from safe_exec.experiments.culprits import reproduction
from safe_exec.experiments.culprits.failure import MEMORY
from safe_exec.experiments.culprits.minimizer import search
from safe_exec.experiments.culprits.oracle.memory_trial import ObservedTrial
from safe_exec.experiments.culprits.oracle.oracle import Oracle
from safe_exec.experiments.culprits.problem import SearchedRun
from safe_exec.experiments.culprits.protocol import (
    Outcome,
    Problem,
    Query,
    Reply,
    Result,
    SearchCancelled,
)
from safe_exec.experiments.culprits.reduction import Reduction
from safe_exec.experiments.culprits.roles import CulpritSet, culprits_of, look_first
from safe_exec.experiments.driver import drive
from safe_exec.limits.isolation import as_metadata
from safe_exec.model import events
from safe_exec.model.events import EventSink
from safe_exec.model.verdict import Culprits, Verdict

# The reduction of the reproduction goes on until the search has taken this many times the first
# run, and at least this many seconds.
MOST_FIRST_RUNS = 2.0
LEAST_REDUCTION_SECONDS = 20.0
# A search for a hang takes this much longer than the cell's timeout, including the time for its
# last trial to settle.
HANG_SLACK_SECONDS, HANG_SETTLE_SECONDS = 5.0, 1.5
# The trial that confirms a reduced reproduction lasts this share of the timeout at least.
HANG_SHARE = 0.9
_Result = TypeVar("_Result")


class FirstRun(Struct, frozen=True, kw_only=True):
    """The first run: its verdict, the stripped notebook and the search's time budget."""

    verdict: Verdict
    node: Any
    budget: float
    sink: EventSink = lambda _event: None
    started: float = field(default_factory=time.monotonic)


class InvestigationResult(Struct, frozen=True, kw_only=True):
    """The culprits, the reproduction if there is one, and warnings for the user."""

    culprits: Culprits
    reproduction: Any | None
    # A trial of the culprits that was observed for its memory.
    observed: ObservedTrial | None = None
    warnings: tuple[str, ...] = ()


class Investigation:
    """One search; call ``run()`` once."""

    def __init__(self, first_run: FirstRun, oracle: Oracle) -> None:
        self.first_run, self.oracle = first_run, oracle
        self.searched = searched = SearchedRun.of(first_run.verdict, first_run.node)
        self.crash, self.records, self.order = searched.crash, searched.records, searched.order
        self.sources, self.dependencies = searched.sources, searched.dependencies
        self.number = 0
        self.start_time = time.monotonic()
        # The reduction that was made while the run that confirms these cells went on.
        self.reduced_early: tuple[tuple[int, ...], Reduction] | None = None

    def elapsed(self) -> float:
        """Return the seconds since the run began, the time base of events."""
        return time.monotonic() - self.first_run.started

    async def run(self) -> InvestigationResult:
        """Search, reduce the culprit cells and build the result.

        Raises RerunFailed if trials cannot run.
        """
        # Everything that static analysis knows is free; trials cost seconds.
        problem = self.problem()
        self.first_run.sink(
            events.SearchStarted(
                time=self.elapsed(), cells=len(problem.cells), budget=self.first_run.budget
            )
        )
        result = await self.drive(search(problem), self.ask_cells)
        if self.oracle.misled:
            # Runs to the end decide: search again, with nothing but them.
            result = await self.drive(search(self.problem()), self.ask_cells)
        observed = await self.observe(result)
        sources: Mapping[int, str] = {}
        if result.minimal and result.cells:
            sources = await self.reduce(result)
        document = self.document(result.cells, sources) if result.cells else None
        self.first_run.sink(
            events.SearchFinished(time=self.elapsed(), cells=result.cells, minimal=result.minimal)
        )
        return InvestigationResult(
            culprits=self.culprits(result),
            reproduction=document,
            observed=observed,
            warnings=self.warnings(result),
        )

    def problem(self) -> Problem:
        """State the search problem."""
        subject = self.oracle.subject
        return self.searched.problem(
            budget=self.remaining(),
            recognition_seconds=self.oracle.recognition_seconds(),
            # The crash cell may continue after an error, or the failure may occur in any cell.
            stops_at_errors=not (subject.failure.moves or subject.request.allow_errors),
        )

    # --- driving ----------------------------------------------------------------------------------

    async def drive(
        self,
        searching: Generator[Query, Reply, _Result],
        ask_oracle: Callable[[Query], Awaitable[Reply]],
    ) -> _Result:
        """Answer the search's queries until it returns; Ctrl-C keeps the best result so far."""
        misled_before = self.oracle.misled

        def cancellation() -> SearchCancelled | None:
            signals = self.oracle.subject.request.cancellation.signals
            contradicted = self.oracle.misled and not misled_before
            return SearchCancelled() if signals or contradicted else None

        return await drive(searching, ask_oracle, cancellation=cancellation)

    async def ask_cells(self, query: Query) -> Reply:
        """Run a trial of a set of cells. To confirm culprits, run the reproduction itself."""
        start_time = time.monotonic()
        if query.fresh and self.oracle.is_hanging(query.cells):
            # The run that confirms these cells goes on until its time is up.
            reduction = self.reduction_of(query.cells)
            await self.reduce_hang(query.cells, reduction, self.start_time)
            self.reduced_early = query.cells, reduction
        self.number += 1
        self.first_run.sink(
            events.SearchTrialStarted(time=self.elapsed(), number=self.number, cells=query.cells)
        )
        node = self.document(query.cells, {}) if query.fresh else None
        reply = await self.oracle.answer(
            query, node=node, crash=len(query.cells) - 1 if node is not None else None
        )
        self.report_trial(query, reply)
        # The trials of statements count too.
        seconds = min(time.monotonic() - start_time, query.time_budget)
        return replace(reply, seconds=max(reply.seconds, seconds))

    def report_trial(self, query: Query, reply: Reply) -> None:
        """Emit the event for a finished trial."""
        best = (
            query.cells
            if reply.answer is Outcome.FAIL and len(query.cells) < len(query.best or self.order)
            else query.best
        )
        self.first_run.sink(
            events.SearchTrialFinished(
                time=self.elapsed(),
                number=self.number,
                answer=reply.answer.value,
                seconds=reply.seconds,
                left=query.undecided,
                best=best,
            )
        )

    # --- inside the culprit cells --------------------------------------------------------------------

    async def reduce(self, result: Result) -> dict[int, str]:
        """Search for parts of the culprit cells that still fail at the same line.

        Returns the sources of the cells, by index; unchanged sources if nothing can be removed.
        """
        sources = {index: self.sources[index] for index in result.cells}
        if not self.is_steady(result):
            return sources
        if self.reduced_early is not None and self.reduced_early[0] == result.cells:
            reduction = self.reduced_early[1]
        elif self.oracle.recognition_seconds() is not None:
            # The run that confirmed these cells began anew.
            reduction = self.reduction_of(result.cells)
            await self.reduce_hang(result.cells, reduction, time.monotonic())
        else:
            reduction = self.reduction_of(result.cells, confirms=True)
            await self.reduce_others(result.cells, reduction)
        if not reduction.is_smaller:
            return sources
        is_certain = reduction.confirms or await self.confirms(result.cells, reduction)
        return reduction.texts(reduction.selection) if is_certain else sources

    def reduction_of(self, cells: tuple[int, ...], *, confirms: bool = False) -> Reduction:
        """Return the reduction of culprit cells, which can remove nothing without a crash line."""
        return Reduction(
            {index: self.sources[index] for index in cells},
            crash=self.crash.index,
            crash_line=self.crash.line or 1,
            lines=self.lines_of_crash(),
            language=self.first_run.verdict.notebook.language,
            confirms=confirms,
        )

    async def reduce_others(self, cells: tuple[int, ...], reduction: Reduction) -> None:
        """Reduce the statements for a failure other than a hang; confirm each depth of blocks."""
        if self.crash.line is None:
            return
        elapsed = time.monotonic() - self.start_time
        first_seconds = self.first_run.verdict.usage.wall_seconds or 0.0
        seconds = max(LEAST_REDUCTION_SECONDS, MOST_FIRST_RUNS * first_seconds - elapsed)
        end = time.monotonic() + min(self.remaining(), seconds)
        steps = reduction.steps(
            start_seconds=sum(self.records[index].seconds or 0.0 for index in cells),
            remaining=lambda: end - time.monotonic(),
        )

        async def ask(query: Query) -> Reply:
            return await self.ask_statements(cells, reduction, reduction.selected(query), query)

        await self.drive(steps, ask)

    async def reduce_hang(
        self, cells: tuple[int, ...], reduction: Reduction, start_time: float
    ) -> None:
        """Reduce the statements for a hang, by trials that stop as soon as the hang is recognised.

        The last trial continues, to confirm the result. It ends soon enough after ``start_time``
        for the budget of the search.
        """
        timeout = self.oracle.subject.crash_timeout()
        if timeout is None or self.crash.line is None:
            return
        seconds_before = sum(self.records[index].seconds or 0.0 for index in cells[:-1])
        end = start_time + timeout + HANG_SLACK_SECONDS - HANG_SETTLE_SECONDS - seconds_before
        least = HANG_SHARE * timeout

        def remaining() -> float:
            fits = self.remaining() > timeout + seconds_before + HANG_SETTLE_SECONDS
            return end - time.monotonic() - least if fits else -1.0

        async def ask(query: Query) -> Reply:
            seconds = max(least, end - time.monotonic())
            # The last trial may take all the time that is left; it began soon enough.
            query = replace(query, time_budget=self.remaining())
            selection = reduction.selected(query)
            return await self.ask_statements(cells, reduction, selection, query, seconds)

        # A trial begins if there is any time left.
        await self.drive(reduction.steps(start_seconds=0.0, remaining=remaining), ask)

    async def confirms(self, cells: tuple[int, ...], reduction: Reduction) -> bool:
        """Tell whether the reduced cells still fail in a run that may last until the timeout."""
        if self.oracle.subject.request.cancellation.signals or self.remaining() <= 0:
            return False
        query = Query(cells=cells, time_budget=self.remaining(), fresh=True)
        reply = await self.ask_statements(cells, reduction, reduction.selection, query)
        return reply.answer is Outcome.FAIL

    def remaining(self) -> float:
        """Return the seconds that are left of the budget."""
        return self.first_run.budget - (time.monotonic() - self.start_time)

    def is_steady(self, result: Result) -> bool:
        """Whether the culprits failed in every run.

        Otherwise a single trial cannot tell whether a statement is needed.
        """
        failures, runs = result.reproduced
        return failures == runs and not result.several_forms

    def lines_of_crash(self) -> dict[int, set[int]]:
        """Return the lines of the crash and of its stack, by cell."""
        lines = {self.crash.index: {self.crash.line or 1}}
        for frame in self.crash.stack:
            if frame.cell is not None and frame.line is not None:
                lines.setdefault(frame.cell, set()).add(frame.line)
        return lines

    async def ask_statements(
        self,
        cells: tuple[int, ...],
        reduction: Reduction,
        selection: frozenset[int],
        query: Query,
        hang_seconds: float | None = None,
    ) -> Reply:
        """Run a trial of the culprit cells with a part of their statements."""
        self.number += 1
        node = self.document(cells, reduction.texts(selection))
        self.first_run.sink(
            events.SearchTrialStarted(time=self.elapsed(), number=self.number, cells=cells)
        )
        reply = await self.oracle.answer(
            query, node=node, crash=len(cells) - 1, origins=cells, hang_seconds=hang_seconds
        )
        reply = reduction.judge(selection, reply)
        self.report_trial(replace(query, cells=cells, best=cells), reply)
        return reply

    async def observe(self, result: Result) -> ObservedTrial | None:
        """Run the culprits once more if memory ran out and the holders of memory are unknown."""
        cause, use = self.first_run.verdict.cause, self.first_run.verdict.memory
        if use is not None and is_explained(use):
            return None
        signals = self.oracle.subject.request.cancellation.signals
        budget = self.first_run.budget - (time.monotonic() - self.start_time)
        if not result.cells or cause is None or cause.kind not in MEMORY or signals or budget <= 0:
            return None
        return await self.oracle.observe(self.document(result.cells, {}), budget)

    # --- the answer -------------------------------------------------------------------------------

    def document(self, cells: tuple[int, ...], sources: Mapping[int, str]) -> Any:
        """Return the reproduction notebook of these cells; ``sources`` replace the cells' own."""
        verdict, request = self.first_run.verdict, self.oracle.subject.request
        return reproduction.build(
            self.first_run.node,
            cells,
            limits=verdict.limits,
            kernel=request.kernel_name,
            allow_errors=request.allow_errors,
            origin=verdict.notebook.path,
            cause=verdict.cause,
            sources=sources,
            isolation=as_metadata(verdict.isolation),
        )

    def culprits(self, result: Result) -> Culprits:
        """Convert the search result to the verdict's types."""
        assert self.first_run.verdict.cause is not None
        memory = (
            self.first_run.verdict.limits.memory
            if self.first_run.verdict.cause.kind in MEMORY
            else None
        )
        culprit_set = CulpritSet(
            cells=result.cells,
            dynamic_deps=result.dynamic_deps,
            order=self.order,
            dependencies=self.dependencies,
            sources=self.sources,
            records=self.records,
            memory_limit=memory,
            crash=self.crash,
            setting=next(
                (str(f.value) for f in self.first_run.verdict.cause.evidence if f.fact == SETTING),
                "",
            ),
        )
        cells = culprits_of(culprit_set)
        return Culprits(
            cells=cells,
            minimal=result.minimal,
            method=f"{result.method}, forks" if self.oracle.forked else result.method,
            look_first=look_first(culprit_set, cells, self.growth(memory)) if cells else None,
            trials=self.oracle.trials,
            cached=self.oracle.cached,
            recognised=self.oracle.recognised,
            forked=self.oracle.forked,
            fork_note=self.oracle.fork_note,
            disagreements=self.oracle.disagreements,
            reproduced=result.reproduced,
            endings=result.endings,
            seconds=time.monotonic() - self.start_time,
            stopped=result.stopped,
        )

    def growth(self, memory: int | None) -> int | None:
        """Return a lower bound for the crash cell's memory growth.

        The bound is the part of the limit that was free when the cell began.
        """
        if memory is None:
            return None
        kept_before = sum(max(0, self.records[index].memory_kept or 0) for index in self.order[:-1])
        return max(0, memory - kept_before)

    def warnings(self, result: Result) -> tuple[str, ...]:
        """Return the warnings that the search adds to the verdict."""
        gaps = self.oracle.workspaces.gaps
        # The gaps limit what the result means, so the user must know them.
        warnings = [f"the culprit search could not rule out {' and '.join(gaps)}"] if gaps else []
        if self.oracle.is_recognised_only(result.cells):
            warnings.append(
                "the hang of the culprits was recognised, and no run up to the timeout confirmed "
                "it: the budget of the search was too small"
            )
        if self.oracle.is_forked_only(result.cells):
            warnings.append(
                "the culprits failed in a fork of a live kernel, and no run from scratch confirmed "
                "it: the budget of the search was too small"
            )
        others = self.oracle.others + (Counter() if result.several_forms else self.oracle.forms)
        if others:
            warnings.append(
                "trials of the culprit search that failed in other ways and were ignored: "
                f"{_counted(others)}"
            )
        if result.several_forms:
            warnings.append(
                "the same cells ended in several ways, and each counts as the failure: "
                f"{_counted(self.oracle.forms)} too"
            )
        return tuple(warnings)


def _counted(kinds: Counter[str]) -> str:
    """Format counts by kind as ``abort (2), bus error (1)``."""
    return ", ".join(f"{kind.replace('_', ' ')} ({count})" for kind, count in sorted(kinds.items()))
