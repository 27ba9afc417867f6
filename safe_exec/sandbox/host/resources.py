"""The memory and processors available to us on this machine and in our cgroups.

Reads /proc and the cgroup file systems.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

# The kernel reports "no limit" of cgroup v1 as a number close to 2**63.
NO_LIMIT = 1 << 60


def memory_and_swap() -> tuple[int | None, int | None]:
    """Return total memory and swap in bytes, from /proc/meminfo."""
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
    """Return the smallest known figure, ``None`` if none is known."""
    return min((figure for figure in figures if figure is not None), default=None)


def cgroup_memory_limit(
    mounts: Mapping[str, tuple[Path, str]], own: Mapping[str, str]
) -> int | None:
    """Return the memory limit of our cgroup (of a container, say), ``None`` without one."""
    if "memory" in mounts:
        stat = cgroup_directory(mounts["memory"], own.get("memory", "/")) / "memory.stat"
        with contextlib.suppress(OSError, ValueError, IndexError):
            rows = dict(line.split() for line in stat.read_text().splitlines())
            # This figure includes the limits of all ancestor cgroups. In a container they are not
            # visible in any other file.
            limit = int(rows["hierarchical_memory_limit"])
            return limit if limit < NO_LIMIT else None
    limits: list[int] = []
    if "" in mounts:
        top, directory = mounts[""][0], cgroup_directory(mounts[""], own.get("", "/"))
        while directory != top.parent and (directory == top or top in directory.parents):
            with contextlib.suppress(OSError, ValueError):
                limits.append(int((directory / "memory.max").read_text()))
            directory = directory.parent
    return min(limits, default=None)


def memory_available() -> int | None:
    """Return the bytes that can be used without swapping, ``None`` if unknown."""
    # The machine and each ancestor cgroup has its own remainder; the smallest one counts.
    return least(_meminfo().get("MemAvailable"), *(row for _, row in _left_in_groups()))


def _left_in_groups() -> Iterator[tuple[Path, int]]:
    """Yield each ancestor cgroup with its remaining memory."""
    # Linux reclaims cached files before it reaches the limit, so they count as available.
    mounts, own = cgroup_mounts(), own_cgroups()
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
    """Yield our cgroup of a controller and its ancestors."""
    if controller not in mounts:
        return
    top, directory = (
        mounts[controller][0],
        cgroup_directory(mounts[controller], own.get(controller, "/")),
    )
    while directory == top or top in directory.parents:
        yield directory
        directory = directory.parent


def cpus_available() -> int:
    """Return the number of processors that we may use."""
    # The CPU affinity, or less if an ancestor cgroup has a quota (a container's ``--cpus``).
    counts = [
        float(
            len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count() or 1
        )
    ]
    mounts, own = cgroup_mounts(), own_cgroups()
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


def cgroup_mounts() -> dict[str, tuple[Path, str]]:
    """Map each controller (``""``: unified hierarchy) to its mount point and the cgroup there."""
    # The root differs from ``/`` inside a container that shares the host's cgroup namespace
    # (proc_pid_mountinfo(5)).
    # The first mount of a controller counts: later ones may be bind mounts of parts of it.
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


def own_cgroups() -> dict[str, str]:
    """Map each controller to the path of our cgroup (cgroups(7))."""
    own: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            for controller in controllers.split(","):
                own[controller] = path
    return own


def cgroup_directory(mount: tuple[Path, str], path: str) -> Path:
    """Return the directory of a cgroup; ``mount`` is a mount point and the cgroup mounted there."""
    point, root = mount
    if root != "/" and path.startswith(root):
        path = path[len(root) :]
    return point / path.lstrip("/")
