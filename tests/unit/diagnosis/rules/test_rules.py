"""Every rule by a table, the order among them, and what must hold for whatever evidence comes in."""

from __future__ import annotations

import enum
import math
import signal
import typing
from collections.abc import Mapping
from typing import Any

import msgspec
import msgspec.structs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safe_exec.diagnosis.rules import RULES, Context, find_cause, isolation
from safe_exec.diagnosis.verdict import STATUS_OF
from safe_exec.model.ending import (
    Cancelled,
    CellError,
    CellFailed,
    Died,
    Ending,
    ExitStatus,
    InternalError,
    LimitHit,
    OutputDifference,
    OutputsDiffer,
    Passed,
    StartFailed,
    TerminationReason,
    TimedOut,
)
from safe_exec.model.evidence import (
    CLAIMS,
    Access,
    ActivityObservation,
    CellLocation,
    Channel,
    Evidence,
    FaultReport,
    FaultSite,
    Frame,
    IsolationConflict,
    IsolationFacts,
    NeedKind,
    OutputBurst,
    ProcessCount,
    Raised,
    Volume,
)
from safe_exec.model.limits import Enforcement, LimitName, Limits, Mechanism, Wall
from safe_exec.model.observed import ObservedLock
from safe_exec.model.verdict import (
    Activity,
    Cause,
    CauseKind,
    CellRecord,
    CellStatus,
    Confidence,
    Origin,
    Status,
)

K, C = CauseKind, Confidence
MIB = 1 << 20
LIMITS = Limits(
    memory=100 * MIB,
    cpu_time=10.0,
    cell_timeout=3.0,
    timeout=9.0,
    processes=20,
    open_files=50,
    file_size=MIB,
    cell_output=MIB,
    output=4 * MIB,
)
BARE = Limits()
NO_NETWORK = {Wall.NETWORK: Enforcement(by=Mechanism.BUBBLEWRAP, hard=True)}
NO_TCP = {Wall.NETWORK: Enforcement(by=Mechanism.LANDLOCK, hard=False)}
UNHELD = {Wall.NETWORK: Enforcement(by=Mechanism.NONE, hard=False)}


def exit_code(number: int) -> ExitStatus:
    """The wait status of a process that left with an exit code."""
    return ExitStatus(number << 8)


def by(number: int, *, core: bool = False) -> ExitStatus:
    """The wait status of a process that a signal ended."""
    return ExitStatus(number | (0x80 if core else 0))


def raised(ename: str, evalue: str = "") -> CellError:
    return CellError(ename=ename, evalue=evalue, traceback=())


def wrote(text: str) -> OutputBurst:
    """What native code wrote right before the end."""
    return OutputBurst(channel=Channel.DESCRIPTOR, text=text, age=0.1)


NESTED = CellError(
    ename="MemoryError", evalue="", traceback=("----> 2 value = eval(text)", "MemoryError: ")
)


def failed(error: CellError) -> CellFailed:
    return CellFailed(cell=2, error=error)


def seen(**facts: Any) -> ActivityObservation:
    """A main thread asleep in no call that is known, unless changed."""
    return ActivityObservation(
        **{"state": "S", "cpu_share": 0.0, "syscall": None, "stack": (), **facts}
    )


