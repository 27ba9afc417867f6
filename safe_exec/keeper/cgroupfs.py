"""Control groups as files: made, written, read, removed. Standard library only; the keeper's part of them.

Which groups there are and what is written into them says the plan (``sandbox/mechanisms/cgroup_v1.py``, ``sandbox/mechanisms/cgroup_v2.py``).
"""

from __future__ import annotations

import contextlib
import os
import time

HAND_ON_SECONDS = 5.0
REMOVE_SECONDS = 1.0


def write(path: str, value: str) -> None:
    """Write to one file; an OSError names the file and the value."""
    try:
        with open(path, "w") as handle:
            handle.write(value)
    except OSError as error:
        raise OSError(error.errno, f"cannot write {value!r} to {path}: {error.strerror}") from error


def read(path: str) -> str | None:
    """What stands in one file; ``None`` where it cannot be read."""
    try:
        with open(path) as handle:
            return handle.read(65536)
    except OSError:
        return None


def hand_on(group: str, leaf: str, controllers: list[str]) -> None:
    """Have a group hand controllers on, which it can once no process stands in it: all of them go into ``leaf``.

    Other keepers of the same runner may be at it too. What has ended meanwhile cannot be moved and need not be. The leaf stays: we are in
    it. Of a scope systemd removes it with all the rest.
    """
    with contextlib.suppress(FileExistsError):
        os.mkdir(leaf)
    deadline = time.monotonic() + HAND_ON_SECONDS
    while pids := (read(f"{group}/cgroup.procs") or "").split():
        for pid in pids:
            try:
                write(f"{leaf}/cgroup.procs", pid)
            except ProcessLookupError:
                continue
        if time.monotonic() > deadline:
            raise OSError(
                f"{group} does not get empty, {', '.join(pids)} stay: it cannot hand controllers on"
            )
    write(f"{group}/cgroup.subtree_control", " ".join(f"+{name}" for name in controllers))


def oomd_killed(dirs: list[str]) -> bool | None:
    """Whether systemd-oomd killed one of these groups: it says so in an extended attribute (systemd-oomd.service(8))."""
    for path in dirs:
        for name in ("user.oomd_kill", "trusted.oomd_kill"):
            with contextlib.suppress(OSError):
                return int(os.getxattr(path, name)) > 0
    return None


def remove(path: str) -> bool:
    """Remove one control group; it stays busy for a moment after its last process is gone."""
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
