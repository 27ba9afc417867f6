"""What earlier searches learned, on disk in the user's own cache, so that a search that was cut short goes on where it stopped.

Imports files and procfs. One small JSON file for each trial, and for each run whose search may go on a copy of the folder it started from.
An entry is named after all that its answer depends on; nothing in it is ever changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safe_exec.files import write_atomically
from safe_exec.keeper import procfs
from safe_exec.keeper.file_tree import remove_tree

FOLDER_DAYS = 7
TRIAL_DAYS = 30
_DAY = 86400.0
_OWNER = "owner.json"
_RUN_ID = re.compile(r"[0-9A-Za-z]+(-[0-9A-Za-z]+)*")


def cache_root() -> Path:
    """The directory of the cache: ``$XDG_CACHE_HOME/safe-exec``, ``~/.cache/safe-exec``, else one of the user's own in /tmp.

    Raises OSError where not even that can be had.
    """
    own = Path(tempfile.gettempdir()) / f"safe-exec-cache-{os.geteuid()}"
    base = next(
        (
            b
            for b in (os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~/.cache"))
            if os.path.isabs(b)
        ),
        None,
    )
    for path in (*([Path(base) / "safe-exec"] if base else []), own):
        with contextlib.suppress(OSError):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.mkdir(mode=0o700, exist_ok=True)
            status = path.lstat()
            if (
                stat.S_ISDIR(status.st_mode)
                and status.st_uid == os.geteuid()
                and os.access(path, os.W_OK)
            ):
                return path
    raise OSError(f"no place for a cache: neither {base or '~/.cache'} nor {own} can be written")


def key_of(parts: Mapping[str, Any]) -> str:
    """The name of an entry: a hash of all that the answer depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


class TrialCache:
    """Answers by key. A cache that cannot be read or written is an empty one: it saves time and decides nothing."""

    def __init__(self, root: Path) -> None:
        self.directory = root / "trials"

    def get(self, key: str) -> dict[str, Any] | None:
        """The answer of an earlier trial."""
        try:
            entry = json.loads(self._path(key).read_text())
        except (OSError, ValueError, RecursionError):
            return None
        return entry if isinstance(entry, dict) else None

    def put(self, key: str, answer: Mapping[str, Any]) -> None:
        """Keep an answer."""
        path = self._path(key)
        with contextlib.suppress(OSError):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomically(path, json.dumps(answer).encode())

    def _path(self, key: str) -> Path:
        return self.directory / key[:2] / f"{key}.json"


# --- folders of runs --------------------------------------------------------------------------------------------


def claim_folder(root: Path, run_id: str) -> Path:
    """A directory for what a run keeps of its folder; marked as ours while we live. Raises OSError.

    It may be there from a run whose search goes on. A verdict names it, and anybody may write one: no path gets past here.
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
    """Remove a run's directory, and what is read-only in it."""
    remove_tree(directory)


def tidy(root: Path) -> None:
    """Remove what nobody will ask for any more: old answers, and folders of runs that are over for long."""
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
