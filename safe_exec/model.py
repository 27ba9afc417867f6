"""The words of safe-exec as types: limits, endings, evidence, causes and the verdict.

Imports nothing else of safe-exec. Sizes are bytes and times are seconds everywhere; ``None`` is "unlimited" in
:class:`Limits` and "not measured" in every figure, never 0.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Mapping
from enum import StrEnum

from safe_exec.records import dataclass, field, fields

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


class Mechanism(StrEnum):
    """What holds a limit."""

    CGROUP_V2 = "cgroup-v2"
    SYSTEMD = "systemd"
    CGROUP_V1 = "cgroup-v1"
    RLIMIT = "rlimit"
    BUBBLEWRAP = "bubblewrap"
    LANDLOCK = "landlock"
    SECCOMP = "seccomp"
    KERNEL = "kernel"
    WATCHDOG = "watchdog"
    RUNNER = "runner"
    NONE = "none"


class LimitName(StrEnum):
    """The limits a user may set; each is a field of :class:`Limits`."""

    MEMORY = "memory"
    CPUS = "cpus"
    CPU_TIME = "cpu_time"
    CELL_TIMEOUT = "cell_timeout"
    TIMEOUT = "timeout"
    START_TIMEOUT = "start_timeout"
    PROCESSES = "processes"
    OPEN_FILES = "open_files"
    FILE_SIZE = "file_size"
    CELL_OUTPUT = "cell_output"
    OUTPUT = "output"
    DISK = "disk"
    SHM = "shm"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the user allows one notebook; ``None`` is unlimited.

    ``disk`` is what may be written to the folder, /tmp and scratch together, ``shm`` to /dev/shm. ``memory`` covers the kernel and all its
    descendants; ``open_files`` and ``file_size`` hold for each process.
    ``cpu_time`` is the processor time of the whole tree; ``interrupt_grace`` is how long a kernel that ran past its
    time may take to answer an interrupt before it is killed.
    """

    memory: int | None = None
    cpus: float | None = None
    cpu_time: float | None = None
    cell_timeout: float | None = None
    timeout: float | None = None
    start_timeout: float | None = None
    processes: int | None = None
    open_files: int | None = None
    file_size: int | None = None
    cell_output: int | None = None
    output: int | None = None
    disk: int | None = None
    shm: int | None = None
    interrupt_grace: float = 2.0

    def __post_init__(self) -> None:
        """Raises TypeError for what is no number (units are for files and options), ValueError for one below zero."""
        for name, value in self.as_dict().items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise TypeError(f"Limits.{name} is a number of bytes, seconds or things, not {value!r}; pass units as options")
            if value is not None and not value >= 0:
                raise ValueError(f"Limits.{name} cannot be {value!r}")

    def of(self, name: LimitName) -> int | float | None:
        """The value of one limit, ``None`` where it is unlimited."""
        value: int | float | None = getattr(self, name.value)
        return value

    def as_dict(self) -> dict[str, int | float | None]:
        """Every limit by its name, in bytes, seconds and counts."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


class FolderUse(StrEnum):
    """What a notebook may do with its folder. Of a copy nothing comes back unless ``Isolation.write_back``."""

    WRITE = "write"
    READ = "read"
    COPY = "copy"


class SystemCalls(StrEnum):
    """Whether system calls that no notebook needs are let through, refused with EPERM, or end the kernel (SIGSYS)."""

    ALL = "all"
    REFUSE = "refuse"
    KILL = "kill"


@dataclass(frozen=True, kw_only=True)
class Isolation:
    """What a notebook may reach, beside its limits. The defaults wall off nothing.

    ``hide_home``: home directories are empty but for what the kernel's interpreter needs. ``read_only_system``: nothing may be
    written but the folder, ``writable``, and a /tmp, /dev/shm and home of its own. ``network``: other hosts; loopback always stays.
    ``own_processes``: process, ipc and host names of its own. ``listed_environment``: of the environment only what is known to be
    harmless, and ``env``. ``other_user``: as a user that owns nothing, where we are root. ``devices`` are paths below /dev.
    ``required``: where one of these walls does not stand nothing is run.
    """

    hide_home: bool = False
    read_only_system: bool = False
    folder: FolderUse = FolderUse.WRITE
    write_back: bool = True
    network: bool = True
    own_processes: bool = False
    listed_environment: bool = False
    system_calls: SystemCalls = SystemCalls.ALL
    other_user: bool = False
    required: bool = False
    env: tuple[str, ...] = ()
    writable: tuple[str, ...] = ()
    hide: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()


class Wall(StrEnum):
    """The walls that isolation may put up; the verdict says of each that was asked for what holds it."""

    HOME = "home"
    SYSTEM = "system"
    FOLDER = "folder"
    HIDDEN = "hidden"
    NETWORK = "network"
    PROCESSES = "processes"
    ENVIRONMENT = "environment"
    SYSTEM_CALLS = "system_calls"
    PRIVILEGES = "privileges"
    USER = "user"


@dataclass(frozen=True, kw_only=True)
class Enforcement:
    """What holds one limit or wall: ``hard`` means the operating system's kernel does, with no way past it."""

    by: Mechanism
    hard: bool
    note: str = ""


