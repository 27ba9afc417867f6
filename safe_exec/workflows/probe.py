"""A limit probed: runs of a notebook with one value after the other, until its threshold is known.

May import aside, conclude, culprit and what is below. The search knows numbers, the runs know no limit in particular; here they meet.
"""

from __future__ import annotations

import math
import resource
import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from msgspec import Struct
from msgspec.structs import replace

from safe_exec.errors import SandboxError
from safe_exec.experiments.driver import drive
from safe_exec.experiments.threshold.scales import SCALES, Scale
from safe_exec.experiments.threshold.search import (
    Bracket,
    ProbeCancelled,
    ProbeOutcome,
    ProbeQuery,
    ProbeResult,
    Search,
    search,
)
from safe_exec.model.limits import Enforcement, LimitName, Limits, Mechanism
from safe_exec.model.verdict import Cause, CrashCell
from safe_exec.sandbox.planner import build_plan
from safe_exec.workflows.prepare import PreparedJob
from safe_exec.workflows.scratch import open_scratch

if TYPE_CHECKING:
    from safe_exec.experiments.rerun import Rerunner, RerunResult

SLOW_FACTOR, SLOW_SECONDS = 10.0, 10.0
"""A run that takes so many times the one that passed, and so much more, fails: near its limit a program may only crawl."""
TIMES = (LimitName.CELL_TIMEOUT, LimitName.TIMEOUT)
MOST_PROCESSES = 1 << 15
UNKNOWN_MEMORY = 1 << 40


class ProbeRun(Struct, frozen=True, kw_only=True):
    """One run with one value (infinity: without a limit): what became of it, and of what it died."""

    value: float
    outcome: ProbeOutcome
    seconds: float
    peak: float | None = None
    cause: Cause | None = None
    crash_cell: CrashCell | None = None
    slow: bool = False
    cut: bool = False

    @property
    def passed(self) -> bool:
        """Whether every cell ran."""
        return self.outcome is ProbeOutcome.PASSED and not self.cut


class ProbeReport(Struct, frozen=True, kw_only=True):
    """The whole answer. ``held`` is what holds the limit here; ``warnings`` are lines."""

    scale: Scale
    precision: float
    bracket: Bracket
    runs: tuple[ProbeRun, ...]
    enforcement: Enforcement | None = None
    warnings: tuple[str, ...] = ()

    def passing(self) -> ProbeRun | None:
        """The run with the smallest value with which it always passed."""
        return next(
            (run for run in self.runs if run.passed and run.value == self.bracket.passes), None
        )

    def failing(self) -> ProbeRun | None:
        """The run just below; where it never passed, the last one."""
        failed = [run for run in self.runs if not run.passed and not run.cut]
        if self.bracket.passes is None:
            return failed[-1] if failed else None
        return next((run for run in failed if run.value == self.bracket.fails), None)


class ProbeListener(Protocol):
    """Is told of runs as they begin and end."""

    def begins(self, number: int, value: float) -> None:
        """Run ``number`` (from 1) begins."""

    def ended(self, number: int, run: ProbeRun) -> None:
        """It is over."""


class ProbeRunner(Protocol):
    """Runs the notebook with a value."""

    async def run(self, query: ProbeQuery) -> ProbeRun:
        """One run."""

    @property
    def cancelled(self) -> bool:
        """Whether the user has stopped us."""


async def probe(
    prepared: PreparedJob,
    name: LimitName,
    *,
    precision: float,
    budget: float,
    observer: ProbeListener,
) -> ProbeReport:
    """Find the threshold of one limit. Raises SandboxError where nothing can be run or nothing here holds that limit."""
    from safe_exec.experiments.rerun import RerunFailed

    scale = SCALES[name]
    current_value = prepared.limits.values.of(name)
    question = scale.question(
        initial=current_value,
        most=most_of(name, prepared, budget),
        precision=precision,
        budget=budget,
    )
    enforcement = enforcement_of(prepared, name, question.guess)
    async with open_scratch(prepared) as scratch:
        runner = NotebookRunner(prepared, scratch.rerunner, scale)
        try:
            bracket, runs = await run_search(search(question), runner, observer)
        except RerunFailed as trouble:
            raise SandboxError(str(trouble)) from trouble
        gaps = scratch.gaps
    return ProbeReport(
        scale=scale,
        precision=precision,
        bracket=bracket,
        runs=runs,
        enforcement=enforcement,
        warnings=(*prepared.limits.resolved.warnings, *_gap(gaps)),
    )


def _gap(gaps: tuple[str, ...]) -> tuple[str, ...]:
    return (f"runs may have seen {' and '.join(gaps)}",) if gaps else ()


