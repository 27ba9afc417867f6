"""Conclusions as types: status, cause, culprits and the verdict that holds them."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from msgspec import Struct, field

from safe_exec.model.evidence import Frame, IsolationFacts
from safe_exec.model.limits import Enforcement, Isolation, LimitName, Limits, Wall

VERDICT_SCHEMA = "safe-exec/verdict/1"


class Status(StrEnum):
    """How a run ended, as the verdict and the exit code say it."""

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
    UNKNOWN = "unknown"


class Activity(StrEnum):
    """What a kernel that ran past its time was doing."""

    PYTHON_LOOP = "python_loop"
    NATIVE_CODE = "native_code"
    SLEEPING = "sleeping"
    WAITING_IO = "waiting_io"
    WAITING_LOCK = "waiting_lock"
    WAITING_CHILD = "waiting_child"
    STOPPED = "stopped"


class Confidence(StrEnum):
    """How sure a cause is."""

    CERTAIN = "certain"
    LIKELY = "likely"
    GUESS = "guess"


class Origin(StrEnum):
    """Who said a fact: the system around the kernel, or the kernel process itself."""

    OUTSIDE = "outside"
    INSIDE = "inside"


FactValue = str | int | float | bool | None


class Fact(Struct, frozen=True, kw_only=True):
    """One piece of evidence that a cause rests on; ``source`` names where it was read."""

    fact: str
    value: FactValue
    source: str
    origin: Origin


class Cause(Struct, frozen=True, kw_only=True):
    """What we conclude. ``signal`` is negative (-9 for SIGKILL), as subprocess gives it."""

    kind: CauseKind
    summary: str
    confidence: Confidence
    evidence: tuple[Fact, ...] = ()
    advice: str = ""
    activity: Activity | None = None
    signal: int | None = None
    exit_code: int | None = None


class CrashCell(Struct, frozen=True, kw_only=True):
    """The cell that ran when it happened; ``line`` counts from 1 within the cell."""

    index: int
    code_index: int
    id: str | None
    execution_count: int | None
    line: int | None
    source_line: str | None
    stack: tuple[Frame, ...] = ()


class CellStatus(StrEnum):
    """What became of one cell."""

    PASSED = "passed"
    FAILED = "failed"
    KILLED = "killed"
    NOT_RUN = "not_run"
    SKIPPED = "skipped"


class CellRecord(Struct, frozen=True, kw_only=True):
    """The figures of one code cell. ``started`` is seconds since the run began."""

    index: int
    code_index: int
    id: str | None
    status: CellStatus
    started: float | None = None
    seconds: float | None = None
    cpu_seconds: float | None = None
    memory_peak: int | None = None
    memory_kept: int | None = None
    output_bytes: int | None = None
    output_truncated: bool = False


class Role(StrEnum):
    """What a culprit did, as far as evidence tells.

    ``crash``: it ran when it happened. ``accumulator``: it kept much of what ran out. ``definition``: another culprit
    uses what it defines. ``trigger``: it set off what struck later (a thread, a timer, an exit that was asked for).
    ``setup``: it must run before; why is not visible.
    """

    CRASH = "crash"
    ACCUMULATOR = "accumulator"
    DEFINITION = "definition"
    TRIGGER = "trigger"
    SETUP = "setup"


class Stopped(StrEnum):
    """Why a culprit search ended before its result was known to be minimal."""

    BUDGET = "budget"
    CANCELLED = "cancelled"
    NOT_REPRODUCED = "not_reproduced"
    TOO_RARE = "too_rare"


class Culprit(Struct, frozen=True, kw_only=True):
    """One cell of the set. ``note`` says in a few words what it did, from evidence (``+612 MiB kept``).

    ``source_line`` is the first line of the cell that says something, at most 200 characters of it.
    """

    index: int
    code_index: int
    id: str | None
    role: Role
    note: str
    source_line: str | None = None


class Culprits(Struct, frozen=True, kw_only=True):
    """The result of a culprit search.

    ``cells`` in order, the crash cell last; empty where nothing reproduced. ``minimal``: without any one of them it no
    longer happens. ``look_first`` is the index of the cell a person should read first. ``trials`` counts kernels that were
    started for the search (the first run is none of them), ``cached`` those that an earlier search had run.
    ``reproduced`` is (k, n): of n runs of this very set, from scratch, k ended the same way; ``endings`` counts how they ended (``passed``, or
    the kind of the cause). ``seconds`` is the wall time of the
    search. ``repro_notebook`` is the path of the reproduction, where one was written.
    """

    cells: tuple[Culprit, ...]
    minimal: bool
    method: str
    look_first: int | None
    trials: int
    cached: int
    reproduced: tuple[int, ...]
    seconds: float
    endings: Mapping[str, int] = field(default_factory=dict)
    repro_notebook: str | None = None
    stopped: Stopped | None = None


class Timeline(Struct, frozen=True, kw_only=True):
    """Samples of the whole run, four columns of the same length; ``cell`` is -1 between cells."""

    seconds: tuple[float, ...] = ()
    memory: tuple[int | None, ...] = ()
    cpu: tuple[float | None, ...] = ()
    cell: tuple[int, ...] = ()


class Usage(Struct, frozen=True, kw_only=True):
    """What the whole run used. ``memory_upper_bound``: its memory, that of its cells and of the timeline may have been less.

    So it is where processes could not be looked into: pages that they share with others count for each of them.
    """

    wall_seconds: float | None = None
    cpu_seconds: float | None = None
    memory_peak: int | None = None
    memory_peak_raw: int | None = None
    oom_kills: int | None = None
    processes_peak: int | None = None
    output_bytes: int | None = None
    memory_upper_bound: bool = False


class NotebookInfo(Struct, frozen=True, kw_only=True):
    """The notebook that was run."""

    path: str
    sha256: str | None
    kernel: str | None
    language: str | None
    cells: int
    code_cells: int


class Environment(Struct, frozen=True, kw_only=True):
    """Where it ran. ``python`` and ``packages`` are the kernel side's, ``None`` where they are not known, or there is no Python.

    ``isolation_facts`` is ``None`` without isolation.
    """

    python: str | None
    platform: str
    packages: Mapping[str, str] | None = None
    cgroup: str | None = None
    isolation: Mapping[Wall, Enforcement] = field(default_factory=dict)
    isolation_facts: IsolationFacts | None = None


class Verdict(Struct, frozen=True, kw_only=True):
    """The whole answer. ``culprits`` is ``None`` where no search was made.

    ``isolation`` is what was asked for; what holds it stands in ``environment``. ``allow_errors`` says whether the run goes on
    after a cell that raises; ``remote_hosts`` are the other hosts that it was seen to talk to. ``started`` and ``finished`` are
    ISO 8601 in UTC; the other fields are as in docs/verdict.md.
    """

    safe_exec_version: str
    run_id: str
    started: str
    finished: str
    command: tuple[str, ...]
    cwd: str
    status: Status
    notebook: NotebookInfo
    cause: Cause | None
    crash_cell: CrashCell | None
    cells: tuple[CellRecord, ...]
    limits: Limits
    enforcement: Mapping[LimitName, Enforcement]
    timeline: Timeline
    usage: Usage
    environment: Environment
    stderr_tail: str = ""
    warnings: tuple[str, ...] = ()
    culprits: Culprits | None = None
    isolation: Isolation = field(default_factory=Isolation)
    allow_errors: bool = False
    remote_hosts: tuple[str, ...] = ()
    outputs: Mapping[str, str] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """The exit code of the command for this verdict."""
        return self.status.exit_code
