"""Cleans up after runs whose runner and keeper were both killed, from their notes.

A note is one JSON file per sandbox in a directory of the user's own; the keeper removes it last.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import stat as stat_module
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from safe_exec.errors import SandboxError
from safe_exec.keeper import file_tree, procfs


def notes_directory() -> Path:
    """Return the user's own directory for notes: in XDG_RUNTIME_DIR, else in /tmp."""
    # Notes name cgroups and directories to remove. So they must not come from another user.
    base = os.environ.get("XDG_RUNTIME_DIR")
    own = Path(tempfile.gettempdir()) / f"safe-exec-{os.geteuid()}"
    directory = Path(base) / "safe-exec" if base and os.access(base, os.W_OK) else own
    with contextlib.suppress(FileExistsError):
        directory.mkdir(mode=0o700)
    status = directory.lstat()
    if not stat_module.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise SandboxError(
            f"{directory} is not a directory of this user; remove it, or set XDG_RUNTIME_DIR "
            "to one that is"
        )
    return directory


def note_path(run_id: str) -> Path:
    """Return the path of a run's note."""
    return notes_directory() / f"{run_id}.json"


def write_note(path: Path, note: Mapping[str, object]) -> None:
    """Write a note, before the cgroups and directories that it names are made."""
    # The directory may be in /tmp, so do not follow a link.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "w") as handle:
        json.dump(note, handle)


def renew_note(path: Path, note: Mapping[str, object]) -> None:
    """Replace a note atomically."""
    fresh = path.with_name(f".{path.stem}.new")
    write_note(fresh, note)
    fresh.replace(path)


def sweep() -> list[str]:
    """Clean up after dead runs; return the removed paths."""
    removed: list[str] = []
    try:
        notes = list(notes_directory().glob("*.json"))
    except OSError:
        return removed
    for path in notes:
        # Another run may sweep at the same time, and a note may be half written.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            note = json.loads(path.read_text())
            if is_dead(note):
                removed.extend([*note["cgroup_dirs"], *note["directories"]])
                if not clean(note):
                    path.unlink()
    return removed


def is_dead(note: Mapping[str, int]) -> bool:
    """Whether both runner and keeper have ended. Raises KeyError for an invalid note."""
    # If either lives, it cleans up itself.
    return not any(_alive(note[role], note[f"{role}_started"]) for role in ("owner", "keeper"))


def _alive(pid: int, started: int) -> bool:
    """Whether the process of this pid and start time still runs."""
    status = procfs.stat(pid)
    # Pids are reused, but not together with the same start time in clock ticks.
    return status is not None and status.started == started and status.state not in "ZX"


def clean(note: Mapping[str, object], *, orphaned: bool = True) -> list[str]:
    """Kill the processes in the noted cgroups, and remove the cgroups and directories.

    Returns the remaining paths. With ``orphaned`` the runner has ended too, so its own directories
    are removed as well.
    """
    groups, directories = _paths(note["cgroup_dirs"]), _paths(note["directories"])
    directories += _paths(note.get("orphans", [])) if orphaned else []
    for path in groups:
        _empty_group(path)
    # Children come after their parents in a note and must be removed first.
    for path in reversed(groups):
        with contextlib.suppress(OSError):
            path.rmdir()
    for path in directories:
        if not path.is_symlink():
            file_tree.remove_tree(path)
    return [str(path) for path in (*groups, *directories) if os.path.lexists(path)]


def _paths(value: object) -> list[Path]:
    if not isinstance(value, list):
        raise TypeError("a note holds lists of paths")
    return [Path(str(path)) for path in value]


def _empty_group(group: Path) -> None:
    deadline = time.monotonic() + 2.0
    while time.monotonic() < deadline:
        try:
            pids = [int(pid) for pid in (group / "cgroup.procs").read_text().split()]
        except (OSError, ValueError):
            return
        if not pids:
            return
        procfs.signal_all(pids, signal.SIGKILL)
        time.sleep(0.005)
