"""Resource limits (setrlimit(2)): enforced by Linux, but for each process alone."""

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

# RLIMIT_DATA and not RLIMIT_AS stands in for a memory limit where there are no control groups: an
# idle ipykernel has 814 MB of address space with 52 MB resident, while RLIMIT_DATA (private
# writable memory, since Linux 4.7) is near what is used. It still counts memory that was reserved
# and never touched (a thread's stack, say), hence the headroom; and shared memory goes past it,
# hence the watchdog beside it.

# Private memory that an idle kernel reserves and does not touch: 150 to 220 MB measured (thread
# stacks above all).
DATA_HEADROOM = 256 * 1024 * 1024

# Between SIGXCPU and the SIGKILL for a process that ignores it.
CPU_HARD_SECONDS = 2

# Tasks of ours in the user namespace that bubblewrap makes: the init (keeper/bwrap_init.py).
INIT_TASKS = 1


def offer(
    limits: Limits, machine: HostCapabilities, placement: Placement = ANYWHERE
) -> Offer | None:
    """Return what rlimits can enforce."""
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
        size = limits.memory + DATA_HEADROOM
        note = (
            "private memory of each process by RLIMIT_DATA, with 256 MiB of headroom; shared "
            "memory is not counted"
        )
        yield LimitName.MEMORY, (resource.RLIMIT_DATA, size, size), _held(note, hard=False)
    if (
        limits.processes is not None and machine.uid != 0 and machine.user_tasks is not None
    ):  # root is exempt from it
        count, enforcement = _processes(
            limits.processes, machine.user_tasks, alone=enclosed and machine.counts_in_namespaces
        )
        yield LimitName.PROCESSES, (resource.RLIMIT_NPROC, count, count), enforcement


def _processes(limit: int, user_tasks: int, *, alone: bool) -> tuple[int, Enforcement]:
    """RLIMIT_NPROC and what it is worth."""
    # In a user namespace the count of tasks begins with 0 (Linux 5.14, kernel/ucount.c), so it is
    # the notebook's own. Elsewhere all tasks of the user count, and any that ends meanwhile leaves
    # its place to the notebook: the watchdog counts besides.
    if alone:
        return limit + INIT_TASKS, _held("counted in a user namespace of its own")
    note = (
        "the user's other processes count too: the limit is beside them, and where one ends the "
        "watchdog alone holds it"
    )
    return limit + user_tasks, _held(note, hard=False)


def process_count(plan: SpawnPlan, tasks: int, limit: int | None) -> ProcessCount | None:
    """The ``tasks`` of the notebook against RLIMIT_NPROC; ``None`` where it is not set."""
    allowed = next(
        (soft for number, soft, _ in plan.rlimits if number == resource.RLIMIT_NPROC), None
    )
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
    """Return a row within the machine's own hard limit, which cannot be raised."""
    number, soft, hard = row
    _, ceiling = resource.getrlimit(number)
    # Raising a hard limit takes CAP_SYS_RESOURCE (setrlimit(2)).
    if ceiling == resource.RLIM_INFINITY:
        return row
    return number, min(soft, ceiling), min(hard, ceiling)