DIED = Died(cell=2, exit=by(9))
LATE = TimedOut(cell=2, whole_notebook=False, allowed=3.0, answered=True)
LATE_WHOLE = TimedOut(cell=2, whole_notebook=True, allowed=9.0, answered=False)
SLEEPS = seen(syscall="clock_nanosleep")
FULL = FaultReport(
    title="Segmentation fault", stack=(), main=True, stack_bytes=8 * MIB, stack_limit=8 * MIB
)
SHALLOW = msgspec.structs.replace(FULL, stack_bytes=MIB // 4)
IN_THREAD = msgspec.structs.replace(FULL, main=False)
NULL = FaultSite(
    faulted=True, main=True, address=0, stack_pointer=0x7FFC0000, stack_bytes=MIB, overflow=False
)
PAST_THE_STACK = msgspec.structs.replace(NULL, address=0x7FFBFFF8, overflow=True)
SENT = msgspec.structs.replace(NULL, faulted=False, address=None)
HANDLERS = frozenset({2, 4, 6, 7, 8})
"""What a Python process still catches after it has died of SIGSEGV: SIGINT, and the fault handler's other four."""
FORKING = CellLocation(
    cell=2,
    line=1,
    source="traceback",
    stack=(Frame(function="_execute_child", line=1, file="subprocess.py"),),
)


BY_BUBBLEWRAP = Enforcement(by=Mechanism.BUBBLEWRAP, hard=True, note="empty")
WALLS = {
    Wall.HOME: BY_BUBBLEWRAP,
    Wall.SYSTEM: BY_BUBBLEWRAP,
    Wall.ENVIRONMENT: Enforcement(by=Mechanism.RUNNER, hard=True, note="listed"),
}
TAKEN = IsolationFacts(
    by=Mechanism.BUBBLEWRAP, folder="/home/me/work", hidden_homes=("/home/me",), read_only=True
)
VARIABLE = IsolationConflict(
    kind=NeedKind.VARIABLE,
    name="A_TOKEN",
    access=Access.HIDDEN,
    line="KeyError: 'A_TOKEN'",
    exact=True,
    cell=2,
)
MENTIONED = msgspec.structs.replace(VARIABLE, exact=False)
HIDDEN_FILE = IsolationConflict(
    kind=NeedKind.PATH,
    name="../d.csv",
    access=Access.HIDDEN,
    line="[Errno 2] No such file or directory: '../d.csv'",
    path="/home/me/d.csv",
    allow=("/home/me/d.csv",),
    exact=True,
    cell=2,
)
NO_SPACE = raised("OSError", "[Errno 28] No space left on device")
NOT_ENOUGH = "Not enough free space to write 32000000 bytes after offset 0"
WRITING = "1%\ncp: error writing 'big': No space left on device\n"
FULL_DISK = Volume(
    places=("/home/me/work", "/tmp"), size=16 * MIB, free=0, free_at_start=16 * MIB, own=True
)
FULL_BEFORE = msgspec.structs.replace(FULL_DISK, free_at_start=0)
EMPTY_DISK = msgspec.structs.replace(FULL_DISK, free=16 * MIB)
ROOMY = msgspec.structs.replace(
    FULL_DISK, size=100 << 30, free=50 << 30, free_at_start=None, own=False
)
SHM_FULL = Volume(places=("/dev/shm",), size=64 * MIB, free=0, free_at_start=64 * MIB, own=True)
DUCKDB = "Out of Memory Error: failed to allocate data of size 16.0 MiB (56.4 MiB/57.2 MiB used)\n\nPossible solutions:"
DUCKDB_DISK = "Out of Memory Error: failed to offload data block of size 256.0 KiB (9.4 MiB/9.5 MiB used).\nThis limit was set by"
JVM = 'Exception in thread "main" java.lang.OutOfMemoryError: Java heap space\n'
UNREACHED = raised("URLError", "<urlopen error [Errno 101] Network is unreachable>")
HOST = IsolationConflict(
    kind=NeedKind.HOST,
    name="example.org",
    access=Access.HIDDEN,
    line="Could not resolve host: example.org",
    exact=True,
    cell=2,
)
CURL = msgspec.structs.replace(HOST, in_output=True)
PIP = msgspec.structs.replace(
    CURL, cell=1, line="WARNING: Retrying after NameResolutionError: /simple/x/"
)
PRINTED = msgspec.structs.replace(
    HIDDEN_FILE, line="cat: ../d.csv: No such file or directory", in_output=True
)
NOT_INSTALLED = IsolationConflict(
    kind=NeedKind.PATH,
    name="/venv/lib/python3.12/site-packages/fieldpkg.py",
    access=Access.READ_ONLY,
    line="OSError: [Errno 30] Read-only file system: '/venv/lib/python3.12/site-packages/fieldpkg.py'",
    path="/venv/lib/python3.12/site-packages/fieldpkg.py",
    allow=("/venv/lib/python3.12/site-packages",),
    writes=True,
    exact=True,
    cell=1,
    in_output=True,
)


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """What was observed, and what is to be concluded from it."""

    id: str
    ending: Ending
    kind: CauseKind
    confidence: Confidence = Confidence.CERTAIN
    activity: Activity | None = None
    limits: Limits = LIMITS
    language: str | None = "python"
    seen: Mapping[str, Any] = msgspec.field(default_factory=dict)
    walls: Mapping[Wall, Enforcement] = msgspec.field(default_factory=dict)

    @property
    def context(self) -> Context:
        """As the rules get it; an error of the ending is in the evidence too, as a trial puts it there."""
        error = self.ending.error if isinstance(self.ending, CellFailed | TimedOut) else None
        status = self.ending.exit if isinstance(self.ending, Died | StartFailed) else None
        evidence = Evidence(**{"error": error, "exit": status, **self.seen})
        return Context(
            ending=self.ending,
            evidence=evidence,
            limits=self.limits,
            language=self.language,
            current=2,
            walls=self.walls,
        )


def dead(
    name: str,
    status: ExitStatus | None,
    kind: CauseKind,
    confidence: Confidence = C.CERTAIN,
    **facts: Any,
) -> Row:
    limits = facts.pop("limits", LIMITS)
    return Row(
        id=name,
        ending=Died(cell=2, exit=status),
        kind=kind,
        confidence=confidence,
        limits=limits,
        seen=facts,
    )


def error(
    name: str, raises: CellError, kind: CauseKind, confidence: Confidence = C.CERTAIN, **facts: Any
) -> Row:
    more = {key: facts.pop(key) for key in ("limits", "language", "walls") if key in facts}
    return Row(id=name, ending=failed(raises), kind=kind, confidence=confidence, seen=facts, **more)


def late(
    name: str, kind: CauseKind, confidence: Confidence, activity: Activity | None, **facts: Any
) -> Row:
    ending = facts.pop("ending", LATE)
    return Row(
        id=name, ending=ending, kind=kind, confidence=confidence, activity=activity, seen=facts
    )


def hit(
    name: str, limit: LimitName, kind: CauseKind, confidence: Confidence = C.CERTAIN, **facts: Any
) -> Row:
    return Row(
        id=name, ending=LimitHit(limit=limit, cell=2), kind=kind, confidence=confidence, seen=facts
    )


DEATHS = [
    dead(
        "library-without-a-thread",
        by(signal.SIGABRT),
        K.TOO_MANY_PROCESSES,
        C.LIKELY,
        process_refusals=3,
        final_output=(wrote("std::system_error\n  what():  Resource temporarily unavailable\n"),),
    ),
    dead(
        "library-leaves-without-a-thread",
        exit_code(1),
        K.TOO_MANY_PROCESSES,
        C.LIKELY,
        processes_peak=20,
        final_output=(
            wrote("libgomp: Thread creation failed: Resource temporarily unavailable\n"),
        ),
    ),
    dead(
        "thread-words-but-room-for-more",
        exit_code(1),
        K.EXIT,
        processes_peak=5,
        process_refusals=0,
        final_output=(
            wrote("libgomp: Thread creation failed: Resource temporarily unavailable\n"),
        ),
    ),
    dead(
        "no-memory-for-the-error-itself",
        exit_code(1),
        K.MEMORY_ERROR,
        C.LIKELY,
        memory_peak=60 * MIB,
        final_output=(wrote("OSError: [Errno 12] x\nMemoryError\n"),),
    ),
    dead(
        "no-memory-but-another-error-last",
        exit_code(1),
        K.EXIT,
        memory_peak=60 * MIB,
        final_output=(wrote("MemoryError\nValueError: x\n"),),
    ),
    dead(
        "refusals-but-other-words",
        by(signal.SIGABRT),
        K.ABORT,
        process_refusals=3,
        final_output=(wrote("free(): invalid pointer\n"),),
    ),
    # Memory: what we did, what the system counted.
    dead(
        "abort-for-descriptors",
        by(signal.SIGABRT),
        K.TOO_MANY_OPEN_FILES,
        C.LIKELY,
        stderr_tail="Too many open files (src/signaler.cpp:345)\n",
    ),
    dead("watchdog", by(9), K.OUT_OF_MEMORY, termination=TerminationReason.MEMORY),
    dead(
        "watchdog-by-an-upper-bound",
        by(9),
        K.OUT_OF_MEMORY,
        C.LIKELY,
        termination=TerminationReason.MEMORY,
        memory_upper_bound=True,
    ),
    dead("oom-counted", by(9), K.OUT_OF_MEMORY, oom_kills=1, oom_kills_cell=1),
    dead(
        "oom-of-named-container",
        by(9),
        K.OUT_OF_MEMORY,
        C.CERTAIN,
        oom_kills=1,
        oom_kills_cell=1,
        oom_elsewhere=True,
        oom_bound=("/sys/fs/cgroup/box", 4 * MIB),
    ),
    dead(
        "oom-of-container",
        by(9),
        K.OUT_OF_MEMORY,
        C.LIKELY,
        oom_kills=1,
        oom_kills_cell=1,
        oom_elsewhere=True,
    ),
    dead("oomd", by(9), K.OUT_OF_MEMORY, oomd_killed=True, oom_kills=0, oom_kills_cell=0),
    # SIGKILL without a counter that went up in this cell.
    dead("sigkill-uncounted", by(9), K.KILLED, C.LIKELY),
    dead("sigkill-counted-none", by(9), K.KILLED, oom_kills=0, oom_kills_cell=0),
    dead(
        "sigkill-after-a-worker-of-an-earlier-cell", by(9), K.KILLED, oom_kills=1, oom_kills_cell=0
    ),
    dead("keeper-killed", None, K.KILLED, C.LIKELY),
    # A worker's death in the same cell does not explain another signal or a status.
    dead(
        "segfault-beside-a-killed-worker",
        by(11),
        K.SEGFAULT,
        C.LIKELY,
        oom_kills=1,
        oom_kills_cell=1,
    ),
    dead("exit-beside-a-killed-worker", exit_code(1), K.EXIT, oom_kills=1, oom_kills_cell=1),
    # Processor time.
    dead(
        "cpu-watched", by(9), K.CPU_TIME, termination=TerminationReason.CPU_TIME, cpu_seconds=10.2
    ),
    dead("cpu-soft", by(signal.SIGXCPU), K.CPU_TIME, kernel_cpu_seconds=10.0),
    dead("cpu-soft-with-core", by(signal.SIGXCPU, core=True), K.CPU_TIME, kernel_cpu_seconds=10.0),
    dead("cpu-hard", by(9), K.CPU_TIME, kernel_cpu_seconds=12.0),
    dead("cpu-of-its-own", by(signal.SIGXCPU), K.CPU_TIME, kernel_cpu_seconds=1.0, limits=BARE),
    dead("sigkill-long-before-its-cpu-time", by(9), K.KILLED, C.LIKELY, kernel_cpu_seconds=3.0),
    dead(
        "segfault-after-a-killed-worker",
        by(11),
        K.SEGFAULT,
        C.LIKELY,
        oom_kills=1,
        oom_kills_cell=0,
        oom_kills_earlier=((0, 1),),
    ),
    dead(
        "oom-after-much-cpu",
        by(9),
        K.OUT_OF_MEMORY,
        kernel_cpu_seconds=12.0,
        oom_kills=1,
        oom_kills_cell=1,
    ),
    # Other limits that come as signals.
    dead("file-size-signal", by(signal.SIGXFSZ), K.FILE_TOO_LARGE),
    dead("seccomp", by(signal.SIGSYS, core=True), K.BAD_SYSTEM_CALL),
    # Faults.
    dead(
        "segfault", by(11, core=True), K.SEGFAULT, fault=msgspec.structs.replace(SHALLOW, site=NULL)
    ),
    dead("segfault-by-the-size-of-the-stack-alone", by(11), K.SEGFAULT, C.LIKELY, fault=SHALLOW),
    dead(
        "segfault-with-a-full-stack",
        by(11),
        K.SEGFAULT,
        fault=msgspec.structs.replace(FULL, site=NULL),
    ),
    dead(
        "segfault-that-was-sent",
        by(11),
        K.SEGFAULT,
        fault=msgspec.structs.replace(SHALLOW, site=SENT),
    ),
    dead(
        "large-frames",
        by(11),
        K.STACK_OVERFLOW,
        fault=msgspec.structs.replace(SHALLOW, site=PAST_THE_STACK),
    ),
    dead(
        "stack-overflow-in-a-thread",
        by(11),
        K.STACK_OVERFLOW,
        fault=msgspec.structs.replace(
            IN_THREAD, site=msgspec.structs.replace(PAST_THE_STACK, main=False)
        ),
    ),
    dead(
        "null-in-a-thread",
        by(11),
        K.SEGFAULT,
        fault=msgspec.structs.replace(IN_THREAD, site=msgspec.structs.replace(NULL, main=False)),
    ),
    dead("no-report-though-armed", by(11), K.STACK_OVERFLOW, C.LIKELY, caught_signals=HANDLERS),
    dead("no-report-and-disarmed", by(11), K.SEGFAULT, C.LIKELY, caught_signals=frozenset({2})),
    dead(
        "no-report-and-its-own-handler",
        by(11),
        K.SEGFAULT,
        C.LIKELY,
        caught_signals=HANDLERS,
        handler_replaced=True,
    ),
    dead(
        "no-report-and-still-caught", by(11), K.SEGFAULT, C.LIKELY, caught_signals=HANDLERS | {11}
    ),
    dead("killed-and-armed", by(9), K.KILLED, C.LIKELY, caught_signals=HANDLERS | {11}),
    dead("segfault-unseen", by(11), K.SEGFAULT, C.LIKELY),
    dead("stack-overflow", by(11), K.STACK_OVERFLOW, fault=FULL),
    dead("stack-overflow-by-bus-error", by(7), K.STACK_OVERFLOW, fault=FULL),
    dead("fault-in-a-thread-with-a-full-main-stack", by(11), K.SEGFAULT, C.LIKELY, fault=IN_THREAD),
    dead("abort-with-a-full-stack", by(6), K.ABORT, fault=FULL),
    dead("abort", by(6), K.ABORT),
    dead("illegal-instruction", by(4), K.ILLEGAL_INSTRUCTION),
    dead("bus-error", by(7), K.BUS_ERROR),
    dead("floating-point", by(8), K.FLOATING_POINT_EXCEPTION),
    # Ends of the process's own doing.
    dead("os._exit(0)", exit_code(0), K.EXIT),
    dead("os._exit(1)", exit_code(1), K.EXIT),
    dead("os._exit(137)-is-no-sigkill", exit_code(137), K.EXIT, oom_kills=1, oom_kills_cell=1),
    dead("os._exit(139)-is-no-segfault", exit_code(139), K.EXIT, fault=SHALLOW),
    Row(id="asked", ending=Died(cell=2, exit=None, asked_to_exit=True), kind=K.EXIT),
    Row(
        id="asked-then-left",
        ending=Died(cell=2, exit=exit_code(0), asked_to_exit=True),
        kind=K.EXIT,
    ),
    # Signals that ask.
    dead("sigterm", by(15), K.TERMINATED),
    dead("sighup", by(1), K.TERMINATED),
    dead("sigalrm", by(14), K.TERMINATED),
    dead("sigpipe", by(13), K.TERMINATED),
    dead("sigprof", by(27), K.TERMINATED),
    dead("real-time-signal", by(40), K.TERMINATED),
]

TIMES = [
    late("nothing-seen", K.CELL_TIMEOUT, C.CERTAIN, None),
    late("sleeping", K.CELL_TIMEOUT, C.CERTAIN, Activity.SLEEPING, observation=SLEEPS),
    late("sleeping-whole", K.NOTEBOOK_TIMEOUT, C.CERTAIN, Activity.SLEEPING, observation=SLEEPS, ending=LATE_WHOLE),
    late("killed-by-us-then", K.CELL_TIMEOUT, C.CERTAIN, None, exit=by(9), termination=TerminationReason.CELL_TIMEOUT),
    late("worker-killed-and-hang", K.WORKER_OUT_OF_MEMORY, C.LIKELY, None, oom_kills=1, oom_kills_cell=1),
    late("worker-of-an-earlier-cell", K.CELL_TIMEOUT, C.CERTAIN, None, oom_kills=1, oom_kills_cell=0),
    late("full-of-processes", K.TOO_MANY_PROCESSES, C.LIKELY, None, processes_at_timeout=ProcessCount(tasks=64, allowed=64, refused=9)),
    late("full-by-rlimit", K.TOO_MANY_PROCESSES, C.LIKELY, None, processes_at_timeout=ProcessCount(tasks=64, allowed=64)),
    late(
        "full-with-what-else-the-user-runs", K.TOO_MANY_PROCESSES, C.LIKELY, Activity.SLEEPING, observation=SLEEPS,
        processes_at_timeout=ProcessCount(tasks=60, allowed=64, of_user=(94, 94)),
    ),
    late(
        "full-and-nothing-refused", K.CELL_TIMEOUT, C.CERTAIN, None,
        processes_at_timeout=ProcessCount(tasks=64, allowed=64, refused=0),
    ),
    late(
        "refused-once-and-room-again", K.CELL_TIMEOUT, C.CERTAIN, None,
        processes_at_timeout=ProcessCount(tasks=12, allowed=64, refused=9),
    ),
    late(
        "still-printing", K.OUTPUT_FLOOD, C.LIKELY, None,
        cell_output_bytes=30 * MIB, cell_output_received=30 * MIB, cell_seconds=3.0, cell_output_age=0.1,
    ),
    late(
        "printed-long-ago", K.CELL_TIMEOUT, C.CERTAIN, None,
        cell_output_bytes=30 * MIB, cell_output_received=30 * MIB, cell_seconds=60.0, cell_output_age=50.0,
    ),
    late("prints-a-little", K.CELL_TIMEOUT, C.CERTAIN, None, cell_output_bytes=5000, cell_output_received=5000, cell_seconds=3.0, cell_output_age=0.1),
    late("crowd-of-its-own", K.CELL_TIMEOUT, C.CERTAIN, None, crowd_at_timeout=90),
    late("exec", K.UNRESPONSIVE, C.CERTAIN, None, replaced_by="/bin/sleep 9", observation=SLEEPS),
    late("mute", K.UNRESPONSIVE, C.LIKELY, Activity.WAITING_IO, observation=seen(syscall="epoll_wait"), cell_active=False, cell_seconds=3.0),
    late("not-begun-but-stopped", K.CELL_TIMEOUT, C.CERTAIN, Activity.STOPPED, observation=seen(state="T"), cell_active=False),
    late(
        "not-begun-but-busy", K.CELL_TIMEOUT, C.CERTAIN, Activity.NATIVE_CODE,
        observation=seen(state="R", cpu_share=1.0, starved=True), cell_active=False,
    ),
    late(
        "reads-a-terminal", K.STDIN, C.LIKELY, Activity.WAITING_CHILD,
        observation=seen(syscall="wait4", children=1, reads_terminal=True),
    ),
    late(
        "child-at-work-beside-a-terminal", K.CELL_TIMEOUT, C.CERTAIN, Activity.WAITING_CHILD,
        observation=seen(syscall="wait4", children=1, reads_terminal=True, children_cpu_share=1.0),
    ),
]  # fmt: skip

ERRORS = [
    error(
        "rust-threads-refused",
        raised("PanicException", "ThreadPoolBuildError { kind: IOError(Os { code: 11 }) }"),
        K.TOO_MANY_PROCESSES,
        C.LIKELY,
        process_refusals=1,
    ),
    error(
        "rust-threads-and-room-for-more",
        raised("PanicException", "ThreadPoolBuildError { kind: IOError(Os { code: 11 }) }"),
        K.EXCEPTION,
        process_refusals=0,
        processes_peak=4,
    ),
    error(
        "file-lock-is-no-thread",
        raised("BlockingIOError", "unable to lock file, 'Resource temporarily unavailable'"),
        K.EXCEPTION,
        process_refusals=2,
    ),
    error(
        "descriptor-did-not-arrive",
        raised("RuntimeError", "received 0 items of ancdata"),
        K.TOO_MANY_OPEN_FILES,
        C.LIKELY,
        open_files=50,
    ),
    error(
        "sqlite-without-a-descriptor",
        raised("OperationalError", "unable to open database file"),
        K.TOO_MANY_OPEN_FILES,
        C.LIKELY,
        open_files=48,
    ),
    error(
        "sqlite-with-descriptors-left",
        raised("OperationalError", "unable to open database file"),
        K.EXCEPTION,
        open_files=9,
    ),
    error(
        "another-error-at-the-limit",
        raised("ZeroDivisionError", "division by zero"),
        K.EXCEPTION,
        open_files=50,
    ),
    error(
        "inotify-watches",
        raised("OSError", "[Errno 28] inotify watch limit reached"),
        K.EXCEPTION,
        C.LIKELY,
        volumes=(ROOMY,),
    ),
    error(
        "inotify-instances",
        raised("OSError", "[Errno 24] inotify instance limit reached"),
        K.EXCEPTION,
        C.LIKELY,
        open_files=10,
    ),
    error(
        "lock-of-another",
        raised("BlockingIOError", "[Errno 11] unable to lock file"),
        K.EXCEPTION,
        C.LIKELY,
        named_lock=ObservedLock(path="/a/core.hdf", kind="file", holder=7, command="python x.py"),
    ),
    error(
        "lock-of-its-own-before-isolation",
        raised("PermissionError", "[Errno 13] Permission denied: 'run.nc'"),
        K.EXCEPTION,
        C.LIKELY,
        named_lock=ObservedLock(path="/a/run.nc", kind="file", own=True),
        conflicts=(
            IsolationConflict(
                kind=NeedKind.PATH, name="run.nc", access=Access.OPEN, path="/a/run.nc", line="x"
            ),
        ),
    ),
    error(
        "dask-worker",
        raised("KilledWorker", "Attempted to run task 'x' on 4 different workers"),
        K.MEMORY_ERROR,
        memory_peak=60 * MIB,
        last_words="WARNING - Worker is at 81% memory usage. Pausing worker.  Process memory: "
        "234.21 MiB -- Worker memory limit: 286.10 MiB\n",
    ),
    error(
        "dask-worker-of-another-reason",
        raised("KilledWorker", "Attempted to run task 'x' on 4 different workers"),
        K.EXCEPTION,
        memory_peak=60 * MIB,
        last_words="WARNING - Restarting worker\n",
    ),
    error(
        "memory-maps",
        raised("OSError", "[Errno 12] Cannot allocate memory"),
        K.MEMORY_ERROR,
        memory_maps=(65530, 65530),
    ),
    error(
        "memory-maps-in-words",
        raised("OSError", "Memory mapping file failed: Cannot allocate memory"),
        K.MEMORY_ERROR,
        memory_maps=(65000, 65530),
    ),
    error(
        "few-memory-maps",
        raised("OSError", "[Errno 12] Cannot allocate memory"),
        K.MEMORY_ERROR,
        C.LIKELY,
        memory_maps=(300, 65530),
    ),
    error(
        "parser-of-python-3.14",
        raised("MemoryError", "Parser stack overflowed - Python source too complex to parse"),
        K.EXCEPTION,
        C.LIKELY,
        memory_peak=MIB,
    ),
    error("parser-by-its-line", NESTED, K.EXCEPTION, C.LIKELY, memory_peak=MIB),
    error("parser-but-memory-was-short", NESTED, K.MEMORY_ERROR, memory_peak=99 * MIB),
    error("zero-division", raised("ZeroDivisionError", "division by zero"), K.EXCEPTION),
    error("system-exit", raised("SystemExit", "1"), K.EXCEPTION),
    error("keyboard-interrupt", raised("KeyboardInterrupt"), K.EXCEPTION),
    error("stdin", raised("StdinNotImplementedError", "raw_input was called"), K.STDIN, C.LIKELY),
    error(
        "worker",
        raised("BrokenProcessPool", "terminated abruptly"),
        K.WORKER_OUT_OF_MEMORY,
        oom_kills=1,
        oom_kills_cell=1,
    ),
    error(
        "worker-of-an-earlier-cell",
        raised("BrokenProcessPool", "x"),
        K.EXCEPTION,
        oom_kills=1,
        oom_kills_cell=0,
    ),
    error("memory-error", raised("MemoryError"), K.MEMORY_ERROR, C.LIKELY),
    error(
        "memory-error-near-the-limit", raised("MemoryError"), K.MEMORY_ERROR, memory_peak=95 * MIB
    ),
    error(
        "memory-error-without-a-limit",
        raised("MemoryError"),
        K.MEMORY_ERROR,
        C.LIKELY,
        memory_peak=95 * MIB,
        limits=BARE,
    ),
    error(
        "numpy-asks-for-little",
        raised("_ArrayMemoryError", "Unable to allocate 9.54 MiB"),
        K.MEMORY_ERROR,
        C.LIKELY,
    ),
    error(
        "numpy-memory-error",
        raised("_ArrayMemoryError", "Unable to allocate 74.5 GiB"),
        K.MEMORY_ERROR,
    ),
    error(
        "qualified-memory-error",
        raised("numpy.core._exceptions._ArrayMemoryError", "x"),
        K.MEMORY_ERROR,
        C.LIKELY,
    ),
    error(
        "errno-12", raised("OSError", "[Errno 12] Cannot allocate memory"), K.MEMORY_ERROR, C.LIKELY
    ),
    error(
        "r-memory",
        raised("ERROR", "Error: cannot allocate vector of size 74.5 Gb"),
        K.MEMORY_ERROR,
        C.LIKELY,
        language="R",
    ),
    error(
        "r-text-in-python", raised("ValueError", "cannot allocate vector of size 7 Gb"), K.EXCEPTION
    ),
    error(
        "open-files",
        raised("OSError", "[Errno 24] Too many open files: 'a'"),
        K.TOO_MANY_OPEN_FILES,
        open_files=49,
    ),
    error(
        "open-files-closed-since",
        raised("OSError", "[Errno 24] Too many open files"),
        K.TOO_MANY_OPEN_FILES,
        C.LIKELY,
    ),
    error(
        "open-files-in-words",
        raised("gaierror", "oops: Too many open files"),
        K.TOO_MANY_OPEN_FILES,
        C.LIKELY,
        open_files=50,
    ),
    error("no-network", UNREACHED, K.NETWORK_BLOCKED, walls=NO_NETWORK, conflicts=(HOST,)),
    error(
        "service-of-this-machine",
        raised("ConnectionRefusedError", "[Errno 111] Connection refused"),
        K.NETWORK_BLOCKED,
        walls=NO_NETWORK,
        conflicts=(msgspec.structs.replace(HOST, name="127.0.0.1:5000", local=True),),
    ),
    error("no-tcp", UNREACHED, K.NETWORK_BLOCKED, C.LIKELY, walls=NO_TCP, conflicts=(HOST,)),
    error(
        "no-route",
        UNREACHED,
        K.NETWORK_BLOCKED,
        C.LIKELY,
        walls=NO_NETWORK,
        conflicts=(msgspec.structs.replace(HOST, usable=False),),
    ),
    error(
        "curl",
        raised("CalledProcessError", "Command 'curl'"),
        K.NETWORK_BLOCKED,
        walls=NO_NETWORK,
        conflicts=(CURL,),
    ),
    error(
        "r-no-network",
        raised("ERROR", "cannot open URL 'https://x'"),
        K.NETWORK_BLOCKED,
        language="R",
        walls=NO_NETWORK,
        conflicts=(HOST,),
    ),
    Row(
        id="differs",
        ending=OutputsDiffer(
            cell=2,
            differences=(
                OutputDifference(
                    index=2,
                    code_index=2,
                    kind="stdout",
                    summary="stdout differs",
                    lines=("@@ -1 +1 @@", "-a", "+b"),
                ),
                OutputDifference(index=3, code_index=3, kind="text/plain", summary="is missing"),
            ),
        ),
        kind=K.OUTPUT_DIFFERS,
    ),
    error(
        "memory-of-a-program",
        raised("CalledProcessError", "Command 'python'"),
        K.MEMORY_ERROR,
        C.LIKELY,
        last_words='Traceback (most recent call last):\n  File "x.py", line 1, in <module>\nMemoryError\n',
    ),
    error(
        "curl-and-another-error",
        raised("ZeroDivisionError", "x"),
        K.EXCEPTION,
        walls=NO_NETWORK,
        conflicts=(CURL,),
    ),
    error(
        "pip-without-a-network",
        raised("ModuleNotFoundError", "No module named 'x'"),
        K.NETWORK_BLOCKED,
        C.LIKELY,
        walls=NO_NETWORK,
        conflicts=(PIP,),
        raised=(Raised(type="ModuleNotFoundError", module="x"),),
    ),
    error("network-down", raised("OSError", "[Errno 101] Network is unreachable"), K.EXCEPTION),
    error(
        "network-down-unheld",
        raised("OSError", "[Errno 101] Network is unreachable"),
        K.EXCEPTION,
        walls=UNHELD,
        conflicts=(HOST,),
    ),
    error(
        "loopback-refuses",
        raised("ConnectionRefusedError", "[Errno 111] Connection refused"),
        K.EXCEPTION,
        walls=NO_NETWORK,
    ),
    error(
        "variable-removed",
        raised("KeyError", "'A_TOKEN'"),
        K.ISOLATION,
        conflicts=(VARIABLE,),
        walls=WALLS,
        isolation=TAKEN,
    ),
    error(
        "variable-mentioned",
        raised("E", "set A_TOKEN"),
        K.ISOLATION,
        C.LIKELY,
        conflicts=(MENTIONED,),
        walls=WALLS,
    ),
    error(
        "file-hidden",
        raised("FileNotFoundError", HIDDEN_FILE.line),
        K.ISOLATION,
        conflicts=(HIDDEN_FILE,),
        walls=WALLS,
        isolation=TAKEN,
    ),
    error(
        "file-hidden-without-a-wall",
        raised("FileNotFoundError", "x"),
        K.ISOLATION,
        C.LIKELY,
        conflicts=(HIDDEN_FILE,),
        isolation=TAKEN,
    ),
    error(
        "file-hidden-from-a-program",
        raised("CalledProcessError", "Command 'cat' returned non-zero exit status 1."),
        K.ISOLATION,
        conflicts=(PRINTED,),
        walls=WALLS,
        isolation=TAKEN,
    ),
    error(
        "printed-and-another-error",
        raised("ZeroDivisionError", "division by zero"),
        K.EXCEPTION,
        conflicts=(PRINTED,),
        walls=WALLS,
    ),
    error(
        "packages-not-installed",
        raised("ModuleNotFoundError", "No module named 'other'"),
        K.ISOLATION,
        C.LIKELY,
        conflicts=(NOT_INSTALLED,),
        raised=(Raised(type="ModuleNotFoundError", module="other"),),
        walls=WALLS,
        isolation=TAKEN,
    ),
    error(
        "this-package-not-installed",
        raised("ModuleNotFoundError", "No module named 'fieldpkg'"),
        K.ISOLATION,
        conflicts=(NOT_INSTALLED,),
        raised=(Raised(type="ModuleNotFoundError", module="fieldpkg"),),
        walls=WALLS,
        isolation=TAKEN,
    ),
    error("disk-of-a-limit", NO_SPACE, K.DISK_FULL, disk_free=0, limits=Limits(disk=MIB)),
    error("disk-full", NO_SPACE, K.DISK_FULL, volumes=(FULL_DISK,)),
    error("disk-full-at-the-end", NO_SPACE, K.DISK_FULL, disk_free=0),
    error("disk-full-elsewhere", NO_SPACE, K.DISK_FULL, C.LIKELY, volumes=(ROOMY,)),
    error(
        "worker-without-shared-memory",
        raised("RuntimeError", "worker (pid 7) is killed by signal: Bus error."),
        K.DISK_FULL,
        C.LIKELY,
        volumes=(ROOMY, msgspec.structs.replace(SHM_FULL, free_at_start=0)),
    ),
    error(
        "worker-with-shared-memory-left",
        raised("RuntimeError", "worker (pid 7) is killed by signal: Bus error."),
        K.EXCEPTION,
        volumes=(ROOMY,),
    ),
    error("shm-full", NO_SPACE, K.DISK_FULL, volumes=(ROOMY, SHM_FULL)),
    error(
        "quota",
        raised("OSError", "[Errno 122] Disk quota exceeded"),
        K.DISK_FULL,
        C.LIKELY,
        volumes=(ROOMY,),
    ),
    error(
        "sqlite",
        raised("OperationalError", "database or disk is full"),
        K.DISK_FULL,
        C.LIKELY,
        volumes=(ROOMY,),
    ),
    error(
        "sqlite-qualified",
        raised("sqlite3.OperationalError", "database or disk is full"),
        K.DISK_FULL,
        volumes=(FULL_DISK,),
    ),
    error(
        "tofile",
        raised("OSError", "4000000 requested and 2093056 written"),
        K.DISK_FULL,
        volumes=(FULL_DISK,),
    ),
    error("tofile-asks-first", raised("OSError", NOT_ENOUGH), K.DISK_FULL, volumes=(EMPTY_DISK,)),
    error(
        "tofile-asks-first-elsewhere",
        raised("OSError", NOT_ENOUGH),
        K.DISK_FULL,
        C.LIKELY,
        volumes=(ROOMY,),
    ),
    error(
        "polars-disk",
        raised("ComputeError", "underlying IO error: No space left on device (os error 28)"),
        K.DISK_FULL,
        C.LIKELY,
    ),
    error(
        "duckdb-disk",
        raised("_duckdb.IOException", "Could not write file: No space left on device"),
        K.DISK_FULL,
        volumes=(FULL_DISK,),
    ),
    error(
        "wrapped-disk",
        raised("ExportError", "export failed"),
        K.DISK_FULL,
        volumes=(FULL_DISK,),
        raised=(Raised(type="ExportError"), Raised(type="OSError", number=28)),
    ),
    error(
        "program-disk",
        raised("CalledProcessError", "Command 'cp'"),
        K.DISK_FULL,
        volumes=(FULL_DISK,),
        last_words=WRITING,
    ),
    error(
        "program-disk-elsewhere",
        raised("CalledProcessError", "x"),
        K.DISK_FULL,
        C.LIKELY,
        volumes=(ROOMY,),
        last_words=WRITING,
    ),
    error(
        "r-disk",
        raised("ERROR", "Error in close.connection(file)"),
        K.DISK_FULL,
        language="R",
        volumes=(FULL_DISK,),
        last_words=WRITING,
    ),
    error(
        "hdf5-close",
        raised("RuntimeError", "Unable to synchronously close file"),
        K.DISK_FULL,
        volumes=(FULL_DISK,),
    ),
    error(
        "hdf5-close-full-before",
        raised("RuntimeError", "Can't close file"),
        K.DISK_FULL,
        C.LIKELY,
        volumes=(FULL_BEFORE,),
    ),
    error(
        "hdf5-close-with-room",
        raised("RuntimeError", "Unable to synchronously close file"),
        K.EXCEPTION,
        volumes=(ROOMY,),
    ),
    error(
        "pickle-cut-off",
        raised("UnpicklingError", "pickle data was truncated"),
        K.DISK_FULL,
        C.LIKELY,
        volumes=(FULL_BEFORE,),
    ),
    error(
        "pickle-cut-off-with-room",
        raised("UnpicklingError", "pickle data was truncated"),
        K.EXCEPTION,
        volumes=(ROOMY,),
    ),
    error(
        "no-words-but-full", raised("ExportError", "x"), K.DISK_FULL, C.LIKELY, volumes=(FULL_DISK,)
    ),
    error(
        "no-words-and-full-before", raised("ExportError", "x"), K.EXCEPTION, volumes=(FULL_BEFORE,)
    ),
    error(
        "logic-and-full",
        raised("ZeroDivisionError", "division by zero"),
        K.EXCEPTION,
        volumes=(FULL_DISK,),
    ),
    error(
        "another-number-and-full",
        raised("ConnectionResetError", "[Errno 104] Connection reset by peer"),
        K.EXCEPTION,
        volumes=(FULL_DISK,),
        raised=(Raised(type="ConnectionResetError", number=104),),
    ),
    dead("bus-error-of-a-full-shm", by(7), K.BUS_ERROR, volumes=(ROOMY, SHM_FULL)),
    error(
        "duckdb-memory",
        raised("OutOfMemoryException", DUCKDB),
        K.MEMORY_ERROR,
        memory_peak=50 * MIB,
    ),
    error(
        "duckdb-memory-near-ours",
        raised("OutOfMemoryException", DUCKDB),
        K.MEMORY_ERROR,
        C.LIKELY,
        memory_peak=99 * MIB,
    ),
    error(
        "duckdb-memory-unmeasured", raised("OutOfMemoryException", DUCKDB), K.MEMORY_ERROR, C.LIKELY
    ),
    error(
        "duckdb-temporary-files",
        raised("OutOfMemoryException", DUCKDB_DISK),
        K.DISK_FULL,
        memory_peak=MIB,
    ),
    error(
        "r-vectors",
        raised("ERROR", "vector memory limit of 16.0 Gb reached, see mem.maxVSize()"),
        K.MEMORY_ERROR,
        language="R",
        memory_peak=0,
    ),
    error(
        "jvm-of-a-program",
        raised("CalledProcessError", "java"),
        K.MEMORY_ERROR,
        memory_peak=MIB,
        last_words=JVM,
    ),
    dead(
        "polars-threshold",
        by(6),
        K.ABORT,
        stderr_tail="polars: memory usage exceeded POLARS_OOMKILL_THRESHOLD_MB or x, aborting",
    ),
    error("file-size", raised("OSError", "[Errno 27] File too large"), K.FILE_TOO_LARGE),
    error(
        "file-size-not-ours",
        raised("OSError", "[Errno 27] File too large"),
        K.FILE_TOO_LARGE,
        C.LIKELY,
        limits=BARE,
    ),
    error(
        "fork-refused",
        raised("BlockingIOError", "[Errno 11] Resource temporarily unavailable"),
        K.TOO_MANY_PROCESSES,
        process_refusals=3,
    ),
    error(
        "fork-by-its-stack",
        raised("BlockingIOError", "[Errno 11] Resource temporarily unavailable"),
        K.TOO_MANY_PROCESSES,
        C.LIKELY,
        location=FORKING,
    ),
    error(
        "thread-refused",
        raised("RuntimeError", "can't start new thread"),
        K.TOO_MANY_PROCESSES,
        C.LIKELY,
    ),
    error(
        "thread-refused-above",
        raised("RuntimeError", "can't start new thread"),
        K.TOO_MANY_PROCESSES,
        process_refusals=1,
        process_bound=("/sys/fs/cgroup/box", 20),
    ),
    error(
        "bash-fork",
        raised("ERROR", "bash: fork: retry: no"),
        K.TOO_MANY_PROCESSES,
        C.LIKELY,
        language="bash",
    ),
    error(
        "eagain-of-a-socket",
        raised("BlockingIOError", "[Errno 11] Resource temporarily unavailable"),
        K.EXCEPTION,
    ),
    # Text alone, in an exception of the user's own, proves nothing.
    error(
        "says-disk",
        raised("MyError", "[Errno 28] No space left on device"),
        K.EXCEPTION,
        disk_free=10**9,
    ),
    error(
        "says-files", raised("MyError", "[Errno 24] Too many open files"), K.EXCEPTION, open_files=5
    ),
    error("says-size", raised("ValueError", "[Errno 27] File too large"), K.EXCEPTION),
    error(
        "says-processes",
        raised("MyError", "[Errno 11] Resource temporarily unavailable"),
        K.EXCEPTION,
        process_refusals=3,
    ),
    error(
        "says-memory",
        raised("MyError", "MemoryError: [Errno 12] Cannot allocate memory"),
        K.EXCEPTION,
    ),
    error("says-thread", raised("MyError", "can't start new thread"), K.EXCEPTION),
    error(
        "says-killed",
        raised("MyError", "Killed, exit status 137, oom_kill 1, SIGSEGV"),
        K.EXCEPTION,
    ),
    error("says-input", raised("MyError", "StdinNotImplementedError: raw_input"), K.EXCEPTION),
]

INSTALLED = {"bash": "bash", "conda-py": "python", "ir": "R", "python3": "python"}


@pytest.mark.parametrize(
    ("installed", "language", "advice"),
    [
        (INSTALLED, "python", "--kernel python3 (conda-py too). Or install"),
        (INSTALLED, "Python", "--kernel python3"),
        (INSTALLED, "R", "--kernel ir. Or install"),
        (INSTALLED, "julia", "None of the installed kernels is for julia"),
        (INSTALLED, None, "Choose an installed kernel with --kernel NAME"),
        ({"venv": "python"}, "python", "--kernel venv. Or install"),
        ({}, "python", "pip install ipykernel"),
        ({}, "R", "None of the installed kernels is for R"),
    ],
)
def test_a_kernel_that_is_not_installed(
    installed: dict[str, str], language: str | None, advice: str
) -> None:
    context = Context(
        ending=StartFailed(reason="no kernel named 'x' is installed", installed=installed),
        evidence=Evidence(),
        limits=Limits(),
        language=language,
    )
    cause = find_cause(context)
    assert cause is not None and advice in cause.advice
    assert cause.kind is K.KERNEL_START_FAILED
    assert [fact.fact for fact in cause.evidence] == ["started"], "nobody waited for it"


def test_a_kernel_that_declines_to_start_says_why_and_the_remedy() -> None:
    line = (
        "safe-exec: threads run Python at the same time: set PYTHON_GIL=1, or choose another kernel"
    )
    context = Context(
        ending=StartFailed(reason="the kernel ended before it was ready", exit=by(1)),
        evidence=Evidence(stderr_tail=f"a warning\n{line}\n"),
        limits=Limits(),
        language="python",
    )
    cause = find_cause(context)
    assert cause is not None and cause.kind is K.KERNEL_START_FAILED
    assert "threads run Python at the same time" in cause.summary
    assert cause.advice == "Set PYTHON_GIL=1, or choose another kernel."


OTHERS = [
    Row(
        id="start-past-its-memory",
        ending=StartFailed(reason="the kernel ended", exit=by(9)),
        kind=K.KERNEL_START_FAILED,
        seen={"termination": TerminationReason.MEMORY},
    ),
    Row(
        id="start",
        ending=StartFailed(reason="the kernel did not answer", waited=60.0),
        kind=K.KERNEL_START_FAILED,
    ),
    Row(
        id="start-killed-for-memory",
        ending=StartFailed(reason="the kernel ended", exit=by(9)),
        kind=K.KERNEL_START_FAILED,
        seen={"oom_kills": 1, "termination": TerminationReason.MEMORY},
    ),
    Row(id="internal", ending=InternalError(message="no"), kind=K.UNKNOWN, confidence=C.GUESS),
    Row(
        id="unfit",
        ending=InternalError(message="no", unfit=True),
        kind=K.UNKNOWN,
        confidence=C.CERTAIN,
    ),
    hit(
        "output",
        LimitName.CELL_OUTPUT,
        K.OUTPUT_FLOOD,
        cell_output_bytes=16 * MIB,
        cell_output_received=16 * MIB,
    ),
    hit(
        "output-in-all",
        LimitName.OUTPUT,
        K.OUTPUT_FLOOD,
        cell_output_bytes=16 * MIB,
        cell_output_received=16 * MIB,
    ),
    hit(
        "processes",
        LimitName.PROCESSES,
        K.TOO_MANY_PROCESSES,
        termination=TerminationReason.PROCESSES,
        exit=by(9),
    ),
    hit("disk", LimitName.DISK, K.DISK_FULL, termination=TerminationReason.DISK, exit=by(9)),
    hit("worker-unnoticed", LimitName.MEMORY, K.WORKER_OUT_OF_MEMORY, oom_kills=1),
    hit("nothing-fits", LimitName.OPEN_FILES, K.UNKNOWN, C.GUESS),
]

ROWS = [*DEATHS, *TIMES, *ERRORS, *OTHERS]


def of(row: Row) -> Cause:
    cause = find_cause(row.context)
    assert cause is not None
    return cause


@pytest.mark.parametrize("row", ROWS, ids=[row.id for row in ROWS])
def test_what_is_concluded(row: Row) -> None:
    cause = of(row)
    assert (cause.kind, cause.confidence, cause.activity) == (
        row.kind,
        row.confidence,
        row.activity,
    )


@pytest.mark.parametrize("row", ROWS, ids=[row.id for row in ROWS])
def test_a_reader_is_told_why_and_from_what(row: Row) -> None:
    cause = of(row)
    assert cause.summary and cause.summary == cause.summary.strip()
    assert "None" not in cause.summary and "  " not in cause.summary
    assert all(fact.source and isinstance(fact.origin, Origin) for fact in cause.evidence)
    if cause.kind is not K.UNKNOWN:
        assert cause.advice and cause.evidence


@pytest.mark.parametrize("row", DEATHS, ids=[row.id for row in DEATHS])
def test_a_death_carries_its_raw_end(row: Row) -> None:
    cause = of(row)
    assert isinstance(row.ending, Died)
    status = row.ending.exit
    number = status.signal if status else None
    assert cause.signal == (None if number is None else -number)
    assert cause.exit_code == (status.exit_code if status else None)


@pytest.mark.parametrize("row", TIMES, ids=[row.id for row in TIMES])
def test_our_own_signal_says_nothing_about_a_timeout(row: Row) -> None:
    killed = msgspec.structs.replace(
        row, seen={**row.seen, "exit": by(9), "termination": TerminationReason.CELL_TIMEOUT}
    )
    cause = of(killed)
    if cause.kind is not K.WORKER_OUT_OF_MEMORY:
        assert (cause.kind, cause.signal, cause.exit_code) == (row.kind, None, None)


def test_every_kind_can_be_concluded() -> None:
    assert {row.kind for row in ROWS} == set(CauseKind)


def test_every_rule_gives_some_row_its_cause() -> None:
    first = [next(rule for rule in RULES if rule(row.context) is not None) for row in ROWS]
    assert [rule.__name__ for rule in RULES if rule not in first] == []


def test_every_ending_but_two_has_a_cause() -> None:
    endings = {type(row.ending) for row in ROWS}
    assert endings == set(typing.get_args(Ending)) - {Passed, Cancelled}


@pytest.mark.parametrize("reason", [None, *TerminationReason])
@pytest.mark.parametrize(
    "ending", [Passed(), Cancelled(signal=2, cell=2)], ids=["passed", "cancelled"]
)
def test_what_passed_or_was_cancelled_has_no_cause(
    ending: Ending, reason: TerminationReason | None
) -> None:
    evidence = Evidence(
        termination=reason,
        exit=by(9),
        oom_kills=1,
        oom_kills_cell=1,
        oomd_killed=True,
        observation=SLEEPS,
    )
    assert find_cause(Context(ending=ending, evidence=evidence, limits=LIMITS)) is None


SAYINGS = (  # the last words of a cell that ran into nothing of the kind
    "Killed\n", "MemoryError\n", "Out of memory: Killed process 1 (python)\n", "Segmentation fault (core dumped)\n", "Aborted",
)  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=[row.id for row in ROWS])
def test_what_was_printed_changes_nothing(row: Row) -> None:
    before = of(row)
    for text in SAYINGS:
        after = of(
            msgspec.structs.replace(
                row, seen={**row.seen, "last_words": row.seen.get("last_words", "") + text}
            )
        )
        assert msgspec.structs.replace(after, summary="", evidence=()) == msgspec.structs.replace(
            before, summary="", evidence=()
        )


