"""Bind mounts, overlays and tmpfs in a mount namespace of the kernel's own.

The keeper's child calls :func:`enter` before it executes the kernel. No process outside sees these
mounts, and they disappear with the last process inside. A user with the right to mount needs a
mount namespace only; any other gets a user namespace too, with the same user id, if the system
allows that (user_namespaces(7)). Overlays in a user namespace: Linux 5.11 (overlayfs,
Documentation/filesystems/overlayfs.rst).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_SLAVE = 0x2, 0x4, 0x1000, 0x4000, 0x80000
PROBE_SECONDS = 10

# ``{"kind": "bind", "source", "target"}``, ``{"kind": "tmpfs", "target", "options"}``, or
# ``{"kind": "overlay", "lower", "upper", "work", "target"}``; carried out in order. ``{"kind":
# "bind", ..., "optional": "yes"}`` may be gone by then.
Mount = Mapping[str, str]


def enter(mounts: Iterable[Mount], *, user_namespace: bool) -> None:
    """Enter new namespaces and make the mounts.

    Raises OSError that names the mount that failed.
    """
    uid, gid = os.geteuid(), os.getegid()
    _call(
        "unshare",
        CLONE_NEWNS | (CLONE_NEWUSER if user_namespace else 0),
        action="a mount namespace of its own",
    )
    if user_namespace:
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{uid} {uid} 1"),
            ("gid_map", f"{gid} {gid} 1"),
        ):
            Path(f"/proc/self/{name}").write_text(text)
    # What is mounted outside later may still show up inside; what we mount stays with us.
    _mount("none", "/", "", MS_REC | MS_SLAVE, "")
    for mount in mounts:
        make(mount)


def enter_own() -> None:
    """Enter a new mount namespace, as root if that succeeds, else with a user namespace too.

    Raises OSError.
    """
    if os.geteuid() == 0:
        # Root without the right to mount (in a container) gets on as everybody else does.
        with contextlib.suppress(OSError):
            enter([], user_namespace=False)
            return
    enter([], user_namespace=True)


def make(mount: Mount) -> None:
    """Make one mount in this process's namespace. Raises OSError."""
    target = mount["target"]
    if mount["kind"] == "bind":
        with contextlib.suppress(*([FileNotFoundError] if "optional" in mount else [])):
            _mount(mount["source"], target, "", MS_BIND | MS_REC, "")
    elif mount["kind"] == "tmpfs":
        _mount("tmpfs", target, "tmpfs", MS_NOSUID | MS_NODEV, mount["options"])
    else:
        layers = {"lowerdir": mount["lower"], "upperdir": mount["upper"], "workdir": mount["work"]}
        options = ",".join(f"{name}={_escaped(path)}" for name, path in layers.items())
        # Only the first user namespace may keep overlayfs's own marks in trusted.* attributes:
        # without the marks a directory is not opaque.
        options += "" if _is_first_user_namespace() else ",userxattr"
        _mount("overlay", target, "overlay", 0, options)


def _is_first_user_namespace() -> bool:
    return Path("/proc/self/uid_map").read_text().split() == ["0", "0", "4294967295"]


def _escaped(path: str) -> str:
    """Return a path for an option of overlayfs, whose separators are escaped."""
    return "".join(f"\\{char}" if char in "\\,:" else char for char in path)


def _mount(source: str, target: str, kind: str, flags: int, options: str) -> None:
    arguments = [os.fsencode(part) for part in (source, target, kind)]
    _call(
        "mount",
        *arguments,
        ctypes.c_ulong(flags),
        os.fsencode(options),
        action=f"{kind or 'bind'} mount on {target}",
    )


def _call(name: str, *arguments: object, action: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"cannot make {action}: {os.strerror(number)}")


# --- what can be had ------------------------------------------------------------------------------


@cache
def namespaces() -> str | None:
    """Return how a kernel gets its own mounts: as "root", in a "user" namespace, or ``None``."""
    # Both ways are tried, since no setting tells reliably whether they work.
    return next(
        (
            way
            for way in ("root", "user")
            if _works(way, [{"kind": "tmpfs", "target": "/tmp", "options": ""}])  # noqa: S108
        ),
        None,
    )


def overlays(lower: Path, scratch: Path, way: str) -> bool:
    """Tell whether ``lower`` can be overlaid with layers in ``scratch``."""
    # Probed in ``scratch``: not every file system can carry layers.
    for name in ("upper", "work", "merged"):
        (scratch / name).mkdir(exist_ok=True)
    mount = {
        "kind": "overlay",
        "lower": str(lower),
        "upper": str(scratch / "upper"),
        "work": str(scratch / "work"),
        "target": str(scratch / "merged"),
    }
    return _works(way, [mount])


def _works(way: str, mounts: list[dict[str, str]]) -> bool:
    """Tell whether the mounts succeed.

    They are tried in a separate process, because a process cannot leave its new namespace.
    """
    if sys.platform != "linux" or (way == "root" and os.geteuid() != 0):
        return False
    # The keeper, which mounts, starts faster without.
    import subprocess

    root = str(Path(__file__).parent.parent.parent)
    program = (
        "import sys; sys.path.append(sys.argv[1]); from safe_exec.keeper.mounts import enter; "
        "enter(eval(sys.argv[3]), user_namespace=sys.argv[2] == 'user')"
    )
    argv = [sys.executable, "-I", "-S", "-c", program, root, way, repr(mounts)]
    try:
        process = subprocess.run(argv, capture_output=True, timeout=PROBE_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return process.returncode == 0
