"""Finds the cgroup of the unified hierarchy below which ours can be made.

May import procfs. Three rules decide (the kernel's admin-guide/cgroup-v2; systemd's "Control Group
APIs and Delegation"):

- a group with processes in it cannot hand controllers on to its children ("no internal processes");
  the root group can;
- a process may be moved by who may write to ``cgroup.procs`` of the nearest common ancestor of both
  groups ("delegation containment"). A login session and the hierarchy of the same user's systemd
  meet in a group of root's: nothing can be moved from one to the other, what is to live there must
  be born there;
- a group has one writer. Those of systemd's units are systemd's, which takes controllers away again
  as it sees fit, unless the unit has ``Delegate=yes``: then systemd marks it so (extended
  attribute, since version 251 for all to read) and keeps away.

And one of our own: where it would leave a group that bounds memory or processors, it is not done. A
container, a service or a batch job is given less than the machine so that what runs in it stays
below that.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from msgspec import Struct

from safe_exec.keeper import procfs

CONTROLLERS = ("memory", "pids", "cpu")
NEEDED = frozenset({"memory", "pids"})
UNITS = (".slice", ".scope", ".service", ".socket", ".mount", ".swap")
# Where our own processes go in a group that is to hand controllers on.
LEAF = "safe-exec"
SCOPE_SECONDS = 10


class CgroupHierarchy(Struct, frozen=True, kw_only=True):
    """The unified hierarchy: its mount point, and the directory of our own cgroup."""

    root: Path
    own: Path

    def ancestors(self) -> Iterator[Path]:
        """Our own group and those above it."""
        directory = self.own
        while directory == self.root or self.root in directory.parents:
            yield directory
            directory = directory.parent


class Scope(Struct, frozen=True, kw_only=True):
    """A scope that systemd makes for each sandbox, below the slice at ``directory``.

    ``runtime`` is where the user's is reached (XDG_RUNTIME_DIR).
    """

    slice: str
    directory: Path
    controllers: frozenset[str]
    runtime: Path | None = None

    @property
    def environment(self) -> Mapping[str, str]:
        """For systemd-run; what the user set may lead elsewhere (``su``, ``dbus-run-session``)."""
        return (
            {}
            if self.runtime is None
            else {
                "XDG_RUNTIME_DIR": str(self.runtime),
                "DBUS_SESSION_BUS_ADDRESS": f"unix:path={self.runtime}/bus",
            }
        )

    def command(self, name: str) -> tuple[str, ...]:
        """Return the command that starts another one in a scope of this name."""
        # The scope ends with its last process.
        # The default limit on tasks of a scope (a share of the machine's) is none that anybody
        # asked for.
        manager = () if self.runtime is None else ("--user",)
        more = (
            "-p",
            "Delegate=yes",
            "-p",
            "TasksMax=infinity",
            "--description=a notebook in safe-exec's limits",
            "--",
        )
        return (
            "systemd-run",
            *manager,
            "--scope",
            "--quiet",
            "--collect",
            f"--unit={name}.scope",
            f"--slice={self.slice}",
            *more,
        )

    def group(self, name: str) -> Path:
        """Return the directory of the scope of this name."""
        return self.directory / f"{name}.scope"


class DelegationTarget(Struct, frozen=True, kw_only=True):
    """A cgroup below which ours can be made, or the reason why there is none.

    ``needs_leaf``: it is our own, and its processes, ours alone, must first go into a group below.
    ``owned_by_systemd``: it is a unit of systemd's that was not delegated, which is good only where
    nothing else is.
    """

    parent: Path | None = None
    controllers: frozenset[str] = frozenset()
    needs_leaf: bool = False
    owned_by_systemd: bool = False
    why_not: str = ""


def find(hierarchy: CgroupHierarchy, *, systemd: bool) -> DelegationTarget:
    """The nearest group from ours upwards below which we may make one that gets controllers."""
    above = _above(hierarchy, systemd=systemd)
    if above.parent is not None and not above.owned_by_systemd:
        return above
    if _is_ours_alone(hierarchy, systemd=systemd):
        controllers = frozenset(words(hierarchy.own / "cgroup.controllers")) & frozenset(
            CONTROLLERS
        )
        return DelegationTarget(parent=hierarchy.own, controllers=controllers, needs_leaf=True)
    return above


def _above(hierarchy: CgroupHierarchy, *, systemd: bool) -> DelegationTarget:
    reason = "no group above this process hands memory and pids on to new groups"
    for directory in hierarchy.ancestors():
        delegated = frozenset(words(directory / "cgroup.subtree_control"))
        if not delegated >= NEEDED:
            continue
        if escaped := bounds_left(hierarchy, directory):
            return DelegationTarget(why_not=escaped)
        trouble = can_join_below(directory)
        if not trouble:
            return DelegationTarget(
                parent=directory,
                controllers=delegated & frozenset(CONTROLLERS),
                owned_by_systemd=systemd and _is_unit(hierarchy, directory),
            )
        reason = trouble
    return DelegationTarget(why_not=reason)


def _is_unit(hierarchy: CgroupHierarchy, directory: Path) -> bool:
    """Whether a group is systemd's to write to."""
    # The service of a user's systemd is delegated, and that systemd's own.
    if directory.name.startswith("user@") and directory.name.endswith(".service"):
        return True
    return (directory == hierarchy.root or directory.name.endswith(UNITS)) and not _is_delegated(
        directory
    )


def _is_delegated(directory: Path) -> bool:
    for name in ("user.delegate", "trusted.delegate"):
        with contextlib.suppress(OSError):
            return os.getxattr(directory, name) == b"1"
    return False


