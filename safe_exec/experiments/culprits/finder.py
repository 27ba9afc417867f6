"""Finds the culprits of a failed run.

States the problem, drives the search, shrinks the crash cell.

The pure search asks, and the oracle answers by running trials. May import the other parts of
``experiments``, trial and notebook.
"""

from __future__ import annotations

import ast
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from msgspec import Struct, field
from msgspec.structs import replace

from safe_exec.diagnosis.rules.engines import SETTING
from safe_exec.experiments.culprits import reproduction
from safe_exec.experiments.culprits.failure import MEMORY
from safe_exec.experiments.culprits.minimizer import search
from safe_exec.experiments.culprits.oracle import Oracle
from safe_exec.experiments.culprits.protocol import (
    Outcome,
    Problem,
    Query,
    Reply,
    Result,
    Search,
    SearchCancelled,
)
from safe_exec.experiments.culprits.roles import CulpritSet, culprits_of, look_first
from safe_exec.experiments.driver import drive
from safe_exec.experiments.static_analysis.dependencies import Dependencies
from safe_exec.experiments.static_analysis.frame_reads import is_caught, names_read_at
from safe_exec.limits.isolation import as_metadata
from safe_exec.model import events
from safe_exec.model.events import EventSink
from safe_exec.model.verdict import CauseKind, CellStatus, Culprits, Verdict

# What depends on where memory lies or how much threads take of it at a time, or comes from outside.
ERRATIC = MEMORY | {
    CauseKind.SEGFAULT,
    CauseKind.ABORT,
    CauseKind.KILLED,
    CauseKind.TERMINATED,
    CauseKind.UNKNOWN,
}
# How much more suspicious a cell is that hands a name of the slice to somebody else.
WEAK = 0.5
# A crash cell of so many statements is worth making smaller.
SHRINK_FROM = 5
# Only cells that ran can have contributed to the failure.
RAN = (CellStatus.PASSED, CellStatus.FAILED, CellStatus.KILLED)


class FirstRun(Struct, frozen=True, kw_only=True):
    """The outcome of the first run.

    Its verdict, the stripped notebook and the search's time budget.
    """

    verdict: Verdict
    node: Any
    budget: float
    sink: EventSink = lambda _event: None
    started: float = field(default_factory=time.monotonic)


class InvestigationResult(Struct, frozen=True, kw_only=True):
    """The culprits, the reproduction if there is one, and warnings for the user."""

    culprits: Culprits
    reproduction: Any | None
    warnings: tuple[str, ...] = ()


