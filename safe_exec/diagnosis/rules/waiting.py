"""Finds the process or file lock that a kernel waits for, and why the wait does not end. Pure.

Observations of the processes in /proc decide. Python stacks, which are the kernel's claims, only
tell that a pool or an executor of processes is awaited. Imports context and model.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

from msgspec import Struct

from safe_exec.model.evidence import ActivityObservation, Frame
from safe_exec.model.observed import ObservedLock, ObservedProcess
from safe_exec.model.patterns import lazy_pattern

# Processor seconds per second, from which a process computes.
AT_WORK = 0.5
SEARCHED_FRAMES = 16
# A pool starts its workers at once: one that is younger than the others by this replaced one that
# is gone.
NEW_WORKER_SECONDS = 0.5

# Calls that wait for time to pass, or for a signal.
SLEEPS = ("nanosleep", "clock_nanosleep", "pause", "rt_sigsuspend", "rt_sigtimedwait")
READS = ("read", "readv", "recvfrom", "recvmsg")
WRITES = ("write", "writev", "splice", "sendto", "sendmsg")
WAITS = ("wait4", "waitid")
# Calls that wait for several descriptors, or for time to pass.
MULTIPLEXERS = ("select", "pselect6", "poll", "ppoll", "epoll_wait", "epoll_pwait", "epoll_pwait2")

# Python's code that waits for a child process.
FILES_OF_CHILDREN = (
    "subprocess.py",
    "popen_fork.py",
    "popen_spawn_posix.py",
    "popen_forkserver.py",
    "popen_loky_posix.py",
    "pty_spawn.py",
    "core/magics/script.py",
)
# Python's and joblib's code for pools and executors of processes, and their queues.
FILES_OF_POOLS = (
    "multiprocessing/pool.py",
    "multiprocessing/queues.py",
    "multiprocessing/connection.py",
    "multiprocessing/managers.py",
    "multiprocessing/process.py",
    "futures/process.py",
    "joblib/parallel.py",
    "loky/process_executor.py",
    "loky/_base.py",
)
# The threads of these modules show that an executor of processes exists.
FILES_OF_EXECUTORS = ("futures/process.py", "loky/process_executor.py")
# Packages that try for the lock on a file again and again, sleeping in between.
FILES_OF_FILE_LOCKS = (
    "filelock/",
    "portalocker/",
    "fasteners/",
    "lockfile/",
    "zc/lockfile/",
    "oslo_concurrency/",
)

# Processes that Python starts beside the workers: they are always at rest.
_HELPER = lazy_pattern(
    r"multiprocessing\.(?:resource_tracker|semaphore_tracker|forkserver)"
    r"|loky\.backend\.resource_tracker"
)
_WORKER = lazy_pattern(r"multiprocessing\.spawn|--multiprocessing-fork|popen_loky_posix")


class Blockage(StrEnum):
    """The reason why a process does not end."""

    STOPPED = "stopped"
    FULL_PIPE = "full_pipe"
    LOST_LOCK = "lost_lock"
    FILE_LOCK = "file_lock"
    INPUT = "input"
    TERMINAL = "terminal"
    HOLDS_OUTPUT = "holds_output"
    ENDED = "ended"
    COMPUTES = "computes"
    SLEEPS = "sleeps"
    IDLE = "idle"
    CHILD = "child"
    OTHER = "other"


# Blockages that do not end by themselves, whoever is waited for.
STUCK = (
    Blockage.STOPPED,
    Blockage.FULL_PIPE,
    Blockage.LOST_LOCK,
    Blockage.FILE_LOCK,
    Blockage.INPUT,
    Blockage.TERMINAL,
)
# All blockages, the most telling first.
ORDER = (
    *STUCK,
    Blockage.HOLDS_OUTPUT,
    Blockage.COMPUTES,
    Blockage.SLEEPS,
    Blockage.OTHER,
    Blockage.ENDED,
    Blockage.CHILD,
    Blockage.IDLE,
)


class Blocker(Struct, frozen=True, kw_only=True):
    """The process that a kernel most likely waits for, and why it does not end."""

    process: ObservedProcess
    blockage: Blockage


# --- whether it waits for processes ---------------------------------------------------------------


def other_processes(observation: ActivityObservation) -> list[ObservedProcess]:
    """Return the processes besides the kernel, without Python's own helpers."""
    return [process for process in observation.processes if not _HELPER.search(process.command)]


def waits_for_processes(observation: ActivityObservation) -> bool:
    """Tell whether an idle kernel waits for a child, a pool's worker, or the holder of a pipe."""
    if observation.syscall in WAITS or _waits_for_shell(observation):
        return True
    some = bool(observation.children or other_processes(observation) or observation.ended)
    if some and _stands_in(observation.stack, FILES_OF_CHILDREN):
        return True
    if some and _stands_in(observation.stack, FILES_OF_POOLS) and not _is_thread_pool(observation):
        return True
    return (some and _waits_for_executor(observation)) or bool(_partners(observation))


