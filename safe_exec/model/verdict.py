"""Conclusions as types: status, cause, culprits, and the verdict that contains them."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, field
from msgspec.structs import force_setattr, replace

from safe_exec.model.ending import OutputDifference
from safe_exec.model.evidence import Frame, IsolationFacts, NativeFrame
from safe_exec.model.limits import Amount, Count, Enforcement, Isolation, LimitName, Limits, Wall
from safe_exec.model.memory import MemoryUse

VERDICT_SCHEMA = "safe-exec/verdict/1"
MOST_SAMPLES = 500

Line = Annotated[int, Meta(ge=1)]
Text = Annotated[str, Meta(min_length=1)]
Moment = Annotated[
    str,
    Meta(
        description="ISO 8601 in UTC.",
        pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}([.][0-9]+)?(Z|[+]00:00)$",
    ),
]
ExitCode = Literal[0, 1, 3, 4, 5, 6, 7, 130]


class Status(StrEnum):
    """How a run ended, as the verdict and the exit code report it."""

    PASSED = "passed"
    CELL_ERROR = "cell_error"
    KERNEL_DIED = "kernel_died"
    TIMEOUT = "timeout"
    LIMIT_EXCEEDED = "limit_exceeded"
    START_FAILED = "start_failed"
    INTERNAL_ERROR = "internal_error"
    CANCELLED = "cancelled"

    @property
    def exit_code(self) -> int:
        """The exit code of ``safe-exec run`` for this status."""
        return _EXIT_CODES[self]


_EXIT_CODES = {
    Status.PASSED: 0,
    Status.CELL_ERROR: 1,
    Status.KERNEL_DIED: 3,
    Status.TIMEOUT: 4,
    Status.LIMIT_EXCEEDED: 5,
    Status.START_FAILED: 6,
    Status.INTERNAL_ERROR: 7,
    Status.CANCELLED: 130,
}


class CauseKind(StrEnum):
    """Why the kernel died, the cell failed or the run was ended."""

    OUT_OF_MEMORY = "out_of_memory"
    MEMORY_ERROR = "memory_error"
    WORKER_OUT_OF_MEMORY = "worker_out_of_memory"
    SEGFAULT = "segfault"
    STACK_OVERFLOW = "stack_overflow"
    ABORT = "abort"
    ILLEGAL_INSTRUCTION = "illegal_instruction"
    BUS_ERROR = "bus_error"
    FLOATING_POINT_EXCEPTION = "floating_point_exception"
    EXIT = "exit"
    KILLED = "killed"
    TERMINATED = "terminated"
    CELL_TIMEOUT = "cell_timeout"
    NOTEBOOK_TIMEOUT = "notebook_timeout"
    CPU_TIME = "cpu_time"
    UNRESPONSIVE = "unresponsive"
    STDIN = "stdin"
    NETWORK_BLOCKED = "network_blocked"
    ISOLATION = "isolation"
    DISK_FULL = "disk_full"
    TOO_MANY_PROCESSES = "too_many_processes"
    TOO_MANY_OPEN_FILES = "too_many_open_files"
    FILE_TOO_LARGE = "file_too_large"
    OUTPUT_FLOOD = "output_flood"
    BAD_SYSTEM_CALL = "bad_system_call"
    KERNEL_START_FAILED = "kernel_start_failed"
    EXCEPTION = "exception"
    OUTPUT_DIFFERS = "output_differs"
    UNKNOWN = "unknown"


class Activity(StrEnum):
    """The activity of a kernel that exceeded its time."""

    PYTHON_LOOP = "python_loop"
    NATIVE_CODE = "native_code"
    SLEEPING = "sleeping"
    WAITING_IO = "waiting_io"
    WAITING_LOCK = "waiting_lock"
    WAITING_CHILD = "waiting_child"
    STOPPED = "stopped"


class Confidence(StrEnum):
    """How certain a cause is."""

    CERTAIN = "certain"
    LIKELY = "likely"
    GUESS = "guess"


class Origin(StrEnum):
    """The source of a fact: the system around the kernel, or the kernel process itself."""

    OUTSIDE = "outside"
    INSIDE = "inside"


FactValue = str | int | float | bool | None


class Fact(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One piece of evidence for a cause; ``source`` tells where it was read."""

    fact: Text
    value: FactValue
    source: str
    origin: Origin