def _says_delegated(own: Path) -> bool:
    """Whether systemd says that our own unit is delegated."""
    # A user's systemd 252 sets no attribute on its scopes [measured].
    user = any(part.startswith("user@") and part.endswith(".service") for part in own.parts)
    argv = [
        "systemctl",
        *(["--user"] if user else []),
        "show",
        "--property=Delegate",
        "--value",
        own.name,
    ]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        process = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SCOPE_SECONDS,
            check=False,
        )
        return process.stdout.strip() == "yes"
    return False


def _is_ours_alone(hierarchy: CgroupHierarchy, *, systemd: bool) -> bool:
    """Whether our own cgroup may be divided: writable, with only our processes in it."""
    # So it is below ``systemd-run --scope -p Delegate=yes safe-exec run ...``, and in a container
    # that runs nothing else.
    own = hierarchy.own
    files = [own / name for name in ("cgroup.procs", "cgroup.subtree_control")]
    if (
        not all(os.access(path, os.W_OK) for path in files)
        or not frozenset(words(own / "cgroup.controllers")) >= NEEDED
    ):
        return False
    pids = {int(pid) for pid in words(own / "cgroup.procs")}
    me = os.getpid()
    if not (pids == {me} or pids <= {me, *procfs.descendants(me)}) or can_make_group(own):
        return False
    return not (systemd and _is_unit(hierarchy, own)) or _says_delegated(own)


def bounds_left(hierarchy: CgroupHierarchy, target: Path) -> str:
    """Return the bound on memory or cpus that a sandbox below ``target`` would escape, or ""."""
    for directory in hierarchy.ancestors():
        if directory == target or directory in target.parents:
            break
        for file in ("memory.max", "cpu.max"):
            value = words(directory / file)
            if value and value[0] != "max":
                return (
                    f"a group below {target} would leave {directory}, which has a {file} of "
                    f"{' '.join(value)}"
                )
    return ""


def can_join_below(directory: Path) -> str:
    """Return why our processes cannot move to a new cgroup here, "" if they can."""
    trouble = can_make_group(directory)
    if trouble:
        return trouble
    # Moving a process takes write access to the common ancestor's cgroup.procs (delegation
    # containment, admin-guide/cgroup-v2).
    if not os.access(directory / "cgroup.procs", os.W_OK):
        return f"{directory}/cgroup.procs is not ours to write"
    return ""


def can_make_group(directory: Path) -> str:
    """Try to make and remove a group; why not, or the empty string."""
    # The only proof that counts: modes and mounts lie.
    # A mode may allow what a read-only mount, a namespace or an LSM forbids.
    probe = directory / f"safe-exec-probe-{os.getpid()}"
    try:
        probe.mkdir()
    except OSError as error:
        return f"{directory}: {error.strerror}"
    probe.rmdir()
    return ""


# --- scopes ---------------------------------------------------------------------------------------


def find_scope(hierarchy: CgroupHierarchy, uid: int) -> tuple[Scope | None, str]:
    """Return a scope that systemd makes for us, which is probed, or why there is none.

    Costs one start of systemd-run, where there is a systemd at all.
    """
    if shutil.which("systemd-run") is None:
        return None, "there is no systemd-run"
    scope = _system_scope(hierarchy) if uid == 0 else _user_scope(hierarchy, uid)
    if isinstance(scope, str):
        return None, scope
    escaped = bounds_left(hierarchy, scope.directory)
    reason = escaped or _refused(scope)
    return (None, reason) if reason else (scope, "")


def _system_scope(hierarchy: CgroupHierarchy) -> Scope | str:
    """Root's: in the slice that we are in, so that its limits go on to hold."""
    above = next(
        (path for path in hierarchy.ancestors() if path.name.endswith(".slice")),
        hierarchy.root / "system.slice",
    )
    return _scope(above, hierarchy.root, None)


def _user_scope(hierarchy: CgroupHierarchy, uid: int) -> Scope | str:
    manager = hierarchy.root / f"user.slice/user-{uid}.slice/user@{uid}.service"
    # XDG_RUNTIME_DIR is not trusted: after su or sudo it is another user's.
    runtime = Path(f"/run/user/{uid}")
    if not os.access(runtime / "bus", os.W_OK) or not manager.is_dir():
        return f"no systemd of user {uid} is running"
    inside = (
        path
        for path in hierarchy.ancestors()
        if manager in path.parents and path.name.endswith(".slice")
    )
    return _scope(next(inside, manager / "app.slice"), manager, runtime)


def _scope(directory: Path, manager: Path, runtime: Path | None) -> Scope | str:
    controllers = frozenset(words(manager / "cgroup.controllers")) & frozenset(CONTROLLERS)
    if not controllers >= NEEDED:
        return f"{manager} has no {' and '.join(sorted(NEEDED - controllers))} to hand on"
    return Scope(
        slice=directory.name, directory=directory, controllers=controllers, runtime=runtime
    )


def _refused(scope: Scope) -> str:
    """Return why systemd makes no such scope, "" if it does."""
    name = f"safe-exec-probe-{os.getpid()}"
    argv = [
        *scope.command(name),
        "sh",
        "-c",
        'grep -qx $$ "$1/cgroup.procs"',
        "sh",
        str(scope.group(name)),
    ]
    try:
        process = subprocess.run(
            argv,
            env={**os.environ, **scope.environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SCOPE_SECONDS, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"systemd-run: {error}"
    if not process.returncode:
        return ""
    return (
        "systemd-run: "
        f"{(process.stderr.strip().splitlines() or ['the scope is not where it should be'])[-1]}"
    )


def words(path: Path) -> list[str]:
    """The words of a small file; none where it cannot be read."""
    try:
        return path.read_text().split()
    except OSError:
        return []
