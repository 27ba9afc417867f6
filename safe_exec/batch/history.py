"""Remember a notebook's last run on this machine: its duration, and its fingerprint if it passed.

Each notebook has one small JSON file in the user's cache. A missing or unreadable file counts as no
history: history saves time and never changes a result.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from pathlib import Path

import msgspec
from msgspec import Struct
from msgspec.structs import asdict

from safe_exec.cache import cache_root
from safe_exec.files import write_atomically
from safe_exec.reports import json_text

KEPT_DAYS = 180
_DAY = 86400.0


class RunHistory(Struct, frozen=True, kw_only=True):
    """The last run of a notebook.

    ``seconds`` is its duration, ``passed`` the fingerprint of the last run that passed.
    """

    seconds: float | None = None
    passed: str | None = None


class History:
    """The histories of notebooks, by their path."""

    def __init__(self, directory: Path | None) -> None:
        self.directory = directory

    @classmethod
    def of_user(cls) -> History:
        """Open the history in the user's cache; without a cache it stays empty."""
        with contextlib.suppress(OSError):
            directory = cache_root() / "notebooks"
            directory.mkdir(mode=0o700, exist_ok=True)
            return cls(directory)
        return cls(None)

    def get(self, notebook: Path) -> RunHistory:
        """Return the record of earlier runs of a notebook."""
        # Any error means no history: the file may be of another version, or cut short.
        try:
            return msgspec.json.decode(self._file(notebook).read_bytes(), type=RunHistory)
        except (OSError, ValueError, RecursionError):
            return RunHistory()

    def put(self, notebook: Path, record: RunHistory) -> None:
        """Replace the record of earlier runs of a notebook."""
        # Best effort: a full disk or a read-only home costs the next batch some time, nothing else.
        with contextlib.suppress(OSError):
            write_atomically(
                self._file(notebook),
                json_text.line({"path": ascii(str(notebook)), **asdict(record)}),
            )

    def tidy(self) -> None:
        """Delete the histories of notebooks that have not run for half a year."""
        with contextlib.suppress(OSError):
            for entry in os.scandir(self.directory) if self.directory is not None else ():
                if time.time() - entry.stat(follow_symlinks=False).st_mtime > KEPT_DAYS * _DAY:
                    os.unlink(entry.path)

    def _file(self, notebook: Path) -> Path:
        if self.directory is None:
            raise FileNotFoundError("there is no cache")
        # A hash, because a path may be longer than a file name can be.
        name = hashlib.sha256(os.fsencode(os.path.realpath(notebook))).hexdigest()
        return self.directory / f"{name}.json"
