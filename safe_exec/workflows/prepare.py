"""What the user asked for, read and checked before anything runs or is written. May import notebook, profiles and the sandbox's plan.

With an error from here nothing has been written: exit code 2.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import Struct, field
from msgspec.structs import replace

from safe_exec.errors import EnforcementError, LimitsError, OutputPathError, UsageError
from safe_exec.files import HeldTree, check_writable
from safe_exec.limits import isolation, profiles
from safe_exec.model.limits import Isolation, LimitName, Limits, Wall
from safe_exec.notebook import notebook
from safe_exec.sandbox import keeper_process
from safe_exec.sandbox.host.capabilities import Machine, Rehearsal, detect, look_for_walls
from safe_exec.sandbox.mechanisms.bubblewrap import is_needed
from safe_exec.sandbox.mechanisms.isolation import put_up
from safe_exec.sandbox.plan import require
from safe_exec.sandbox.planner import Required, build_plan, parse_mechanisms, parse_required

if TYPE_CHECKING:
    from safe_exec.kernel.prestart import Early
    from safe_exec.model.events import EventSink

DEFAULT_KERNEL = "python3"


class Bisect(StrEnum):
    """Whether a search for the culprits follows a run that failed."""

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


class Job(Struct, frozen=True, kw_only=True):
    """What the user asked for.

    ``isolation`` counts beside ``limits`` that are no profile; ``walls`` are changes to either. ``bisect_budget`` is in seconds; ``None``
    for what the length of the first run makes of it.

    ``output``, ``verdict`` and ``repro`` (the reproduction) stand beside the notebook where nothing is said.
    ``writes``: documents are written; without it their paths need not be writable. ``machine`` is one that was looked at before (what it
    says of memory is what a percentage refers to). ``beside`` are files and directories that belong to us, wherever they lie: no part of
    the folder that the notebook starts from. ``tree`` is the directory in which all documents lie, where others write into it too.
    """

    path: Path
    limits: str | Limits | None = None
    isolation: Isolation | None = None
    options: Mapping[str, object] = field(default_factory=dict)
    output: Path | None = None
    verdict: Path | None = None
    repro: Path | None = None
    kernel: str | None = None
    cwd: Path | None = None
    allow_errors: bool = False
    require: str | None = None
    mechanisms: tuple[str, ...] | None = None
    env: Mapping[str, str] | None = None
    sinks: tuple[EventSink, ...] = ()
    command: tuple[str, ...] = ()
    walls: Mapping[str, Any] = field(default_factory=dict)
    bisect: Bisect = Bisect.AUTO
    bisect_budget: float | None = None
    writes: bool = True
    machine: Machine | None = None
    beside: tuple[Path, ...] = ()
    tree: HeldTree | None = None


class Prepared(Struct, frozen=True, kw_only=True):
    """A job that can run: everything was read and checked, nothing has been written."""

    job: Job
    notebook: notebook.Notebook
    node: Any
    resolved: profiles.Resolved
    machine: Machine
    required: tuple[LimitName | Wall, ...]
    output: Path
    verdict: Path
    repro: Path
    cwd: Path
    kernel_name: str
    run_id: str
    started: float
    started_at: datetime
    early: Early | None = None


def prepare(
    job: Job, early: Early | None = None, source: notebook.Source | None = None
) -> Prepared:
    """Read and check all input and every output path.

    In the sandbox of ``early`` the kernel is started as soon as its limits are known, while the notebook is read whole and checked.
    ``source`` is a notebook that somebody else has read. Raises UsageError and its kinds: with them nothing has been written.
    """
    started, started_at = time.monotonic(), datetime.now(UTC)
    source = source or notebook.Source.of(job.path)
    with _rehearsal(job) as rehearsal:
        scan = source.scan()
        whole = source.notebook() if scan is None else None
        machine = job.machine or detect(parse_mechanisms(job.mechanisms))
        metadata, cells = (scan.metadata, scan.cells) if scan else _of_node(whole)
        resolved = _resolve(job, metadata, machine)
        needed = is_needed(
            resolved.isolation,
            disk=resolved.limits.disk is not None,
            shm=resolved.limits.shm is not None,
        )
        if needed and not machine.looked_for_walls:
            machine = look_for_walls(machine, rehearsal)
    warnings = _check_cells(resolved, cells, job.path)
    required = _required(job, resolved, machine)
    asked = (
        resolved.isolation
        if required.isolation is None
        else replace(resolved.isolation, required=required.isolation)
    )
    resolved = replace(resolved, warnings=(*resolved.warnings, *warnings), isolation=asked)
    paths = notebook.default_outputs(job.path)
    output, verdict, repro = (
        job.output or paths.out,
        job.verdict or paths.verdict,
        job.repro or paths.repro,
    )
    refuse_same(
        {"the notebook": job.path, "-o": output, "--verdict": verdict, "the reproduction": repro}
    )
    for path in (output, verdict) if job.writes else ():
        check_writable(path if job.tree is None else job.tree.now(path))
    cwd = job.cwd or job.path.absolute().parent
    if not cwd.is_dir():
        raise UsageError(f"{cwd}: no such directory to run in (--cwd)")
    if early is not None and scan is not None:
        kernel_name = job.kernel or scan.kernel_name or DEFAULT_KERNEL
        env = dict(job.env if job.env is not None else os.environ)
        plan = build_plan(resolved.limits, machine, early.run_id, resolved.isolation)
        limits = replace(resolved.limits, cell_output=largest_output(resolved, cells))
        with contextlib.suppress(EnforcementError):  # a run that is refused says so in its verdict
            require(plan, required.names)
            early.launch(kernel_name, plan=plan, limits=limits, cwd=cwd, env=env)
    read = whole or source.notebook()
    return Prepared(
        job=job,
        notebook=read,
        node=notebook.strip_annotations(read.node),
        resolved=resolved,
        machine=machine,
        required=required.names,
        output=output,
        verdict=verdict,
        repro=repro,
        cwd=cwd,
        kernel_name=job.kernel or read.kernel_name or DEFAULT_KERNEL,
        run_id=early.run_id if early is not None else keeper_process.new_run_id(),
        started=started,
        started_at=started_at,
        early=early,
    )


def begun_now(prepared: Prepared) -> Prepared:
    """The same, whose time begins to run: it had to wait for others."""
    return replace(prepared, started=time.monotonic(), started_at=datetime.now(UTC))


def _rehearsal(job: Job) -> contextlib.AbstractContextManager[Rehearsal | None]:
    """Bubblewrap tried while the notebook is read, where by its own words the job will need it. What else asks for walls waits for it later."""
    named = (
        isinstance(job.limits, str)
        and job.limits in profiles.shipped_profiles()
        and job.limits != profiles.DEFAULT_PROFILE
    )
    likely = named or job.isolation or job.walls or {"disk", "shm"} & job.options.keys()
    return (
        Rehearsal()
        if job.machine is None and likely and sys.platform.startswith("linux")
        else contextlib.nullcontext()
    )


def _of_node(
    read: notebook.Notebook | None,
) -> tuple[Mapping[str, Any], tuple[Mapping[str, Any], ...]]:
    assert read is not None
    node = notebook.strip_annotations(read.node)
    return node.metadata, tuple(node.cells)


def largest_output(resolved: profiles.Resolved, cells: Iterable[Mapping[str, Any]]) -> int | None:
    """The most that any cell may put out, in bytes: cells may have caps of their own."""
    caps = [
        profiles.cell_limits(resolved, cell["metadata"], where="cell")[0].cell_output
        for cell in cells
        if cell["cell_type"] == "code"
    ]
    known = [cap for cap in caps if cap is not None]
    return max(known) if known and len(known) == len(caps) else None


def refuse_same(paths: Mapping[str, Path]) -> None:
    """Refuse to write two documents to one file, or over the notebook. Raises OutputPathError."""
    seen: dict[Path, str] = {}
    for name, path in paths.items():
        real = path.absolute().parent.resolve() / path.name
        if real in seen:
            raise OutputPathError(
                f"{path}: {seen[real]} and {name} are the same file; give {name} another one"
            )
        seen[real] = name


def _resolve(job: Job, metadata: Mapping[str, Any], machine: Machine) -> profiles.Resolved:
    if isinstance(job.limits, Limits):
        given = profiles.parse_overrides(
            job.options, where="--", machine_memory=machine.memory_total
        )
        return profiles.Resolved(
            limits=profiles.apply(job.limits, given),
            profile="custom",
            warnings=(),
            sources={},
            loosenable=False,
            fixed=frozenset(given),
            isolation=isolation.apply(job.isolation or Isolation(), job.walls),
        )
    file = profiles.find_project_file(job.path)
    project = (
        profiles.project_overrides(file, job.path, machine_memory=machine.memory_total)
        if file
        else None
    )
    return profiles.resolve(
        chosen=job.limits,
        project=project,
        metadata=metadata,
        options=job.options,
        machine_memory=machine.memory_total,
        notebook=str(job.path),
        walls=job.walls,
    )


def _check_cells(
    resolved: profiles.Resolved, cells: Iterable[Mapping[str, Any]], path: Path
) -> tuple[str, ...]:
    """A cell's own limits are input too: wrong ones are found before anything runs. Warnings of those that do not count."""
    warnings: list[str] = []
    for index, cell in enumerate(cells):
        warnings += profiles.cell_limits(resolved, cell["metadata"], where=f"{path}, cell {index}")[
            1
        ]
    return tuple(warnings)


def _required(job: Job, resolved: profiles.Resolved, machine: Machine) -> Required:
    """What must hold for anything to be run. Raises LimitsError for what is not even asked for."""
    if job.require is None:
        return Required()
    try:
        required = parse_required(job.require, resolved.limits)
    except ValueError as error:
        raise LimitsError(f"--require: {error}") from error
    asked = put_up(resolved.isolation, resolved.limits, machine).walls
    for name in required.names:
        if isinstance(name, Wall):
            if name not in asked:
                raise LimitsError(
                    f"--require {name}: no such wall is asked for; choose a profile with it (--limits)"
                )
        elif resolved.limits.of(name) is None:
            raise LimitsError(
                f"--require {name}: no limit is set for it; set one (--{name.replace('_', '-')})"
            )
    if required.isolation and not asked:
        raise LimitsError(
            "--require walls: no wall is asked for; choose a profile with some (--limits)"
        )
    return required


def command_line() -> tuple[str, ...]:
    """How this process was called, for the verdict."""
    return ("safe-exec", *sys.argv[1:])
