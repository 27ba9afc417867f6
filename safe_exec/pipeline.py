"""The whole of ``run``: read, resolve limits, first run, cause, verdict, reports. May import everything below commands."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safe_exec import events, notebook, profiles
from safe_exec.errors import EnforcementError, LimitsError, OutputPathError, SafeExecError, UsageError
from safe_exec.events import Event, EventSink
from safe_exec.files import HeldSpace, check_writable, write_atomically
from safe_exec.model import Evidence, InternalError, Limits, Verdict
from safe_exec.sandbox.build import build_plan, parse_mechanisms, parse_required
from safe_exec.sandbox.leftovers import sweep
from safe_exec.sandbox.machine import Machine, detect
from safe_exec.sandbox.plan import SpawnPlan, require

log = logging.getLogger("safe_exec")

HELD_BYTES = 1 << 20
DEFAULT_KERNEL = "python3"


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What the user asked for."""

    path: Path
    limits: str | Limits | None = None
    options: Mapping[str, object] = field(default_factory=dict)
    output: Path | None = None
    verdict: Path | None = None
    kernel: str | None = None
    cwd: Path | None = None
    allow_errors: bool = False
    require: str | None = None
    mechanisms: tuple[str, ...] | None = None
    env: Mapping[str, str] | None = None
    sinks: tuple[EventSink, ...] = ()
    command: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A job that can run: everything was read and checked, nothing has been written."""

    job: Job
    notebook: notebook.Notebook
    node: Any
    resolved: profiles.Resolved
    machine: Machine
    required: tuple[Any, ...]
    output: Path
    verdict: Path
    cwd: Path
    kernel_name: str
    run_id: str
    started: float
    started_at: datetime


def prepare(job: Job) -> Prepared:
    """Read and check all input and every output path.

    Raises UsageError and its kinds: with them nothing has been written.
    """
    started, started_at = time.monotonic(), datetime.now(UTC)
    read = notebook.read(job.path)
    machine = detect(parse_mechanisms(job.mechanisms))
    node = notebook.strip_annotations(read.node)
    resolved = _resolve(job, node, machine)
    warnings = _check_cells(resolved, node, job.path)
    resolved = replace(resolved, warnings=(*resolved.warnings, *warnings))
    paths = notebook.default_outputs(job.path)
    output, verdict = job.output or paths.out, job.verdict or paths.verdict
    refuse_same({"the notebook": job.path, "-o": output, "--verdict": verdict})
    for path in (output, verdict):
        check_writable(path)
    cwd = job.cwd or job.path.absolute().parent
    if not cwd.is_dir():
        raise UsageError(f"{cwd}: no such directory to run in (--cwd)")
    return Prepared(
        job=job,
        notebook=read,
        node=node,
        resolved=resolved,
        machine=machine,
        required=_required(job, resolved.limits),
        output=output,
        verdict=verdict,
        cwd=cwd,
        kernel_name=job.kernel or read.kernel_name or DEFAULT_KERNEL,
        run_id=secrets.token_hex(6),
        started=started,
        started_at=started_at,
    )


def refuse_same(paths: Mapping[str, Path]) -> None:
    """Refuse to write two documents to one file, or over the notebook. Raises OutputPathError."""
    seen: dict[Path, str] = {}
    for name, path in paths.items():
        real = path.absolute().parent.resolve() / path.name
        if real in seen:
            raise OutputPathError(f"{path}: {seen[real]} and {name} are the same file; give {name} another one")
        seen[real] = name


def _resolve(job: Job, node: Any, machine: Machine) -> profiles.Resolved:
    if isinstance(job.limits, Limits):
        given = profiles.parse_overrides(job.options, where="--", machine_memory=machine.memory_total)
        return profiles.Resolved(
            limits=profiles.apply(job.limits, given),
            profile="custom",
            warnings=(),
            sources={},
            loosenable=False,
            fixed=frozenset(given),
        )
    file = profiles.find_project_file(job.path)
    project = profiles.project_overrides(file, job.path, machine_memory=machine.memory_total) if file else None
    return profiles.resolve(
        chosen=job.limits,
        project=project,
        metadata=node.metadata,
        options=job.options,
        machine_memory=machine.memory_total,
        notebook=str(job.path),
    )


def _check_cells(resolved: profiles.Resolved, node: Any, path: Path) -> tuple[str, ...]:
    """A cell's own limits are input too: wrong ones are found before anything runs. Warnings of those that do not count."""
    warnings: list[str] = []
    for index, cell in enumerate(node.cells):
        warnings += profiles.cell_limits(resolved, cell.metadata, where=f"{path}, cell {index}")[1]
    return tuple(warnings)


def _required(job: Job, limits: Limits) -> tuple[Any, ...]:
    if job.require is None:
        return ()
    try:
        names = parse_required(job.require, limits)
    except ValueError as error:
        raise LimitsError(f"--require: {error}") from error
    for name in names:
        if limits.of(name) is None:
            raise LimitsError(f"--require {name}: no limit is set for it; set one (--{name.replace('_', '-')})")
    return names


# --- running ----------------------------------------------------------------------------------------------------