def test_last_words_of_a_library_are_shown() -> None:
    burst = OutputBurst(channel=Channel.DESCRIPTOR, text="free(): invalid pointer\n", age=0.0)
    row = dead("abort", by(6), K.ABORT, final_output=(burst,))
    assert "free(): invalid pointer" in of(row).summary
    left = dead("exit", exit_code(3), K.EXIT, final_output=(burst,))
    assert "free(): invalid pointer" in of(left).summary


def test_the_reason_of_a_fatal_error_in_python_is_shown_rather_than_what_was_printed_before() -> (
    None
):
    fatal = FaultReport(
        title="_PyErr_NormalizeException: Cannot recover from MemoryErrors", stack=(), main=True
    )
    burst = OutputBurst(
        channel=Channel.DESCRIPTOR, text='ading.py", line 975 in run\nsome words\n', age=0.0
    )
    summary = of(dead("abort", by(6), K.ABORT, fault=fatal, final_output=(burst,))).summary
    assert summary.endswith(
        "fatal error in Python: _PyErr_NormalizeException: Cannot recover from MemoryErrors"
    )


@pytest.mark.parametrize(
    ("frames", "main", "outside_cells"),
    [
        ((Frame(function="send", line=713, file="/v/zmq/sugar/socket.py"),), True, True),
        (
            (
                Frame(function="send", line=713, file="/v/zmq/sugar/socket.py"),
                Frame(function="<module>", line=1, file="x", cell=3),
            ),
            True,
            False,
        ),
        ((Frame(function="send", line=713, file="/v/zmq/sugar/socket.py"),), False, False),
        ((Frame(function="run", line=1, file="/v/numpy/core.py"),), True, False),
        ((), True, False),
    ],
)
def test_a_crash_in_the_kernel_s_own_code_points_to_native_code_that_ran_before(
    frames: tuple[Frame, ...], main: bool, outside_cells: bool
) -> None:
    report = FaultReport(title="Segmentation fault", stack=frames, main=main)
    cause = of(dead("segfault", by(11), K.SEGFAULT, fault=report))
    assert cause.summary.endswith("no code of the notebook was running") is outside_cells
    assert ("ran earlier" in cause.advice) is outside_cells


