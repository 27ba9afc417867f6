"""Observes how many files a running kernel has open, and how large they are. Reads /proc.

It samples with each usage sample and at the end of each cell. Files that are opened and closed in
between go unnoticed, so the figures are lower bounds: good starting points for a search.
"""

from __future__ import annotations

import contextlib
import os
import stat

from safe_exec.model import events

_WRITABLE = 0o200


class Descriptors:
    """An event sink that records the peak of open files and the largest written file.

    ``limit`` is the kernel's limit for open files. Descriptors with that number or a higher one are
    safe-exec's own.
    """

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self.most: int | None = None
        self.largest: int | None = None
        self._pid = 0

    def __call__(self, event: events.Event) -> None:
        """Sample at events after which the open files may have changed."""
        match event:
            case events.KernelStarted():
                self._pid = event.pid
            case events.KernelReady() | events.UsageSampled() | events.CellFinished() if self._pid:
                self.look()

    def look(self) -> None:
        """Sample now; a kernel that has ended has no open files."""
        directory = f"/proc/{self._pid}/fd"
        with contextlib.suppress(OSError):
            # The agent places its own descriptors beyond the limit.
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
