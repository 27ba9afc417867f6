"""Probe a limit: run a notebook with one value after another until its threshold is known.

The search (``experiments.threshold``) only knows numbers, and the reruns (``experiments.rerun``)
know no particular limit. This module connects them.
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
from safe_exec.workflows.job import PreparedJob
from safe_exec.workflows.scratch import open_scratch

if TYPE_CHECKING:
    from safe_exec.experiments.rerun import Rerunner, RerunResult

# Near its memory limit a program may only crawl, because the system keeps reclaiming pages.
SLOW_FACTOR, SLOW_SECONDS = 10.0, 10.0
"""A run fails if it takes ten times as long as the one that passed, and ten seconds more."""
TIMES = (LimitName.CELL_TIMEOUT, LimitName.TIMEOUT)
MOST_PROCESSES = 1 << 15
UNKNOWN_MEMORY = 1 << 40


class ProbeRun(Struct, frozen=True, kw_only=True):
    """One run with one value of the limit; infinity stands for no limit."""

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
    """The result of a probe.

    ``enforcement`` is the mechanism that enforces the limit on this host.
    """

    scale: Scale
    precision: float
    bracket: Bracket
    runs: tuple[ProbeRun, ...]
    enforcement: Enforcement | None = None
    warnings: tuple[str, ...] = ()

    def passing(self) -> ProbeRun | None:
        """Return the run with the smallest value that always passed."""
        return next(
            (run for run in self.runs if run.passed and run.value == self.bracket.passes), None
        )

    def failing(self) -> ProbeRun | None:
        """Return the run with the largest failing value; if none passed, the last run."""
        failed = [run for run in self.runs if not run.passed and not run.cut]
        if self.bracket.passes is None:
            return failed[-1] if failed else None
        return next((run for run in failed if run.value == self.bracket.fails), None)


class ProbeListener(Protocol):
    """Receives the start and the end of every run."""

    def begins(self, number: int, value: float) -> None:
        """Run ``number``, counted from 1, starts with ``value``."""

    def ended(self, number: int, run: ProbeRun) -> None:
        """Run ``number`` has ended."""


class ProbeRunner(Protocol):
    """Runs the notebook with one value."""

    async def run(self, query: ProbeQuery) -> ProbeRun:
        """Run the notebook once."""

    @property
    def cancelled(self) -> bool:
        """Whether the user stopped the probe."""


async def probe(
    prepared: PreparedJob,
    name: LimitName,
    *,
    precision: float,
    budget: float,
    observer: ProbeListener,
) -> ProbeReport:
    """Find the threshold of one limit.

    Raises SandboxError if the notebook cannot run or no mechanism here enforces the limit.
    """
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
    return (f"runs may have seen {' and '.join(gaps)} of earlier runs",) if gaps else ()


def most_of(name: LimitName, prepared: PreparedJob, budget: float) -> float:
    """Return the largest value of a limit that is worth a run on this host."""
    match name:
        case LimitName.MEMORY:
            return float(prepared.limits.machine.memory_total or UNKNOWN_MEMORY)
        case LimitName.OPEN_FILES:
            # The runner does not raise its own hard limit, so it is the most a kernel can get.
            hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
            return float(hard if hard != resource.RLIM_INFINITY else 1 << 20)
        case LimitName.PROCESSES:
            return float(MOST_PROCESSES)
        case LimitName.FILE_SIZE:
            # A file cannot be larger than the free space it is written to.
            return float(shutil.disk_usage(prepared.paths.cwd).free)
    # A run longer than the budget of the probe could not be measured.
    return budget


def enforcement_of(prepared: PreparedJob, name: LimitName, value: float) -> Enforcement | None:
    """Return the mechanism that would enforce the limit. Raises SandboxError if there is none."""
    limits = with_value(prepared.limits.values, name, SCALES[name].limit(value))
    # The plan for one value shows the mechanism for all of them.
    enforcement = build_plan(limits, prepared.limits.machine, prepared.run_id).enforcement.get(name)
    if enforcement is not None and enforcement.by is Mechanism.NONE:
        raise SandboxError(
            f"{name.value}: no mechanism on this machine enforces this limit; "
            "`safe-exec doctor` says how to fix it"
        )
    return enforcement


def with_value(limits: Limits, name: LimitName, value: float | None) -> Limits:
    """Return the limits with one of them replaced."""
    changed: dict[str, Any] = {name.value: value}
    return replace(limits, **changed)


async def run_search(
    searching: Search, runner: ProbeRunner, observer: ProbeListener
) -> tuple[Bracket, tuple[ProbeRun, ...]]:
    """Answer the search until it ends; a signal ends it with the result so far."""
    runs: list[ProbeRun] = []

    async def answer(query: ProbeQuery) -> ProbeResult:
        observer.begins(len(runs) + 1, query.value)
        run = await runner.run(query)
        # An interrupted run says nothing about its value, so it is not recorded.
        if not runner.cancelled:
            runs.append(run)
            observer.ended(len(runs), run)
        return ProbeResult(outcome=run.outcome, seconds=run.seconds, peak=run.peak, cut=run.cut)

    def cancellation() -> ProbeCancelled | None:
        return ProbeCancelled() if runner.cancelled else None

    bracket = await drive(searching, answer, cancellation=cancellation)
    return bracket, tuple(runs)


class NotebookRunner:
    """Runs the notebook itself, in copies of its folder."""

    def __init__(self, prepared: PreparedJob, runs: Rerunner, scale: Scale) -> None:
        self.prepared, self.runs, self.scale = prepared, runs, scale
        # Set by the first run that passes: the baseline for "too slow".
        self._deadline = math.inf
        self._first = True

    @property
    def cancelled(self) -> bool:
        """Whether a signal arrived."""
        return bool(self.runs.template.cancellation.signals)

    async def run(self, query: ProbeQuery) -> ProbeRun:
        """Run once, in a new kernel. Raises RerunFailed if even the first run cannot start."""
        from safe_exec.experiments.rerun import RerunFailed, RerunOptions, why_not_run
        from safe_exec.experiments.threshold.descriptors import Descriptors
        from safe_exec.model.ending import InternalError

        name, value = self.scale.name, self.scale.limit(query.value)
        limits = with_value(self.prepared.limits.values, name, value)
        descriptors = Descriptors(limits.open_files)
        options = RerunOptions(
            limits=limits,
            # The first run uses the limits that the user gave, including the limits of cells.
            cell_limits=self.runs.template.cell_limits if self._first else self._of_cells(value),
            time_budget=query.time_budget,
            deadline=self._deadline,
            sink=descriptors,
        )
        rerun_result = await self.runs.run(options)
        trouble = (
            why_not_run(rerun_result.result)
            # Only the first run tells whether the notebook can run here. A later one that cannot start
            # failed because of the value that is probed.
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
        """Return the limits of cells, with the value of the probe in place of their own."""
        # The user asked for this limit by an option, and options take precedence over cells.
        own = self.runs.template.cell_limits
        return lambda cell: with_value(own(cell), self.scale.name, value)

    def _to_probe_run(
        self, query: ProbeQuery, rerun_result: RerunResult, descriptors: Any
    ) -> ProbeRun:
        from safe_exec.diagnosis.verdict import cause_of, crash_cell
        from safe_exec.experiments.rerun import peak_of

        result, request, name = rerun_result.result, rerun_result.request, self.scale.name
        cause = cause_of(result, request.limits, request.plan, self.prepared.notebook.language)
        # Open files and file sizes are counted from events: the kernel keeps no peak of them.
        measured = {
            LimitName.OPEN_FILES: descriptors.most,
            LimitName.FILE_SIZE: descriptors.largest,
        }
        return ProbeRun(
            value=query.value,
            # A failure that has nothing to do with the limit must not move the threshold.
            outcome=self.scale.outcome(cause),
            seconds=rerun_result.seconds,
            peak=measured[name] if name in measured else peak_of(name, result),
            cause=cause,
            crash_cell=crash_cell(result.ending, result.location, result.node),
            slow=rerun_result.slow,
            cut=rerun_result.cut,
        )
