"""Prepare a job: read the notebook, resolve its limits, check its output paths.

Three pure steps, each with a frozen result. ``PreparedJob`` holds the three results. Nothing is
written before all three have succeeded, so every error raised here means exit code 2 and no files.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from msgspec.structs import replace

from safe_exec.errors import EnforcementError, LimitsError, OutputPathError, UsageError
from safe_exec.files import check_writable, one_line
from safe_exec.kernel.installed_kernels import installed_kernels, is_installed
from safe_exec.limits import isolation, profiles
from safe_exec.model.limits import Isolation, Limits, Wall
from safe_exec.notebook import inputs as notebook_inputs
from safe_exec.notebook import notebook
from safe_exec.notebook.inputs import CellSelection, ExitMeaning, NotebookInputs, read_stdin
from safe_exec.notebook.kernel_choice import KernelChoice, KernelFallback, stand_in
from safe_exec.notebook.text_formats import is_text_format
from safe_exec.sandbox import keeper_process
from safe_exec.sandbox.host.bwrap_probe import BwrapProbe
from safe_exec.sandbox.host.capabilities import HostCapabilities, detect, probe_isolation
from safe_exec.sandbox.mechanisms.bubblewrap import is_needed
from safe_exec.sandbox.mechanisms.isolation import plan_isolation
from safe_exec.sandbox.plan import require
from safe_exec.sandbox.planner import Required, parse_mechanisms, parse_required
from safe_exec.workflows.job import Job, JobLimits, JobPaths, NotebookHeader, PreparedJob
from safe_exec.workflows.snapshots import leaves_snapshots

if TYPE_CHECKING:
    from safe_exec.kernel.coverage_file import CoverageFile
    from safe_exec.kernel.prestart import PrestartedKernel
    from safe_exec.model.verdict import Verdict
    from safe_exec.workflows.library_coverage import CoverageRun

DEFAULT_KERNEL = "python3"


def prepare(
    job: Job, kernel: PrestartedKernel | None = None, source: notebook.Source | None = None
) -> PreparedJob:
    """Read and check all input and every output path.

    ``source`` is a notebook that was read before. With ``kernel`` the kernel starts as soon as its
    limits are known. Raises UsageError or a subclass before anything is written.
    """
    started, started_at = time.monotonic(), datetime.now(UTC)
    source = source or notebook.Source.of(job.path)
    with _bwrap_probe(job) as bwrap_probe:
        header = read_header(source)
        limits = resolve_limits(job, header, bwrap_probe)
    paths = check_outputs(job)
    choice = _choose_kernel(job, header)
    coverage = _open_coverage(job)
    if kernel is not None and header.parsed is None:
        # A kernel takes longer to start than the rest of this function: validating the notebook,
        # the slowest step left, happens while it starts.
        coverage_file = None if coverage is None else coverage.file
        _start_kernel(
            kernel,
            job,
            header,
            limits,
            kernel_name=choice.name,
            cwd=paths.cwd,
            coverage=coverage_file,
        )
    document = header.parsed or source.notebook()
    language = _language(job, choice.name, document)
    stripped = notebook.strip_annotations(document.node)
    applied = notebook_inputs.apply(stripped, job.inputs, language)
    marked = _marked(job, applied.node)
    return PreparedJob(
        job=job,
        notebook=document,
        node=applied.node,
        skipped=applied.skipped | marked.skipped,
        may_raise=marked.may_raise,
        language=language,
        kernel_name=choice.name,
        limits=limits.with_warnings((*filter(None, [choice.warning]), *applied.warnings)),
        paths=paths,
        run_id=kernel.run_id if kernel is not None else keeper_process.new_run_id(),
        started=started,
        started_at=started_at,
        kernel=kernel,
        coverage=coverage,
    )


def start_clock(prepared: PreparedJob) -> PreparedJob:
    """Return the same job with its time starting now, after it waited for other notebooks."""
    return replace(prepared, started=time.monotonic(), started_at=datetime.now(UTC))


def _language(job: Job, kernel_name: str, document: notebook.Notebook) -> str | None:
    """Return the language for parameters: the installed kernel's, otherwise the notebook's.

    Without parameters it is always the notebook's.
    """
    if not job.inputs.parameters:
        return document.language
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    try:
        language: str = KernelSpecManager().get_kernel_spec(kernel_name).language
    except NoSuchKernel:
        return document.language
    return language or document.language


class _MarkedCells(NamedTuple):
    """Indexes of cells whose comments or tags exempt them from the comparison of outputs."""

    skipped: frozenset[int] = frozenset()
    may_raise: frozenset[int] = frozenset()


def _marked(job: Job, node: Any) -> _MarkedCells:
    if job.comparison is None:
        return _MarkedCells()
    from safe_exec.notebook.comparison import cells_that_may_raise, cells_to_skip

    return _MarkedCells(skipped=cells_to_skip(node), may_raise=cells_that_may_raise(node))


def inputs_of_run(verdict: Verdict) -> NotebookInputs:
    """Return the inputs of an earlier run.

    Raises UsageError if its file for stdin cannot be read.
    """
    ran = verdict.notebook
    return NotebookInputs(
        parameters=ran.parameters,
        selection=CellSelection(skip_tags=ran.skip_tags, only_tags=ran.only_tags, until=ran.until),
        exit_is=ExitMeaning(ran.exit_is),
        strict_shell=ran.strict_shell,
        # Read again: the lines may be secrets, and a verdict is shown to many.
        stdin=None if ran.stdin is None else read_stdin(Path(ran.stdin)),
    )


# --- step 1: read the notebook ------------------------------------------------------------------


def read_header(source: notebook.Source) -> NotebookHeader:
    """Read metadata and cells, without validating the notebook if that is possible."""
    scan = source.scan()
    if scan is not None:
        return NotebookHeader(
            metadata=scan.metadata,
            cells=scan.cells,
            kernel_name=scan.kernel_name,
            language=scan.language,
        )
    parsed = source.notebook()
    node = notebook.strip_annotations(parsed.node)
    return NotebookHeader(
        metadata=node.metadata,
        cells=tuple(node.cells),
        kernel_name=parsed.kernel_name,
        language=parsed.language,
        parsed=parsed,
    )


# --- step 2: resolve the limits -----------------------------------------------------------------


def resolve_limits(
    job: Job, header: NotebookHeader, bwrap_probe: BwrapProbe | None = None
) -> JobLimits:
    """Combine profile, project file, metadata and options; detect what this host can enforce.

    Raises LimitsError and UsageError.
    """
    # The machine comes first: a limit of "50%" refers to its memory.
    machine = job.machine or detect(parse_mechanisms(job.mechanisms))
    resolved = _resolve(job, header.metadata, machine)
    needs_bubblewrap = is_needed(
        resolved.isolation,
        disk=resolved.limits.disk is not None,
        shm=resolved.limits.shm is not None,
    )
    # Testing bubblewrap starts a process, so it happens only if a wall or a size limit needs it.
    if needs_bubblewrap and not machine.is_isolation_probed:
        machine = probe_isolation(machine, bwrap_probe)
    warnings = _check_cells(resolved, header.cells, job.path)
    required = _required(job, resolved, machine)
    requested = resolved.isolation
    if required.isolation is not None:
        requested = replace(requested, required=required.isolation)
    return JobLimits(
        # Warnings about cells join those of the notebook, and end up in the verdict.
        resolved=replace(resolved, warnings=(*resolved.warnings, *warnings), isolation=requested),
        machine=machine,
        required=required.names,
        keep_files=job.keep_files,
    )


def _bwrap_probe(job: Job) -> contextlib.AbstractContextManager[BwrapProbe | None]:
    """Test bubblewrap in the background if the job's own options ask for it.

    If only the notebook or a limits file asks for it, the test runs later, in the foreground.
    """
    # The default profile is the only one that ships without walls.
    has_profile_with_walls = (
        isinstance(job.limits, str)
        and job.limits in profiles.shipped_profiles()
        and job.limits != profiles.DEFAULT_PROFILE
    )
    likely = (
        has_profile_with_walls or job.isolation or job.walls or {"disk", "shm"} & job.options.keys()
    )
    return (
        BwrapProbe()
        if job.machine is None and likely and sys.platform.startswith("linux")
        else contextlib.nullcontext()
    )


def _resolve(job: Job, metadata: Mapping[str, Any], machine: HostCapabilities) -> profiles.Resolved:
    if job.resolved is not None:
        return job.resolved
    if isinstance(job.limits, Limits):
        overrides = profiles.parse_overrides(
            job.options, error_prefix="--", machine_memory=machine.memory_total
        )
        return profiles.Resolved(
            limits=profiles.apply(job.limits, overrides),
            profile="custom",
            warnings=(),
            sources={},
            loosenable=False,
            fixed=frozenset(overrides),
            isolation=isolation.apply(job.isolation or Isolation(), job.walls),
        )
    # A project file (safe-exec.yaml) applies to limits by name only: others are complete.
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
    """Check the limits in the metadata of cells; return warnings about those that are ignored."""
    # A wrong limit in the last cell must not surface after an hour of computing.
    warnings: list[str] = []
    for index, cell in enumerate(cells):
        warnings += profiles.cell_limits(
            resolved, cell["metadata"], error_prefix=f"{path}, cell {index}"
        )[1]
    return tuple(warnings)


def _required(job: Job, resolved: profiles.Resolved, machine: HostCapabilities) -> Required:
    """Parse ``--require``. Raises LimitsError for a limit or wall that was not requested."""
    if job.require is None:
        return Required()
    try:
        required = parse_required(job.require, resolved.limits)
    except ValueError as error:
        raise LimitsError(f"--require: {error}") from error
    walls = plan_isolation(resolved.isolation, resolved.limits, machine).walls
    for name in required.names:
        if isinstance(name, Wall):
            if name not in walls:
                raise LimitsError(
                    f"--require {name}: this wall is not requested; "
                    "choose a profile with it (--limits)"
                )
        elif resolved.limits.of(name) is None:
            raise LimitsError(
                f"--require {name}: no limit is set for it; set one (--{name.replace('_', '-')})"
            )
    if required.isolation and not walls:
        raise LimitsError(
            "--require walls: no wall is requested; choose a profile with some (--limits)"
        )
    return required


def largest_output(resolved: profiles.Resolved, cells: Iterable[Mapping[str, Any]]) -> int | None:
    """Return the largest output limit of any cell, in bytes; ``None`` if a cell has no limit."""
    # The runner reserves buffers once, for the cell with the largest limit.
    caps = [
        profiles.cell_limits(resolved, cell["metadata"], error_prefix="cell")[0].cell_output
        for cell in cells
        if cell["cell_type"] == "code"
    ]
    limits = [cap for cap in caps if cap is not None]
    return max(limits) if limits and len(limits) == len(caps) else None


# --- step 3: check the output paths -------------------------------------------------------------


def check_outputs(job: Job) -> JobPaths:
    """Check that every document can be written and that the working directory exists.

    Raises OutputPathError and UsageError.
    """
    defaults = notebook.default_outputs(job.path)
    paths = JobPaths(
        notebook=job.output or defaults.out,
        verdict=job.verdict or defaults.verdict,
        repro=job.repro or defaults.repro,
        cwd=job.cwd or job.path.absolute().parent,
    )
    refuse_same(
        {
            "the notebook": job.path,
            "-o": paths.notebook,
            "--verdict": paths.verdict,
            "the reproduction": paths.repro,
        }
    )
    # The reproduction is left out: most runs write none.
    for path in (paths.notebook, paths.verdict) if job.writes else ():
        check_writable(path if job.tree is None else job.tree.current_path(path))
    if job.form.in_place and is_text_format(job.path):
        raise UsageError(
            f"{one_line(job.path)}: a text has no place for outputs; leave out --in-place"
        )
    if job.writes and job.form.in_place:
        check_writable(job.path.resolve())
    if not paths.cwd.is_dir():
        raise UsageError(f"{paths.cwd}: no such directory to run in (--cwd)")
    return paths


def refuse_same(paths: Mapping[str, Path]) -> None:
    """Raise OutputPathError if two documents, or a document and the notebook, are one file."""
    names: dict[Path, str] = {}
    for name, path in paths.items():
        # Only the folder is resolved: a symlink in place of the document is replaced, not followed.
        real = path.absolute().parent.resolve() / path.name
        if real in names:
            hint = " or use --in-place" if (names[real], name) == ("the notebook", "-o") else ""
            raise OutputPathError(
                f"{path}: {names[real]} and {name} are the same file; give {name} another one{hint}"
            )
        names[real] = name


# --- the kernel ---------------------------------------------------------------------------------


def _choose_kernel(job: Job, header: NotebookHeader) -> KernelChoice:
    """Choose the kernel: the job's, the notebook's own, or another one of its language."""
    if job.kernel is not None and not (job.kernel_of_language and _speaks_another(job, header)):
        return KernelChoice(job.kernel)
    language = header.language
    is_python = language is None or language.lower() == "python"
    # A notebook without a kernelspec is Python, unless its metadata name another language.
    name = header.kernel_name or (DEFAULT_KERNEL if is_python else None)
    if job.kernel_fallback is KernelFallback.NEVER or (name is not None and is_installed(name)):
        return KernelChoice(name or DEFAULT_KERNEL)
    replacement = stand_in(name, language, installed_kernels())
    return replacement or KernelChoice(name or DEFAULT_KERNEL)


def _speaks_another(job: Job, header: NotebookHeader) -> bool:
    """Tell whether the job's kernel runs another language than the notebook's."""
    spoken = installed_kernels().get((job.kernel or "").lower())
    return bool(spoken and header.language and spoken.lower() != header.language.lower())


def _start_kernel(
    kernel: PrestartedKernel,
    job: Job,
    header: NotebookHeader,
    limits: JobLimits,
    *,
    kernel_name: str,
    cwd: Path,
    coverage: CoverageFile | None,
) -> None:
    plan = limits.plan(kernel.run_id)
    # The run itself reports a required limit that cannot be enforced, in its verdict.
    with contextlib.suppress(EnforcementError):
        require(plan, limits.required)
        kernel.launch(
            kernel_name,
            plan=plan,
            limits=replace(
                limits.values, cell_output=largest_output(limits.resolved, header.cells)
            ),
            cwd=cwd,
            # Only the Python API sets an environment; a command passes its own on.
            env=dict(job.env if job.env is not None else os.environ),
            strict_shell=job.inputs.strict_shell,
            coverage=coverage,
            snapshots=leaves_snapshots(job, plan, limits.values, kernel_name),
        )


def command_line() -> tuple[str, ...]:
    """Return the command line of this process, for the verdict."""
    return ("safe-exec", *sys.argv[1:])


def _open_coverage(job: Job) -> CoverageRun | None:
    if job.coverage is None:
        return None
    # Imported only here: few runs measure coverage.
    from safe_exec.workflows.library_coverage import open_coverage

    return open_coverage(job.coverage, job.path)