def test_cells_that_fill_the_memory_are_named() -> None:
    cells = tuple(
        CellRecord(index=n, code_index=n - 1, id=None, status=CellStatus.PASSED, memory_kept=kept)
        for n, kept in enumerate((612 * MIB, None, 1000, 20 * MIB), 1)
    )
    killed = dead("oom", by(9), K.OUT_OF_MEMORY, oom_kills=1, oom_kills_cell=1)
    context = msgspec.structs.replace(killed.context, cells=cells, current=4)
    cause = find_cause(context)
    assert (
        cause is not None
        and "code cell 1 kept 612" in cause.advice
        and "code cell 4" not in cause.advice
    )


def test_a_program_that_failed_is_told_with_its_last_line() -> None:
    failed = CellError(
        ename="CalledProcessError", evalue="Command 'x' returned non-zero exit status 1."
    )
    row = error("program", failed, K.EXCEPTION, last_words="Traceback\nIndexError: no\n\n")
    assert ("printed last", "IndexError: no") in [
        (fact.fact, fact.value) for fact in of(row).evidence
    ]
    plain = error(
        "other", CellError(ename="ValueError", evalue="x"), K.EXCEPTION, last_words="printed"
    )
    assert [fact.fact for fact in of(plain).evidence] == ["raised", "kernel process"]