@dataclass(frozen=True)
class ExitStatus:
    """The raw wait status of a process (``waitpid(2)``): an exit code or a signal, never both."""

    raw: int

    @property
    def signal(self) -> int | None:
        """The number of the signal that ended the process, positive, or ``None``."""
        return os.WTERMSIG(self.raw) if os.WIFSIGNALED(self.raw) else None

    @property
    def exit_code(self) -> int | None:
        """The exit code, or ``None`` where a signal ended the process."""
        return os.WEXITSTATUS(self.raw) if os.WIFEXITED(self.raw) else None

    def __str__(self) -> str:
        if self.signal is None:
            return f"exit status {self.exit_code}"
        try:
            return signal.Signals(self.signal).name
        except ValueError:  # a real-time signal has no name
            return f"signal {self.signal}"


class TerminationReason(StrEnum):
    """What *we* did to end the kernel; recorded before the signal is sent, the first one stays."""

    MEMORY = "memory"
    CPU_TIME = "cpu_time"
    CELL_TIMEOUT = "cell_timeout"
    NOTEBOOK_TIMEOUT = "notebook_timeout"
    START_TIMEOUT = "start_timeout"
    PROCESSES = "processes"
    DISK = "disk"
    OUTPUT = "output"
    CANCELLED = "cancelled"
    INTERNAL = "internal"
    SHUTDOWN = "shutdown"


# --- how a trial ended: observed, not interpreted ---------------------------------------------------------------


_DEBUGGER = re.compile(r"\b(?:pdb|debugger|bdb)\.py\b|\bdebugger\(|\.set_trace\(")
"""Frames of a debugger in a traceback, as IPython 7 to 9 print them."""
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True, kw_only=True)
class CellError:
    """An exception that a cell raised, as the kernel reported it."""

    ename: str
    evalue: str
    traceback: tuple[str, ...] = ()

    @property
    def in_debugger(self) -> bool:
        """Whether a debugger stands in the traceback."""
        return _DEBUGGER.search(_COLOURS.sub("", "\n".join(self.traceback))) is not None


@dataclass(frozen=True, kw_only=True)
class Passed:
    """Every cell ran and the kernel was alive at the end."""


@dataclass(frozen=True, kw_only=True)
class CellFailed:
    """A cell raised; the kernel was alive. ``cell`` is an index over all cells."""

    cell: int
    error: CellError


@dataclass(frozen=True, kw_only=True)
class Died:
    """The kernel ended, or asked to (``asked_to_exit``), before our shutdown request.

    ``cell`` is the cell that ran when it happened; for a kernel that only asked, the cell that did. ``exit`` is
    ``None`` where the status could not be had (the keeper itself was killed) or the kernel only asked.
    """

    cell: int | None
    exit: ExitStatus | None
    asked_to_exit: bool = False


