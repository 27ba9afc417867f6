"""What this machine offers to hold limits with, found once per run.

May import model, unified. Reads /proc and /sys only; makes and removes one probe control group, and a scope where systemd is to give one.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Self

from msgspec import Struct, field
from msgspec.structs import replace

from safe_exec.keeper import landlock, procfs, seccomp
from safe_exec.model.limits import Mechanism
from safe_exec.sandbox import keeper_process
from safe_exec.sandbox.host import cgroup_delegation
from safe_exec.sandbox.mechanisms.bubblewrap import OLDEST

V1_CONTROLLERS = ("memory", "pids", "cpu", "cpuacct")
NO_LIMIT = 1 << 60
COUNTS_IN_NAMESPACES = (5, 14)
"""The version of Linux from which each user namespace counts tasks for RLIMIT_NPROC itself."""
NOT_LOOKED_FOR = "it was not looked for"
V2_CONTROLLERS = cgroup_delegation.CONTROLLERS


class HostCapabilities(Struct, frozen=True, kw_only=True):
    """What can hold limits here.

    ``v1`` maps a controller to the directory under which we may make groups; ``v2`` is such a directory of the unified
    tree whose children get ``v2_controllers``, our own where we must ``v2_needs_leaf`` first; ``v2_plain`` one where a group may be made
    but no controllers are had (it still gives ``cgroup.kill``). ``scope`` is what systemd makes for each sandbox, where that is the better
    way. ``memory_total`` is bytes, ``allowed`` the mechanisms that may be used at all. ``bubblewrap`` is the program where it does what
    is needed, ``landlock`` the version of it (0: none). ``counts_in_namespaces``: for an ordinary user it makes a user namespace, in which
    the system counts the user's processes anew.
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
        """Whether :func:`probe_isolation` has been here."""
        return self.bubblewrap_why_not != NOT_LOOKED_FOR

    def allows(self, mechanism: Mechanism) -> bool:
        """Whether a mechanism may be used."""
        return mechanism in self.allowed


def detect(allowed: frozenset[Mechanism] = frozenset(Mechanism)) -> HostCapabilities:
    """Look at the machine; every field is what was seen now."""
    if not sys.platform.startswith("linux"):
        no_filter = f"there is none for {sys.platform}"
        return HostCapabilities(
            platform=sys.platform,
            cpus=os.cpu_count() or 1,
            allowed=allowed,
            uid=_uid(),
            seccomp_why_not=no_filter,
        )
    mounts = _cgroup_mounts()
    own = _own_cgroups()
    v1, v1_why = _v1_parents(mounts, own)
    tree = (
        cgroup_delegation.CgroupHierarchy(
            root=mounts[""][0], own=_directory(mounts[""], own.get("", "/"))
        )
        if "" in mounts
        else None
    )
    ground, scope, scope_why = _v2_ground(tree, allowed)
    memory, swap = memory_and_swap()
    memory = least(memory, _memory_of_group(mounts, own))
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


BUBBLEWRAP_SECONDS = 10
INSTALL_BUBBLEWRAP = "install the package bubblewrap"
NOT_INSTALLED = f"it is not installed ({INSTALL_BUBBLEWRAP})"
REHEARSAL = (
    *(
        "--ro-bind",
        "/",
        "/",
        "--dev",
        "/dev",
        "--proc",
        "/proc",
        "--unshare-pid",
        "--unshare-net",
        "--die-with-parent",
    ),
    *("--perms", "0755", "--size", "4096", "--tmpfs", "/tmp", "true"),  # noqa: S108
)
"""What bubblewrap is asked to do to see whether it can."""


def probe_isolation(
    machine: HostCapabilities, bwrap_probe: BwrapProbe | None = None, *, version: bool = False
) -> HostCapabilities:
    """What can wall a kernel off here, tried: bubblewrap may be there and not allowed to make namespaces (Docker, AppArmor).

    Costs a start of bubblewrap, for runs that ask for walls only; ``bwrap_probe`` is one that was begun before. What ``version`` it is, is asked
    for those who want to know, and where it fails.
    """
    if not machine.platform.startswith("linux"):
        return replace(machine, bubblewrap_why_not=f"there is none for {machine.platform}")
    with bwrap_probe or BwrapProbe() as tried:
        fails = tried.outcome()
    version_text = (
        _version_of(tried.path) if tried.path is not None and (version or fails) else None
    )
    why_not = (_too_old(version_text) or fails) if fails else ""
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
    """Whether RLIMIT_NPROC counts in each user namespace for itself, and bubblewrap makes one (set-user-id root it does not)."""
    release = re.match(r"(\d+)\.(\d+)", platform.release())
    return (
        release is not None
        and (int(release[1]), int(release[2])) >= COUNTS_IN_NAMESPACES
        and not os.stat(bubblewrap).st_mode & stat.S_ISUID
    )