def _stands_in(stack: Sequence[Frame], files: Sequence[str]) -> bool:
    return any((frame.file or "").endswith(tuple(files)) for frame in stack[:SEARCHED_FRAMES])


def _is_thread_pool(observation: ActivityObservation) -> bool:
    """Tell whether a pool is one of threads; multiprocessing has the same code for processes."""
    return any(
        frame.function == "worker" and (frame.file or "").endswith("pool.py")
        for stack in observation.threads
        for frame in stack
    )


def _waits_for_executor(observation: ActivityObservation) -> bool:
    """Tell whether the kernel waits for a future of an executor of processes."""
    if not _stands_in(observation.stack, ("futures/_base.py",)):
        return False
    at_work = any(
        frame.function == "run" and (frame.file or "").endswith("futures/thread.py")
        for stack in observation.threads
        for frame in stack
    )
    return not at_work and any(
        _stands_in(stack, FILES_OF_EXECUTORS) for stack in observation.threads
    )


def _waits_for_shell(observation: ActivityObservation) -> bool:
    """Tell whether a kernel that drives a shell waits for a child of that shell.

    Such a kernel reads from the shell's terminal, whatever program runs there.
    """
    return not observation.instrumented and any(
        process.syscall in WAITS and not process.adopted for process in observation.processes
    )


def _partners(observation: ActivityObservation) -> list[ObservedProcess]:
    """Return the processes at the other end of a pipe that blocks the kernel."""
    # Sockets and terminals are targets as well.
    pipes = {target for target in observation.targets or () if target.startswith("pipe:")}
    read = (
        pipes & _own_reads(observation)
        if observation.syscall in (*READS, *MULTIPLEXERS)
        else frozenset()
    )
    written = (
        pipes & _own_writes(observation)
        if observation.syscall in (*WRITES, *MULTIPLEXERS)
        else frozenset()
    )
    return [
        process
        for process in other_processes(observation)
        if read & set(process.writes) or written & set(process.reads)
    ]


def reads_own_pipe(observation: ActivityObservation) -> bool:
    """Tell whether the kernel reads a pipe that only it can write to, so it waits for itself."""
    if observation.syscall not in READS or not observation.targets:
        return False
    # A read has a single target.
    pipe = observation.targets[0]
    held_elsewhere = any(pipe in process.writes for process in observation.processes)
    return pipe.startswith("pipe:") and pipe in observation.writes and not held_elsewhere


# --- which one, and why it does not end -----------------------------------------------------------


def blockage_of(process: ObservedProcess, observation: ActivityObservation) -> Blockage:  # noqa: C901, PLR0911
    """Return the reason why a process does not end."""
    # A zombie waits for nothing; its parent has to reap it.
    if process.state in "ZX":
        return Blockage.ENDED
    # Stopped by a signal or by a debugger.
    if process.state in "Tt":
        return Blockage.STOPPED
    # The writer cannot go on before somebody reads.
    if process.full_pipe is not None:
        return Blockage.FULL_PIPE
    if process.state == "R" or (process.cpu_share or 0.0) >= AT_WORK:
        return Blockage.COMPUTES
    # A fork copies locks but not the threads that hold them.
    if process.syscall == "futex" and process.private_wait and process.threads == 1:
        return Blockage.LOST_LOCK
    if process.syscall in ("flock", "fcntl"):
        return Blockage.FILE_LOCK
    # There is no terminal from which an answer could come.
    if process.reads_terminal:
        return Blockage.TERMINAL
    if process.syscall in READS and set(process.targets or ()) & _own_writes(observation):
        return Blockage.INPUT
    if process.syscall in WAITS:
        return Blockage.CHILD
    if process.syscall in SLEEPS or (process.syscall in MULTIPLEXERS and process.targets == ()):
        return Blockage.SLEEPS
    return (
        Blockage.IDLE
        if is_worker(process) and process.syscall in ("futex", *READS, *MULTIPLEXERS)
        else Blockage.OTHER
    )


def _own_writes(observation: ActivityObservation) -> frozenset[str]:
    """Return the pipes that the kernel only writes to.

    The pipes of multiprocessing queues are left out, because a fork holds both of their ends.
    """
    return frozenset(observation.writes) - frozenset(observation.reads)


def _own_reads(observation: ActivityObservation) -> frozenset[str]:
    """Return the pipes that the kernel only reads.

    A read from such a pipe ends once no other process holds its writing end.
    """
    return frozenset(observation.reads) - frozenset(observation.writes)


def is_worker_command(command: str) -> bool:
    """Tell whether multiprocessing or loky started this command as a worker."""
    return _WORKER.search(command) is not None


