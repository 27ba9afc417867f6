"""cgroups version 2: one cgroup below the nearest one that delegates its controllers.

Source: the kernel's admin-guide/cgroup-v2.
"""

from __future__ import annotations

from pathlib import Path

from msgspec import Struct

from safe_exec.model.limits import Enforcement, LimitName, Limits, Mechanism
from safe_exec.sandbox.host import cgroup_delegation
from safe_exec.sandbox.host.capabilities import HostCapabilities
from safe_exec.sandbox.mechanisms.offers import ANYWHERE, Placement
from safe_exec.sandbox.plan import CgroupPlan, Delegation, Offer

PERIOD_US = 100_000


class _Place(Struct, frozen=True, kw_only=True):
    """The parent of the sandbox's cgroup, and the mechanism that provides it."""

    by: Mechanism
    parent: Path
    controllers: frozenset[str]
    note: str = ""
    leaf: str | None = None
    launcher: tuple[str, ...] = ()


def _place(machine: HostCapabilities, name: str) -> _Place | None:
    """Return the place of the sandbox's cgroup, in a systemd scope if there is one."""
    scope = machine.scope
    if scope is not None and machine.allows(Mechanism.SYSTEMD):
        owner = "the system's" if scope.runtime is None else "the user's"
        note = f"a scope of {owner} systemd"
        launcher = scope.command(name)
        return _Place(
            by=Mechanism.SYSTEMD,
            parent=scope.group(name),
            controllers=scope.controllers,
            note=note,
            leaf="keeper",
            launcher=launcher,
        )
    if machine.v2 is not None and machine.allows(Mechanism.CGROUP_V2):
        leaf = cgroup_delegation.LEAF if machine.v2_needs_leaf else None
        return _Place(
            by=Mechanism.CGROUP_V2, parent=machine.v2, controllers=machine.v2_controllers, leaf=leaf
        )
    return None


def offer(
    limits: Limits, machine: HostCapabilities, placement: Placement = ANYWHERE
) -> Offer | None:
    """Return the offer of cgroups version 2."""
    name = placement.cgroup
    place = _place(machine, name)
    if place is None:
        return None
    group = place.parent / name
    writes: list[tuple[str, str]] = []
    holds: dict[LimitName, Enforcement] = {}

    def hold(limit: LimitName, file: str, value: str, note: str = "") -> None:
        writes.append((str(group / file), value))
        holds[limit] = Enforcement(
            by=place.by, hard=True, note="; ".join(part for part in (note, place.note) if part)
        )

    # ``memory.oom.group`` stays 0: a worker that is killed for memory must not take the kernel with
    # it.
    if limits.memory is not None and "memory" in place.controllers:
        hold(LimitName.MEMORY, "memory.max", str(limits.memory), "no swap")
    if limits.processes is not None and "pids" in place.controllers:
        hold(LimitName.PROCESSES, "pids.max", str(limits.processes), "threads count")
    if limits.cpus is not None and "cpu" in place.controllers:
        hold(LimitName.CPUS, "cpu.max", f"{max(1000, round(limits.cpus * PERIOD_US))} {PERIOD_US}")
    delegation = None
    if place.leaf is not None:
        delegation = Delegation(
            group=str(place.parent),
            leaf=str(place.parent / place.leaf),
            controllers=tuple(
                controller
                for controller in cgroup_delegation.CONTROLLERS
                if controller in place.controllers
            ),
            launcher=place.launcher,
            environment=machine.scope.environment if place.launcher and machine.scope else {},
        )
    work = CgroupPlan(
        delegation=delegation,
        dirs=(str(group),),
        writes=tuple(writes),
        # This file does not exist if swap accounting is off.
        writes_where_present=((str(group / "memory.swap.max"), "0"),)
        if limits.memory is not None
        else (),
        joins=(str(group / "cgroup.procs"),),
        kill_files=(str(group / "cgroup.kill"),),
        memory_file=str(group / "memory.current"),
        # memory.peak exists since Linux 5.19, cgroup.kill since 5.14, memory.events.local since
        # 5.2. Files that an older kernel lacks are not read.
        counter_files=tuple(
            str(group / name)
            for name in (
                "memory.events",
                "memory.events.local",
                "memory.peak",
                "pids.events",
                "pids.peak",
                "cpu.stat",
            )
        ),
    )
    return Offer(mechanism=place.by, holds=holds, cgroup=work)