@dataclass(frozen=True, kw_only=True)
class TimedOut:
    """We ended a cell (``whole`` false) or the notebook (true) after ``allowed`` seconds.

    ``answered`` says whether the cell ended at the interrupt, ``None`` where none was sent or the kernel itself ended at it; ``error``
    is what the cell raised then.
    """

    cell: int | None
    whole: bool
    allowed: float
    answered: bool | None = None
    error: CellError | None = None


@dataclass(frozen=True, kw_only=True)
class LimitHit:
    """We ended the run for ``limit``."""

    limit: LimitName
    cell: int | None


@dataclass(frozen=True, kw_only=True)
class StartFailed:
    """The kernel never became ready."""

    reason: str
    exit: ExitStatus | None = None
    waited: float | None = None


@dataclass(frozen=True, kw_only=True)
class Cancelled:
    """The user or the system stopped us with ``signal``."""

    signal: int
    cell: int | None


@dataclass(frozen=True, kw_only=True)
class InternalError:
    """The sandbox could not be built as asked, or safe-exec itself failed.

    ``refused``: nothing failed; the machine cannot hold a limit that was required.
    """

    message: str
    cell: int | None = None
    refused: bool = False


Ending = Passed | CellFailed | Died | TimedOut | LimitHit | StartFailed | Cancelled | InternalError


# --- evidence ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One frame of a stack, innermost first. ``cell`` is the index of the notebook cell whose code it runs."""

    function: str
    line: int | None
    file: str | None = None
    cell: int | None = None


