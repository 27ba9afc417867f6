"""From a run that failed to its culprits: sets the problem up, drives the search, shrinks the crash cell, names roles.

May import the other parts of this package, trial and notebook. The pure search asks; the oracle answers by trials.
"""

from __future__ import annotations

import ast
import re
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from msgspec import Struct, field
from msgspec.structs import replace

from safe_exec.diagnosis.rules.engines import SETTING
from safe_exec.experiments.culprits import reproduction
from safe_exec.experiments.culprits.failure import MEMORY
from safe_exec.experiments.culprits.minimizer import search
from safe_exec.experiments.culprits.oracle import Oracle
from safe_exec.experiments.culprits.protocol import (
    Answer,
    Ask,
    Problem,
    Reply,
    Result,
    Search,
    SearchCancelled,
)
from safe_exec.experiments.culprits.roles import Found, culprits_of, look_first
from safe_exec.experiments.static_analysis.dependencies import Dependencies
from safe_exec.experiments.static_analysis.frame_reads import is_caught, read_on_the_way
from safe_exec.limits.isolation import as_metadata
from safe_exec.model import events
from safe_exec.model.events import EventSink
from safe_exec.model.verdict import CauseKind, CellStatus, Culprits, Verdict

ERRATIC = MEMORY | {
    CauseKind.SEGFAULT,
    CauseKind.ABORT,
    CauseKind.KILLED,
    CauseKind.TERMINATED,
    CauseKind.UNKNOWN,
}
"""What depends on where memory lies or how much threads take of it at a time, or comes from outside."""
WEAK = 0.5
"""How much more suspicious a cell is that hands a name of the slice to somebody else."""
SHRINK_FROM = 5
"""A crash cell of so many statements is worth making smaller."""
RAN = (CellStatus.PASSED, CellStatus.FAILED, CellStatus.KILLED)


class Given(Struct, frozen=True, kw_only=True):
    """What the first run left: its verdict, the stripped notebook, and the seconds that may be spent."""

    verdict: Verdict
    node: Any
    budget: float
    sink: EventSink = lambda _event: None
    started: float = field(default_factory=time.monotonic)


class Investigated(Struct, frozen=True, kw_only=True):
    """The culprits, the reproduction where there is one, and what the user should know."""

    culprits: Culprits
    reproduction: Any | None
    warnings: tuple[str, ...] = ()


