"""Plans the walls around one kernel on this machine.

The result is plain data for the keeper (keeper/bwrap.py and keeper/child.py).
"""

from __future__ import annotations

import base64
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

import safe_exec
from safe_exec.errors import IsolationError
from safe_exec.keeper.child import LandlockRules, Walls
from safe_exec.keeper.protocol import BwrapSetup, LimitedDisk
from safe_exec.model.evidence import IsolationFacts
from safe_exec.model.limits import (
    Enforcement,
    FolderUse,
    Isolation,
    LimitName,
    Mechanism,
    RepositoryUse,
    SystemCalls,
    Wall,
)
from safe_exec.sandbox.host.repository import SYSTEM, repository_access
from safe_exec.sandbox.isolation_facts import KernelPaths, facts_of, inside_places, outside_places
from safe_exec.sandbox.mechanisms import bubblewrap
from safe_exec.sandbox.plan import SpawnPlan
from safe_exec.sandbox.sandbox import WallSetup
from safe_exec.sandbox.visible_paths import homes, interpreters, visible

# A user that owns no files: no distribution allocates ids in this range (systemd, UIDs-GIDs.md).
OTHER_UID = 1_060_660
INODE_BYTES = 4096
LEAST_INODES = 1024
NO_WALL = Enforcement(by=Mechanism.NONE, hard=False)


class PlannedKernel(Struct, frozen=True, kw_only=True):
    """A kernel that is about to be started, with its plan and its directories."""

    plan: SpawnPlan
    argv: Sequence[str]
    env: Mapping[str, str]
    cwd: Path
    runtime: Path

    @property
    def folder(self) -> Path:
        """The folder without links; only such a path can be mounted over."""
        return self.cwd.resolve()

    @property
    def owner(self) -> int | None:
        """The id of the user that the kernel runs as; ``None`` if it is the runner's own."""
        return (
            OTHER_UID
            if self.plan.isolation.other_user and self.plan.enclosed and os.geteuid() == 0
            else None
        )


class Enclosure(Struct, frozen=True, kw_only=True):
    """The keeper's part of the walls, the kernel's environment, and facts for the user."""

    setup: WallSetup
    env: Mapping[str, str]
    cwd: str
    facts: IsolationFacts
    warnings: tuple[str, ...] = ()


def enclose(kernel: PlannedKernel) -> Enclosure:
    """Plan the walls of one kernel. Raises IsolationError if a wall is impossible."""
    requested = kernel.plan.isolation
    kernel = replace(kernel, plan=replace(kernel.plan, isolation=settled(requested)))
    demand_narrow(kernel.folder, requested)
    hideable = homes()
    paths = KernelPaths(
        folder=kernel.folder,
        runtime=kernel.runtime,
        homes=hideable,
        readable=visible(kernel.argv, kernel.env),
        interpreters=interpreters(kernel.argv, kernel.env),
        kernel_home=kernel.env.get("HOME"),
        repository=repository_access(
            kernel.plan.isolation,
            kernel.folder,
            homes=hideable,
            has_disk_limit=LimitName.DISK in kernel.plan.enforcement,
        ),
    )
    # Landlock cannot give the kernel a /tmp of its own. TMPDIR puts its temporary files into a
    # directory that is removed with the run.
    own_tmp = (
        {"TMPDIR": str(kernel.runtime)}
        if kernel.plan.landlock and kernel.plan.isolation.read_only_system
        else {}
    )
    program = kernel.plan.enclosed
    setup = WallSetup(
        bwrap=_bubblewrap(kernel, paths, program) if program else None,
        walls=_own_walls(kernel, paths),
        owner=kernel.owner,
        discarded=outside_places(kernel.plan, paths),
    )
    return Enclosure(
        setup=setup,
        env={**kernel.env, **own_tmp},
        # The path that the user gave may contain a link in a hidden directory. Use the real path.
        cwd=str(kernel.folder),
        facts=facts_of(kernel.plan, paths),
        warnings=(paths.repository.warning,) if paths.repository.warning else (),
    )