class Investigation:
    """One search; call ``run()`` once."""

    def __init__(self, first_run: FirstRun, oracle: Oracle) -> None:
        self.first_run, self.oracle = first_run, oracle
        verdict = first_run.verdict
        assert verdict.crash_cell is not None
        self.crash = verdict.crash_cell
        self.records = {record.index: record for record in verdict.cells}
        # Skipped cells cannot contribute, and the crash cell is added last.
        ran = [
            r.index
            for r in verdict.cells
            if r.index <= self.crash.index and r.status in RAN and r.index != self.crash.index
        ]
        self.order = (*ran, self.crash.index)
        self.sources = {index: str(first_run.node.cells[index].source) for index in self.order}
        self.dependencies = Dependencies.of_sources(
            [self.sources[i] for i in self.order], language=verdict.notebook.language
        )
        self.number = 0
        self.start_time = time.monotonic()

    def elapsed(self) -> float:
        """Return the seconds since the run began, the time base of events."""
        return time.monotonic() - self.first_run.started

    async def run(self) -> InvestigationResult:
        """Search, shrink the crash cell and build the result.

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
        source = None
        if result.minimal and result.cells:
            source = await self.shrink(result)
        document = self.reproduction(result, source) if result.cells else None
        self.first_run.sink(
            events.SearchFinished(time=self.elapsed(), cells=result.cells, minimal=result.minimal)
        )
        return InvestigationResult(
            culprits=self.culprits(result), reproduction=document, warnings=self.warnings(result)
        )

    def problem(self) -> Problem:
        """State the search problem from the first run and the source code, without any trial."""
        index_of = dict(enumerate(self.order))
        crash = len(self.order) - 1
        strong, weak = (
            self.dependencies.slice_of(crash),
            self.dependencies.slice_of(crash, weak=True),
        )
        side_effect_risks = self.dependencies.side_effect_risks()
        resource_use, limit = self.resource_use()
        frame_names = self.names_in_frames()

        def stops_at(cells: frozenset[int]) -> int | None:
            positions = [n for n, index in index_of.items() if index in cells]
            missing = self.dependencies.surely_missing(
                positions, crash=crash, crash_line=self.crash.line
            )
            if missing is not None:
                return index_of[missing[0]]
            return self.crash.index if self.dependencies.lack_any(positions, frame_names) else None

        def definers(name: str, cell: int) -> tuple[int, ...]:
            return tuple(
                index_of[n] for n in self.dependencies.definers(name, self.order.index(cell))
            )

        return Problem(
            cells=self.order,
            slice=frozenset(index_of[n] for n in strong),
            needs={
                index_of[n]: frozenset(index_of[m] for m in self.dependencies.needs(n))
                for n in range(len(self.order))
            },
            definers=definers,
            predicted_stop=stops_at,
            side_effect_risk={
                index_of[n]: s + (WEAK if n in weak else 0.0)
                for n, s in enumerate(side_effect_risks)
            },
            resource_use=resource_use,
            limit=limit,
            seconds={index: self.records[index].seconds or 0.0 for index in self.order},
            start_seconds=min(
                (r.started for r in self.records.values() if r.started is not None), default=0.0
            ),
            erratic=self.first_run.verdict.cause is not None
            and self.first_run.verdict.cause.kind in ERRATIC,
            budget=self.first_run.budget,
        )

    def names_in_frames(self) -> dict[int, frozenset[str]]:
        """Return, by position, the names that the crash's stack frames had read at their lines.

        A run that lacks one of these names cannot fail the same way. The result is empty if the
        crash cell may continue after an error, or if the failure strikes at varying places.
        """
        if self.oracle.subject.failure.moves or self.oracle.subject.request.allow_errors:
            return {}
        lines = [
            (self.crash.index, self.crash.line),
            *((frame.cell, frame.line) for frame in reversed(self.crash.stack)),
        ]
        names: dict[int, frozenset[str]] = {}
        for index, line in lines:
            if index is None or line is None:
                # A library's frame.
                continue
            if index not in self.sources or is_caught(self.sources[index], line):
                # What is missing further in may be caught here.
                break
            position = self.order.index(index)
            names[position] = names.get(position, frozenset()) | names_read_at(
                self.sources[index], line
            )
        return names

    def resource_use(self) -> tuple[Mapping[int, float] | None, float | None]:
        """Return how much of the exhausted resource each cell used, and how much was available."""
        assert self.first_run.verdict.cause is not None
        kind, limits = self.first_run.verdict.cause.kind, self.first_run.verdict.limits
        if kind in MEMORY and limits.memory is not None:
            return {i: float(self.records[i].memory_kept or 0) for i in self.order}, float(
                limits.memory
            )
        if kind is CauseKind.NOTEBOOK_TIMEOUT and limits.timeout is not None:
            return {i: self.records[i].seconds or 0.0 for i in self.order}, limits.timeout
        if kind is CauseKind.CPU_TIME and limits.cpu_time is not None:
            return {i: self.records[i].cpu_seconds or 0.0 for i in self.order}, limits.cpu_time
        return None, None

    # --- driving ----------------------------------------------------------------------------------

    async def drive(
        self, searching: Search, ask_oracle: Callable[[Query], Awaitable[Reply]]
    ) -> Result:
        """Answer the search's queries until it returns; Ctrl-C keeps the best result so far."""

        def cancellation() -> SearchCancelled | None:
            signals = self.oracle.subject.request.cancellation.signals
            return SearchCancelled() if signals else None

        return await drive(searching, ask_oracle, cancellation=cancellation)

    async def ask_cells(self, query: Query) -> Reply:
        """Run a trial of a set of cells; a confirmation runs the reproduction itself."""
        self.number += 1
        self.first_run.sink(
            events.SearchTrialStarted(time=self.elapsed(), number=self.number, cells=query.cells)
        )
        node = self.document(query.cells, None) if query.fresh else None
        answered = await self.oracle.answer(
            query, node=node, crash=len(query.cells) - 1 if node is not None else None
        )
        self.report_trial(query, answered.reply)
        return answered.reply

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

    # --- inside the crash cell --------------------------------------------------------------------

    async def shrink(self, result: Result) -> str | None:
        """Search for a part of the crash cell that still fails; ``None`` if all of it is needed.

        This is the same search, over the cell's statements.
        """
        # Statements behind the crash line never ran.
        statements = statements_of(self.sources[self.crash.index], self.crash.line)
        budget = self.first_run.budget - (time.monotonic() - self.start_time)
        # A short cell is easy to read as it is.
        if len(statements) < SHRINK_FROM or self.crash.line is None or budget <= 0:
            return None
        texts = [text for _, text in statements]
        dependencies = Dependencies.of_sources(
            texts, language=self.first_run.verdict.notebook.language
        )
        crash = len(texts) - 1
        problem = Problem(
            cells=tuple(range(len(texts))),
            slice=dependencies.slice_of(crash),
            needs={n: dependencies.needs(n) for n in range(len(texts))},
            side_effect_risk=dict(enumerate(map(float, dependencies.side_effect_risks()))),
            start_seconds=sum(self.records[i].seconds or 0.0 for i in result.cells),
            budget=budget,
        )

        async def ask_statements(query: Query) -> Reply:
            self.number += 1
            node = self.document(result.cells, "\n".join(texts[n] for n in query.cells))
            self.first_run.sink(
                events.SearchTrialStarted(
                    time=self.elapsed(), number=self.number, cells=result.cells
                )
            )
            answered = await self.oracle.answer(query, node=node, crash=len(result.cells) - 1)
            self.report_trial(replace(query, cells=result.cells, best=result.cells), answered.reply)
            return answered.reply

        result_of_statements = await self.drive(search(problem), ask_statements)
        if not result_of_statements.cells or len(result_of_statements.cells) == len(texts) == len(
            ast.parse(self.sources[self.crash.index]).body
        ):
            return None
        return "\n".join(texts[n] for n in result_of_statements.cells)

    # --- the answer -------------------------------------------------------------------------------

    def document(self, cells: tuple[int, ...], source: str | None) -> Any:
        """Return the reproduction notebook of these cells."""
        verdict, request = self.first_run.verdict, self.oracle.subject.request
        return reproduction.build(
            self.first_run.node,
            cells,
            limits=verdict.limits,
            kernel=request.kernel_name,
            allow_errors=request.allow_errors,
            origin=verdict.notebook.path,
            cause=verdict.cause,
            crash_source=source,
            isolation=as_metadata(verdict.isolation),
        )

    def reproduction(self, result: Result, source: str | None) -> Any:
        """Return the reproduction of the final result."""
        return self.document(result.cells, source)

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
            method=result.method,
            look_first=look_first(culprit_set, cells, self.growth(memory)) if cells else None,
            trials=self.oracle.trials,
            cached=self.oracle.cached,
            reproduced=result.reproduced,
            endings=result.endings,
            seconds=time.monotonic() - self.start_time,
            stopped=result.stopped,
        )

    def growth(self, memory: int | None) -> int | None:
        """Return a lower bound for the crash cell's memory growth.

        The rest of the limit when it began.
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


def statements_of(source: str, last_line: int | None) -> list[tuple[int, str]]:
    """Return the top-level statements of a cell, each with its first line, up to ``last_line``.

    The result is empty for a cell that is not valid Python.
    """
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    lines = re.split(
        r"\r\n|\r|\n", source
    )  # those of the parser: splitlines() knows more, within texts too
    spans: list[tuple[int, int]] = []
    for statement in body:
        first = min(
            [statement.lineno, *(d.lineno for d in getattr(statement, "decorator_list", []))]
        )
        if last_line is not None and first > last_line:
            break
        last = statement.end_lineno or first
        # Two on one line stay together, be it one that goes on after a backslash.
        if spans and (spans[-1][1] >= first or lines[first - 2].endswith("\\")):
            spans[-1] = (spans[-1][0], last)
        else:
            spans.append((first, last))
    return [(first, "\n".join(lines[first - 1 : last])) for first, last in spans]
