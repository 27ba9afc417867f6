"""Caches answers of earlier searches on disk, so that an interrupted search can continue.

The user's cache holds one small JSON file for each trial, and a copy of the initial folder for each
run whose search may continue. An entry is named after everything that its answer depends on, and is
never modified. Imports files and procfs.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from pathlib import Path
from typing import TypeVar

import msgspec

from safe_exec.files import write_atomically
from safe_exec.keeper import procfs
from safe_exec.keeper.file_tree import remove_tree

T = TypeVar("T")

# A search is continued soon or never, and a copy of a folder is large.
FOLDER_DAYS = 7
# Answers are small; they remain useful as long as the notebook is being worked on.
TRIAL_DAYS = 30
_DAY = 86400.0
_OWNER = "owner.json"
_RUN_ID = re.compile(r"[0-9A-Za-z]+(-[0-9A-Za-z]+)*")


class TrialCache:
    """Answers by key. A cache that cannot be read or written behaves like an empty one."""

    def __init__(self, root: Path) -> None:
        self.directory = root / "trials"

    def get(self, key: str, kind: type[T]) -> T | None:
        """Return the answer of an earlier trial, if there is one."""
        try:
            return msgspec.json.decode(self._path(key).read_bytes(), type=kind)
        except (OSError, ValueError, RecursionError):
            return None

    def put(self, key: str, answer: object) -> None:
        """Store an answer."""
        path = self._path(key)
        with contextlib.suppress(OSError):
            # Answers contain file names of the user.
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomically(path, msgspec.json.encode(answer))

    def _path(self, key: str) -> Path:
        return self.directory / key[:2] / f"{key}.json"


# --- folders of runs ------------------------------------------------------------------------------


def claim_folder(root: Path, run_id: str) -> Path:
    """Create and claim the directory in which a run keeps the copy of its folder. Raises OSError.

    It may exist already, from a run whose search continues. The run id comes from a verdict, which
    anybody may have written, so it is checked: it must not lead to another path.
    """
    if not _RUN_ID.fullmatch(run_id):
        raise OSError(f"not the name of a run: {run_id[:80]!r}")
    directory = root / "folders" / run_id
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    me = procfs.stat(os.getpid())
    (directory / _OWNER).write_text(
        json.dumps({"pid": os.getpid(), "started": me.started if me else 0})
    )
    return directory


def release_folder(directory: Path) -> None:
    """Remove a run's directory, including read-only files in it."""
    remove_tree(directory)


def tidy(root: Path) -> None:
    """Remove old answers, and folders of runs that ended long ago."""
    current_time = time.time()
    for directory in _entries(root / "folders"):
        with contextlib.suppress(OSError):
            if current_time - directory.stat().st_mtime > FOLDER_DAYS * _DAY and not _owned(
                directory
            ):
                release_folder(directory)
    for shelf in _entries(root / "trials"):
        for path in _entries(shelf):
            with contextlib.suppress(OSError):
                if current_time - path.stat().st_mtime > TRIAL_DAYS * _DAY:
                    path.unlink()


def _owned(directory: Path) -> bool:
    try:
        owner = json.loads((directory / _OWNER).read_text())
        process = procfs.stat(int(owner["pid"]))
        return process is not None and process.started == owner["started"]
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return False


def _entries(directory: Path) -> list[Path]:
    try:
        return list(directory.iterdir())
    except OSError:
        return []
