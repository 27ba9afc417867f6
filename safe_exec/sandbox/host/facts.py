"""Collects facts about this host for advice: container, WSL, CI, systemd, cgroup hierarchy."""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path

from msgspec import Struct

from safe_exec.sandbox import stale_runs

# Only advice depends on these facts (:mod:`safe_exec.sandbox.advice.limits`). Whether a mechanism
# works is probed in ``capabilities``, since files can be misleading. Reads files only, below a root
# that tests replace.


class Container(StrEnum):
    """The kind of container, as detected from inside."""

    NONE = "none"
    DOCKER = "docker"
    PODMAN = "podman"
    KUBERNETES = "kubernetes"
    OTHER = "other"


class CgroupTree(StrEnum):
    """The cgroup hierarchies that are mounted.

    ``hybrid`` means that v1 hierarchies have the controllers and a unified one is mounted too.
    """

    V2 = "v2"
    HYBRID = "hybrid"
    V1 = "v1"
    NONE = "none"


class HostFacts(Struct, frozen=True, kw_only=True):
    """Facts about this host on which the advice depends.

    ``mount`` is the mount point of the unified hierarchy, ``controllers`` are those of its topmost
    visible cgroup, ``disabled`` those switched off at boot. ``read_only`` is true if cgroups are
    mounted read-only. ``wsl`` is the version of WSL. ``user_manager`` is true if a systemd of this
    user runs. ``user_controllers`` are the controllers that it can delegate (``None`` if unknown);
    ``runtime_dir`` is true if the environment contains its address, and ``linger`` if it runs
    without a login. ``distribution`` are the names of the distribution (``ubuntu debian``).
    ``apparmor_userns``, ``no_userns_clone`` and ``no_user_namespaces`` are settings that forbid
    user namespaces.
    """

    release: str = ""
    user: str = ""
    tree: CgroupTree = CgroupTree.NONE
    mount: Path = Path("/sys/fs/cgroup")
    controllers: frozenset[str] = frozenset()
    disabled: frozenset[str] = frozenset()
    read_only: bool = False
    container: Container = Container.NONE
    wsl: int | None = None
    github: bool = False
    systemd: bool = False
    systemd_run: bool = False
    user_manager: bool = False
    user_controllers: frozenset[str] | None = None
    runtime_dir: bool = False
    linger: bool = False
    distribution: str = ""
    apparmor_userns: bool = False
    no_userns_clone: bool = False
    no_user_namespaces: bool = False


class _Mounts(Struct, frozen=True, kw_only=True):
    tree: CgroupTree
    unified: Path | None
    read_only: bool


def collect(
    *,
    root: Path = Path("/"),
    environ: Mapping[str, str] = os.environ,
    uid: int | None = None,
    release: str | None = None,
) -> HostFacts:
    """Collect the facts; tests pass another ``root`` directory."""
    number = uid if uid is not None else _own_uid()
    kernel = release if release is not None else platform.release()
    user = _user_name(number, root)
    mounts = _mounts(_text(root / "proc/self/mountinfo"))
    unified = mounts.unified or Path("/sys/fs/cgroup")
    manager = f"user.slice/user-{number}.slice/user@{number}.service/cgroup.controllers"
    handed_on = _inside(root, unified) / manager
    return HostFacts(
        release=kernel,
        user=user,
        tree=mounts.tree,
        mount=unified,
        controllers=frozenset(_text(_inside(root, unified) / "cgroup.controllers").split()),
        disabled=_disabled(_text(root / "proc/cgroups")),
        read_only=mounts.read_only,
        container=_container(root, environ),
        wsl=_wsl(kernel),
        github=environ.get("GITHUB_ACTIONS") == "true",
        systemd=_there(root / "run/systemd/system"),  # sd_booted(3)
        systemd_run=_has_program("systemd-run", root, environ),
        user_manager=_there(root / f"run/user/{number}/systemd/private"),
        user_controllers=frozenset(_text(handed_on).split()) if _there(handed_on) else None,
        runtime_dir=bool(environ.get("XDG_RUNTIME_DIR")),
        linger=_there(root / "var/lib/systemd/linger" / user),
        distribution=_distribution(_text(root / "etc/os-release")),
        apparmor_userns=_text(
            root / "proc/sys/kernel/apparmor_restrict_unprivileged_userns"
        ).strip()
        == "1",
        no_userns_clone=_text(root / "proc/sys/kernel/unprivileged_userns_clone").strip() == "0",
        no_user_namespaces=_text(root / "proc/sys/user/max_user_namespaces").strip() == "0",
    )