def test_who_called_os_exit_is_told() -> None:
    caller = (Frame(function="leave", line=4, file="/lib/x.py"),)
    assert (
        "os._exit() in leave (/lib/x.py, line 4)"
        in of(dead("exit", exit_code(3), K.EXIT, exit_caller=caller)).summary
    )
    for function, words in (
        ("leave", "leave, a cell, line 4"),
        ("<module>", "a cell, line 4"),
        ("<cell line: 4>", "a cell, line 4"),
    ):
        own = (Frame(function=function, line=4, file="<timed exec>", cell=7),)
        assert (
            f"os._exit() in {words}"
            in of(dead("exit", exit_code(3), K.EXIT, exit_caller=own)).summary
        )


def test_an_exit_that_was_asked_for_in_an_earlier_cell() -> None:
    asked = (
        Frame(function="leave", line=9, file="/lib/x.py"),
        Frame(function="<module>", line=2, file="1.py", cell=7),
    )
    summary = of(dead("exit", exit_code(0), K.EXIT, exit_request=asked)).summary
    assert (
        summary
        == "the kernel process exited with exit status 0, as exit() or quit() in a cell, line 2 had asked it to"
    )
    assert "had asked" not in of(dead("exit", exit_code(1), K.EXIT, exit_request=asked)).summary


