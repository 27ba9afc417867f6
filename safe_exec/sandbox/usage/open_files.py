"""Open files without a visible name: files in memory, and removed files."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable

from msgspec import Struct, field

# Standard library only. Two kinds of files are missed: descriptors in transit in a socket
# (SCM_RIGHTS, unix(7)), and those of processes that start and end between two scans.

# The unit of ``st_blocks`` (stat(2)).
BLOCK = 512
IN_MEMORY = ("/memfd:", "/dev/shm/", "/SYSV", "/dev/zero")  # noqa: S108 - looked at, not used
REMOVED = " (deleted)"
_INODE = tuple[int, int]


class UnlinkedAndMemoryFiles(Struct):
    """Sizes of files in ``memory`` and of ``removed`` files, by inode, in bytes."""

    memory: dict[_INODE, int] = field(default_factory=dict)
    removed: dict[_INODE, int] = field(default_factory=dict)


def hidden_usage(pids: Iterable[int]) -> UnlinkedAndMemoryFiles:
    """Measure the hidden files of processes, except those that we may not inspect."""
    # Files are keyed by inode, so one that several processes have open counts once.
    usage = UnlinkedAndMemoryFiles()
    for pid in pids:
        with contextlib.suppress(OSError), os.scandir(f"/proc/{pid}/fd") as entries:
            for entry in entries:
                _note(entry.path, usage)
    return usage


def _note(path: str, usage: UnlinkedAndMemoryFiles) -> None:
    with contextlib.suppress(OSError):
        target = os.readlink(path)
        in_memory = target.startswith(IN_MEMORY)
        if not in_memory and not target.endswith(REMOVED):
            return
        status = os.stat(path)
        if stat.S_ISREG(status.st_mode):
            table = usage.memory if in_memory else usage.removed
            table[status.st_dev, status.st_ino] = status.st_blocks * BLOCK
