"""Lists the files that were created or changed in the working directory while a notebook ran."""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from safe_exec.keeper.protocol import KeptFile
from safe_exec.model.verdict import CreatedFile

MOST_FILES = 200
# The folder may be a home with a million files: nobody waits for its listing.
MOST_ENTRIES = 20_000
SECONDS = 0.3
# File systems stamp files with a clock that is a few milliseconds late.
CLOCK_SECONDS = 0.02
SKIPPED = frozenset({"__pycache__", "node_modules"})


class CreatedFiles(NamedTuple):
    """Files in the order of their paths. ``is_complete`` is false if there are more."""

    files: tuple[CreatedFile, ...]
    is_complete: bool


def created_files(
    folder: Path, since: float, own_paths: Collection[Path], kept_files: Sequence[KeptFile] = ()
) -> CreatedFiles:
    """List files below ``folder`` that changed after ``since``, in seconds of the system's clock.

    ``own_paths`` are files and directories of safe-exec. Hidden files and caches are left out, and
    links are not followed.
    """
    files = {
        file.path: CreatedFile(path=file.path, bytes=file.bytes, from_copy=True)
        for file in kept_files
    }
    walk = _Walk(own_paths)
    for path, status in walk.entries(folder):
        # The time of a change of the inode; nobody can set it back.
        if path not in files and status.st_ctime >= since - CLOCK_SECONDS:
            files[path] = CreatedFile(path=path, bytes=status.st_size)
    listed = sorted(files.values(), key=lambda file: file.path)
    is_complete = walk.is_complete and len(listed) <= MOST_FILES
    return CreatedFiles(tuple(listed[:MOST_FILES]), is_complete)


class _Walk:
    """Walks a folder within a budget of time and of entries."""

    def __init__(self, own_paths: Collection[Path]) -> None:
        self.is_complete = True
        self._own_paths = own_paths
        self._budget = MOST_ENTRIES
        self._deadline = time.monotonic() + SECONDS

    def entries(self, folder: Path) -> Iterator[tuple[str, os.stat_result]]:
        """Yield the regular files with their relative paths."""
        waiting = [(folder.absolute(), "")]
        while waiting:
            directory, prefix = waiting.pop()
            # A directory that we may not read, or that is gone.
            with contextlib.suppress(OSError), os.scandir(directory) as entries:
                for entry in entries:
                    self._budget -= 1
                    if self._budget < 0 or time.monotonic() > self._deadline:
                        self.is_complete = False
                        return
                    path = directory / entry.name
                    is_skipped = entry.name.startswith(".") or entry.name in SKIPPED
                    if is_skipped or path in self._own_paths:
                        continue
                    status = entry.stat(follow_symlinks=False)
                    if stat.S_ISDIR(status.st_mode):
                        waiting.append((path, f"{prefix}{entry.name}/"))
                    elif stat.S_ISREG(status.st_mode):
                        yield f"{prefix}{entry.name}", status