# --- whatever comes in ------------------------------------------------------------------------------------------

counts = st.none() | st.integers(0, 1 << 62)
seconds = st.none() | st.floats(0, 1e12)
claimed = (
    st.floats()
)  # read from memory that the kernel process writes: not a number, infinite, anything
words = st.text(max_size=40)
statuses = st.one_of(
    st.integers(0, 255).map(exit_code),
    st.integers(1, 64).map(by),
    st.integers(1, 64).map(lambda number: by(number, core=True)),
)
frames = st.builds(
    Frame, function=words, line=counts, file=st.none() | words, cell=st.none() | st.integers(0, 9)
)
stacks = st.lists(frames, max_size=3).map(tuple)
texts = st.one_of(
    words,
    st.sampled_from(
        [row.ending.error.evalue for row in ERRORS if isinstance(row.ending, CellFailed)]
    ),
)
names = st.one_of(
    words,
    st.sampled_from(
        [row.ending.error.ename for row in ERRORS if isinstance(row.ending, CellFailed)]
    ),
)
cell_errors = st.builds(CellError, ename=names, evalue=texts)
places = st.builds(
    CellLocation,
    cell=st.integers(0, 9),
    line=st.integers(0, 99),
    source=words,
    stack=stacks,
    age=st.none() | claimed,
)
looks = st.builds(
    ActivityObservation,
    state=st.none() | st.sampled_from(list("RSDTtZX")) | words,
    cpu_share=seconds,
    syscall=st.none() | st.sampled_from(["read", "futex", "wait4", "epoll_wait", "select", "999"]),
    stack=stacks,
    gil_waits=st.lists(claimed, max_size=5).map(tuple),
    lines=counts,
    awaiting=st.none() | words,
    children=counts,
    children_cpu_share=seconds,
    window=seconds,
    starved=st.none() | st.booleans(),
    reads_terminal=st.none() | st.booleans(),
)
sites = st.builds(
    FaultSite,
    faulted=st.booleans(),
    main=st.booleans(),
    address=counts,
    stack_pointer=st.integers(0, 1 << 62),
    stack_bytes=counts,
    overflow=st.booleans(),
    library=st.none() | words,
    library_offset=counts,
)
faults = st.builds(
    FaultReport,
    title=words,
    stack=stacks,
    main=st.none() | st.booleans(),
    stack_bytes=counts,
    stack_limit=counts,
    site=st.none() | sites,
)
bursts = st.builds(OutputBurst, channel=st.sampled_from(Channel), text=words, age=st.floats(0, 100))