@dataclass(frozen=True, kw_only=True)
class FaultReport:
    """What faulthandler wrote on its own descriptor while the kernel was dying, and what stood outside then.

    ``stack`` is the thread that faulted; ``main`` says whether that is the main thread. ``stack_bytes`` is the size
    to which the faulting thread's stack had grown, ``stack_limit`` how far it may (both read outside, from /proc).
    """

    title: str
    stack: tuple[Frame, ...]
    main: bool | None = None
    stack_bytes: int | None = None
    stack_limit: int | None = None


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the kernel was in a cell when last seen. ``source`` says how we know, ``age`` how long before the end."""

    cell: int
    line: int
    source: str
    stack: tuple[Frame, ...] = ()
    age: float | None = None


@dataclass(frozen=True, kw_only=True)
class Looked:
    """What the kernel was seen to do in a short window before a timeout was acted on.

    ``state`` is the scheduler state of the main thread (``R``, ``S``, ``D``, ``T``, ...), ``runnable`` the share of
    looks at which it had work to do (on a busy machine that says more than the time it got), ``cpu_share`` processor
    seconds per second of the whole kernel process, ``syscall`` the name of the call it was blocked in,
    ``gil_waits`` the seconds that the sampling thread inside waited for the interpreter each time (empty: it
    starved), ``lines`` the distinct innermost places it saw, ``opcode`` whether the innermost frame stood in a call,
    ``children_cpu_share`` processor seconds per second of the kernel's descendants, ``ignores_interrupt`` whether SIGINT was ignored by the
    kernel process, ``fitted`` whether code of ours runs in the
    kernel: elsewhere the main thread need not be the one that runs cells.
    """

    state: str | None
    cpu_share: float | None
    syscall: str | None
    stack: tuple[Frame, ...]
    gil_waits: tuple[float, ...] = ()
    lines: int | None = None
    awaiting: str | None = None
    children: int | None = None
    children_cpu_share: float | None = None
    window: float | None = None
    runnable: float | None = None
    starved: bool | None = None
    reads_terminal: bool | None = None
    ignores_interrupt: bool | None = None
    fitted: bool = True


@dataclass(frozen=True, kw_only=True)
class IsolationFacts:
    """The places, variables and hosts that isolation took from one run. Recorded outside, as the walls are built.

    Paths are absolute, without links, and as the kernel sees them. ``by`` holds the walls around files: bubblewrap hides (ENOENT) and
    mounts read-only (EROFS), Landlock refuses (EACCES). ``home`` is the kernel's HOME. ``hidden_homes`` has the user's own home first;
    ``hidden`` was hidden by name (``Isolation.hide``). ``readable`` stays visible inside hidden places, and so does ``writable``: files
    written there are kept. Files written into ``discarded`` are gone after the run. ``read_only``: nothing else can be written.
    ``repository`` is the repository around the folder where it is visible as a whole. ``removed_variables`` are names that the kernel's
    environment would have without isolation; their values are recorded nowhere. ``network``: other hosts can be reached.
    """

    by: Mechanism = Mechanism.NONE
    home: str | None = None
    folder: str | None = None
    repository: str | None = None
    hidden_homes: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()
    readable: tuple[str, ...] = ()
    writable: tuple[str, ...] = ()
    discarded: tuple[str, ...] = ()
    read_only: bool = False
    removed_variables: tuple[str, ...] = ()
    network: bool = True


class NeedKind(StrEnum):
    """What a cell can ask for that isolation may take away."""

    PATH = "path"
    VARIABLE = "variable"
    MODULE = "module"
    PROGRAM = "program"
    HOST = "host"


class Access(StrEnum):
    """The access that isolation leaves to a thing."""

    OPEN = "open"
    READ_ONLY = "read_only"
    HIDDEN = "hidden"


@dataclass(frozen=True, kw_only=True)
class Raised:
    """The attributes of an exception that a cell raised, or of one that it came from. The kernel's own word.

    ``number`` is the error number, ``files`` the names that it is about, ``module`` the one that was not found, ``variable`` the key that
    ``os.environ`` does not have. ``writes``: whether the file was to be written, where that is known. ``remote``: the exception was only being
    handled when the next one was raised.
    """

    type: str
    number: int | None = None
    files: tuple[str, ...] = ()
    module: str | None = None
    variable: str | None = None
    writes: bool | None = None
    remote: bool = False


@dataclass(frozen=True, kw_only=True)
class IsolationConflict:
    """A thing that a cell asked for, that exists outside the sandbox, and that isolation took away. Checked outside.

    ``name`` is the thing as the kernel named it in ``line``; ``path`` is where it is outside, ``allow`` what to open to the notebook so that it can
    have it, empty where opening would not help. ``writes``: it is to be written. ``usable``: we ourselves, and the user that
    the kernel runs as, may use it. ``moved``: it was looked for in the home that the kernel has instead of the user's. ``exact``: the kernel named this
    thing as the one that was refused. ``cell`` named it, ``in_output``: in its output.
    """

    kind: NeedKind
    name: str
    access: Access
    line: str
    path: str | None = None
    allow: tuple[str, ...] = ()
    writes: bool = False
    usable: bool = True
    moved: bool = False
    exact: bool = False
    cell: int | None = None
    in_output: bool = False


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """All that was observed of one trial and may bear on its cause. No opinions.

    Origins: everything is read outside the kernel but ``error``, ``raised`` (its attributes and those of the exceptions that it came from),
    ``place``, ``remote_hosts``, ``executed``, ``last_words`` (the end of what the cell put out) and the Python stacks, which the kernel process says
    of itself; of ``conflicts`` the names. ``oom_bound`` is
    the group above the sandbox whose memory limit was hit, and that limit in bytes; ``process_bound`` one that allows fewer processes and
    threads than the run, and how many. ``exit_request`` is the stack of a call of ``exit()`` or ``quit()``.
    """

    exit: ExitStatus | None = None
    termination: TerminationReason | None = None
    oom_kills: int | None = None
    oom_kills_cell: int | None = None
    oom_elsewhere: bool | None = None
    oom_bound: tuple[str, int] | None = None
    oomd_killed: bool | None = None
    process_refusals: int | None = None
    process_bound: tuple[str, int] | None = None
    memory_peak: int | None = None
    memory_peak_raw: int | None = None
    memory_last: int | None = None
    processes_peak: int | None = None
    cpu_seconds: float | None = None
    kernel_cpu_seconds: float | None = None
    error: CellError | None = None
    fault: FaultReport | None = None
    place: Place | None = None
    looked: Looked | None = None
    cell_seconds: float | None = None
    cell_output_bytes: int | None = None
    cell_output_received: int | None = None
    cell_messages: int | None = None
    cell_output_age: float | None = None
    cell_output_truncated: bool = False
    output_bytes: int | None = None
    exit_caller: tuple[Frame, ...] = ()
    exit_request: tuple[Frame, ...] = ()
    remote_hosts: tuple[str, ...] = ()
    signals_to_runner: tuple[int, ...] = ()
    signals_to_keeper: tuple[int, ...] = ()
    kernel_uid: int | None = None
    stderr_tail: str = ""
    disk_free: int | None = None
    open_files: int | None = None
    executed: str | None = None
    cell_active: bool | None = None
    last_words: str = ""
    isolation: IsolationFacts | None = None
    raised: tuple[Raised, ...] = ()
    conflicts: tuple[IsolationConflict, ...] = ()


# --- conclusions ------------------------------------------------------------------------------------------------

FactValue = str | int | float | bool | None


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One piece of evidence that a cause rests on; ``source`` names where it was read."""

    fact: str
    value: FactValue
    source: str
    origin: Origin


