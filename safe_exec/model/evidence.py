"""Facts about one trial that may bear on its cause. ``None`` means "not measured", never 0."""

from __future__ import annotations

from enum import StrEnum

from msgspec import Struct

from safe_exec.model.ending import CellError, ExitStatus, TerminationReason
from safe_exec.model.limits import Count, Mechanism, RepositoryUse
from safe_exec.model.observed import ChangedLimit, EndedChild, ObservedLock, ObservedProcess


class Frame(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One frame of a stack, innermost first.

    ``cell`` is the index of the notebook cell whose code it runs; ``line`` counts within that cell then, and
    ``source_line`` is its text there, where the notebook is at hand.
    """

    function: str
    line: Count | None
    file: str | None = None
    cell: Count | None = None
    source_line: str | None = None


class FaultSite(Struct, frozen=True, kw_only=True):
    """The processor's state at a fatal signal, read from outside while the fault handler was held up.

    ``faulted`` is false for a signal that was sent: no instruction failed. ``address`` is the one whose
    access failed, ``None`` where the processor does not tell. ``overflow`` says whether that access was
    one to the thread's stack, past its end; ``stack_bytes`` is the size of that stack. ``library`` is the
    file whose code was running (empty for code that was generated), ``library_offset`` the place in it.
    """

    faulted: bool
    main: bool
    address: int | None
    stack_pointer: int
    stack_bytes: int | None
    overflow: bool
    library: str | None = None
    library_offset: int | None = None


class FaultReport(Struct, frozen=True, kw_only=True):
    """What faulthandler wrote on its own descriptor while the kernel was dying, and what stood outside then.

    ``stack`` is the thread that faulted; ``main`` says whether that is the main thread. ``stack_bytes`` is the size
    to which the main thread's stack had grown, ``stack_limit`` how far it may, and ``site`` the place of the fault
    (all read outside, from /proc).
    """

    title: str
    stack: tuple[Frame, ...]
    main: bool | None = None
    stack_bytes: int | None = None
    stack_limit: int | None = None
    site: FaultSite | None = None


class CellLocation(Struct, frozen=True, kw_only=True):
    """Where the kernel was in a cell when last seen. ``source`` says how we know, ``age`` how long before the end."""

    cell: int
    line: int
    source: str
    stack: tuple[Frame, ...] = ()
    age: float | None = None


class ActivityObservation(Struct, frozen=True, kw_only=True):
    """What the kernel was seen to do in a short window before a timeout was acted on.

    ``state`` is the scheduler state of the main thread (``R``, ``S``, ``D``, ``T``, ...), ``runnable`` the share of
    looks at which it had work to do (on a busy machine that says more than the time it got), ``cpu_share`` processor
    seconds per second of the whole kernel process, ``syscall`` the name of the call it was blocked in,
    ``gil_waits`` the seconds that the sampling thread inside waited for the interpreter each time (empty: it
    starved), ``cpu_wait_share`` the share of the time for which the main thread waited for a processor,
    ``lines`` the distinct innermost places it saw, ``opcode`` whether the innermost frame stood in a call,
    ``children_cpu_share`` processor seconds per second of the kernel's descendants, ``ignores_interrupt`` whether SIGINT was ignored by the
    kernel process, ``targets``, ``awaited``, ``reads`` and ``writes`` are those of the kernel, as in ``ObservedProcess``; ``switches`` is how often
    per second its main thread went to rest, ``threads`` are the stacks of its other threads, ``processes`` the other processes of the sandbox,
    ``ended`` children that ended while the cell ran, ``lock`` the lock on a file that it waits for, ``listening`` the
    addresses of sockets that it is blocked at and that listen for connections, ``instrumented`` whether code of ours runs in the
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
    cpu_wait_share: float | None = None
    runnable: float | None = None
    starved: bool | None = None
    reads_terminal: bool | None = None
    ignores_interrupt: bool | None = None
    targets: tuple[str, ...] | None = None
    awaited: int | None = None
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    switches: float | None = None
    threads: tuple[tuple[Frame, ...], ...] = ()
    processes: tuple[ObservedProcess, ...] = ()
    ended: tuple[EndedChild, ...] = ()
    lock: ObservedLock | None = None
    listening: tuple[str, ...] = ()
    instrumented: bool = True


class Channel(StrEnum):
    """The way that output took: the process's own descriptors 1 and 2, or Python's streams in the cell that ran."""

    DESCRIPTOR = "descriptor"
    STDERR = "stderr"
    STDOUT = "stdout"


class OutputBurst(Struct, frozen=True, kw_only=True):
    """Text that came in one go. ``age`` is seconds from its last piece to the end of the kernel."""

    channel: Channel
    text: str
    age: float


class IsolationFacts(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The places, variables and hosts that isolation took from one run. Recorded outside, as the walls are built.

    Paths are absolute, without links, and as the kernel sees them. ``by`` holds the walls around files: bubblewrap hides (ENOENT) and
    mounts read-only (EROFS), Landlock refuses (EACCES). ``home`` is the kernel's HOME. ``hidden_homes`` has the user's own home first;
    ``hidden`` was hidden by name (``Isolation.hide``). ``readable`` stays visible inside hidden places, and so does ``writable``: files
    written there are kept. Files written into ``discarded`` are gone after the run. ``read_only``: nothing else can be written.
    ``repository`` is the root of the repository around the folder, ``repository_use`` how much of it the walls leave open (if it is
    ``closed``, they hold for it as for any other place). ``removed_variables`` are names that the kernel's
    environment would have without isolation; their values are recorded nowhere. ``network``: other hosts can be reached.
    """

    by: Mechanism = Mechanism.NONE
    home: str | None = None
    folder: str | None = None
    repository: str | None = None
    repository_use: RepositoryUse = RepositoryUse.CLOSED
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


class Raised(Struct, frozen=True, kw_only=True):
    """The attributes of an exception that a cell raised, or of one that it came from. The kernel's word.

    ``number`` is the error number, ``files`` the names that it is about, ``host`` and ``port`` those that were
    connected to last, ``module`` the one that was not found, ``variable`` the key that ``os.environ``
    does not have. ``writes``: whether the file was to be written, where that is known. ``remote``: the
    exception was only being handled when the next one was raised.
    """

    type: str
    number: int | None = None
    files: tuple[str, ...] = ()
    host: str | None = None
    port: int | None = None
    module: str | None = None
    variable: str | None = None
    writes: bool | None = None
    remote: bool = False


class IsolationConflict(Struct, frozen=True, kw_only=True):
    """A thing that a cell asked for, that exists outside the sandbox, and that isolation took away.

    ``name`` is the thing as the kernel named it in ``line``; all else was checked outside. ``path`` is
    where it is outside, ``allow`` what to open to the notebook so that it can have it, empty where
    opening would not help. ``writes``: it is to be written. ``usable``: the user that the kernel runs as
    may use it. ``moved``: it was looked for in the home that the kernel has instead of the user's.
    ``local``: the host is this machine itself, where something listens that the sandbox's own loopback does not have.
    ``exact``: the kernel named this thing as the one that was refused. ``cell`` named it, ``in_output``:
    in its output.
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
    local: bool = False
    exact: bool = False
    cell: int | None = None
    in_output: bool = False


class Volume(Struct, frozen=True, kw_only=True):
    """A file system that the kernel can write to: its bytes, and the lowest free ones that were seen.

    ``places`` are its directories as the kernel sees them. ``free_at_start`` are the bytes that were free as
    the cell began. ``own``: it is the sandbox's own, and not the machine's.
    """

    places: tuple[str, ...]
    size: int
    free: int
    free_at_start: int | None = None
    own: bool = False


class ProcessCount(Struct, frozen=True, kw_only=True):
    """Processes and threads of the sandbox at one moment, and how many may be.

    ``of_user`` is all that its user runs and how many the system lets that be, where it counts those. ``refused`` is how many more
    it has refused in this run; ``None``: nobody counts that.
    """

    tasks: int
    allowed: int
    of_user: tuple[int, int] | None = None
    refused: int | None = None

    @property
    def full(self) -> bool:
        """Whether no further one would be allowed; and where that is counted, whether one was refused."""
        tasks, allowed = self.of_user or (self.tasks, self.allowed)
        return tasks >= allowed and self.refused != 0


class OwnAction(Struct, frozen=True, kw_only=True):
    """What the notebook did to its own process, as the kernel told it before it happened: its word.

    ``kind``: ``signal`` (with ``target`` process, group, everybody or parent), ``limit`` (its name, and the
    new soft ``value``), ``trace`` (a trace function was set or taken away), ``exec``, ``program`` (a command
    in ``text`` that may send signals), ``symbol`` (a C function that sends signals was looked up) or
    ``lock`` (the lock on the file ``text`` was asked for). ``call`` is the call, ``time`` when it was made
    (``time.monotonic``), ``cell`` the cell that ran, ``stack`` where the call stands, innermost first.
    ``child``: a process that the kernel had forked did it.
    """

    kind: str
    call: str
    time: float
    cell: int | None = None
    stack: tuple[Frame, ...] = ()
    target: str | None = None
    signal: int | None = None
    limit: str | None = None
    value: int | None = None
    text: str = ""
    child: bool = False


class Evidence(Struct, frozen=True, kw_only=True):
    """All that was observed of one trial and may bear on its cause. No opinions.

    Origins: everything is read outside the kernel but ``error``, ``raised`` (its attributes and those of
    the exceptions that it came from), ``location``, ``remote_hosts``, ``last_words`` (the end
    of what the cell put out), ``final_output`` (what a kernel that died wrote shortly before, in order),
    ``printed`` (text in the output of a cell, with the cell's index, that begins with the last traceback
    of a thread or a worker) and the Python stacks, which the kernel process says of itself; of
    ``conflicts`` the names. ``volumes`` are as the last cell left them, or lower. ``oom_bound`` is
    the group above the sandbox whose memory limit was hit, and that limit in bytes; ``process_bound`` one that allows fewer processes and
    threads than the run, and how many. ``exit_request`` is the stack of a call of ``exit()`` or ``quit()``.
    ``agent``: code of ours runs in the kernel, and tells of such things. ``own_actions`` and ``tracing`` (the
    trace functions that were on when the last cell began) are the kernel's word; ``changed_limits`` and
    ``replaced_by``, the command line of a program that took the kernel's place, were read outside.
    ``died_at`` is the time of the kernel's death (``time.monotonic``), ``overcommit`` is
    vm.overcommit_memory. ``kill_command`` is the line of the cell, from 1, in which a script of another
    language sends a signal, with its text.
    ``caught_signals`` are those that the process still had handlers for when it had ended; ``handler_replaced`` whether the kernel told
    that its fault handler was no longer in place.
    ``oom_kills_earlier`` are cells before the current one (by index) in which processes were killed for memory, and how many.
    ``oom_kills_in_time`` are those of ``oom_kills_cell`` that had happened when the time of the cell was up.
    ``memory_kernel`` is the most that the kernel process had in its whole life, or a child that it waited for.
    ``memory_children`` is the part of the peak that processes other than the kernel's had; ``memory_upper_bound``: pages that
    several processes share may be in it more than once. ``memory_maps`` are those of the kernel after the last cell, and how many
    the system allows a process (vm.max_map_count).
    """

    exit: ExitStatus | None = None
    termination: TerminationReason | None = None
    oom_kills: int | None = None
    oom_kills_cell: int | None = None
    oom_kills_in_time: int | None = None
    oom_kills_earlier: tuple[tuple[int, int], ...] = ()
    oom_elsewhere: bool | None = None
    oom_bound: tuple[str, int] | None = None
    oomd_killed: bool | None = None
    process_refusals: int | None = None
    process_bound: tuple[str, int] | None = None
    memory_peak: int | None = None
    memory_peak_raw: int | None = None
    memory_last: int | None = None
    memory_children: int | None = None
    memory_kernel: int | None = None
    memory_upper_bound: bool = False
    processes_at_timeout: ProcessCount | None = None
    processes_peak: int | None = None
    cpu_seconds: float | None = None
    kernel_cpu_seconds: float | None = None
    error: CellError | None = None
    fault: FaultReport | None = None
    caught_signals: frozenset[int] | None = None
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
    exit_request: tuple[Frame, ...] = ()
    remote_hosts: tuple[str, ...] = ()
    signals_to_keeper: tuple[int, ...] = ()
    stderr_tail: str = ""
    disk_free: int | None = None
    open_files: int | None = None
    memory_maps: tuple[int, int] | None = None
    cell_active: bool | None = None
    last_words: str = ""
    printed: tuple[int, str] | None = None
    agent: bool = True
    own_actions: tuple[OwnAction, ...] = ()
    tracing: tuple[str, ...] = ()
    changed_limits: tuple[ChangedLimit, ...] = ()
    replaced_by: str | None = None
    kill_command: tuple[int, str] | None = None
    died_at: float | None = None
    overcommit: int | None = None
    isolation: IsolationFacts | None = None
    raised: tuple[Raised, ...] = ()
    conflicts: tuple[IsolationConflict, ...] = ()
    volumes: tuple[Volume, ...] = ()
    final_output: tuple[OutputBurst, ...] = ()


# The fields of the evidence that the kernel process says of itself: read outside, but written
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
)
