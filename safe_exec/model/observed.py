"""Types for observations in /proc: the sandbox's processes, file locks, the kernel's own limits."""

from __future__ import annotations

from msgspec import Struct

from safe_exec.model.ending import ExitStatus


class ObservedProcess(Struct, frozen=True, kw_only=True):
    """A process of the sandbox besides the kernel, observed when the time was up."""

    # The process id outside; local_pid is the one inside the sandbox.
    pid: int
    local_pid: int
    # The parent's process id outside.
    parent: int
    # The command line, shortened and without secrets.
    command: str
    # The scheduler state (S, T, Z, ...).
    state: str
    # Processor seconds per second.
    cpu_share: float | None = None
    # Seconds since the start of the process.
    age: float = 0.0
    threads: int = 1
    # The system call in which its main thread was blocked the whole time.
    syscall: str | None = None
    # The files that the call waits for. Empty: it waits for time to pass; None: unknown.
    targets: tuple[str, ...] | None = None
    # Whether it waits without a timeout for a thread of its own process.
    private_wait: bool = False
    # The child that it waits for, by local id.
    awaited: int | None = None
    # The pipes of which it holds the read end.
    reads: tuple[str, ...] = ()
    # The pipes of which it holds the write end.
    writes: tuple[str, ...] = ()
    # A full pipe that blocks one of its threads, and the bytes in that pipe.
    full_pipe: str | None = None
    pipe_bytes: int | None = None
    # It runs the kernel's own program: a fork without an exec.
    forked: bool = False
    # Its parent has ended.
    adopted: bool = False
    # The status of a zombie that its parent has not reaped.
    exit: ExitStatus | None = None
    reads_terminal: bool = False


class EndedChild(Struct, frozen=True, kw_only=True):
    """A descendant of the kernel that was alive while the cell ran and has ended since."""

    local_pid: int
    command: str
    # A fork without an exec.
    forked: bool = False
    # None if its parent has reaped it; the keeper reports the status of processes that it adopted.
    exit: ExitStatus | None = None


class ObservedLock(Struct, frozen=True, kw_only=True):
    """A lock on a file, and its holder."""

    path: str
    # flock, fcntl, sqlite, or "lock file" for one that is only polled for.
    kind: str
    # The holder's local process id; None if unknown.
    holder: int | None = None
    command: str | None = None
    # Whether the kernel itself is the holder.
    own: bool = False


class ChangedLimit(Struct, frozen=True, kw_only=True):
    """A soft resource limit of the kernel that changed since it was ready (``None``: unlimited)."""

    name: str
    initial_value: int | None
    current_value: int | None
