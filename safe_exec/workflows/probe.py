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
from safe_exec.experiments.threshold.scales import SCALES, Scale
from safe_exec.experiments.threshold.search import Bracket, Cancel, Fate, Search, Tried, Try, search
from safe_exec.model.limits import Enforcement, LimitName, Limits, Mechanism
from safe_exec.model.verdict import Cause, CrashCell
from safe_exec.sandbox.planner import build_plan
from safe_exec.workflows.prepare import PreparedJob
from safe_exec.workflows.scratch import open_scratch

if TYPE_CHECKING:
    from safe_exec.experiments.rerun import Ran, Runs

SLOW_FACTOR, SLOW_SECONDS = 10.0, 10.0
"""A run that takes so many times the one that passed, and so much more, fails: near its limit a program may only crawl."""
TIMES = (LimitName.CELL_TIMEOUT, LimitName.TIMEOUT)
MOST_PROCESSES = 1 << 15
UNKNOWN_MEMORY = 1 << 40


class ProbeRun(Struct, frozen=True, kw_only=True):
    """One run with one value (infinity: without a limit): what became of it, and of what it died."""

    value: float
    fate: Fate
    seconds: float
    peak: float | None = None
    cause: Cause | None = None
    crash_cell: CrashCell | None = None
    slow: bool = False
    cut: bool = False

    @property
    def passed(self) -> bool:
        """Whether every cell ran."""
        return self.fate is Fate.PASSED and not self.cut


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

    async def run(self, attempt: Try) -> ProbeRun:
        """One run."""

    @property
    def cancelled(self) -> bool:
        """Whether the user has stopped us."""


async def probe(
    prepared: PreparedJob, name: LimitName, *, precision: float, budget: float, watch: ProbeListener
) -> ProbeReport:
    """Find the threshold of one limit. Raises SandboxError where nothing can be run or nothing here holds that limit."""
    from safe_exec.experiments.rerun import NoTrial

    scale = SCALES[name]
    current_value = prepared.limits.values.of(name)
    question = scale.question(
        given=current_value,
        most=most_of(name, prepared, budget),
        precision=precision,
        budget=budget,
    )
    enforcement = enforcement_of(prepared, name, question.guess)
    async with open_scratch(prepared) as scratch:
        runner = NotebookRunner(prepared, scratch.runs, scale)
        try:
            bracket, runs = await drive(search(question), runner, watch)
        except NoTrial as trouble:
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


async def drive(
    searching: Search, runner: ProbeRunner, watch: ProbeListener
) -> tuple[Bracket, tuple[ProbeRun, ...]]:
    """Answer the search's questions until it is done; a signal ends it with what is known."""
    runs: list[ProbeRun] = []
    try:
        attempt = next(searching)
        while True:
            watch.begins(len(runs) + 1, attempt.value)
            run = await runner.run(attempt)
            if runner.cancelled:
                attempt = searching.throw(Cancel())
                continue
            runs.append(run)
            watch.ended(len(runs), run)
            attempt = searching.send(
                Tried(fate=run.fate, seconds=run.seconds, peak=run.peak, cut=run.cut)
            )
    except StopIteration as done:
        bracket: Bracket = done.value
        return bracket, tuple(runs)


class NotebookRunner:
    """Runs of the notebook itself."""

    def __init__(self, prepared: PreparedJob, runs: Runs, scale: Scale) -> None:
        self.prepared, self.runs, self.scale = prepared, runs, scale
        self._deadline = math.inf
        self._first = True

    @property
    def cancelled(self) -> bool:
        """Whether a signal came."""
        return bool(self.runs.template.cancellation.signals)

    async def run(self, attempt: Try) -> ProbeRun:
        """One run, cold. Raises NoTrial where not even the first can be run."""
        from safe_exec.experiments.rerun import Change, NoTrial, why_not_run
        from safe_exec.experiments.threshold.descriptors import Descriptors
        from safe_exec.model.ending import InternalError

        name, value = self.scale.name, self.scale.limit(attempt.value)
        limits = with_value(self.prepared.limits.values, name, value)
        descriptors = Descriptors(limits.open_files)
        change = Change(
            limits=limits,
            # The first run is with the limits as given, of the cells too.
            cell_limits=self.runs.template.cell_limits if self._first else self._of_cells(value),
            allowed=attempt.allowed,
            deadline=self._deadline,
            sink=descriptors,
        )
        ran = await self.runs.run(change)
        trouble = why_not_run(ran.result) if isinstance(ran.result.ending, InternalError) else None
        if trouble is not None and self._first:
            raise NoTrial(trouble)
        self._first = False
        run = self._to_probe_run(attempt, ran, descriptors)
        if run.passed and name not in TIMES:
            self._deadline = min(self._deadline, SLOW_FACTOR * ran.seconds + SLOW_SECONDS)
        return run

    def _of_cells(self, value: float | None) -> Callable[[Any], Limits]:
        """What a cell says of itself does not count for the limit that is probed: an option has set it."""
        own = self.runs.template.cell_limits
        return lambda cell: with_value(own(cell), self.scale.name, value)

    def _to_probe_run(self, attempt: Try, ran: Ran, descriptors: Any) -> ProbeRun:
        from safe_exec.diagnosis.verdict import cause_of, crash_cell
        from safe_exec.experiments.rerun import peak_of

        result, request, name = ran.result, ran.request, self.scale.name
        cause = cause_of(result, request.limits, request.plan, self.prepared.notebook.language)
        measured = {
            LimitName.OPEN_FILES: descriptors.most,
            LimitName.FILE_SIZE: descriptors.largest,
        }
        return ProbeRun(
            value=attempt.value,
            fate=self.scale.fate(cause),
            seconds=ran.seconds,
            peak=measured[name] if name in measured else peak_of(name, result),
            cause=cause,
            crash_cell=crash_cell(result.ending, result.place, result.node),
            slow=ran.slow,
            cut=ran.cut,
        )
