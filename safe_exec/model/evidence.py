"""Facts about one trial that may bear on its cause. ``None`` means "not measured", never 0."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from msgspec import Struct, field

from safe_exec.model.ending import CellError, ExitStatus, TerminationReason
from safe_exec.model.limits import Count, Mechanism, RepositoryUse
from safe_exec.model.memory import Census, CensusLine
from safe_exec.model.observed import ChangedLimit, EndedChild, ObservedLock, ObservedProcess


class Frame(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One frame of a stack. Stacks are listed with the innermost frame first."""

    function: str
    # The line in the file, or in the cell if the frame runs the code of a cell.
    line: Count | None
    file: str | None = None
    # The index of the notebook cell whose code the frame runs.
    cell: Count | None = None
    # The text of the line, if the notebook is available.
    source_line: str | None = None


class NativeFrame(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One frame of a native stack: of a C function, or of Python code that C functions called."""

    # None if no symbol is known for the address.
    function: str | None
    # The path of the file that holds the function.
    library: str | None = None
    # The version of the package or of the C library that the file belongs to.
    version: str | None = None
    # The offset of the address from the beginning of the library in memory, for addr2line.
    offset: Count | None = None
    # Only for Python code.
    python: Frame | None = None
    # The representations of the frame's local variables; only with --locals.
    locals: Mapping[str, str] = field(default_factory=dict)


class FaultSite(Struct, frozen=True, kw_only=True):
    """The processor's state at a fatal signal, read from outside."""

    # False for a signal that was sent: no instruction failed.
    faulted: bool
    main: bool
    # The address whose access failed; None if the processor does not report it.
    address: int | None
    stack_pointer: int
    # The size of the thread's stack.
    stack_bytes: int | None
    # Whether the access was one to the thread's stack, past its end.
    overflow: bool
    # The file of the running code (empty for generated code), and the offset in it.
    library: str | None = None
    library_offset: int | None = None


class FaultReport(Struct, frozen=True, kw_only=True):
    """The report of a dying kernel's faulthandler, with measurements from outside."""

    title: str
    # The stack of the thread that faulted.
    stack: tuple[Frame, ...]
    # Whether that is the main thread.
    main: bool | None = None
    # The size to which the main thread's stack had grown, and its limit.
    stack_bytes: int | None = None
    stack_limit: int | None = None
    site: FaultSite | None = None
    # The native stack of the thread that faulted, and the reason if it could not be read. Both are
    # empty if nobody tried to read it.
    native: tuple[NativeFrame, ...] = ()
    native_error: str | None = None


class CellLocation(Struct, frozen=True, kw_only=True):
    """The kernel's last known location in a cell."""

    cell: int
    line: int
    # The source of this knowledge: traceback, fault, dump, sample, statement and so on.
    source: str
    stack: tuple[Frame, ...] = ()
    # Seconds from the observation to the end.
    age: float | None = None


class ActivityObservation(Struct, frozen=True, kw_only=True):
    """The kernel's activity, observed for a short time before safe-exec acted on a timeout.

    ``targets``, ``awaited``, ``reads`` and ``writes`` describe the kernel as in
    ``ObservedProcess``.
    """

    # The scheduler state of the main thread (R, S, D, T, ...).
    state: str | None
    # Processor seconds per second of the whole kernel process.
    cpu_share: float | None
    # The system call in which the main thread was blocked.
    syscall: str | None
    stack: tuple[Frame, ...]
    # The agent's waits for the interpreter lock in seconds; empty if it never got the lock.
    gil_waits: tuple[float, ...] = ()
    # The number of distinct innermost lines that the agent's samples saw.
    lines: int | None = None
    awaiting: str | None = None
    children: int | None = None
    # Processor seconds per second of the kernel's descendants.
    children_cpu_share: float | None = None
    window: float | None = None
    # The share of the time in which the main thread waited for a processor.
    cpu_wait_share: float | None = None
    # The share of samples in which the main thread had work. On a busy machine this says more than
    # the processor time that it got.
    runnable: float | None = None
    starved: bool | None = None
    reads_terminal: bool | None = None
    # Whether the kernel process ignored SIGINT.
    ignores_interrupt: bool | None = None
    targets: tuple[str, ...] | None = None
    awaited: int | None = None
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    # How often per second the main thread went to sleep.
    switches: float | None = None
    # The stacks of the kernel's other threads.
    threads: tuple[tuple[Frame, ...], ...] = ()
    # The other processes of the sandbox.
    processes: tuple[ObservedProcess, ...] = ()
    # Children that ended while the cell ran.
    ended: tuple[EndedChild, ...] = ()
    # The file lock that the kernel waits for.
    lock: ObservedLock | None = None
    listening: tuple[str, ...] = ()
    # Whether the agent runs in the kernel. If not, the main thread need not be the one that runs
    # the cells.
    instrumented: bool = True


class Channel(StrEnum):
    """The path of output: the process's descriptors 1 and 2, or Python's streams."""

    DESCRIPTOR = "descriptor"
    STDERR = "stderr"
    STDOUT = "stdout"


class OutputBurst(Struct, frozen=True, kw_only=True):
    """Text of one channel that arrived without a pause.

    ``age`` is the time from its last part to the end, in seconds.
    """

    channel: Channel
    text: str
    # Seconds from the last piece of the text to the end of the kernel.
    age: float


class IsolationFacts(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The places, variables and hosts that isolation took from a run, recorded when it was set up.

    Paths are absolute, free of links, and as the kernel sees them.
    """

    # The mechanism of the file walls. bubblewrap hides files (ENOENT) and mounts them read-only
    # (EROFS); Landlock refuses access (EACCES).
    by: Mechanism = Mechanism.NONE
    # The kernel's HOME.
    home: str | None = None
    folder: str | None = None
    # The root of the repository around the folder, and how much of it stays open. A closed
    # repository is treated like any other place.
    repository: str | None = None
    repository_use: RepositoryUse = RepositoryUse.CLOSED
    # The hidden home directories, the user's own first.
    hidden_homes: tuple[str, ...] = ()
    # The places hidden by name (Isolation.hide).
    hidden: tuple[str, ...] = ()
    # The places that stay visible inside hidden ones.
    readable: tuple[str, ...] = ()
    # The places that stay visible, and where written files are kept.
    writable: tuple[str, ...] = ()
    # The places whose files are lost after the run.
    discarded: tuple[str, ...] = ()
    # Whether nothing else can be written.
    read_only: bool = False
    # The variables that isolation removed from the environment. Their values are not recorded
    # anywhere.
    removed_variables: tuple[str, ...] = ()
    # Whether other hosts can be reached.
    network: bool = True


class NeedKind(StrEnum):
    """The kinds of things that a cell may need and isolation may take away."""

    PATH = "path"
    VARIABLE = "variable"
    MODULE = "module"
    PROGRAM = "program"
    HOST = "host"


class Access(StrEnum):
    """The access that isolation leaves: full, read-only, or none."""

    OPEN = "open"
    READ_ONLY = "read_only"
    HIDDEN = "hidden"


class Raised(Struct, frozen=True, kw_only=True):
    """The attributes of an exception that a cell raised, or of one of its causes.

    This is the kernel's claim.
    """

    type: str
    # The error number.
    number: int | None = None
    # The file names that the error is about.
    files: tuple[str, ...] = ()
    # The host that was last connected to.
    host: str | None = None
    port: int | None = None
    # The module that was not found.
    module: str | None = None
    # The key that os.environ lacks.
    variable: str | None = None
    # Whether the file was to be written, if known.
    writes: bool | None = None
    # The exception was only being handled when the next one was raised.
    remote: bool = False


class IsolationConflict(Struct, frozen=True, kw_only=True):
    """A thing that a cell needed, that exists outside the sandbox, and that isolation took away.

    ``name`` and ``line`` come from the kernel; everything else was checked outside.
    """

    kind: NeedKind
    # The name by which the kernel called the thing in `line`.
    name: str
    access: Access
    line: str
    # The thing's path outside the sandbox.
    path: str | None = None
    # The paths to open to the notebook; empty if opening them would not help.
    allow: tuple[str, ...] = ()
    # Whether it was to be written.
    writes: bool = False
    # Whether it lies in the notebook's folder, which is then no place to write to either.
    in_folder: bool = False
    # Whether the user that the kernel runs as may use it.
    usable: bool = True
    # Whether it is a socket, which no copy can stand for.
    socket: bool = False
    # It was looked for in the home that the kernel has instead of the user's.
    moved: bool = False
    local: bool = False
    # The kernel named this very thing as the refused one.
    exact: bool = False
    # The cell that named it, and whether it did so in its output.
    cell: int | None = None
    in_output: bool = False


class Volume(Struct, frozen=True, kw_only=True):
    """A file system that the kernel can write to. Sizes are in bytes."""

    # Its directories as the kernel sees them.
    places: tuple[str, ...]
    size: int
    # The fewest free bytes observed.
    free: int
    # The free bytes when the cell began.
    free_at_start: int | None = None
    # Whether it belongs to the sandbox rather than to the machine.
    own: bool = False


class ProcessCount(Struct, frozen=True, kw_only=True):
    """The processes and threads of the sandbox at one moment, and how many are allowed."""

    tasks: int
    allowed: int
    # All processes and threads of the user, and their limit, if the system counts those.
    of_user: tuple[int, int] | None = None
    # How many more the system has refused in this run; None: nobody counts them.
    refused: int | None = None

    @property
    def full(self) -> bool:
        """Whether the limit is used up and, if refusals are counted, a process was refused."""
        tasks, allowed = self.of_user or (self.tasks, self.allowed)
        return tasks >= allowed and self.refused != 0


class OwnAction(Struct, frozen=True, kw_only=True):
    """An action of the notebook on its own process, reported before it happened.

    This is the kernel's claim.
    """

    # signal, limit, trace (a trace function was set or removed), exec, program (a command that may
    # send signals), symbol (a C function that sends signals was looked up), or lock (of a file).
    kind: str
    # The call, and its time (time.monotonic).
    call: str
    time: float
    cell: int | None = None
    # The stack of the call.
    stack: tuple[Frame, ...] = ()
    # The receiver of a signal: process, group, everybody or parent.
    target: str | None = None
    signal: int | None = None
    # The name of a resource limit, and its new soft value.
    limit: str | None = None
    value: int | None = None
    # The command, or the path of the lock.
    text: str = ""
    # Whether a process that the kernel had forked did it.
    child: bool = False


class MissedPeak(Struct, frozen=True, kw_only=True):
    """Memory that a process had between two checks of the watchdog, in bytes.

    ``process`` is the largest resident memory of one process, ``highest_check`` the most that
    a check saw of one. All processes together may have had ``possible``. ``interval`` are the seconds between the
    two checks that were furthest apart.
    """

    process: int
    highest_check: int
    possible: int
    interval: float


class Evidence(Struct, frozen=True, kw_only=True):
    """All observations of one trial that may bear on its cause. No opinions.

    The fields in ``CLAIMS`` and the Python stacks come from the kernel process itself; everything
    else was read outside.
    """

    exit: ExitStatus | None = None
    termination: TerminationReason | None = None
    oom_kills: int | None = None
    oom_kills_cell: int | None = None
    oom_kills_in_time: int | None = None
    # Earlier cells (by index) in which processes were killed for memory, and how many.
    oom_kills_earlier: tuple[tuple[int, int], ...] = ()
    oom_elsewhere: bool | None = None
    # The group above the sandbox whose memory limit was hit, and that limit in bytes.
    oom_bound: tuple[str, int] | None = None
    oomd_killed: bool | None = None
    process_refusals: int | None = None
    # A group above the sandbox that allows fewer processes than the run, and how many.
    process_bound: tuple[str, int] | None = None
    memory_peak: int | None = None
    memory_peak_raw: int | None = None
    memory_last: int | None = None
    # The part of the peak that belongs to processes other than the kernel.
    memory_children: int | None = None
    memory_kernel: int | None = None
    # Pages that several processes share may be counted more than once.
    memory_upper_bound: bool = False
    memory_missed: MissedPeak | None = None
    processes_at_timeout: ProcessCount | None = None
    # Runnable threads of the notebook, if they left too little processor time for an observation.
    crowd_at_timeout: int | None = None
    processes_peak: int | None = None
    cpu_seconds: float | None = None
    kernel_cpu_seconds: float | None = None
    # The error of the cell, by the kernel's word.
    error: CellError | None = None
    fault: FaultReport | None = None
    # The signals for which the process still had handlers when it ended.
    caught_signals: frozenset[int] | None = None
    # The kernel reported that its fault handler was no longer installed.
    handler_replaced: bool = False
    location: CellLocation | None = None
    observation: ActivityObservation | None = None
    cell_seconds: float | None = None
    cell_output_bytes: int | None = None
    cell_output_received: int | None = None
    cell_output_age: float | None = None
    cell_output_truncated: bool = False
    output_bytes: int | None = None
    exit_caller: tuple[Frame, ...] = ()
    # The stack of a call of exit() or quit().
    exit_request: tuple[Frame, ...] = ()
    remote_hosts: tuple[str, ...] = ()
    signals_to_keeper: tuple[int, ...] = ()
    stderr_tail: str = ""
    disk_free: int | None = None
    open_files: int | None = None
    # The kernel's memory maps after the last cell, and the system's limit.
    memory_maps: tuple[int, int] | None = None
    cell_active: bool | None = None
    # The end of the cell's output.
    last_words: str = ""
    # Text in the output of a cell (with its index) that begins with the last traceback of a thread
    # or a worker.
    printed: tuple[int, str] | None = None
    # The end of the cell's stderr when its time was up, before the interrupt.
    stderr_in_time: str = ""
    # The lock on a file that the cell's error names, with its holder, read outside.
    named_lock: ObservedLock | None = None
    # Whether the agent runs in the kernel and reports such events.
    agent: bool = True
    # The notebook's actions on its own process, by the kernel's word.
    own_actions: tuple[OwnAction, ...] = ()
    # The trace functions that were active when the last cell began, by the kernel's word.
    tracing: tuple[str, ...] = ()
    # Resource limits that changed since the start, read outside.
    changed_limits: tuple[ChangedLimit, ...] = ()
    # The command line of a program that replaced the kernel, read outside.
    replaced_by: str | None = None
    # The line (from 1) and text of a script in another language that sends a signal.
    kill_command: tuple[int, str] | None = None
    # The time of the kernel's death (time.monotonic).
    died_at: float | None = None
    # vm.overcommit_memory.
    overcommit: int | None = None
    isolation: IsolationFacts | None = None
    # The attributes of the cell's exception and of its causes.
    raised: tuple[Raised, ...] = ()
    # Refused things that exist outside; only their names come from the kernel.
    conflicts: tuple[IsolationConflict, ...] = ()
    # The file systems after the last cell, with the lowest free space that was seen.
    volumes: tuple[Volume, ...] = ()
    # The last output of a dead kernel, in order.
    final_output: tuple[OutputBurst, ...] = ()
    # What held the kernel's memory, by the kernel's word, the earliest first.
    censuses: tuple[Census, ...] = ()
    # The lines whose allocations were alive at the end, if they were recorded in the kernel.
    allocations: tuple[CensusLine, ...] = ()
    # Why a recording that was asked for could not be made or read; the lines are then sampled.
    allocations_error: str | None = None


# The fields of the evidence that the kernel process claims about itself: read outside, but written
# inside. `fault` and `observation` hold both.
CLAIMS = (
    "error",
    "raised",
    "location",
    "remote_hosts",
    "own_actions",
    "tracing",
    "last_words",
    "exit_caller",
    "exit_request",
    "stderr_tail",
    "final_output",
    "handler_replaced",
    "printed",
    "stderr_in_time",
    "censuses",
    "allocations",
    "allocations_error",
)