def demand_narrow(folder: Path, isolation: Isolation) -> None:
    """Raise IsolationError if a place that must be closed lies in the notebook's folder."""
    # The folder and everything in it stays open, so it must not contain a home or /usr.
    closed = [
        *(homes() if isolation.hide_home else ()),
        *(SYSTEM if isolation.read_only_system else ()),
    ]
    for path in closed:
        if path.is_relative_to(folder):
            kind = "a home" if path not in SYSTEM else "a part of the system"
            raise IsolationError(
                f"the notebook's folder {folder} is, or holds, {kind} that is to be walled "
                f"off ({path})"
            )


def settled(isolation: Isolation) -> Isolation:
    """Return ``isolation`` with its paths resolved on this machine. Raises IsolationError.

    Paths to hide that do not exist are dropped.
    """
    settings: dict[str, Any] = {
        name: tuple(map(_without_links, getattr(isolation, name))) for name in _PATHS
    }
    # A link in a hidden place cannot be followed inside. So open both the link's path and its
    # target.
    for name in _OPENED:
        settings[name] = tuple(
            dict.fromkeys(form for path in getattr(isolation, name) for form in _both_forms(path))
        )
    for name in (*_OPENED, "devices"):
        for path in settings[name]:
            if not os.path.exists(path):
                raise IsolationError(f"isolation: {name}: {path}: no such file or directory")
    for path in settings["devices"]:
        if not path.startswith("/dev/"):
            raise IsolationError(f"isolation: devices: {path} is not below /dev")
    if "/" in (*settings["writable"], *settings["show"], *settings["hide"]):
        raise IsolationError("isolation: / itself can be neither writable, nor shown, nor hidden")
    settings["hide"] = tuple(path for path in settings["hide"] if os.path.exists(path))
    return replace(isolation, **settings)


_PATHS = ("hide", "devices")
_OPENED = ("writable", "show")


def _without_links(path: str) -> str:
    return os.path.realpath(os.path.expanduser(path))


def _both_forms(path: str) -> tuple[str, str]:
    """Return a path with its parent's links resolved, and the same path with all links resolved."""
    plain = os.path.abspath(os.path.expanduser(path))
    return os.path.join(
        os.path.realpath(os.path.dirname(plain)), os.path.basename(plain)
    ), os.path.realpath(plain)


def written_repository(isolation: Isolation, folder: Path, *, has_disk_limit: bool) -> Path | None:
    """Return the repository around a folder, if isolation lets a notebook there write to it."""
    try:
        access = repository_access(
            settled(isolation), folder.resolve(), homes=homes(), has_disk_limit=has_disk_limit
        )
    except IsolationError:
        # The run itself reports this error.
        return None
    return access.root if access.use is RepositoryUse.WRITE else None


def _bubblewrap(kernel: PlannedKernel, paths: KernelPaths, program: str) -> BwrapSetup:
    disk, isolation = _disk(kernel), kernel.plan.isolation
    sandbox_paths = bubblewrap.SandboxPaths(
        folder=kernel.folder,
        runtime=kernel.runtime,
        homes=paths.homes,
        visible=paths.readable,
        files=frozenset(path for path in map(Path, isolation.hide) if not path.is_dir()),
        read_only=tuple(path for path in kernel.runtime.glob("*") if path.is_file()),
        disk=Path(disk.base) if disk else None,
        repository=paths.repository.root if paths.repository.is_visible else None,
        repository_is_writable=paths.repository.use is RepositoryUse.WRITE,
        interpreters=paths.interpreters,
        links=frozenset(
            path for path in map(Path, (*isolation.writable, *isolation.show)) if path.is_symlink()
        ),
    )
    is_root = os.geteuid() == 0
    devices = bubblewrap.shared_devices(isolation, root=is_root)
    return BwrapSetup(
        argv=tuple(
            bubblewrap.arguments(
                program, isolation, sandbox_paths, shm_bytes=kernel.plan.shm, root=is_root
            )
        ),
        python=sys.executable,
        package_root=str(Path(safe_exec.__file__).parent.parent),
        sockets=str(kernel.runtime),
        disk=disk,
        discarded=inside_places(kernel.plan, paths),
        devices=tuple(path for path in devices if os.path.exists(path)),
    )