BY_TYPE: dict[Any, st.SearchStrategy[Any]] = {
    int: st.integers(0, 1 << 62),
    float: st.floats(0, 1e12),
    bool: st.booleans(),
    str: texts,
    ExitStatus: statuses,
    TerminationReason: st.sampled_from(TerminationReason),
    CellError: cell_errors,
    FaultReport: faults,
    CellLocation: places,
    ActivityObservation: looks,
    Frame: frames,
    OutputBurst: bursts,
    frozenset[int]: st.frozensets(st.sampled_from([2, 4, 6, 7, 8, 11])),
}


def conflicts_of_fields() -> st.SearchStrategy[IsolationConflict]:
    """Any conflict there can be: only a variable and a host have no path, and an option always has a value."""
    fields = {
        name: values_of(hint) for name, hint in typing.get_type_hints(IsolationConflict).items()
    }
    paths = st.text("abc/. ", min_size=1, max_size=8).map("/".__add__)
    pathless = {NeedKind.VARIABLE, NeedKind.HOST}

    def build(kind: NeedKind) -> st.SearchStrategy[IsolationConflict]:
        without = kind in pathless
        return st.builds(
            IsolationConflict,
            **fields
            | {
                "kind": st.just(kind),
                "path": st.none() if without else paths,
                "allow": st.just(()) if without else st.lists(paths, max_size=2).map(tuple),
            },
        )

    return st.sampled_from(NeedKind).flatmap(build)


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    """Any value of a field's type."""
    if hint in BY_TYPE:
        return BY_TYPE[hint]
    if hint is type(None):
        return st.none()
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return st.sampled_from(hint)
    if isinstance(hint, msgspec.StructMeta):
        return st.builds(
            hint,
            **{name: values_of(of_field) for name, of_field in typing.get_type_hints(hint).items()},
        )
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        several = arguments[-1] is Ellipsis
        return (
            st.lists(values_of(arguments[0]), max_size=3).map(tuple)
            if several
            else st.tuples(*map(values_of, arguments))
        )
    return st.one_of(*map(values_of, arguments))