async def run_job(prepared: Prepared, sinks: tuple[EventSink, ...] = ()) -> Verdict:
    """First run, cause, verdict, reports. Signals end the run in order until all is written."""
    from safe_exec.trial import Cancellation  # nbclient and zmq: not needed to refuse bad input

    cancellation = Cancellation()
    emit = _fan_out((*prepared.job.sinks, *sinks))
    with _signals(cancellation.arrive):
        sweep()
        emit(_run_started(prepared))
        held = HeldSpace(prepared.output.absolute().parent, HELD_BYTES)
        try:
            result, plan = await _first_run(prepared, emit, cancellation)
        finally:
            held.release()
        verdict = _conclude(prepared, result, plan)
        verdict = _write(prepared, verdict, result.node)
        emit(
            events.RunFinished(
                time=time.monotonic() - prepared.started,
                status=verdict.status,
                cause=verdict.cause.kind.value if verdict.cause else None,
            )
        )
    return verdict


async def _first_run(prepared: Prepared, emit: EventSink, cancellation: Any) -> tuple[Any, SpawnPlan]:
    from safe_exec.ledger import Ledger
    from safe_exec.trial import TrialRequest, TrialResult, run_trial

    limits = prepared.resolved.limits
    plan = build_plan(limits, prepared.machine, prepared.run_id)
    try:
        require(plan, prepared.required)
    except EnforcementError as error:
        ledger = Ledger.for_notebook(prepared.node, prepared.started)
        ledger.close(time.monotonic() - prepared.started)
        return TrialResult(
            ending=InternalError(message=str(error), refused=True),
            evidence=Evidence(),
            ledger=ledger,
            node=prepared.node,
            place=None,
            hello={},
            warnings=(),
        ), plan
    request = TrialRequest(
        run_id=prepared.run_id,
        node=prepared.node,
        kernel_name=prepared.kernel_name,
        cwd=prepared.cwd,
        limits=limits,
        machine=prepared.machine,
        plan=plan,
        cell_limits=lambda cell: profiles.cell_limits(prepared.resolved, cell.metadata, where="cell")[0],
        largest_output=_largest_output(prepared),
        allow_errors=_allow_errors(prepared),
        env=dict(prepared.job.env if prepared.job.env is not None else os.environ),
        sink=emit,
        started=prepared.started,
        cancellation=cancellation,
    )
    return await run_trial(request), plan


def _largest_output(prepared: Prepared) -> int | None:
    """The most that any cell may put out, in bytes: cells may have caps of their own."""
    caps = [
        profiles.cell_limits(prepared.resolved, cell.metadata, where="cell")[0].cell_output
        for cell in prepared.node.cells
        if cell.cell_type == "code"
    ]
    known = [cap for cap in caps if cap is not None]
    return max(known) if known and len(known) == len(caps) else None


def _allow_errors(prepared: Prepared) -> bool:
    """The option, or the notebook's ``metadata.execution.allow_errors`` as nbclient reads it."""
    execution = prepared.node.metadata.get("execution")
    own = execution.get("allow_errors") if isinstance(execution, Mapping) else None
    return prepared.job.allow_errors or own is True


def _conclude(prepared: Prepared, result: Any, plan: SpawnPlan) -> Verdict:
    from safe_exec.conclude import conclude

    return conclude(prepared, result, plan)


def _write(prepared: Prepared, verdict: Verdict, node: Any) -> Verdict:
    """The annotated notebook first, then the verdict, which says what was written."""
    from safe_exec.reports import annotated, verdict_json

    written = {"notebook": str(prepared.output.absolute()), "verdict": str(prepared.verdict.absolute())}
    verdict = replace(verdict, outputs=written)
    try:
        write_atomically(prepared.output, notebook.dumps(annotated.annotate(node, verdict)))
    except (OSError, SafeExecError) as error:
        verdict = replace(
            verdict,
            outputs={"verdict": written["verdict"]},
            warnings=(*verdict.warnings, f"the annotated notebook could not be written: {error}"),
        )
    try:
        write_atomically(prepared.verdict, verdict_json.dumps(verdict))
    except OSError as error:
        outputs = {name: path for name, path in verdict.outputs.items() if name != "verdict"}
        verdict = replace(verdict, outputs=outputs, warnings=(*verdict.warnings, f"the verdict could not be written: {error}"))
    return verdict


def _run_started(prepared: Prepared) -> events.RunStarted:
    return events.RunStarted(
        time=time.monotonic() - prepared.started,
        run_id=prepared.run_id,
        notebook=str(prepared.job.path),
        kernel=prepared.kernel_name,
        code_cells=sum(cell.cell_type == "code" for cell in prepared.node.cells),
        limits=prepared.resolved.limits.as_dict(),
    )


def _fan_out(sinks: tuple[EventSink, ...]) -> EventSink:
    """One sink for all. One that raises is left out from then on: a broken progress display must not cost the run."""
    live = list(sinks)

    def emit(event: Event) -> None:
        for sink in tuple(live):
            try:
                sink(event)
            except Exception:
                live.remove(sink)
                log.exception("an event sink failed and gets no more events")

    return emit


@contextlib.contextmanager
def _signals(arrive: Any) -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP are told to ``arrive`` until everything is written.

    Elsewhere than on the main thread nothing is taken over.
    """
    loop, taken = asyncio.get_running_loop(), []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        with contextlib.suppress(RuntimeError, ValueError, NotImplementedError):
            loop.add_signal_handler(number, arrive, number)
            taken.append(number)
    try:
        yield
    finally:
        for number in taken:
            loop.remove_signal_handler(number)


def command_line() -> tuple[str, ...]:
    """How this process was called, for the verdict."""
    return ("safe-exec", *sys.argv[1:])