def dead_runs() -> int:
    """Return the number of runs whose runner and keeper were both killed.

    The next run cleans up after them. Raises SandboxError if the directory of the notes belongs to
    another user.
    """
    return sum(_is_dead(path) for path in stale_runs.notes_directory().glob("*.json"))


def _is_dead(path: Path) -> bool:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return stale_runs.is_dead(json.loads(path.read_text()))
    # The note was removed meanwhile, or is being written.
    return False


def _own_uid() -> int:
    return os.geteuid() if hasattr(os, "geteuid") else 0


def _user_name(uid: int, root: Path) -> str:
    """Return a user's name from the passwd file or the user database, else the number."""
    for line in _text(root / "etc/passwd").splitlines():
        fields = line.split(":")
        if fields[2:3] == [str(uid)]:
            return fields[0]
    # ImportError on Windows, KeyError for a uid without a name.
    with contextlib.suppress(ImportError, KeyError):
        import pwd

        return pwd.getpwuid(uid).pw_name
    return str(uid)


def _mounts(mountinfo: str) -> _Mounts:
    """Return the cgroup mounts of proc_pid_mountinfo(5)."""
    unified: Path | None = None
    v1 = read_only = False
    for line in mountinfo.splitlines():
        mount_fields, _, type_fields = line.partition(" - ")
        kind, _, options = type_fields.partition(" ")
        if kind == "cgroup2":
            unified = unified or Path(mount_fields.split()[4])
        elif kind == "cgroup" and "name=" not in options:
            v1 = True
        else:
            continue
        read_only = read_only or "ro" in mount_fields.split()[5].split(",")
    return _Mounts(tree=_TREES[unified is not None, v1], unified=unified, read_only=read_only)


_TREES = {
    (True, True): CgroupTree.HYBRID,
    (True, False): CgroupTree.V2,
    (False, True): CgroupTree.V1,
    (False, False): CgroupTree.NONE,
}


def _disabled(cgroups: str) -> frozenset[str]:
    """Return the controllers that are disabled (``cgroup_disable=memory`` at boot)."""
    rows = [line.split() for line in cgroups.splitlines() if not line.startswith("#")]
    return frozenset(row[0] for row in rows if row[-1:] == ["0"])


def _distribution(release: str) -> str:
    """Return the names of the distribution and of similar ones (os-release(5))."""
    rows = dict(line.split("=", 1) for line in release.splitlines() if "=" in line)
    return " ".join(rows.get(name, "").strip("\"' ") for name in ("ID", "ID_LIKE")).strip()


def _container(root: Path, environ: Mapping[str, str]) -> Container:
    # Most reliable first: files made by the engines, then the variable ``container``, then the
    # names of cgroups.
    groups = _text(root / "proc/self/cgroup")
    variable = environ.get("container", "")
    if environ.get("KUBERNETES_SERVICE_HOST") or "kubepods" in groups:
        return Container.KUBERNETES
    if _there(root / "run/.containerenv") or variable in ("podman", "libpod") or "libpod" in groups:
        return Container.PODMAN
    if _there(root / ".dockerenv") or variable == "docker" or "/docker" in groups:
        return Container.DOCKER
    # systemd stores the container manager there. For systemd WSL is a container; for us it is a
    # machine.
    manager = variable or _text(root / "run/systemd/container").strip()
    return Container.OTHER if manager and manager != "wsl" else Container.NONE


def _wsl(release: str) -> int | None:
    """Return the version of WSL, ``None`` elsewhere."""
    # The release is ``...-Microsoft`` on WSL 1 and ``...-microsoft-standard-WSL2`` on WSL 2.
    if "microsoft" not in release.lower():
        return None
    return 1 if release.endswith("-Microsoft") else 2


def _has_program(name: str, root: Path, environ: Mapping[str, str]) -> bool:
    folders = environ.get("PATH", os.defpath).split(os.pathsep)
    return any(folder and _there(_inside(root, Path(folder)) / name) for folder in folders)


def _inside(root: Path, path: Path) -> Path:
    return root / str(path).lstrip("/")


def _there(path: Path) -> bool:
    """Whether a path exists and can be seen."""
    # After su an entry of PATH can be in another user's closed directory; Path.exists would raise.
    return os.path.exists(path)


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
