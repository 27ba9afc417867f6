"""A job: a notebook and how to run it, as asked for and as prepared."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from msgspec import Struct, field
from msgspec.structs import replace

from safe_exec.files import OutputRoot
from safe_exec.limits import profiles
from safe_exec.model.limits import Isolation, LimitName, Limits, Wall
from safe_exec.notebook import inputs as notebook_inputs
from safe_exec.notebook import notebook
from safe_exec.notebook.inputs import NotebookInputs
from safe_exec.notebook.kernel_choice import KernelFallback
from safe_exec.notebook.output_form import OutputForm
from safe_exec.sandbox.host.capabilities import HostCapabilities
from safe_exec.sandbox.plan import SpawnPlan
from safe_exec.sandbox.planner import build_plan

if TYPE_CHECKING:
    from safe_exec.kernel.prestart import PrestartedKernel
    from safe_exec.model.events import EventSink
    from safe_exec.notebook.comparison import ComparisonRules
    from safe_exec.workflows.library_coverage import CoverageRequest, CoverageRun


class Bisect(StrEnum):
    """Whether a search for the culprits follows a failed run."""

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


class Job(Struct, frozen=True, kw_only=True):
    """A request to run one notebook.

    ``limits`` is the name of a profile, the path of a limits file, or ready-made limits; only
    ready-made limits are combined with ``isolation``. ``options`` and ``walls`` override both.
    ``output``, ``verdict`` and ``repro`` (the reproduction) default to paths beside the notebook, and
    ``output`` to the notebook itself if its ``form`` is in place and it passes;
    with ``writes`` false they need not be writable. ``tree`` is the directory that holds all
    documents if other runs write there too. ``own_paths`` are files and directories of safe-exec
    itself, which are left out of copies of the notebook's folder. ``machine`` holds capabilities
    that were detected before; a percentage limit refers to its memory. ``resolved`` are the final
    limits if they were resolved on another machine; profile, options and metadata then change
    nothing. ``bisect_budget`` is in
    seconds; ``None`` derives it from the duration of the first run.
    """

    path: Path
    limits: str | Limits | None = None
    isolation: Isolation | None = None
    options: Mapping[str, object] = field(default_factory=dict)
    inputs: NotebookInputs = field(default_factory=NotebookInputs)
    comparison: ComparisonRules | None = None
    form: OutputForm = field(default_factory=OutputForm)
    # Patterns of files that come back from a private copy of the folder.
    keep_files: tuple[str, ...] = ()
    output: Path | None = None
    verdict: Path | None = None
    repro: Path | None = None
    kernel: str | None = None
    # Another language than that of `kernel` keeps the notebook's own kernel.
    kernel_of_language: bool = False
    kernel_fallback: KernelFallback = KernelFallback.LANGUAGE
    cwd: Path | None = None
    allow_errors: bool = False
    keep_going: bool = False
    require: str | None = None
    mechanisms: tuple[str, ...] | None = None
    env: Mapping[str, str] | None = None
    sinks: tuple[EventSink, ...] = ()
    command: tuple[str, ...] = ()
    walls: Mapping[str, Any] = field(default_factory=dict)
    bisect: Bisect = Bisect.AUTO
    bisect_budget: float | None = None
    # Show local variables in the native stack of a crash.
    with_locals: bool = False
    # The number of runs; cells whose results differ are reported.
    repeat: int = 1
    coverage: CoverageRequest | None = None
    # How each earlier attempt of this run failed, in one line.
    earlier_attempts: tuple[str, ...] = ()
    # Replays and probes run in scratch folders and write no documents.
    writes: bool = True
    machine: HostCapabilities | None = None
    resolved: profiles.Resolved | None = None
    own_paths: tuple[Path, ...] = ()
    tree: OutputRoot | None = None


class NotebookHeader(Struct, frozen=True, kw_only=True):
    """The parts of a notebook that its limits and its kernel depend on.

    ``parsed`` is the whole notebook if the header could not be read without parsing all of it.
    """

    metadata: Mapping[str, Any]
    cells: tuple[Mapping[str, Any], ...]
    kernel_name: str | None
    language: str | None = None
    parsed: notebook.Notebook | None = None


class JobLimits(Struct, frozen=True, kw_only=True):
    """The limits and walls of a job, the host's capabilities, and the names from ``--require``."""

    resolved: profiles.Resolved
    machine: HostCapabilities
    required: tuple[LimitName | Wall, ...] = ()
    keep_files: tuple[str, ...] = ()

    @property
    def values(self) -> Limits:
        """The limits of the whole notebook."""
        return self.resolved.limits

    @property
    def isolation(self) -> Isolation:
        """The isolation that was requested."""
        return self.resolved.isolation

    def with_warnings(self, warnings: tuple[str, ...]) -> Self:
        """Return the same limits with more warnings for the verdict."""
        resolved = replace(self.resolved, warnings=(*self.resolved.warnings, *warnings))
        return replace(self, resolved=resolved)

    def plan(self, run_id: str) -> SpawnPlan:
        """Return the mechanism for each limit and wall of a run."""
        plan = build_plan(self.values, self.machine, run_id, self.isolation)
        return replace(plan, keep_patterns=self.keep_files)


class JobPaths(Struct, frozen=True, kw_only=True):
    """Output paths (annotated notebook, verdict, reproduction) and the working directory."""

    notebook: Path
    verdict: Path
    repro: Path
    cwd: Path

    @property
    def documents(self) -> tuple[Path, Path, Path]:
        """All output paths."""
        return self.notebook, self.verdict, self.repro


class PreparedJob(Struct, frozen=True, kw_only=True):
    """A job that can run: all input was read and checked, and nothing has been written.

    ``node`` is the notebook without the annotations of earlier runs; the run fills in its outputs.
    ``skipped`` are the indexes of code cells that do not run, ``may_raise`` those that may raise.
    ``language`` is the one that parameters are set in. ``started`` is a reading of the monotonic
    clock. ``kernel`` is a kernel that is starting.
    """

    job: Job
    notebook: notebook.Notebook
    node: Any
    kernel_name: str
    limits: JobLimits
    paths: JobPaths
    run_id: str
    skipped: frozenset[int]
    may_raise: frozenset[int]
    language: str | None
    started: float
    started_at: datetime
    kernel: PrestartedKernel | None = None
    coverage: CoverageRun | None = None

    def plan(self) -> SpawnPlan:
        """Return the plan: the mechanism for each limit and wall."""
        return self.limits.plan(self.run_id)

    def fresh_node(self) -> Any:
        """Return a copy of the prepared notebook in its state before the run, without outputs."""
        stripped = notebook.strip_annotations(self.notebook.node)
        return notebook_inputs.apply(stripped, self.job.inputs, self.language).node
