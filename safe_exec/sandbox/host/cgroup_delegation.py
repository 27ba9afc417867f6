"""Finds the parent for the cgroups of sandboxes in the unified hierarchy. May import procfs."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from msgspec import Struct

from safe_exec.keeper import procfs

# Three rules decide (the kernel's admin-guide/cgroup-v2; systemd's "Control Group APIs and
# Delegation"):
#
# - A cgroup with processes in it cannot enable controllers for its children ("no internal
# processes"). Only the root cgroup can. - To move a process, one must be allowed to write to
# ``cgroup.procs`` of the nearest common ancestor of both cgroups ("delegation containment"). For a
# login session and the hierarchy of the same user's systemd this ancestor belongs to root. So a
# process cannot be moved between them; it must be started in its place. - A cgroup has one writer.
# Cgroups of systemd's units belong to systemd, which may disable controllers again, unless the unit
# has ``Delegate=yes``. Then systemd marks the cgroup with an extended attribute (readable for all
# since version 251) and does not touch it.
#
# One rule is our own: a sandbox must not escape a cgroup that limits memory or processors. A
# container, a service or a batch job gets less than the machine so that everything in it stays
# below that.

CONTROLLERS = ("memory", "pids", "cpu")
NEEDED = frozenset({"memory", "pids"})
UNITS = (".slice", ".scope", ".service", ".socket", ".mount", ".swap")
# The leaf for our own processes, in a cgroup that must delegate controllers.
LEAF = "safe-exec"
SCOPE_SECONDS = 10


class CgroupHierarchy(Struct, frozen=True, kw_only=True):
    """The unified hierarchy: its mount point, and the directory of our own cgroup."""

    root: Path
    own: Path

    def ancestors(self) -> Iterator[Path]:
        """Yield our own cgroup and its ancestors."""
        directory = self.own
        while directory == self.root or self.root in directory.parents:
            yield directory
            directory = directory.parent


class Scope(Struct, frozen=True, kw_only=True):
    """A scope that systemd makes for each sandbox, below the slice at ``directory``.

    ``runtime`` is the XDG_RUNTIME_DIR of a user's systemd.
    """

    slice: str
    directory: Path
    controllers: frozenset[str]
    runtime: Path | None = None

    @property
    def environment(self) -> Mapping[str, str]:
        """The environment for systemd-run."""
        # After su or in dbus-run-session these variables lead to another systemd or bus.
        return (
            {}
            if self.runtime is None
            else {
                "XDG_RUNTIME_DIR": str(self.runtime),
                "DBUS_SESSION_BUS_ADDRESS": f"unix:path={self.runtime}/bus",
            }
        )

    def command(self, name: str) -> tuple[str, ...]:
        """Return the command that starts another command in a scope of this name."""
        # The scope ends with its last process. By default systemd limits its tasks to a share of
        # the machine's; the user did not ask for such a limit.
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
    """The parent for the cgroups of sandboxes, or the reason why there is none.

    ``needs_leaf`` is true if the parent is this process's own cgroup, whose processes must move to
    a leaf first. ``owned_by_systemd`` is true if it is a unit that systemd did not delegate, and so
    a last resort.
    """

    parent: Path | None = None
    controllers: frozenset[str] = frozenset()
    needs_leaf: bool = False
    owned_by_systemd: bool = False
    why_not: str = ""


def find(hierarchy: CgroupHierarchy, *, systemd: bool) -> DelegationTarget:
    """Find the nearest cgroup, from our own upwards, whose children can get controllers."""
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
    """Whether only systemd may write to a cgroup."""
    # The service of a user's systemd has the mark of a delegated unit, but belongs to that systemd.
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
    """Whether systemd reports our own unit as delegated."""
    # A user's systemd 252 sets no attribute on its scopes [measured], so ask it.
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
    """Whether our own cgroup is writable and contains only our processes."""
    # This is the case under ``systemd-run --scope -p Delegate=yes safe-exec run ...``, and in a
    # container that runs nothing else.
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
    """Return the memory or cpu limit that a sandbox below ``target`` would escape, or ""."""
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
    """Return why our processes cannot move to a new cgroup in ``directory``, "" if they can."""
    trouble = can_make_group(directory)
    if trouble:
        return trouble
    # Moving a process needs write access to cgroup.procs of the common ancestor (delegation
    # containment, admin-guide/cgroup-v2).
    if not os.access(directory / "cgroup.procs", os.W_OK):
        return f"{directory}/cgroup.procs is not ours to write"
    return ""


def can_make_group(directory: Path) -> str:
    """Try to make and remove a cgroup; return the error, or ""."""
    # The mode of the directory is no proof: a read-only mount, a namespace or a security module can
    # forbid it.
    probe = directory / f"safe-exec-probe-{os.getpid()}"
    try:
        probe.mkdir()
    except OSError as error:
        return f"{directory}: {error.strerror}"
    probe.rmdir()
    return ""


# --- scopes ---------------------------------------------------------------------------------------


def find_scope(hierarchy: CgroupHierarchy, uid: int) -> tuple[Scope | None, str]:
    """Return a scope that systemd makes for us, or the reason why there is none.

    Starts systemd-run once to probe it.
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
    """Return the scope of the system's systemd, for root."""
    # Use the slice that we are in, so that its limits stay in force.
    above = next(
        (path for path in hierarchy.ancestors() if path.name.endswith(".slice")),
        hierarchy.root / "system.slice",
    )
    return _scope(above, hierarchy.root, None)


def _user_scope(hierarchy: CgroupHierarchy, uid: int) -> Scope | str:
    manager = hierarchy.root / f"user.slice/user-{uid}.slice/user@{uid}.service"
    # Do not trust XDG_RUNTIME_DIR: after su or sudo it is another user's.
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
    """Return why systemd does not make this scope, "" if it does."""
    # Success of systemd-run is not enough: the scope must be where we will look for it.
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
    """Return the words of a small file; none if it cannot be read."""
    try:
        return path.read_text().split()
    except OSError:
        return []
