"""Resource limits of each process (setrlimit(2)): held by the system's kernel, but for each process alone.

RLIMIT_DATA and not RLIMIT_AS stands in for a memory limit where there are no control groups: an idle ipykernel has 814 MB of
address space with 52 MB resident, while RLIMIT_DATA (private writable memory, since Linux 4.7) is near what is used.
It still counts memory that was reserved and never touched (a thread's stack, say), hence the headroom; and shared memory goes past
it, hence the watchdog beside it.
"""

from __future__ import annotations

import math

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

from safe_exec.model import Enforcement, LimitName, Limits, Mechanism
from safe_exec.sandbox.machine import Machine
from safe_exec.sandbox.plan import Offer

DATA_HEADROOM = 256 * 1024 * 1024
"""Private memory that an idle kernel reserves and does not touch: 150 to 220 MB measured (thread stacks above all)."""

CPU_HARD_SECONDS = 2
"""Between SIGXCPU and the SIGKILL for a process that ignores it."""


def offer(limits: Limits, machine: Machine) -> Offer | None:
    """What rlimits can hold here."""
    if resource is None or not machine.may(Mechanism.RLIMIT):
        return None
    holds: dict[LimitName, Enforcement] = {}
    rows: dict[LimitName, tuple[tuple[int, int, int], ...]] = {}
    for name, row, note in _wanted(limits, machine):
        rows[name] = (_capped(row),)
        holds[name] = Enforcement(by=Mechanism.RLIMIT, hard=name is not LimitName.MEMORY, note=note)
    return Offer(mechanism=Mechanism.RLIMIT, holds=holds, rlimits=rows)


def _wanted(limits: Limits, machine: Machine) -> list[tuple[LimitName, tuple[int, int, int], str]]:
    wanted = []
    if limits.open_files is not None:
        row = (resource.RLIMIT_NOFILE, limits.open_files, limits.open_files)
        wanted.append((LimitName.OPEN_FILES, row, "each process"))
    if limits.file_size is not None:
        wanted.append((LimitName.FILE_SIZE, (resource.RLIMIT_FSIZE, limits.file_size, limits.file_size), "each file"))
    if limits.cpu_time is not None:
        soft = max(1, math.ceil(limits.cpu_time))
        row = (resource.RLIMIT_CPU, soft, soft + CPU_HARD_SECONDS)
        wanted.append((LimitName.CPU_TIME, row, "each process by RLIMIT_CPU, their sum by the watchdog"))
    if limits.memory is not None:
        size = limits.memory + DATA_HEADROOM
        note = "private memory of each process by RLIMIT_DATA, with 256 MiB of headroom; shared memory is not counted"
        wanted.append((LimitName.MEMORY, (resource.RLIMIT_DATA, size, size), note))
    if limits.processes is not None and machine.uid != 0 and machine.user_tasks is not None:
        # RLIMIT_NPROC counts all tasks of the user, those outside the sandbox too; root is exempt from it.
        count = limits.processes + machine.user_tasks
        wanted.append((LimitName.PROCESSES, (resource.RLIMIT_NPROC, count, count), "beside what the user runs already"))
    return wanted


def _capped(row: tuple[int, int, int]) -> tuple[int, int, int]:
    """A hard limit cannot be raised: where the machine's is lower already, that one stands."""
    number, soft, hard = row
    _, ceiling = resource.getrlimit(number)
    if ceiling == resource.RLIM_INFINITY:
        return row
    return number, min(soft, ceiling), min(hard, ceiling)
