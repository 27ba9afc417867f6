"""Detects which mechanisms can enforce limits on this machine, once per run.

Reads /proc and /sys, makes and removes a probe cgroup, and asks systemd for a probe scope.
"""

from __future__ import annotations

import os
import platform
import re
import stat
import sys
from collections.abc import Mapping
from pathlib import Path

from msgspec import Struct, field
from msgspec.structs import replace

from safe_exec.keeper import landlock, procfs, seccomp
from safe_exec.model.limits import Mechanism
from safe_exec.sandbox import keeper_process
from safe_exec.sandbox.host import cgroup_delegation
from safe_exec.sandbox.host.bwrap_probe import BwrapProbe, too_old, version_of
from safe_exec.sandbox.host.resources import (
    cgroup_directory,
    cgroup_memory_limit,
    cgroup_mounts,
    least,
    memory_and_swap,
    own_cgroups,
)

V1_CONTROLLERS = ("memory", "pids", "cpu", "cpuacct")
# Since this version of Linux each user namespace has its own count for RLIMIT_NPROC.
COUNTS_IN_NAMESPACES = (5, 14)
NOT_LOOKED_FOR = "it was not looked for"
V2_CONTROLLERS = cgroup_delegation.CONTROLLERS


class HostCapabilities(Struct, frozen=True, kw_only=True):
    """The mechanisms that can enforce limits and walls here.

    ``v1`` maps a controller to the directory in which we can make cgroups. ``v2`` is such a
    directory of the unified hierarchy; its children get ``v2_controllers``. If ``v2_needs_leaf``,
    it is our own cgroup, and our processes must move to a leaf first. ``v2_plain`` is a directory
    for cgroups without controllers, which still have ``cgroup.kill``. ``scope`` is set if systemd
    should make a scope for each sandbox. ``memory_total`` is in bytes; ``allowed`` are the
    mechanisms that the user allows. ``bubblewrap`` is the path of a working program, ``landlock``
    the ABI version (0 if missing). ``counts_in_namespaces`` is true if RLIMIT_NPROC has its own
    count in bubblewrap's user namespace.
    """

    platform: str = "linux"
    uid: int = 0
    cpus: int = 1
    memory_total: int | None = None
    swap_total: int | None = None
    v1: Mapping[str, Path] = field(default_factory=dict)
    v2: Path | None = None
    v2_controllers: frozenset[str] = frozenset()
    v2_needs_leaf: bool = False
    v2_plain: Path | None = None
    v2_why_not: str = ""
    scope: cgroup_delegation.Scope | None = None
    scope_why_not: str = ""
    v1_why_not: str = ""
    user_tasks: int | None = None
    bubblewrap: str | None = None
    bubblewrap_version: str | None = None
    bubblewrap_why_not: str = NOT_LOOKED_FOR
    counts_in_namespaces: bool = False
    landlock: int = 0
    seccomp_why_not: str = ""
    allowed: frozenset[Mechanism] = frozenset(Mechanism)

    @property
    def is_isolation_probed(self) -> bool:
        """Whether ``probe_isolation`` has filled in the means of isolation."""
        return self.bubblewrap_why_not != NOT_LOOKED_FOR

    def allows(self, mechanism: Mechanism) -> bool:
        """Whether the user allows a mechanism."""
        return mechanism in self.allowed


def detect(allowed: frozenset[Mechanism] = frozenset(Mechanism)) -> HostCapabilities:
    """Detect the capabilities of this machine, without those of isolation."""
    if not sys.platform.startswith("linux"):
        no_filter = f"there is none for {sys.platform}"
        return HostCapabilities(
            platform=sys.platform,
            cpus=os.cpu_count() or 1,
            allowed=allowed,
            uid=_uid(),
            seccomp_why_not=no_filter,
        )
    mounts = cgroup_mounts()
    own = own_cgroups()
    v1, v1_why = _v1_parents(mounts, own)
    tree = (
        cgroup_delegation.CgroupHierarchy(
            root=mounts[""][0], own=cgroup_directory(mounts[""], own.get("", "/"))
        )
        if "" in mounts
        else None
    )
    ground, scope, scope_why = _v2_ground(tree, allowed)
    memory, swap = memory_and_swap()
    memory = least(memory, cgroup_memory_limit(mounts, own))
    return HostCapabilities(
        uid=_uid(),
        cpus=len(os.sched_getaffinity(0)),
        memory_total=memory,
        swap_total=swap,
        v1=v1,
        v2=ground.parent,
        v2_controllers=ground.controllers,
        v2_needs_leaf=ground.needs_leaf,
        v2_plain=None if ground.parent else _v2_plain(tree),
        v2_why_not=ground.why_not,
        scope=scope,
        scope_why_not=scope_why,
        v1_why_not=v1_why,
        user_tasks=None
        if os.geteuid() == 0 or "pids" in v1 or ground.parent or scope
        else procfs.tasks_of(os.getuid()),
        seccomp_why_not=_no_filter(),
        allowed=allowed,
    )