def _disk(kernel: PlannedKernel) -> LimitedDisk | None:
    """Return the file system of limited size, if a limit or a copy of the folder needs one."""
    isolation = kernel.plan.isolation
    if kernel.plan.disk is None and isolation.folder is not FolderUse.COPY:
        return None
    size = kernel.plan.disk if kernel.plan.disk is not None else bubblewrap.TMP_BYTES
    return LimitedDisk(
        base=str(kernel.runtime / "disk"),
        folder=str(kernel.folder),
        size=size,
        inodes=max(LEAST_INODES, size // INODE_BYTES),
        write_back=isolation.write_back and isolation.folder is FolderUse.WRITE,
        owner=kernel.owner,
    )


def _own_walls(kernel: PlannedKernel, paths: KernelPaths) -> Walls | None:
    """Return the restrictions that the kernel's process applies to itself, if any."""
    isolation = kernel.plan.isolation
    drop_capabilities = bubblewrap.drops_capabilities(isolation, root=os.geteuid() == 0)
    landlock = _landlock(kernel, paths) if kernel.plan.landlock else None
    filter_program = _system_call_filter(kernel.plan)
    if kernel.owner is None and not drop_capabilities and not landlock and not filter_program:
        return None
    return Walls(
        uid=kernel.owner,
        drop_capabilities=drop_capabilities,
        landlock=landlock,
        seccomp=filter_program,
    )


def _system_call_filter(plan: SpawnPlan) -> str | None:
    if plan.walls.get(Wall.SYSTEM_CALLS, NO_WALL).by is not Mechanism.SECCOMP:
        return None
    from safe_exec.sandbox.host import seccomp_policy

    refuses = plan.isolation.system_calls is SystemCalls.REFUSE
    return base64.b64encode(seccomp_policy.load("errno" if refuses else "kill")).decode()


def _landlock(kernel: PlannedKernel, paths: KernelPaths) -> LandlockRules:
    """Return the paths that Landlock leaves readable and writable."""
    # A directory opened for writing can be read too, so no hidden place may lie in one.
    isolation = kernel.plan.isolation
    folder, repository = str(kernel.folder), paths.repository
    roots = [str(repository.root)] if repository.is_visible else []
    extra = [
        str(kernel.runtime),
        *isolation.writable,
        *(roots if repository.use is RepositoryUse.WRITE else []),
    ]
    hidden = [*(map(str, paths.homes) if isolation.hide_home else ()), *isolation.hide]
    # Landlock cannot make a copy of the folder, so FolderUse.COPY only closes it to writes.
    closed = hidden if isolation.folder is FolderUse.WRITE else [*hidden, folder]
    # Programs must write to /dev/null and terminals. The permissions of other devices still apply.
    writable = ["/tmp", "/dev"] if isolation.read_only_system else _all_but(closed)  # noqa: S108
    writable += [*([folder] if isolation.folder is FolderUse.WRITE else []), *extra]
    readable = [*map(str, paths.readable), *isolation.show, *roots, folder]
    opened = [part for path in readable for part in parts_beside(path, hidden)]
    return LandlockRules(
        readable=(*_all_but(hidden), *opened),
        writable=tuple(part for path in writable for part in parts_beside(path, closed)),
        tcp=None if isolation.network else False,
    )


def _all_but(closed: Sequence[str]) -> list[str]:
    from safe_exec.keeper import landlock

    return landlock.all_but(closed) if closed else ["/"]


def parts_beside(path: str, hidden: Sequence[str]) -> list[str]:
    """Return the parts of a tree that can be opened without opening a hidden one."""
    # A Landlock rule opens everything below its path and has no exceptions (landlock(7)). So open
    # the siblings of each hidden part instead.
    inner = [other for other in hidden if other != path and Path(other).is_relative_to(path)]
    if not inner:
        return [path]
    try:
        children = [os.path.join(path, name) for name in sorted(os.listdir(path))]
    except OSError:
        return []
    return [
        part
        for child in children
        if child not in inner and not os.path.islink(child)
        for part in parts_beside(child, inner)
    ]
