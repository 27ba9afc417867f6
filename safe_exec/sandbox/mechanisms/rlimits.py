"""Resource limits (setrlimit(2)): enforced by Linux, but for each process separately."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

from safe_exec.keeper import procfs
from safe_exec.model.evidence import ProcessCount
from safe_exec.model.limits import Enforcement, LimitName, Limits, Mechanism
from safe_exec.sandbox.host.capabilities import HostCapabilities
from safe_exec.sandbox.mechanisms.offers import ANYWHERE, Placement
from safe_exec.sandbox.plan import Offer, SpawnPlan
from safe_exec.sandbox.usage.process_tree import ProcessTree
from safe_exec.units import format_size

# Without cgroups a memory limit becomes RLIMIT_DATA, not RLIMIT_AS: an idle ipykernel has 814 MB of
# address space with 52 MB resident, while RLIMIT_DATA (private writable memory, since Linux 4.7) is
# close to the used memory. But it counts memory that was reserved and never touched, such as thread
# stacks, so the limit needs headroom. And it does not count shared memory, so the watchdog runs
# too.

# An idle kernel reserves 150 to 220 MB of private memory without touching it [measured], mostly
# thread stacks.
DATA_HEADROOM = 256 * 1024 * 1024
# Beside the watchdog, which holds the limit itself, this limit only has to stop what outruns the
# watchdog, and must not refuse memory that the limit allows: pandas 3 reserves 1,110 MiB at its
# first column of strings (the arena of pyarrow's allocator), numpy 210 MiB for two threads
# [measured].
WATCHED_DATA_HEADROOM = 2 * 1024**3

# Seconds between SIGXCPU, which a process can ignore, and SIGKILL.
CPU_HARD_SECONDS = 2

# Our init (keeper/bwrap_init.py) is one task in bubblewrap's user namespace.
INIT_TASKS = 1


def offer(
    limits: Limits, machine: HostCapabilities, placement: Placement = ANYWHERE
) -> Offer | None:
    """Return the offer of rlimits."""
    if resource is None or not machine.allows(Mechanism.RLIMIT):
        return None
    holds: dict[LimitName, Enforcement] = {}
    rows: dict[LimitName, tuple[tuple[int, int, int], ...]] = {}
    for name, row, enforcement in _wanted(limits, machine, enclosed=placement.enclosed):
        rows[name] = (_capped(row),)
        holds[name] = enforcement
    return Offer(mechanism=Mechanism.RLIMIT, holds=holds, rlimits=rows)


_Row = tuple[int, int, int]


def _wanted(
    limits: Limits, machine: HostCapabilities, *, enclosed: bool
) -> Iterator[tuple[LimitName, _Row, Enforcement]]:
    if limits.open_files is not None:
        row = (resource.RLIMIT_NOFILE, limits.open_files, limits.open_files)
        yield LimitName.OPEN_FILES, row, _held("each process")
    if limits.file_size is not None:
        row = (resource.RLIMIT_FSIZE, limits.file_size, limits.file_size)
        yield LimitName.FILE_SIZE, row, _held("each file")
    if limits.cpu_time is not None:
        soft = max(1, math.ceil(limits.cpu_time))
        row = (resource.RLIMIT_CPU, soft, soft + CPU_HARD_SECONDS)
        yield (
            LimitName.CPU_TIME,
            row,
            _held("each process by RLIMIT_CPU, their sum by the watchdog"),
        )
    if limits.memory is not None:
        watched = machine.allows(Mechanism.WATCHDOG)
        headroom = WATCHED_DATA_HEADROOM if watched else DATA_HEADROOM
        size = limits.memory + headroom
        note = (
            f"private memory of each process by RLIMIT_DATA, with {format_size(headroom)} of "
            "headroom; shared memory is not counted"
        )
        yield LimitName.MEMORY, (resource.RLIMIT_DATA, size, size), _held(note, hard=False)
    # Root is exempt from RLIMIT_NPROC (setrlimit(2)).
    if limits.processes is not None and machine.uid != 0 and machine.user_tasks is not None:
        count, enforcement = _processes(
            limits.processes, machine.user_tasks, alone=enclosed and machine.counts_in_namespaces
        )
        yield LimitName.PROCESSES, (resource.RLIMIT_NPROC, count, count), enforcement


def _processes(limit: int, user_tasks: int, *, alone: bool) -> tuple[int, Enforcement]:
    """Return the value for RLIMIT_NPROC, and how well it enforces the limit."""
    # In a new user namespace the count of tasks begins with 0 (Linux 5.14, kernel/ucount.c), so
    # only the notebook's tasks count. Otherwise all tasks of the user count, and each one that ends
    # leaves its place to the notebook. Then the watchdog counts too, and lowers the value.
    if alone:
        return limit + INIT_TASKS, _held("counted in a user namespace of its own")
    note = (
        "the user's other processes count too: the limit is beside them, and the watchdog lowers it "
        "where one ends"
    )
    return limit + user_tasks, _held(note, hard=False)


class ProcessLimit:
    """RLIMIT_NPROC of a tree of processes, which other tasks of the user count against.

    ``limit``: tasks that the tree may have. ``allowed``: RLIMIT_NPROC at its start.
    """

    def __init__(self, limit: int, allowed: int, tree: ProcessTree) -> None:
        self._limit = limit
        self._allowed = allowed
        self._tree = tree
        self._lowered_at = 0

    def refuse_more(self, tasks: int) -> bool:
        """Let the system refuse further tasks to a tree that has too many, ``tasks`` of them.

        Return false if RLIMIT_NPROC does not bound the tree.
        """
        if tasks > self._allowed:
            # Not possible below RLIMIT_NPROC, so it does not count these tasks.
            return False
        # Where tasks of the user have ended since, the tree can grow again.
        if tasks > self._lowered_at:
            others = max(0, procfs.tasks_of(os.getuid()) - tasks)
            for pid in self._tree.pids():
                _lower(pid, self._limit + others)
            self._lowered_at = tasks
        return True


def process_limit(plan: SpawnPlan, limits: Limits, tree: ProcessTree) -> ProcessLimit | None:
    """Return RLIMIT_NPROC of a tree; ``None`` if it is not set or no other tasks count for it."""
    allowed = _process_rlimit(plan)
    if allowed is None or limits.processes is None:
        return None
    if plan.enforcement[LimitName.PROCESSES].hard:
        return None
    return ProcessLimit(limits.processes, allowed, tree)


def _lower(pid: int, most: int) -> None:
    try:
        soft, hard = resource.prlimit(pid, resource.RLIMIT_NPROC)
        lowered = [min(value, most) if value >= 0 else most for value in (soft, hard)]
        resource.prlimit(pid, resource.RLIMIT_NPROC, (lowered[0], lowered[1]))
    except ProcessLookupError:
        # It has ended.
        return
    except PermissionError:
        # A set-user-id program: its tasks count for another user.
        return


def _process_rlimit(plan: SpawnPlan) -> int | None:
    return next((soft for number, soft, _ in plan.rlimits if number == resource.RLIMIT_NPROC), None)


def process_count(plan: SpawnPlan, tasks: int, limit: int | None) -> ProcessCount | None:
    """Compare the notebook's ``tasks`` with RLIMIT_NPROC; ``None`` if that is not set."""
    allowed = _process_rlimit(plan)
    if allowed is None or limit is None:
        return None
    alone = plan.enforcement[LimitName.PROCESSES].hard
    return ProcessCount(
        tasks=tasks,
        allowed=limit,
        of_user=None if alone else (procfs.tasks_of(os.getuid()), allowed),
    )


def _held(note: str, *, hard: bool = True) -> Enforcement:
    return Enforcement(by=Mechanism.RLIMIT, hard=hard, note=note)


def _capped(row: _Row) -> _Row:
    """Return a row with both limits lowered to the hard limit of this process."""
    number, soft, hard = row
    _, ceiling = resource.getrlimit(number)
    # Raising a hard limit needs CAP_SYS_RESOURCE (setrlimit(2)).
    if ceiling == resource.RLIM_INFINITY:
        return row
    return number, min(soft, ceiling), min(hard, ceiling)
