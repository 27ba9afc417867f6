"""The last resort for the disk limit: measures the folder and temporary files of a run."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable

from safe_exec.keeper import procfs
from safe_exec.sandbox.usage.open_files import BLOCK, hidden_usage

# Used if bubblewrap cannot provide a file system of limited size. It counts the growth of a run's
# directories since its start: blocks on the disk, at least a page for each entry, and files that
# were removed but are still open. A walk takes at most a twentieth of the time. It comes early if
# so much space of the file system was used that the limit may be exceeded. So a fast writer is
# noticed within a tenth of a second plus one walk.

LOOK_SECONDS = 0.1
WALK_SECONDS = 0.5
# After a walk of one second, rest for this many seconds, unless free space shrinks.
SHARE = 20
PAGE = 4096


def size_of(places: Iterable[str]) -> int:
    """Return the bytes of all files below some directories."""
    # Files that disappear during the walk, or cannot be read, do not count.
    sizes: dict[tuple[int, int], int] = {}
    directories = list(places)
    while directories:
        with contextlib.suppress(OSError), os.scandir(directories.pop()) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    status = entry.stat(follow_symlinks=False)
                    # A file with several names counts once, and a sparse file by its blocks.
                    sizes[status.st_dev, status.st_ino] = max(PAGE, status.st_blocks * BLOCK)
                    if entry.is_dir(follow_symlinks=False):
                        directories.append(entry.path)
    return sum(sizes.values())


def free_of(places: Iterable[str]) -> int:
    """Return the free bytes of the file systems of some places, each counted once."""
    free: dict[int, int] = {}
    for place in places:
        with contextlib.suppress(OSError):
            status = os.statvfs(place)
            free[os.stat(place).st_dev] = status.f_bfree * status.f_frsize
    return sum(free.values())


class DiskWatch(threading.Thread):
    """Watches the files of one sandbox; calls ``on_passed(bytes)`` once they exceed the limit."""

    def __init__(
        self, root: int, places: tuple[str, ...], allowed: int, on_passed: Callable[[int], None]
    ) -> None:
        super().__init__(name="safe-exec-diskwatch", daemon=True)
        self._root, self._places, self._allowed = root, places, allowed
        self._on_passed = on_passed
        self._stop_event = threading.Event()
        self._looking = threading.Lock()
        self._initial_size: int | None = None
        self._passed = False
        self._used = 0
        self._free = 0
        self._walk_start = self._took = 0.0

    def run(self) -> None:
        """Measure the initial size, then check until the limit is exceeded."""
        with self._looking:
            self._initial_size = size_of(self._places)
            self._free = free_of(self._places)
            self._walk_start = time.monotonic()
        while not self._stop_event.wait(LOOK_SECONDS):
            if self.check():
                return

    def check(self, *, last: bool = False) -> bool:
        """Measure if a measurement is due; true if the growth exceeds the limit.

        The ``last`` check of a run always measures, unless that takes long.
        """
        with self._looking:
            if self._passed or self._initial_size is None or self._stop_event.is_set():
                return self._passed
            # If the file systems lost more free space than the run may still use, the run may have
            # exceeded its limit. Then measure early, but for at most half of the time.
            consumed = self._free - free_of(self._places)
            near = consumed > self._allowed - self._used
            pause = self._took if near else max(WALK_SECONDS, SHARE * self._took)
            due = (
                near or self._took < WALK_SECONDS
                if last
                else time.monotonic() - self._walk_start - self._took >= pause
            )
            if due:
                self._walk(self._initial_size)
            return self._passed

    def _walk(self, initial_size: int) -> None:
        self._walk_start = time.monotonic()
        self._free = free_of(self._places)
        removed = hidden_usage(procfs.descendants(self._root)).removed
        self._used = size_of(self._places) - initial_size + sum(removed.values())
        self._took = time.monotonic() - self._walk_start
        if self._used > self._allowed:
            self._passed = True
            self._on_passed(self._used)

    def stop(self) -> None:
        """Stop the watch and wait for its thread, unless called from it."""
        self._stop_event.set()
        if self.is_alive() and threading.current_thread() is not self:
            self.join()