BY_TYPE[IsolationConflict] = conflicts_of_fields()
FIELDS = {name: values_of(hint) for name, hint in typing.get_type_hints(Evidence).items()}
evidences = st.fixed_dictionaries({}, optional=FIELDS).map(lambda given: Evidence(**given))
claims = st.fixed_dictionaries({}, optional={name: FIELDS[name] for name in CLAIMS})
cells_of = st.integers(0, 9)
bools = st.none() | st.booleans()
endings: st.SearchStrategy[Ending] = st.one_of(
    st.just(Passed()),
    st.builds(CellFailed, cell=cells_of, error=cell_errors),
    st.builds(
        OutputsDiffer,
        cell=cells_of,
        differences=st.lists(
            st.builds(
                OutputDifference,
                index=cells_of,
                code_index=cells_of,
                kind=words,
                summary=words.filter(str.strip),
                lines=st.lists(words, max_size=3).map(tuple),
            ),
            min_size=1,
            max_size=3,
        ).map(tuple),
    ),
    st.builds(
        Died, cell=st.none() | cells_of, exit=st.none() | statuses, asked_to_exit=st.booleans()
    ),
    st.builds(
        TimedOut,
        cell=st.none() | cells_of,
        whole_notebook=st.booleans(),
        allowed=st.floats(0, 1e9),
        answered=bools,
    ),
    st.builds(LimitHit, limit=st.sampled_from(LimitName), cell=st.none() | cells_of),
    st.builds(
        StartFailed, reason=words.filter(str.strip), exit=st.none() | statuses, waited=seconds
    ),
    st.builds(Cancelled, signal=st.integers(1, 64), cell=st.none() | cells_of),
    st.builds(InternalError, message=words, cell=st.none() | cells_of),
)
limit_sets = st.sampled_from([LIMITS, BARE])
languages = st.sampled_from([None, "python", "R", "bash"])


@settings(deadline=None)
@given(ending=endings, evidence=evidences, limits=limit_sets, language=languages)
def test_whatever_was_observed_has_an_answer(
    ending: Ending, evidence: Evidence, limits: Limits, language: str | None
) -> None:
    cause = find_cause(Context(ending=ending, evidence=evidence, limits=limits, language=language))
    if isinstance(ending, Passed | Cancelled):
        assert cause is None
        return
    assert cause is not None
    assert cause.summary.strip()
    assert cause.signal is None or cause.exit_code is None
    assert cause.signal is None or cause.signal < 0
    assert cause.activity is None or isinstance(ending, TimedOut)
    assert all(not isinstance(f.value, float) or math.isfinite(f.value) for f in cause.evidence)


@settings(deadline=None)
@given(status=statuses, evidence=evidences, claim=claims, limits=limit_sets)
def test_claims_from_inside_never_change_what_a_death_is(
    status: ExitStatus, evidence: Evidence, claim: dict[str, Any], limits: Limits
) -> None:
    ending = Died(cell=2, exit=status)
    honest = msgspec.structs.replace(
        evidence, exit=status, **{name: getattr(Evidence(), name) for name in CLAIMS}
    )
    before = find_cause(Context(ending=ending, evidence=honest, limits=limits))
    after = find_cause(
        Context(ending=ending, evidence=msgspec.structs.replace(honest, **claim), limits=limits)
    )
    assert before is not None and after is not None
    said: dict[str, Any] = {"summary": "", "evidence": (), "advice": ""}
    assert msgspec.structs.replace(before, **said) == msgspec.structs.replace(after, **said)
    assert STATUS_OF[type(ending)] is Status.KERNEL_DIED and after.kind is not K.EXCEPTION


@settings(deadline=None)
@given(evidence=evidences, code=st.integers(0, 255))
def test_an_exit_status_is_never_taken_for_a_signal(evidence: Evidence, code: int) -> None:
    ours = (TerminationReason.MEMORY, TerminationReason.CPU_TIME)
    fair = msgspec.structs.replace(
        evidence,
        exit=exit_code(code),
        termination=None if evidence.termination in ours else evidence.termination,
        oomd_killed=None,
    )
    cause = find_cause(
        Context(ending=Died(cell=2, exit=exit_code(code)), evidence=fair, limits=LIMITS)
    )
    assert cause is not None and (cause.kind, cause.exit_code) == (K.EXIT, code)


@pytest.mark.parametrize("socket", [True, False])
def test_a_copy_of_a_socket_in_the_folder_would_not_help(socket: bool) -> None:
    conflict = IsolationConflict(
        kind=NeedKind.PATH,
        name="db.sock",
        access=Access.HIDDEN,
        line="",
        path="/home/ann/db.sock",
        allow=("/home/ann/db.sock",),
        socket=socket,
    )
    text = isolation.advice(conflict)
    assert "--show /home/ann/db.sock" in text
    assert ("put it into the notebook's folder" in text) != socket


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("*****\n  Resource 'stopwords' not found.\n*****", "Resource 'stopwords' not found."),
        ("\n\nnot found\nmore", "not found"),
        ("***", "***"),
    ],
)
def test_the_summary_of_an_exception_is_the_first_line_with_words(message: str, said: str) -> None:
    row = Row(
        id="framed", ending=failed(CellError(ename="LookupError", evalue=message)), kind=K.EXCEPTION
    )
    assert of(row).summary == f"LookupError: {said}"


def test_isolation_that_does_not_fit_the_folder_is_no_fault_of_ours() -> None:
    row = Row(
        id="unfit",
        ending=InternalError(message="the folder is a home", unfit=True),
        kind=K.UNKNOWN,
    )
    cause = of(row)
    assert cause.summary == "the folder is a home"
    assert "report" not in cause.advice
    assert "folder of its own" in cause.advice