@dataclass(frozen=True, kw_only=True)
class Cause:
    """What we conclude. ``signal`` is negative (-9 for SIGKILL), as subprocess gives it."""

    kind: CauseKind
    summary: str
    confidence: Confidence
    evidence: tuple[Fact, ...] = ()
    advice: str = ""
    activity: Activity | None = None
    signal: int | None = None
    exit_code: int | None = None


@dataclass(frozen=True, kw_only=True)
class CrashCell:
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


@dataclass(frozen=True, kw_only=True)
class CellRecord:
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


@dataclass(frozen=True, kw_only=True)
class Culprit:
    """One cell of the set. ``note`` says in a few words what it did, from evidence (``+612 MiB kept``).

    ``source_line`` is the first line of the cell that says something, at most 200 characters of it.
    """

    index: int
    code_index: int
    id: str | None
    role: Role
    note: str
    source_line: str | None = None


@dataclass(frozen=True, kw_only=True)
class Culprits:
    """The result of a culprit search.

    ``cells`` in order, the crash cell last; empty where nothing reproduced. ``minimal``: without any one of them it no
    longer happens. ``look_first`` is the index of the cell a person should read first. ``trials`` counts kernels that were
    started for the search (the first run is none of them), ``cached`` those that an earlier search had run.
    ``reproduced`` is (k, n): of n runs of this very set, from scratch, k ended the same way. ``seconds`` is the wall time of the
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
    repro_notebook: str | None = None
    stopped: Stopped | None = None


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """Samples of the whole run, four columns of the same length; ``cell`` is -1 between cells."""

    seconds: tuple[float, ...] = ()
    memory: tuple[int | None, ...] = ()
    cpu: tuple[float | None, ...] = ()
    cell: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What the whole run used."""

    wall_seconds: float | None = None
    cpu_seconds: float | None = None
    memory_peak: int | None = None
    memory_peak_raw: int | None = None
    oom_kills: int | None = None
    processes_peak: int | None = None
    output_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class NotebookInfo:
    """The notebook that was run."""

    path: str
    sha256: str | None
    kernel: str | None
    language: str | None
    cells: int
    code_cells: int


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Where it ran. ``python`` and ``packages`` are the kernel side's, ``None`` where they are not known, or there is no Python.

    ``isolation_facts`` is ``None`` without isolation.
    """

    python: str | None
    platform: str
    packages: Mapping[str, str] | None = None
    cgroup: str | None = None
    isolation: Mapping[Wall, Enforcement] = field(default_factory=dict)
    isolation_facts: IsolationFacts | None = None


@dataclass(frozen=True, kw_only=True)
class Verdict:
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
