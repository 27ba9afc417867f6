"""Reads, writes and removes cgroups through their files. Standard library only.

The plan lists the cgroups and their content (``sandbox/mechanisms/cgroup_v1.py``,
``sandbox/mechanisms/cgroup_v2.py``).
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable

DELEGATE_SECONDS = 5.0
REMOVE_SECONDS = 1.0


def write(path: str, value: str) -> None:
    """Write a value to one file. Raises OSError that names both."""
    try:
        with open(path, "w") as handle:
            handle.write(value)
    except OSError as error:
        raise OSError(error.errno, f"cannot write {value!r} to {path}: {error.strerror}") from error


def read(path: str) -> str | None:
    """Return the content of one file, ``None`` if it cannot be read."""
    try:
        with open(path) as handle:
            return handle.read(65536)
    except OSError:
        return None


def delegate_controllers(group: str, leaf: str, controllers: Iterable[str]) -> None:
    """Move a cgroup's own processes to ``leaf``, then delegate controllers to its children.

    The leaf is not removed, since this process is in it; systemd removes it with its scope. Raises
    OSError.
    """
    # A cgroup that contains processes cannot delegate controllers (cgroups(7), "no internal
    # processes" rule). Other keepers of the same runner may be doing the same at this moment.
    with contextlib.suppress(FileExistsError):
        os.mkdir(leaf)
    deadline = time.monotonic() + DELEGATE_SECONDS
    while pids := (read(f"{group}/cgroup.procs") or "").split():
        for pid in pids:
            try:
                write(f"{leaf}/cgroup.procs", pid)
            except ProcessLookupError:
                # The process ended in the meantime, and need not be moved.
                continue
        if time.monotonic() > deadline:
            raise OSError(
                f"{group} cannot delegate controllers: processes {', '.join(pids)} stay in it"
            )
    write(f"{group}/cgroup.subtree_control", " ".join(f"+{name}" for name in controllers))


def oomd_killed(dirs: Iterable[str]) -> bool | None:
    """Whether systemd-oomd killed one of these cgroups."""
    # systemd-oomd sets an extended attribute (systemd-oomd.service(8)).
    for path in dirs:
        for name in ("user.oomd_kill", "trusted.oomd_kill"):
            with contextlib.suppress(OSError):
                return int(os.getxattr(path, name)) > 0
    return None


def remove(path: str) -> bool:
    """Remove one cgroup; false if it is still busy after REMOVE_SECONDS."""
    # A cgroup stays busy for a moment after its last process is gone.
    deadline = time.monotonic() + REMOVE_SECONDS
    while True:
        try:
            os.rmdir(path)
        except FileNotFoundError:
            return True
        except OSError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.002)
        else:
            return True
