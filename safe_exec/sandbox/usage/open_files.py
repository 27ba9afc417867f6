"""Files that processes hold open and no directory shows: in memory, or removed."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable

from msgspec import Struct, field

# Standard library only. A descriptor that is on its way in a socket (unix(7), SCM_RIGHTS) is seen
# by nobody, nor is that of a process that is gone between two looks.

# The unit of ``st_blocks`` (stat(2)).
BLOCK = 512
IN_MEMORY = ("/memfd:", "/dev/shm/", "/SYSV", "/dev/zero")  # noqa: S108 - looked at, not used
REMOVED = " (deleted)"
_INODE = tuple[int, int]


class UnlinkedAndMemoryFiles(Struct):
    """Bytes by inode of files in ``memory`` and of ``removed`` files.

    What several processes hold counts once.
    """

    memory: dict[_INODE, int] = field(default_factory=dict)
    removed: dict[_INODE, int] = field(default_factory=dict)


def hidden_usage(pids: Iterable[int]) -> UnlinkedAndMemoryFiles:
    """Look at the descriptors of processes; those that may not be looked at are left out."""
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
