"""What this machine remembers of notebooks: how long each took, and what it was when it passed. Imports culprit's cache and files.

One small JSON file for each notebook in the user's cache, replaced whole: batches that run at the same time do not disturb each other. A
memory that cannot be read or written is an empty one: it saves time and decides nothing but that.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path

from msgspec import Struct
from msgspec.structs import asdict

from safe_exec.experiments.trial_cache import cache_root
from safe_exec.files import write_atomically

KEPT_DAYS = 180
_DAY = 86400.0


class RunHistory(Struct, frozen=True, kw_only=True):
    """``seconds``: what it took the last time it was run. ``passed``: the key of all that it depended on when it last passed."""

    seconds: float | None = None
    passed: str | None = None


class History:
    """The memory of notebooks by their path."""

    def __init__(self, directory: Path | None) -> None:
        self.directory = directory

    @classmethod
    def of_user(cls) -> History:
        """In the user's cache; one that remembers nothing where there is none to be had."""
        with contextlib.suppress(OSError):
            directory = cache_root() / "notebooks"
            directory.mkdir(mode=0o700, exist_ok=True)
            return cls(directory)
        return cls(None)

    def get(self, notebook: Path) -> RunHistory:
        """What is known of a notebook."""
        try:
            document = json.loads(self._file(notebook).read_bytes())
            return RunHistory(
                seconds=_number(document["seconds"]), passed=_word(document["passed"])
            )
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return RunHistory()

    def put(self, notebook: Path, record: RunHistory) -> None:
        """Remember."""
        with contextlib.suppress(OSError):
            write_atomically(
                self._file(notebook),
                json.dumps({"path": ascii(str(notebook)), **asdict(record)}).encode(),
            )

    def tidy(self) -> None:
        """Forget what nobody has run for long."""
        with contextlib.suppress(OSError):
            for entry in os.scandir(self.directory) if self.directory is not None else ():
                if time.time() - entry.stat(follow_symlinks=False).st_mtime > KEPT_DAYS * _DAY:
                    os.unlink(entry.path)

    def _file(self, notebook: Path) -> Path:
        if self.directory is None:
            raise FileNotFoundError("there is no cache")
        name = hashlib.sha256(os.fsencode(os.path.realpath(notebook))).hexdigest()
        return self.directory / f"{name}.json"


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _word(value: object) -> str | None:
    return value if isinstance(value, str) else None