def probe_isolation(
    machine: HostCapabilities, bwrap_probe: BwrapProbe | None = None, *, version: bool = False
) -> HostCapabilities:
    """Return ``machine`` with its means of isolation.

    ``bwrap_probe`` is a probe that was started before. The version of bubblewrap is determined if
    ``version`` is true or the probe fails.
    """
    # Docker and AppArmor can forbid namespaces although bubblewrap is installed, so it must be run
    # once. Only runs with walls need this start.
    if not machine.platform.startswith("linux"):
        return replace(machine, bubblewrap_why_not=f"there is none for {machine.platform}")
    with bwrap_probe or BwrapProbe() as tried:
        fails = tried.outcome()
    version_text = version_of(tried.path) if tried.path is not None and (version or fails) else None
    why_not = (too_old(version_text) or fails) if fails else ""
    return replace(
        machine,
        bubblewrap=None if why_not else tried.path,
        bubblewrap_version=version_text,
        bubblewrap_why_not=why_not,
        counts_in_namespaces=not why_not
        and tried.path is not None
        and _counts_in_namespaces(tried.path),
        landlock=landlock.abi(),
    )


def _counts_in_namespaces(bubblewrap: str) -> bool:
    """Whether RLIMIT_NPROC counts separately in bubblewrap's user namespace."""
    # A set-user-id bubblewrap needs no user namespace and makes none.
    release = re.match(r"(\d+)\.(\d+)", platform.release())
    return (
        release is not None
        and (int(release[1]), int(release[2])) >= COUNTS_IN_NAMESPACES
        and not os.stat(bubblewrap).st_mode & stat.S_ISUID
    )


def _no_filter() -> str:
    """Return why system calls cannot be filtered here, "" if they can."""
    # The filters are built in advance, for 64-bit processes of some architectures.
    machine = os.uname().machine
    return (
        ""
        if machine in seccomp.SECCOMP and sys.maxsize > 1 << 32
        else f"there is none for {machine}"
    )


def _v2_ground(
    tree: cgroup_delegation.CgroupHierarchy | None, allowed: frozenset[Mechanism]
) -> tuple[cgroup_delegation.DelegationTarget, cgroup_delegation.Scope | None, str]:
    """Return the parent for the cgroups of sandboxes, or systemd's scope, or why there is none."""
    # A probe scope costs a start of systemd-run. So ask systemd only if no cgroup is usable without
    # it.
    if tree is None:
        return (
            cgroup_delegation.DelegationTarget(why_not="the unified hierarchy is not mounted"),
            None,
            "the unified hierarchy is not mounted",
        )
    systemd = keeper_process.systemd_is_booted()
    ground = cgroup_delegation.find(tree, systemd=systemd)
    if ground.parent is not None and not ground.owned_by_systemd:
        return ground, None, "it is not needed: groups can be made without"
    if not systemd:
        return ground, None, "systemd is not the init here"
    if Mechanism.SYSTEMD not in allowed:
        return ground, None, "it is not among the mechanisms allowed"
    return ground, *cgroup_delegation.find_scope(tree, _uid())


def _uid() -> int:
    return os.geteuid() if hasattr(os, "geteuid") else 0


def _v1_parents(
    mounts: Mapping[str, tuple[Path, str]], own: Mapping[str, str]
) -> tuple[dict[str, Path], str]:
    parents: dict[str, Path] = {}
    reason = "cgroup v1 controllers are not mounted"
    for controller in V1_CONTROLLERS:
        if controller not in mounts:
            continue
        directory = cgroup_directory(mounts[controller], own.get(controller, "/"))
        trouble = cgroup_delegation.can_make_group(directory)
        if trouble:
            reason = trouble
        else:
            parents[controller] = directory
    return parents, "" if parents else reason


def _v2_plain(tree: cgroup_delegation.CgroupHierarchy | None) -> Path | None:
    return None if tree is None or cgroup_delegation.can_join_below(tree.own) else tree.own