class Investigation:
    """One search; ``run()`` once."""

    def __init__(self, given: Given, oracle: Oracle) -> None:
        self.given, self.oracle = given, oracle
        verdict = given.verdict
        assert verdict.crash_cell is not None
        self.crash = verdict.crash_cell
        self.records = {record.index: record for record in verdict.cells}
        ran = [
            r.index
            for r in verdict.cells
            if r.index <= self.crash.index and r.status in RAN and r.index != self.crash.index
        ]
        self.order = (*ran, self.crash.index)
        self.sources = {index: str(given.node.cells[index].source) for index in self.order}
        self.dependencies = Dependencies.of_sources(
            [self.sources[i] for i in self.order], language=verdict.notebook.language
        )
        self.number = 0
        self.began = time.monotonic()

    def now(self) -> float:
        """Seconds since the run began, for events."""
        return time.monotonic() - self.given.started

    async def run(self) -> Investigated:
        """Search, shrink, and put the answer together. Raises SearchFailed when trials cannot be run."""
        problem = self.problem()
        self.given.sink(
            events.SearchStarted(
                time=self.now(), cells=len(problem.cells), budget=self.given.budget
            )
        )
        result = await self.drive(search(problem), self.ask_cells)
        source = None
        if result.minimal and result.cells:
            source = await self.shrink(result)
        made = self.reproduction(result, source) if result.cells else None
        self.given.sink(
            events.SearchFinished(time=self.now(), cells=result.cells, minimal=result.minimal)
        )
        return Investigated(
            culprits=self.culprits(result), reproduction=made, warnings=self.warnings(result)
        )

    def problem(self) -> Problem:
        """What is known for free."""
        at = dict(enumerate(self.order))
        crash = len(self.order) - 1
        strong, weak = (
            self.dependencies.slice_of(crash),
            self.dependencies.slice_of(crash, weak=True),
        )
        suspicions = self.dependencies.suspicions()
        amounts, limit = self.amounts()
        way = self.names_on_the_way()

        def stops_at(cells: frozenset[int]) -> int | None:
            kept = [n for n, index in at.items() if index in cells]
            found = self.dependencies.surely_missing(kept, crash=crash, crash_line=self.crash.line)
            if found is not None:
                return at[found[0]]
            return self.crash.index if self.dependencies.lack_any(kept, way) else None

        def definers(name: str, before: int) -> tuple[int, ...]:
            return tuple(at[n] for n in self.dependencies.definers(name, self.order.index(before)))

        return Problem(
            cells=self.order,
            slice=frozenset(at[n] for n in strong),
            needs={
                at[n]: frozenset(at[m] for m in self.dependencies.needs(n))
                for n in range(len(self.order))
            },
            definers=definers,
            surely_stops_at=stops_at,
            suspicion={at[n]: s + (WEAK if n in weak else 0.0) for n, s in enumerate(suspicions)},
            amounts=amounts,
            limit=limit,
            seconds={index: self.records[index].seconds or 0.0 for index in self.order},
            start_seconds=min(
                (r.started for r in self.records.values() if r.started is not None), default=0.0
            ),
            erratic=self.given.verdict.cause is not None
            and self.given.verdict.cause.kind in ERRATIC,
            budget=self.given.budget,
        )

    def names_on_the_way(self) -> dict[int, frozenset[str]]:
        """By place in the order, the names read at the lines of the crash's frames: what died there had all of them.

        Nothing where the crash cell may go on after an error, or where the place moves from run to run.
        """
        if self.oracle.subject.failure.moves or self.oracle.subject.request.allow_errors:
            return {}
        lines = [
            (self.crash.index, self.crash.line),
            *((frame.cell, frame.line) for frame in reversed(self.crash.stack)),
        ]
        found: dict[int, frozenset[str]] = {}
        for index, line in lines:
            if index is None or line is None:
                continue  # a library's frame
            if index not in self.sources or is_caught(self.sources[index], line):
                break  # what is missing further in may be caught here
            place = self.order.index(index)
            found[place] = found.get(place, frozenset()) | read_on_the_way(
                self.sources[index], line
            )
        return found

    def amounts(self) -> tuple[Mapping[int, float] | None, float | None]:
        """What each cell kept of what ran out, and how much there was of it."""
        assert self.given.verdict.cause is not None
        kind, limits = self.given.verdict.cause.kind, self.given.verdict.limits
        if kind in MEMORY and limits.memory is not None:
            return {i: float(self.records[i].memory_kept or 0) for i in self.order}, float(
                limits.memory
            )
        if kind is CauseKind.NOTEBOOK_TIMEOUT and limits.timeout is not None:
            return {i: self.records[i].seconds or 0.0 for i in self.order}, limits.timeout
        if kind is CauseKind.CPU_TIME and limits.cpu_time is not None:
            return {i: self.records[i].cpu_seconds or 0.0 for i in self.order}, limits.cpu_time
        return None, None

    # --- driving ------------------------------------------------------------------------------------------------

    async def drive(self, searching: Search, ask_oracle: Any) -> Result:
        """Answer the search's questions until it is done; Ctrl-C keeps the best so far."""
        try:
            ask = next(searching)
            while True:
                reply = await ask_oracle(ask)
                cancelled = bool(self.oracle.subject.request.cancellation.signals)
                ask = searching.throw(SearchCancelled()) if cancelled else searching.send(reply)
        except StopIteration as done:
            result: Result = done.value
            return result

    async def ask_cells(self, ask: Ask) -> Reply:
        """A trial of a set of cells; what is to be confirmed is run as the reproduction, by itself."""
        self.number += 1
        self.given.sink(
            events.SearchTrialStarted(time=self.now(), number=self.number, cells=ask.cells)
        )
        node = self.document(ask.cells, None) if ask.fresh else None
        trialled = await self.oracle.answer(
            ask, node=node, crash=len(ask.cells) - 1 if node is not None else None
        )
        self.finished(ask, trialled.reply)
        return trialled.reply

    def finished(self, ask: Ask, reply: Reply) -> None:
        """Tell of a trial that is over."""
        best = (
            ask.cells
            if reply.answer is Answer.FAIL and len(ask.cells) < len(ask.best or self.order)
            else ask.best
        )
        self.given.sink(
            events.SearchTrialFinished(
                time=self.now(),
                number=self.number,
                answer=reply.answer.value,
                seconds=reply.seconds,
                left=ask.left,
                best=best,
            )
        )

    # --- inside the crash cell ----------------------------------------------------------------------------------

    async def shrink(self, result: Result) -> str | None:
        """Less of the crash cell that still does it: the same search over its statements; ``None`` for all of it."""
        statements = statements_of(self.sources[self.crash.index], self.crash.line)
        left = self.given.budget - (time.monotonic() - self.began)
        if len(statements) < SHRINK_FROM or self.crash.line is None or left <= 0:
            return None
        texts = [text for _, text in statements]
        known = Dependencies.of_sources(texts, language=self.given.verdict.notebook.language)
        crash = len(texts) - 1
        problem = Problem(
            cells=tuple(range(len(texts))),
            slice=known.slice_of(crash),
            needs={n: known.needs(n) for n in range(len(texts))},
            suspicion=dict(enumerate(map(float, known.suspicions()))),
            start_seconds=sum(self.records[i].seconds or 0.0 for i in result.cells),
            budget=left,
        )

        async def ask_statements(ask: Ask) -> Reply:
            self.number += 1
            node = self.document(result.cells, "\n".join(texts[n] for n in ask.cells))
            self.given.sink(
                events.SearchTrialStarted(time=self.now(), number=self.number, cells=result.cells)
            )
            trialled = await self.oracle.answer(ask, node=node, crash=len(result.cells) - 1)
            self.finished(replace(ask, cells=result.cells, best=result.cells), trialled.reply)
            return trialled.reply

        found = await self.drive(search(problem), ask_statements)
        if not found.cells or len(found.cells) == len(texts) == len(
            ast.parse(self.sources[self.crash.index]).body
        ):
            return None
        return "\n".join(texts[n] for n in found.cells)

    # --- the answer ---------------------------------------------------------------------------------------------

    def document(self, cells: tuple[int, ...], source: str | None) -> Any:
        """The notebook that reproduces with these cells."""
        verdict, request = self.given.verdict, self.oracle.subject.request
        return reproduction.build(
            self.given.node,
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
        """The reproduction as it is written."""
        return self.document(result.cells, source)

    def culprits(self, result: Result) -> Culprits:
        """The result in the words of the verdict."""
        assert self.given.verdict.cause is not None
        memory = (
            self.given.verdict.limits.memory if self.given.verdict.cause.kind in MEMORY else None
        )
        found = Found(
            cells=result.cells,
            found=result.found,
            order=self.order,
            dependencies=self.dependencies,
            sources=self.sources,
            records=self.records,
            memory_limit=memory,
            crash=self.crash,
            setting=next(
                (str(f.value) for f in self.given.verdict.cause.evidence if f.fact == SETTING), ""
            ),
        )
        cells = culprits_of(found)
        return Culprits(
            cells=cells,
            minimal=result.minimal,
            method=result.method,
            look_first=look_first(found, cells, self.growth(memory)) if cells else None,
            trials=self.oracle.trials,
            cached=self.oracle.cached,
            reproduced=result.reproduced,
            endings=result.endings,
            seconds=time.monotonic() - self.began,
            stopped=result.stopped,
        )

    def growth(self, memory: int | None) -> int | None:
        """By how much the crash cell grew, at least: what was left of the limit when it began."""
        if memory is None:
            return None
        before = sum(max(0, self.records[index].memory_kept or 0) for index in self.order[:-1])
        return max(0, memory - before)

    def warnings(self, result: Result) -> tuple[str, ...]:
        """What the user should know of the search."""
        gaps = self.oracle.views.gaps
        warnings = [f"the culprit search could not rule out {' and '.join(gaps)}"] if gaps else []
        others = self.oracle.others + (Counter() if result.several_forms else self.oracle.forms)
        if others:
            warnings.append(
                f"trials of the culprit search that failed otherwise, and were not followed: {_counted(others)}"
            )
        if result.several_forms:
            warnings.append(
                f"the same cells ended in several ways, and each counts as the failure: {_counted(self.oracle.forms)} too"
            )
        return tuple(warnings)


def _counted(kinds: Counter[str]) -> str:
    """``abort (2), bus error (1)``."""
    return ", ".join(f"{kind.replace('_', ' ')} ({count})" for kind, count in sorted(kinds.items()))


def statements_of(source: str, last_line: int | None) -> list[tuple[int, str]]:
    """The top-level statements of a cell up to the one that holds ``last_line``: first line and text. Empty for what is no Python."""
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
