"""cgroups version 1: one cgroup per controller, with limits for the whole sandbox.

Sources: the kernel's admin-guide/cgroup-v1 (memory.rst, pids.rst) and sched-bwc.rst.
"""

from __future__ import annotations

from pathlib import Path

from safe_exec.model.limits import Enforcement, LimitName, Limits, Mechanism
from safe_exec.sandbox.host.capabilities import HostCapabilities
from safe_exec.sandbox.mechanisms.offers import ANYWHERE, Placement
from safe_exec.sandbox.plan import CgroupPlan, Offer

PERIOD_US = 100_000


def offer(
    limits: Limits, machine: HostCapabilities, placement: Placement = ANYWHERE
) -> Offer | None:
    """Return the offer of the writable v1 controllers."""
    name = placement.cgroup
    if not machine.allows(Mechanism.CGROUP_V1) or not machine.v1 or machine.v2 or machine.scope:
        return None
    work = CgroupPlan()
    holds: dict[LimitName, Enforcement] = {}
    for part_work, part_holds in (
        _memory(limits, machine, name),
        _pids(limits, machine, name),
        _cpu(limits, machine, name),
    ):
        work = work.plus(part_work)
        holds.update(part_holds)
    return Offer(mechanism=Mechanism.CGROUP_V1, holds=holds, cgroup=work.plus(_kill(machine, name)))


def _kill(machine: HostCapabilities, name: str) -> CgroupPlan:
    """Return the plan for a cgroup that kills all its processes at once."""
    # On a hybrid host a cgroup of the unified tree has no controllers, but it has ``cgroup.kill``
    # (since Linux 5.14). It killed a daemon that had forked twice in 0.7 ms [measured].
    if machine.v2_plain is None:
        return CgroupPlan()
    group = machine.v2_plain / name
    return CgroupPlan(
        dirs=(str(group),),
        joins=(str(group / "cgroup.procs"),),
        kill_files=(str(group / "cgroup.kill"),),
    )


def _memory(
    limits: Limits, machine: HostCapabilities, name: str
) -> tuple[CgroupPlan, dict[LimitName, Enforcement]]:
    if "memory" not in machine.v1:
        return CgroupPlan(), {}
    group = machine.v1["memory"] / name
    writes: list[tuple[str, str]] = []
    holds: dict[LimitName, Enforcement] = {}
    if limits.memory is not None:
        writes.append((str(group / "memory.limit_in_bytes"), str(limits.memory)))
        swap, note = _swap(machine, group, limits.memory)
        writes.extend(swap)
        holds[LimitName.MEMORY] = Enforcement(by=Mechanism.CGROUP_V1, hard=True, note=note)
    # Kills are read from ``oom_kill`` of ``memory.oom_control``, which counts in the victim's own
    # cgroup. ``memory.failcnt`` stayed 0 through real kills [measured on Linux 6.18].
    return CgroupPlan(
        dirs=(str(group),),
        writes=tuple(writes),
        joins=(str(group / "cgroup.procs"),),
        counter_files=(str(group / "memory.oom_control"), str(group / "memory.max_usage_in_bytes")),
        memory_file=str(group / "memory.usage_in_bytes"),
    ), holds


def _swap(machine: HostCapabilities, group: Path, memory: int) -> tuple[list[tuple[str, str]], str]:
    """Return the writes that keep swap from extending the limit."""
    # If Linux accounts for swap, memory and swap together get the same limit. Otherwise swappiness
    # 0 makes swapping unlikely, without a guarantee.
    if (machine.v1["memory"] / "memory.memsw.limit_in_bytes").exists():
        return [
            (str(group / "memory.memsw.limit_in_bytes"), str(memory))
        ], "swap counts against the same limit"
    if machine.swap_total:
        return [
            (str(group / "memory.swappiness"), "0")
        ], "swap is not accounted here; swappiness is 0"
    return [], "this machine has no swap"


def _pids(
    limits: Limits, machine: HostCapabilities, name: str
) -> tuple[CgroupPlan, dict[LimitName, Enforcement]]:
    if "pids" not in machine.v1:
        return CgroupPlan(), {}
    group = machine.v1["pids"] / name
    holds: dict[LimitName, Enforcement] = {}
    writes: tuple[tuple[str, str], ...] = ()
    if limits.processes is not None:
        writes = ((str(group / "pids.max"), str(limits.processes)),)
        holds[LimitName.PROCESSES] = Enforcement(
            by=Mechanism.CGROUP_V1, hard=True, note="threads count"
        )
    return CgroupPlan(
        dirs=(str(group),),
        writes=writes,
        joins=(str(group / "cgroup.procs"),),
        counter_files=(str(group / "pids.events"), str(group / "pids.peak")),
    ), holds


def _cpu(
    limits: Limits, machine: HostCapabilities, name: str
) -> tuple[CgroupPlan, dict[LimitName, Enforcement]]:
    groups = sorted({machine.v1[c] / name for c in ("cpu", "cpuacct") if c in machine.v1})
    holds: dict[LimitName, Enforcement] = {}
    writes: tuple[tuple[str, str], ...] = ()
    if limits.cpus is not None and "cpu" in machine.v1:
        group = machine.v1["cpu"] / name
        quota = max(1000, round(limits.cpus * PERIOD_US))
        writes = (
            (str(group / "cpu.cfs_period_us"), str(PERIOD_US)),
            (str(group / "cpu.cfs_quota_us"), str(quota)),
        )
        holds[LimitName.CPUS] = Enforcement(by=Mechanism.CGROUP_V1, hard=True)
    return CgroupPlan(
        dirs=tuple(str(g) for g in groups),
        writes=writes,
        joins=tuple(str(g / "cgroup.procs") for g in groups),
        counter_files=(str(machine.v1["cpuacct"] / name / "cpuacct.usage"),)
        if "cpuacct" in machine.v1
        else (),
    ), holds
