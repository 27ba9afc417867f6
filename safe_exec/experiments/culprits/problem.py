"""States the problem of a culprit search: everything that is known before the first trial. Pure.

The first run told the times, the memory and the stack of the crash; the source code tells the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import Struct

from safe_exec.experiments.culprits.failure import MEMORY
from safe_exec.experiments.culprits.protocol import Problem
from safe_exec.experiments.static_analysis.dependencies import Dependencies
from safe_exec.experiments.static_analysis.frame_reads import is_caught, names_read_at
from safe_exec.model.verdict import CauseKind, CellRecord, CellStatus, CrashCell, Verdict

# Causes that depend on the layout of memory, on how much of it threads take at a time, or on the
# outside.
ERRATIC = MEMORY | {
    CauseKind.SEGFAULT,
    CauseKind.ABORT,
    CauseKind.KILLED,
    CauseKind.TERMINATED,
    CauseKind.UNKNOWN,
}
# How much is added to the suspicion of a cell that passes a name of the slice to other code.
WEAK = 0.5
# Only cells that ran can have contributed to the failure.
RAN = (CellStatus.PASSED, CellStatus.FAILED, CellStatus.KILLED)


class SearchedRun(Struct, frozen=True, kw_only=True):
    """The cells of a failed run that a search is about, by their index, and what is known of them.

    ``order`` are the cells that ran, the crash cell last; ``dependencies`` counts positions in it.
    """

    verdict: Verdict
    crash: CrashCell
    records: Mapping[int, CellRecord]
    order: tuple[int, ...]
    sources: Mapping[int, str]
    dependencies: Dependencies

    @classmethod
    def of(cls, verdict: Verdict, node: Any) -> SearchedRun:
        """Read the verdict of a run with a crash cell, and its notebook."""
        crash = verdict.crash_cell
        assert crash is not None
        # Skipped cells cannot contribute, and the crash cell is added last.
        ran = [
            r.index
            for r in verdict.cells
            if r.index <= crash.index and r.status in RAN and r.index != crash.index
        ]
        order = (*ran, crash.index)
        sources = {index: str(node.cells[index].source) for index in order}
        return cls(
            verdict=verdict,
            crash=crash,
            records={record.index: record for record in verdict.cells},
            order=order,
            sources=sources,
            dependencies=Dependencies.of_sources(
                [sources[i] for i in order], language=verdict.notebook.language
            ),
        )

    def problem(
        self, *, budget: float, recognition_seconds: float | None, stops_at_errors: bool
    ) -> Problem:
        """State the search problem, without any trial.

        ``budget`` is in seconds. ``recognition_seconds`` is how long a trial takes to recognise a
        hang, ``None`` if it runs to the end. ``stops_at_errors``: an error in a cell ends the run.
        So a run that lacks a name which the crash had read cannot fail the same way.
        """
        index_of = dict(enumerate(self.order))
        crash = len(self.order) - 1
        strong, weak = (
            self.dependencies.slice_of(crash),
            self.dependencies.slice_of(crash, weak=True),
        )
        side_effect_risks = self.dependencies.side_effect_risks()
        resource_use, limit = self.resource_use()
        seconds, fresh_seconds = self.seconds_of_cells(recognition_seconds)
        frame_names = self.names_in_frames() if stops_at_errors else {}

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
            seconds=seconds,
            fresh_seconds=fresh_seconds,
            start_seconds=min(
                (r.started for r in self.records.values() if r.started is not None), default=0.0
            ),
            erratic=self.verdict.cause is not None and self.verdict.cause.kind in ERRATIC,
            budget=budget,
        )

    def seconds_of_cells(self, recognition_seconds: float | None) -> tuple[dict[int, float], float]:
        """Return the seconds that each cell takes in a trial, and those that a fresh run adds."""
        seconds = {index: self.records[index].seconds or 0.0 for index in self.order}
        full = seconds[self.crash.index]
        if recognition_seconds is None or recognition_seconds >= full:
            return seconds, 0.0
        return seconds | {self.crash.index: recognition_seconds}, full - recognition_seconds

    def names_in_frames(self) -> dict[int, frozenset[str]]:
        """Return, by cell position, the names that the stack frames of the crash had just read."""
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
                # A NameError further in may be caught here.
                break
            position = self.order.index(index)
            names[position] = names.get(position, frozenset()) | names_read_at(
                self.sources[index], line
            )
        return names

    def resource_use(self) -> tuple[Mapping[int, float] | None, float | None]:
        """Return how much of the exhausted resource each cell used, and how much was available."""
        assert self.verdict.cause is not None
        kind, limits = self.verdict.cause.kind, self.verdict.limits
        if kind in MEMORY and limits.memory is not None:
            return {i: float(self.records[i].memory_kept or 0) for i in self.order}, float(
                limits.memory
            )
        if kind is CauseKind.NOTEBOOK_TIMEOUT and limits.timeout is not None:
            return {i: self.records[i].seconds or 0.0 for i in self.order}, limits.timeout
        if kind is CauseKind.CPU_TIME and limits.cpu_time is not None:
            return {i: self.records[i].cpu_seconds or 0.0 for i in self.order}, limits.cpu_time
        return None, None