def is_worker(process: ObservedProcess) -> bool:
    """Tell whether a process was forked by the notebook or is a pool's worker."""
    return process.forked or is_worker_command(process.command)


def find_blocker(observation: ActivityObservation) -> Blocker | None:
    """Return the process that the kernel most likely waits for.

    The first candidate is the child that wait4 names; then the process at the other end of the pipe
    that the kernel reads or writes; then an orphan that holds a pipe which only the kernel reads;
    then the child whose state best explains the wait. If the named process is idle and another one
    is stuck forever, the stuck one is returned.
    """
    processes = other_processes(observation)
    if not processes:
        return None
    awaited_children = [
        process
        for process in processes
        if observation.awaited is not None and process.local_pid == observation.awaited
    ]
    # A pipe proves the relation; being a child only suggests it.
    partners = _partners(observation)
    holders = [] if awaited_children or partners else _holders(observation)
    if holders:
        return Blocker(process=holders[0], blockage=Blockage.HOLDS_OUTPUT)
    if (
        partners
        and all(process.adopted for process in partners)
        and observation.syscall not in WRITES
    ):
        return Blocker(process=partners[0], blockage=Blockage.HOLDS_OUTPUT)
    # Descendants count too: the awaited child may itself wait for one of them.
    chosen = (
        _most_telling(_family(awaited_children or partners, processes), observation)
        if awaited_children or partners
        else None
    )
    anybody = _most_telling(
        [process for process in processes if not process.adopted] or processes, observation
    )
    if chosen is None or (
        anybody is not None and anybody.blockage in STUCK and chosen.blockage not in STUCK
    ):
        return anybody
    return chosen


def stuck_child(observation: ActivityObservation) -> Blocker | None:
    """Return a child that will never end by itself, whatever else the kernel is doing."""
    blocker = _most_telling(
        [process for process in other_processes(observation) if not process.adopted], observation
    )
    return blocker if blocker is not None and blocker.blockage in STUCK else None


def _holders(observation: ActivityObservation) -> list[ObservedProcess]:
    """Return orphans that hold a pipe which only the kernel reads and no child holds."""
    # Orphans keep inherited pipes open, so the kernel never sees their end.
    reads = _own_reads(observation)
    used = {
        pipe
        for process in other_processes(observation)
        if not process.adopted and process.state not in "ZX"
        for pipe in process.writes
    }
    free = reads - used
    return [
        process
        for process in other_processes(observation)
        if process.adopted and free & set(process.writes)
    ]


def _family(
    tops: Sequence[ObservedProcess], processes: Sequence[ObservedProcess]
) -> list[ObservedProcess]:
    """Return some processes and all their descendants."""
    family = list(tops)
    for process in family:
        family += [
            child for child in processes if child.parent == process.pid and child not in family
        ]
    return family


def _most_telling(
    processes: Sequence[ObservedProcess], observation: ActivityObservation
) -> Blocker | None:
    blockers = [
        Blocker(process=process, blockage=blockage_of(process, observation))
        for process in processes
    ]
    return min(
        blockers,
        key=lambda blocker: (ORDER.index(blocker.blockage), blocker.process.age),
        default=None,
    )


def replaced_workers(observation: ActivityObservation) -> tuple[int, int]:
    """Return how many workers of a pool ended while the cell ran, and how many replaced others."""
    ended_count = sum(
        child.forked or is_worker_command(child.command) for child in observation.ended
    )
    workers = [
        process
        for process in other_processes(observation)
        if is_worker(process) and process.state not in "ZX"
    ]
    # All workers of a pool start together, so a younger one is a replacement.
    oldest = max((process.age for process in workers), default=0.0)
    return ended_count, sum(process.age < oldest - NEW_WORKER_SECONDS for process in workers)


# --- the lock on a file ---------------------------------------------------------------------------


def awaited_lock(observation: ActivityObservation) -> ObservedLock | None:
    """Return the file lock that the kernel waits for, in a blocking call or by polling."""
    lock = observation.lock
    if lock is None or lock.kind in ("flock", "fcntl"):
        return lock
    # SQLite polls with short sleeps instead of blocking.
    if lock.kind == "sqlite":
        return lock if (observation.switches or 0.0) >= RETRIES_PER_SECOND else None
    return lock if polls_for_file_lock(observation) else None


# SQLite tries again after 100 ms at most; a longer sleep belongs to other code.
RETRIES_PER_SECOND = 4.0


def polls_for_file_lock(observation: ActivityObservation) -> bool:
    """Tell whether a package for lock files is polling."""
    return any(
        package in (frame.file or "")
        for frame in observation.stack[:SEARCHED_FRAMES]
        for package in FILES_OF_FILE_LOCKS
    )
