"""Control groups version 2: one group below the nearest one that hands its controllers on.

Sources: the kernel's admin-guide/cgroup-v2. ``memory.peak`` exists since 5.19, ``cgroup.kill`` since 5.14,
``memory.events.local`` since 5.2; what an older kernel lacks is simply not read. ``memory.oom.group`` stays 0: a killed
worker must not take the kernel with it.
"""

from __future__ import annotations

from safe_exec.model import Enforcement, LimitName, Limits, Mechanism
from safe_exec.sandbox.machine import Machine
from safe_exec.sandbox.plan import CgroupWork, Offer

PERIOD_US = 100_000


def offer(limits: Limits, machine: Machine, name: str) -> Offer | None:
    """What a group of the unified hierarchy can hold here; ``name`` is its directory."""
    if not machine.may(Mechanism.CGROUP_V2) or machine.v2 is None:
        return None
    group = machine.v2 / name
    writes: list[tuple[str, str]] = []
    holds: dict[LimitName, Enforcement] = {}
    if limits.memory is not None and "memory" in machine.v2_controllers:
        writes.append((str(group / "memory.max"), str(limits.memory)))
        holds[LimitName.MEMORY] = Enforcement(by=Mechanism.CGROUP_V2, hard=True, note="no swap")
    if limits.processes is not None and "pids" in machine.v2_controllers:
        writes.append((str(group / "pids.max"), str(limits.processes)))
        holds[LimitName.PROCESSES] = Enforcement(by=Mechanism.CGROUP_V2, hard=True, note="threads count")
    if limits.cpus is not None and "cpu" in machine.v2_controllers:
        writes.append((str(group / "cpu.max"), f"{max(1000, round(limits.cpus * PERIOD_US))} {PERIOD_US}"))
        holds[LimitName.CPUS] = Enforcement(by=Mechanism.CGROUP_V2, hard=True)
    work = CgroupWork(
        dirs=(str(group),),
        writes=tuple(writes),
        # Absent where swap accounting is off.
        writes_where_present=((str(group / "memory.swap.max"), "0"),) if limits.memory is not None else (),
        joins=(str(group / "cgroup.procs"),),
        kill_files=(str(group / "cgroup.kill"),),
        memory_file=str(group / "memory.current"),
        counter_files=tuple(
            str(group / name)
            for name in ("memory.events", "memory.events.local", "memory.peak", "pids.events", "pids.peak", "cpu.stat")
        ),
    )
    return Offer(mechanism=Mechanism.CGROUP_V2, holds=holds, cgroup=work)