class BwrapProbe:
    """Whether bubblewrap does what is needed: a process that begins at once, so that other things can be done meanwhile.

    A version that is too old fails for an option that it does not know. A context manager, which leaves no process behind.
    """

    def __init__(self) -> None:
        """Begin."""
        self.path = shutil.which("bwrap")
        self._process: subprocess.Popen[str] | None = None
        self._trouble = "" if self.path is not None else NOT_INSTALLED
        if self.path is None:
            return
        try:
            self._process = subprocess.Popen(
                [self.path, *REHEARSAL],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
            )
        except OSError as error:
            self._trouble = str(error)

    def outcome(self) -> str:
        """Wait for the end. Why bubblewrap does not do what is needed; empty when it does."""
        if self._process is None:
            return self._trouble
        try:
            _, errors = self._process.communicate(timeout=BUBBLEWRAP_SECONDS)
        except subprocess.TimeoutExpired as error:
            return str(error)
        return (
            (errors.strip().splitlines() or ["it failed without a word"])[-1]
            if self._process.returncode
            else ""
        )

    def close(self) -> None:
        """Wait for its end, whether anybody asked for its outcome or not.

        It is not killed: bubblewrap's inner process waits for a word of the outer one, and would for ever.
        """
        if self._process is None:
            return
        with self._process as process:
            try:
                process.communicate(timeout=BUBBLEWRAP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _version_of(path: str) -> str | None:
    """The last word of ``bubblewrap 0.8.0``; ``None`` where it does not say."""
    try:
        output = subprocess.run(
            [path, "--version"],
            capture_output=True,
            text=True,
            timeout=BUBBLEWRAP_SECONDS,
            check=True,
        ).stdout
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return output.split()[-1] if output.split() else None


def _too_old(version: str | None) -> str:
    """Whether a version that failed is too old; empty where it is not, and where it says nothing."""
    numbers = tuple(map(int, re.findall(r"\d+", version or "")[: len(OLDEST)]))
    if not numbers or numbers >= OLDEST:
        return ""
    return f"version {version} is too old ({'.'.join(map(str, OLDEST))} is the oldest that will do)"


def _no_filter() -> str:
    """Why system calls cannot be filtered here; empty where they can."""
    machine = os.uname().machine
    return (
        ""
        if machine in seccomp.ARCHITECTURES and sys.maxsize > 1 << 32
        else f"there is none for {machine}"
    )


def _v2_ground(
    tree: cgroup_delegation.CgroupHierarchy | None, allowed: frozenset[Mechanism]
) -> tuple[cgroup_delegation.DelegationTarget, cgroup_delegation.Scope | None, str]:
    """Where groups of the unified tree may be made. systemd is asked only where no group is ours without it."""
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


def memory_and_swap() -> tuple[int | None, int | None]:
    """Total memory and swap in bytes, from /proc/meminfo; ``None`` where there is none such."""
    sizes = _meminfo()
    return sizes.get("MemTotal"), sizes.get("SwapTotal")


def _meminfo() -> dict[str, int]:
    sizes: dict[str, int] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key in ("MemTotal", "MemAvailable", "SwapTotal"):
                sizes[key] = int(value.split()[0]) * 1024
    return sizes


def least(*figures: int | None) -> int | None:
    """The smallest of those that are known."""
    return min((figure for figure in figures if figure is not None), default=None)


def _memory_of_group(mounts: Mapping[str, tuple[Path, str]], own: Mapping[str, str]) -> int | None:
    """What the group that we are in may use, a container's limit for instance; ``None`` for no limit."""
    if "memory" in mounts:
        stat = _directory(mounts["memory"], own.get("memory", "/")) / "memory.stat"
        with contextlib.suppress(OSError, ValueError, IndexError):
            rows = dict(line.split() for line in stat.read_text().splitlines())
            limit = int(rows["hierarchical_memory_limit"])
            return limit if limit < NO_LIMIT else None
    limits: list[int] = []
    if "" in mounts:
        top, directory = mounts[""][0], _directory(mounts[""], own.get("", "/"))
        while directory != top.parent and (directory == top or top in directory.parents):
            with contextlib.suppress(OSError, ValueError):
                limits.append(int((directory / "memory.max").read_text()))
            directory = directory.parent
    return min(limits, default=None)


def memory_available() -> int | None:
    """Bytes that can be used now without swapping anything out: the machine's, or what a group above leaves us. ``None``: not known."""
    return least(_meminfo().get("MemAvailable"), *(row for _, row in _left_in_groups()))


def _left_in_groups() -> Iterator[tuple[Path, int]]:
    """What each group that we are in may still use; cached files give way."""
    mounts, own = _cgroup_mounts(), _own_cgroups()
    for controller, limit, used, cached in (
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ("", "memory.max", "memory.current", "inactive_file"),
    ):
        for directory in _ancestors(mounts, own, controller):
            with contextlib.suppress(OSError, ValueError, KeyError):
                most = int((directory / limit).read_text())
                rows = dict(
                    line.split() for line in (directory / "memory.stat").read_text().splitlines()
                )
                if most < NO_LIMIT:
                    yield (
                        directory,
                        max(0, most - int((directory / used).read_text()) + int(rows[cached])),
                    )


def _ancestors(
    mounts: Mapping[str, tuple[Path, str]], own: Mapping[str, str], controller: str
) -> Iterator[Path]:
    """Our group of a controller and those above it."""
    if controller not in mounts:
        return
    top, directory = mounts[controller][0], _directory(mounts[controller], own.get(controller, "/"))
    while directory == top or top in directory.parents:
        yield directory
        directory = directory.parent


def cpus_available() -> int:
    """Processors that we may use: those that we are allowed on, or what a group's quota amounts to (a container's ``--cpus``)."""
    counts = [
        float(
            len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count() or 1
        )
    ]
    mounts, own = _cgroup_mounts(), _own_cgroups()
    for directory in _ancestors(mounts, own, "cpu"):
        with contextlib.suppress(OSError, ValueError):
            quota = int((directory / "cpu.cfs_quota_us").read_text())
            if quota > 0:
                counts.append(quota / int((directory / "cpu.cfs_period_us").read_text()))
    for directory in _ancestors(mounts, own, ""):
        with contextlib.suppress(OSError, ValueError):  # "max 100000": no quota
            share, period = map(int, (directory / "cpu.max").read_text().split())
            counts.append(share / period)
    return max(1, math.floor(min(counts) + 0.5))


def _cgroup_mounts() -> dict[str, tuple[Path, str]]:
    """Controller (``""`` for the unified tree) to its mount point and the root that is mounted there.

    The root differs from ``/`` inside a container that shares the host's cgroup namespace (proc_pid_mountinfo(5)).
    """
    mounts: dict[str, tuple[Path, str]] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            mount_fields, _, type_fields = line.partition(" - ")
            kind, _, options = type_fields.split(" ", 2)
            root, point = mount_fields.split()[3:5]
            if kind == "cgroup2":
                mounts.setdefault("", (Path(point), root))
            elif kind == "cgroup":
                for controller in options.rsplit(" ", 1)[-1].split(","):
                    mounts.setdefault(controller, (Path(point), root))
    return mounts


def _own_cgroups() -> dict[str, str]:
    """Controller to the path of the group that this process is in (cgroups(7))."""
    own: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            for controller in controllers.split(","):
                own[controller] = path
    return own


def _directory(mount: tuple[Path, str], path: str) -> Path:
    point, root = mount
    if root != "/" and path.startswith(root):
        path = path[len(root) :]
    return point / path.lstrip("/")


def _v1_parents(
    mounts: Mapping[str, tuple[Path, str]], own: Mapping[str, str]
) -> tuple[dict[str, Path], str]:
    parents: dict[str, Path] = {}
    reason = "cgroup v1 controllers are not mounted"
    for controller in V1_CONTROLLERS:
        if controller not in mounts:
            continue
        directory = _directory(mounts[controller], own.get(controller, "/"))
        trouble = cgroup_delegation.can_make_group(directory)
        if trouble:
            reason = trouble
        else:
            parents[controller] = directory
    return parents, "" if parents else reason


def _v2_plain(tree: cgroup_delegation.CgroupHierarchy | None) -> Path | None:
    return None if tree is None or cgroup_delegation.can_join_below(tree.own) else tree.own