def most_of(name: LimitName, prepared: PreparedJob, budget: float) -> float:
    """The most of a limit that there is to give."""
    match name:
        case LimitName.MEMORY:
            return float(prepared.limits.machine.memory_total or UNKNOWN_MEMORY)
        case LimitName.OPEN_FILES:
            hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]  # it is not raised
            return float(hard if hard != resource.RLIM_INFINITY else 1 << 20)
        case LimitName.PROCESSES:
            return float(MOST_PROCESSES)
        case LimitName.FILE_SIZE:
            return float(shutil.disk_usage(prepared.paths.cwd).free)
    return budget  # of time: what does not fit is not known


def enforcement_of(prepared: PreparedJob, name: LimitName, value: float) -> Enforcement | None:
    """What holds the limit here, were it set. Raises SandboxError where nothing does."""
    limits = with_value(prepared.limits.values, name, SCALES[name].limit(value))
    enforcement = build_plan(limits, prepared.limits.machine, prepared.run_id).enforcement.get(name)
    if enforcement is not None and enforcement.by is Mechanism.NONE:
        raise SandboxError(
            f"{name.value}: nothing on this machine can hold this limit; `safe-exec doctor` says how to fix it"
        )
    return enforcement


def with_value(limits: Limits, name: LimitName, value: float | None) -> Limits:
    """The limits with one of them changed."""
    changed: dict[str, Any] = {name.value: value}
    return replace(limits, **changed)


async def run_search(
    searching: Search, runner: ProbeRunner, observer: ProbeListener
) -> tuple[Bracket, tuple[ProbeRun, ...]]:
    """Run the notebook for each query of the search; a signal ends it with the bracket so far."""
    runs: list[ProbeRun] = []

    async def answer(query: ProbeQuery) -> ProbeResult:
        observer.begins(len(runs) + 1, query.value)
        run = await runner.run(query)
        if not runner.cancelled:
            runs.append(run)
            observer.ended(len(runs), run)
        return ProbeResult(outcome=run.outcome, seconds=run.seconds, peak=run.peak, cut=run.cut)

    def cancellation() -> ProbeCancelled | None:
        return ProbeCancelled() if runner.cancelled else None

    bracket = await drive(searching, answer, cancellation=cancellation)
    return bracket, tuple(runs)


class NotebookRunner:
    """Runs of the notebook itself."""

    def __init__(self, prepared: PreparedJob, runs: Rerunner, scale: Scale) -> None:
        self.prepared, self.runs, self.scale = prepared, runs, scale
        self._deadline = math.inf
        self._first = True

    @property
    def cancelled(self) -> bool:
        """Whether a signal came."""
        return bool(self.runs.template.cancellation.signals)

    async def run(self, query: ProbeQuery) -> ProbeRun:
        """One run, cold. Raises RerunFailed where not even the first can be run."""
        from safe_exec.experiments.rerun import RerunFailed, RerunOptions, why_not_run
        from safe_exec.experiments.threshold.descriptors import Descriptors
        from safe_exec.model.ending import InternalError

        name, value = self.scale.name, self.scale.limit(query.value)
        limits = with_value(self.prepared.limits.values, name, value)
        descriptors = Descriptors(limits.open_files)
        options = RerunOptions(
            limits=limits,
            # The first run is with the limits as given, of the cells too.
            cell_limits=self.runs.template.cell_limits if self._first else self._of_cells(value),
            time_budget=query.time_budget,
            deadline=self._deadline,
            sink=descriptors,
        )
        rerun_result = await self.runs.run(options)
        trouble = (
            why_not_run(rerun_result.result)
            if isinstance(rerun_result.result.ending, InternalError)
            else None
        )
        if trouble is not None and self._first:
            raise RerunFailed(trouble)
        self._first = False
        run = self._to_probe_run(query, rerun_result, descriptors)
        if run.passed and name not in TIMES:
            self._deadline = min(self._deadline, SLOW_FACTOR * rerun_result.seconds + SLOW_SECONDS)
        return run

    def _of_cells(self, value: float | None) -> Callable[[Any], Limits]:
        """What a cell says of itself does not count for the limit that is probed: an option has set it."""
        own = self.runs.template.cell_limits
        return lambda cell: with_value(own(cell), self.scale.name, value)

    def _to_probe_run(
        self, query: ProbeQuery, rerun_result: RerunResult, descriptors: Any
    ) -> ProbeRun:
        from safe_exec.diagnosis.verdict import cause_of, crash_cell
        from safe_exec.experiments.rerun import peak_of

        result, request, name = rerun_result.result, rerun_result.request, self.scale.name
        cause = cause_of(result, request.limits, request.plan, self.prepared.notebook.language)
        measured = {
            LimitName.OPEN_FILES: descriptors.most,
            LimitName.FILE_SIZE: descriptors.largest,
        }
        return ProbeRun(
            value=query.value,
            outcome=self.scale.outcome(cause),
            seconds=rerun_result.seconds,
            peak=measured[name] if name in measured else peak_of(name, result),
            cause=cause,
            crash_cell=crash_cell(result.ending, result.location, result.node),
            slow=rerun_result.slow,
            cut=rerun_result.cut,
        )
