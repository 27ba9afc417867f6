"""Builds the verdict from a trial's result. Pure except for the clock.

The status follows from one table, the cause from the rules, and the figures from the metrics.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from msgspec import Struct, field
from msgspec.structs import replace

from safe_exec._version import __version__
from safe_exec.diagnosis.memory_use import memory_use
from safe_exec.diagnosis.missed_peak import is_lower_bound, missed_peak_warning
from safe_exec.diagnosis.rules import Context, find_cause
from safe_exec.diagnosis.rules.crashes import KINDS
from safe_exec.diagnosis.rules.isolation import unexplained
from safe_exec.model.ending import (
    Cancelled,
    CellFailed,
    Died,
    Ending,
    InternalError,
    LimitHit,
    OutputsDiffer,
    Passed,
    StartFailed,
    TimedOut,
    signal_name,
)
from safe_exec.model.evidence import CellLocation, Evidence, FaultReport, Frame, NativeFrame
from safe_exec.model.limits import Isolation, Limits
from safe_exec.model.patterns import lazy_pattern
from safe_exec.model.verdict import (
    Cause,
    CrashCell,
    Environment,
    NotebookInfo,
    Status,
    Usage,
    Verdict,
)
from safe_exec.notebook.inputs import NotebookInputs
from safe_exec.sandbox.plan import SpawnPlan

if TYPE_CHECKING:
    from safe_exec.trial.request import TrialResult

# The one table from ending to status; the exit code follows from the status.
STATUS_OF: Mapping[type[Any], Status] = {
    Passed: Status.PASSED,
    CellFailed: Status.CELL_ERROR,
    OutputsDiffer: Status.CELL_ERROR,
    Died: Status.KERNEL_DIED,
    TimedOut: Status.TIMEOUT,
    LimitHit: Status.LIMIT_EXCEEDED,
    StartFailed: Status.START_FAILED,
    Cancelled: Status.CANCELLED,
    InternalError: Status.INTERNAL_ERROR,
}

# Enough for a traceback; the whole output is in the annotated notebook.
STDERR_TAIL = 4000
NO_REPORT = "the kernel's fault handler reported nothing, so nothing held the process"
# The most characters of a local variable's value.
LONGEST_VALUE = 200
_PLUMBING = lazy_pattern(r"/(?:IPython|ipykernel|decorator)/|/decorator\.py$")


def cause_of(
    result: TrialResult, limits: Limits, plan: SpawnPlan, language: str | None
) -> Cause | None:
    """Return the cause that the rules find for a trial."""
    return find_cause(context_of(result, limits, plan, language))


def context_of(
    result: TrialResult, limits: Limits, plan: SpawnPlan, language: str | None
) -> Context:
    """Return a trial as the rules see it."""
    return Context(
        ending=result.ending,
        evidence=result.evidence,
        limits=limits,
        enforcement=plan.enforcement,
        cells=tuple(result.metrics.records.values()),
        current=getattr(result.ending, "cell", None),
        language=language,
        walls=plan.walls,
    )


class RunInfo(Struct, frozen=True, kw_only=True):
    """The facts of a run that its trial does not know: its request, its notebook, its start.

    ``language`` is the one that the notebook's metadata name. ``warnings`` come from its limits.
    ``file_lines`` are the lines in the file of a notebook kept as text, by the id of a cell.
    """

    run_id: str
    started_at: datetime
    command: tuple[str, ...]
    cwd: Path
    path: Path
    sha256: str
    kernel_name: str
    language: str | None
    limits: Limits
    isolation: Isolation
    allow_errors: bool
    inputs: NotebookInputs
    warnings: tuple[str, ...]
    file_lines: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    earlier_attempts: tuple[str, ...] = ()


def build_verdict(run: RunInfo, result: TrialResult, plan: SpawnPlan) -> Verdict:
    """Return the verdict of one run."""
    metrics, evidence = result.metrics, result.evidence
    # A kernel names its language in kernel_info; the notebook's metadata may be out of date.
    language = _language(result.node) or run.language
    context = context_of(result, run.limits, plan, language)
    cause = find_cause(context)
    info = NotebookInfo(
        path=str(run.path),
        sha256=run.sha256,
        kernel=run.kernel_name,
        language=language,
        cells=len(result.node.cells),
        code_cells=len(metrics.records),
        parameters=run.inputs.parameters,
        skip_tags=run.inputs.selection.skip_tags,
        only_tags=run.inputs.selection.only_tags,
        until=run.inputs.selection.until,
        exit_is=run.inputs.exit_is.value,
        strict_shell=run.inputs.strict_shell,
        stdin=None if run.inputs.stdin is None else run.inputs.stdin.path,
    )
    return Verdict(
        safe_exec_version=__version__,
        run_id=run.run_id,
        started=_utc(run.started_at),
        finished=_utc(datetime.now(UTC)),
        command=run.command or ("safe_exec.run", str(run.path)),
        cwd=str(run.cwd),
        status=STATUS_OF[type(result.ending)],
        notebook=info,
        cause=cause,
        memory=memory_use(context, cause),
        crash_cell=crash_cell(
            result.ending,
            result.location,
            result.node,
            evidence.fault,
            run.file_lines,
            native_error=_native_error(result.ending, evidence),
        ),
        differences=result.ending.differences if isinstance(result.ending, OutputsDiffer) else (),
        cells=tuple(metrics.records.values()),
        limits=run.limits,
        isolation=run.isolation,
        enforcement=plan.enforcement,
        timeline=metrics.timeline(),
        profile=metrics.profile.lines(
            {index: record.code_index for index, record in metrics.records.items()}
        ),
        usage=Usage(
            wall_seconds=metrics.wall_seconds,
            cpu_seconds=evidence.cpu_seconds,
            memory_peak=evidence.memory_peak,
            memory_peak_raw=evidence.memory_peak_raw,
            oom_kills=evidence.oom_kills,
            processes_peak=evidence.processes_peak,
            output_bytes=evidence.output_bytes,
            memory_upper_bound=evidence.memory_upper_bound,
            memory_lower_bound=is_lower_bound(evidence, cause),
        ),
        environment=_environment(result, plan),
        stderr_tail=evidence.stderr_tail[-STDERR_TAIL:],
        attempts=len(run.earlier_attempts) + 1,
        warnings=(
            *_attempt_warnings(run, STATUS_OF[type(result.ending)]),
            *run.warnings,
            *result.warnings,
            *missed_peak_warning(evidence, run.limits.memory, cause),
            *unexplained(context, cause),
            *_reasons(result.ending),
            *_not_known(run.kernel_name, result),
        ),
        allow_errors=run.allow_errors,
        remote_hosts=evidence.remote_hosts,
    )


def _attempt_warnings(run: RunInfo, status: Status) -> tuple[str, ...]:
    """Return a line for each earlier attempt; a pass after a failure is flaky."""
    flaky = "flaky: " if status is Status.PASSED else ""
    return tuple(
        f"{flaky}attempt {number} failed: {failure}"
        for number, failure in enumerate(run.earlier_attempts, 1)
    )


def _reasons(ending: Ending) -> tuple[str, ...]:
    """Return the reason why a run without a cause ended: the signal that cancelled it."""
    if isinstance(ending, Cancelled):
        return (f"stopped by {signal_name(ending.signal)}",)
    return ()


def _not_known(kernel: str, result: TrialResult) -> tuple[str, ...]:
    """Return a warning about the facts that are missing if no agent runs in the kernel."""
    ending = result.ending
    if (
        result.instrumented
        or getattr(ending, "cell", None) is None
        or isinstance(ending, Passed | Cancelled)
    ):
        return ()
    missing = "no stack" if result.location is not None else "neither line nor stack"
    return (f"kernel {kernel} is not ipykernel: {missing} is known",)


def _utc(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _language(node: Any) -> str | None:
    name = node.metadata.get("language_info", {}).get("name")
    return str(name) if name else None


def crash_cell(
    ending: Ending,
    location: CellLocation | None,
    node: Any,
    fault: FaultReport | None = None,
    file_lines: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
    *,
    native_error: str | None = None,
) -> CrashCell | None:
    """Return the cell that was running at the failure, with its line if it is known."""
    # Some endings have no cell: a failed start, for example.
    index = getattr(ending, "cell", None)
    if index is None or isinstance(ending, Passed) or node.cells[index].cell_type != "code":
        return None
    cell = node.cells[index]
    line = location.line if location is not None and location.cell == index else None
    lines = cell.source.splitlines()
    if line is not None and not 1 <= line <= len(lines):
        line = None
    return CrashCell(
        index=index,
        code_index=sum(c.cell_type == "code" for c in node.cells[:index]),
        id=cell.get("id"),
        execution_count=cell.get("execution_count"),
        line=line,
        source_line=lines[line - 1] if line is not None else None,
        stack=tuple(_with_source(frame, node) for frame in without_plumbing(location.stack))
        if location is not None
        else (),
        native=tuple(_of_native(frame, node) for frame in fault.native) if fault else (),
        native_error=native_error,
        file_line=_file_line(file_lines.get(cell.get("id", str(index)), ()), line),
    )


def _native_error(ending: Ending, evidence: Evidence) -> str | None:
    """Return why the native stack of a crash is missing or incomplete."""
    if evidence.fault is not None:
        return evidence.fault.native_error
    is_crash = isinstance(ending, Died) and ending.exit is not None and ending.exit.signal in KINDS
    return NO_REPORT if is_crash and evidence.agent else None


def _of_native(frame: NativeFrame, node: Any) -> NativeFrame:
    """Add the source line to a Python frame of a native stack, and shorten its variables."""
    if frame.python is None:
        return frame
    variables = {name: value[:LONGEST_VALUE] for name, value in frame.locals.items()}
    return replace(frame, python=_with_source(frame.python, node), locals=variables)


def _file_line(lines: tuple[int, ...], line: int | None) -> int | None:
    return lines[line - 1] if line is not None and line <= len(lines) else None


def without_plumbing(stack: tuple[Frame, ...]) -> tuple[Frame, ...]:
    """Return a stack without IPython's frames between the code of cells.

    They only show how a magic runs its body. If the failure is in IPython itself, its frames stay.
    """
    # Frames outside any cell are innermost: there the failure is in a library, and they stay.
    first = next(
        (number for number, frame in enumerate(stack) if frame.cell is not None), len(stack)
    )
    return tuple(
        frame
        for number, frame in enumerate(stack)
        if number < first or frame.cell is not None or not _PLUMBING.search(frame.file or "")
    )


def _with_source(frame: Frame, node: Any) -> Frame:
    """Add the source line to a frame of a cell."""
    if frame.cell is None or frame.line is None or frame.cell >= len(node.cells):
        return frame
    lines = node.cells[frame.cell].source.splitlines()
    return replace(
        frame, source_line=lines[frame.line - 1] if 1 <= frame.line <= len(lines) else None
    )


def _environment(result: TrialResult, plan: SpawnPlan) -> Environment:
    # The path comes from the kernel, so its elements may be anything.
    paths = [str(p) for p in result.hello.get("path", ()) if isinstance(p, str)]
    return Environment(
        python=str(result.hello["python"]) if result.hello.get("python") else None,
        platform=f"{platform.system()} {platform.release()} {platform.machine()}",
        packages=installed_packages(paths) if paths else None,
        cgroup=next(
            (path for path in plan.cgroup.dirs if "memory" in path),
            plan.cgroup.dirs[0] if plan.cgroup.dirs else None,
        ),
        isolation=plan.walls,
        isolation_facts=result.evidence.isolation,
        machine=platform.node() or None,
    )


def installed_packages(paths: list[str]) -> dict[str, str]:
    """Return the packages on the kernel's path, by their ``.dist-info`` directories."""
    packages: dict[str, str] = {}
    for path in paths:
        try:
            names = [
                entry.name for entry in Path(path).iterdir() if entry.name.endswith(".dist-info")
            ]
        except OSError:
            continue
        # The kernel chooses its path, so bound the work.
        for name in names[:3000]:
            package, _, version = name.removesuffix(".dist-info").partition("-")
            packages.setdefault(package, version)
    return dict(sorted(packages.items()))