class Cause(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The cause of a failure, the confidence in it, and advice.

    ``signal`` is negative (-9 for SIGKILL), as in subprocess.
    """

    kind: CauseKind
    summary: Text
    confidence: Confidence
    evidence: tuple[Fact, ...] = ()
    advice: str = ""
    activity: Activity | None = None
    signal: Annotated[int, Meta(le=-1)] | None = None
    exit_code: Annotated[int, Meta(ge=0, le=255)] | None = None


class CrashCell(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The cell that was running at the failure; ``line`` counts from 1 within the cell."""

    index: Count
    code_index: Count
    id: str | None
    execution_count: Count | None
    line: Line | None
    source_line: str | None
    stack: tuple[Frame, ...] = ()
    # The native stack of the thread that faulted, innermost frame first.
    native: tuple[NativeFrame, ...] = ()
    # Why the native stack of a crash could not be read.
    native_error: str | None = None
    # The line in the file of a notebook kept as text, from 1.
    file_line: Line | None = None


class CellStatus(StrEnum):
    """The status of one cell."""

    PASSED = "passed"
    FAILED = "failed"
    KILLED = "killed"
    NOT_RUN = "not_run"
    SKIPPED = "skipped"


class CellRecord(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The figures of one code cell. ``started`` is seconds since the run began."""

    index: Count
    code_index: Count
    id: str | None
    status: CellStatus
    # Why a cell was skipped, if the notebook did not ask for it.
    reason: str | None = None
    # Seconds since the run began.
    started: Amount | None = None
    seconds: Amount | None = None
    cpu_seconds: Amount | None = None
    memory_peak: Count | None = None
    memory_kept: int | None = None
    output_bytes: Count | None = None
    output_truncated: bool = False


class Role(StrEnum):
    """A culprit's part in the failure, as far as the evidence shows."""

    # It was running at the failure.
    CRASH = "crash"
    # It kept much of the exhausted resource.
    ACCUMULATOR = "accumulator"
    # Another culprit uses its definitions.
    DEFINITION = "definition"
    # It triggered the later failure: a thread, a timer, a requested exit.
    TRIGGER = "trigger"
    # It must run before, for a reason that is not visible.
    SETUP = "setup"


class Stopped(StrEnum):
    """Why a culprit search ended before its result was known to be minimal."""

    BUDGET = "budget"
    CANCELLED = "cancelled"
    NOT_REPRODUCED = "not_reproduced"
    TOO_RARE = "too_rare"


class Culprit(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One cell of the culprits. ``note`` describes its part in a few words (``+612 MiB kept``).

    ``source_line`` is the first line of code in the cell, at most 200 characters of it.
    """

    index: Count
    code_index: Count
    id: str | None
    role: Role
    note: str
    source_line: str | None = None


class Culprits(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The result of a culprit search."""

    # In order, with the crash cell last; empty if nothing reproduced.
    cells: tuple[Culprit, ...]
    # The failure no longer occurs if any one of the cells is removed.
    minimal: bool
    method: str
    # The index of the cell that a person should read first.
    look_first: Count | None
    # The kernels started for the search, without the first run.
    trials: Count
    # The trials that an earlier search had already run.
    cached: Count
    # (k, n): of n runs of exactly these cells, from scratch, k failed the same way.
    reproduced: tuple[Count, Count]
    # The wall time of the search.
    seconds: Amount
    # The trials whose hang was recognised before the cell's time was up.
    recognised: Count = 0
    # The answers that were found in forks of a live kernel; they count as no trials.
    forked: Count = 0
    # Why there were no such answers, or not from all states of the notebook.
    fork_note: str | None = None
    # How often a run from scratch contradicted an answer that was found in a quicker way.
    disagreements: Count = 0
    # The endings of those runs: passed, or the kind of the cause.
    endings: Mapping[str, Count] = field(default_factory=dict)
    # The path of the reproduction, if one was written.
    repro_notebook: str | None = None
    stopped: Stopped | None = None


class FailureRecord(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One of several failures of a run with ``--keep-going``."""

    status: Status
    cause: Cause | None
    crash_cell: CrashCell | None
    culprits: Culprits | None = None

    @classmethod
    def of(cls, verdict: Verdict) -> FailureRecord:
        """Return the failure of a verdict."""
        return cls(
            status=verdict.status,
            cause=verdict.cause,
            crash_cell=verdict.crash_cell,
            culprits=verdict.culprits,
        )


class Timeline(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Samples of the whole run, four columns of the same length; ``cell`` is -1 between cells."""

    seconds: Annotated[tuple[Amount, ...], Meta(max_length=MOST_SAMPLES)] = ()
    memory: Annotated[tuple[Count | None, ...], Meta(max_length=MOST_SAMPLES)] = ()
    cpu: Annotated[tuple[Amount | None, ...], Meta(max_length=MOST_SAMPLES)] = ()
    cell: Annotated[tuple[Annotated[int, Meta(ge=-1)], ...], Meta(max_length=MOST_SAMPLES)] = ()


class ProfileLine(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The time that a line of a code cell took, estimated from samples.

    ``own_seconds`` were spent in the line itself; ``seconds`` include functions defined in cells
    that it called.
    """

    code_index: Count
    line: Line
    seconds: Amount
    own_seconds: Amount


class Usage(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The resources that the whole run used."""

    wall_seconds: Amount | None = None
    cpu_seconds: Amount | None = None
    memory_peak: Count | None = None
    memory_peak_raw: Count | None = None
    oom_kills: Count | None = None
    processes_peak: Count | None = None
    output_bytes: Count | None = None
    # Some processes could not be inspected. Pages that they share with others are counted for each
    # process, so all memory figures are upper bounds.
    memory_upper_bound: bool = False
    # A process may have been larger for a moment than any check saw it, so that the memory passed
    # its limit: ``memory_peak`` is a lower bound.
    memory_lower_bound: bool = False


class NotebookInfo(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The notebook that was run.

    ``sha256`` is the hash of its file. The cell that sets ``parameters`` counts among the cells.
    ``skip_tags``, ``only_tags`` and ``until`` selected the cells that ran. ``exit_is`` tells
    whether ``sys.exit(0)`` ended the notebook as a success or as an error. With ``strict_shell`` a
    failing ``!command`` raised. ``stdin`` is the path of the file that answered ``input()``.
    """

    path: str
    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")] | None
    kernel: str | None
    language: str | None
    cells: Count
    code_cells: Count
    parameters: Annotated[
        Mapping[str, Any], Meta(description="Values of the parameters that this run set.")
    ] = field(default_factory=dict)
    skip_tags: tuple[str, ...] = ()
    only_tags: tuple[str, ...] = ()
    until: str | None = None
    exit_is: Literal["success", "error"] = "success"
    strict_shell: bool = False
    stdin: str | None = None


class CreatedFile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file that was created or changed while the notebook ran.

    ``path`` is relative to the working directory. ``from_copy`` is true if the file was copied out
    of a private copy of the folder (``--keep-files``).
    """

    path: str
    bytes: Count
    from_copy: bool = False


class FlakyCell(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A cell whose status or outputs differ between the runs of ``--repeat``."""

    index: Count
    code_index: Count
    summary: Text


class Environment(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The environment of the run."""

    # The kernel's Python and packages; None if unknown, or if there is no Python.
    python: str | None
    platform: str
    packages: Mapping[str, str] | None = None
    cgroup: str | None = None
    isolation: Mapping[Wall, Enforcement] = field(default_factory=dict)
    # None without isolation.
    isolation_facts: IsolationFacts | None = None
    # The host name of the machine that ran the notebook.
    machine: str | None = None


class Verdict(
    Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="schema",
    tag=VERDICT_SCHEMA,
):
    """The complete result of a run, as documented in docs/verdict.md."""

    safe_exec_version: Text
    run_id: Text
    # ISO 8601 in UTC, as is `finished`.
    started: Moment
    finished: Moment
    command: tuple[str, ...]
    cwd: str
    status: Status
    exit_code: ExitCode = 0
    notebook: NotebookInfo
    cause: Cause | None
    crash_cell: CrashCell | None
    culprits: Culprits | None = None
    # Only if memory was the cause, or nearly ran out.
    memory: MemoryUse | None = None
    # Only with --keep-going: all failures in the order in which they were found. The first one is
    # also the verdict's own.
    failures: tuple[FailureRecord, ...] = ()
    # Only with --compare: the cells whose outputs differ from the stored ones.
    differences: tuple[OutputDifference, ...] = ()
    cells: tuple[CellRecord, ...]
    limits: Limits
    enforcement: Mapping[LimitName, Enforcement]
    # The requested isolation; its enforcement is in `environment`.
    isolation: Isolation = field(default_factory=Isolation)
    # The attempts with retries, this one included; a pass after the first one is flaky.
    attempts: Annotated[int, Meta(ge=1)] = 1
    # The runs of --repeat, this one included, and the cells whose results differ among them.
    runs: Annotated[int, Meta(ge=1)] = 1
    flaky_cells: tuple[FlakyCell, ...] = ()
    # Whether the run continues after a cell that raises.
    allow_errors: bool = False
    # Other hosts that the notebook contacted.
    remote_hosts: tuple[str, ...] = ()
    # Files in the working directory that were created or changed; None: not listed.
    files: tuple[CreatedFile, ...] | None = None
    # There are more files than are listed.
    more_files: bool = False
    timeline: Timeline
    # Where the time went, the longest first.
    profile: tuple[ProfileLine, ...] = ()
    usage: Usage
    stderr_tail: str = ""
    environment: Environment
    warnings: tuple[str, ...] = ()
    outputs: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        force_setattr(self, "exit_code", self.status.exit_code)
        # The verdict's own failure and the first of the list are the same, whatever was replaced.
        if self.failures:
            force_setattr(self, "failures", (FailureRecord.of(self), *self.failures[1:]))

    def each_failure(self) -> tuple[Verdict, ...]:
        """Return one verdict for each failure, as if it had been the only one.

        Reports describe all failures in this way. Without ``--keep-going`` the verdict itself is
        the only one.
        """
        return tuple(
            replace(
                self,
                status=failure.status,
                cause=failure.cause,
                crash_cell=failure.crash_cell,
                culprits=failure.culprits,
                # The holders of memory are those of the first run.
                memory=None if number else self.memory,
                failures=(),
            )
            for number, failure in enumerate(self.failures)
        ) or (self,)
