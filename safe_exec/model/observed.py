"""What is seen in /proc of the processes of a sandbox, of the locks on files, and of the kernel's own limits."""

from __future__ import annotations

from msgspec import Struct

from safe_exec.model.ending import ExitStatus


class ObservedProcess(Struct, frozen=True, kw_only=True):
    """A process of the sandbox beside the kernel, as /proc showed it when the kernel's time was up.

    ``pid`` and ``parent`` are ids outside, ``local_pid`` is the one that the notebook knows. ``command`` is shortened and has no secrets in it.
    ``state`` is the scheduler's (``S``, ``T``, ``Z``, ...), ``cpu_share`` processor seconds per second, ``age`` seconds since its start.
    ``syscall`` is the call in which its main thread was blocked the whole time, ``targets`` what the descriptors lead to that it waits for there
    (empty: it waits for time to pass; ``None``: for none, or that is not known), ``private_wait`` whether it waits without an end for a thread
    of its own process, ``awaited`` the child that it waits for, by local id. ``reads`` and ``writes`` are the pipes of which it holds that end;
    ``full_pipe`` is the one into which a thread of it could not write, with ``pipe_bytes`` in it. ``forked``: it runs the kernel's own program,
    without an execution of another one. ``adopted``: its parent ended before it. ``exit`` is the status of a zombie, which its parent has not
    read yet.
    """

    pid: int
    local_pid: int
    parent: int
    command: str
    state: str
    cpu_share: float | None = None
    age: float = 0.0
    threads: int = 1
    syscall: str | None = None
    targets: tuple[str, ...] | None = None
    private_wait: bool = False
    awaited: int | None = None
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    full_pipe: str | None = None
    pipe_bytes: int | None = None
    forked: bool = False
    adopted: bool = False
    exit: ExitStatus | None = None
    reads_terminal: bool = False


class EndedChild(Struct, frozen=True, kw_only=True):
    """A child of the kernel, or one of theirs, that was seen alive while the cell ran and has ended since; ``forked`` as above.

    ``exit`` is ``None`` where its parent has read the status: only a process that the keeper had adopted tells it.
    """

    local_pid: int
    command: str
    forked: bool = False
    exit: ExitStatus | None = None


class ObservedLock(Struct, frozen=True, kw_only=True):
    """A lock on a file, and who holds it. ``kind``: flock, fcntl, sqlite, or lock file for one that is only tried for again and again.

    ``holder`` is a process by its local id, ``None`` where it cannot be told; ``own`` whether that is the kernel itself.
    """

    path: str
    kind: str
    holder: int | None = None
    command: str | None = None
    own: bool = False


class ChangedLimit(Struct, frozen=True, kw_only=True):
    """A soft resource limit of the kernel's process that is not what it was when the kernel was ready; ``None``: unlimited."""

    name: str
    initial_value: int | None
    current_value: int | None
