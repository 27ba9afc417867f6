"""What a kernel's open files are seen to come to while it runs. Imports events only; reads /proc.

A look with each sample and at the end of each cell: what is opened and closed in between is not seen, so that these are lower bounds,
good for where to begin.
"""

from __future__ import annotations

import contextlib
import os
import stat

from safe_exec.model import events

_WRITABLE = 0o200


class Descriptors:
    """An event sink that keeps ``most``, how many were open at a time, and ``largest``, the size of the largest file open for writing.

    ``limit`` is what the kernel may open: descriptors from there on are no notebook's (ours are put where nobody would look for them).
    """

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self.most: int | None = None
        self.largest: int | None = None
        self._pid = 0

    def __call__(self, event: events.Event) -> None:
        """Look, at those events that come when something may have changed."""
        match event:
            case events.KernelStarted():
                self._pid = event.pid
            case events.KernelReady() | events.UsageSampled() | events.CellFinished() if self._pid:
                self.look()

    def look(self) -> None:
        """Look now; a kernel that is gone has none."""
        directory = f"/proc/{self._pid}/fd"
        with contextlib.suppress(OSError):
            names = [
                name
                for name in os.listdir(directory)
                if self._limit is None or int(name) < self._limit
            ]
            self.most = max(self.most or 0, len(names))
            for name in names:
                with contextlib.suppress(OSError):
                    self._measure(f"{directory}/{name}")

    def _measure(self, link: str) -> None:
        # The mode of the link says how the file was opened (proc_pid_fd(5)).
        if not os.lstat(link).st_mode & _WRITABLE or os.readlink(link).startswith("/memfd:"):
            return
        status = os.stat(link)
        if stat.S_ISREG(status.st_mode):
            self.largest = max(self.largest or 0, status.st_size)
