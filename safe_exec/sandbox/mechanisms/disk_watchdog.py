"""The last resort for the disk limit: walks the folder and the temporary files of a run."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable

from safe_exec.keeper import procfs
from safe_exec.sandbox.usage.open_files import BLOCK, hidden_usage

# Where bubblewrap gives no file system of limited size. Counted is what has come to the places of a
# run since it began: blocks on the disk, at least a page for each entry, and what is held open
# there after it was removed. The walk takes a twentieth of the time at most, and comes early when
# so much space has gone from the file system that the limit may be passed: a fast writer is seen
# within a tenth of a second and a walk.

LOOK_SECONDS = 0.1
WALK_SECONDS = 0.5
# A walk of a second is followed by so many without one, unless space goes.
SHARE = 20
PAGE = 4096


def size_of(places: Iterable[str]) -> int:
    """Bytes of all below some directories, each inode once."""
    # What goes while we walk, or cannot be read, does not count.
    sizes: dict[tuple[int, int], int] = {}
    directories = list(places)
    while directories:
        with contextlib.suppress(OSError), os.scandir(directories.pop()) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    status = entry.stat(follow_symlinks=False)
                    # A file with several names counts once, and a sparse one by its blocks.
                    sizes[status.st_dev, status.st_ino] = max(PAGE, status.st_blocks * BLOCK)
                    if entry.is_dir(follow_symlinks=False):
                        directories.append(entry.path)
    return sum(sizes.values())


def free_of(places: Iterable[str]) -> int:
    """Bytes that are free where they lie, each file system once."""
    free: dict[int, int] = {}
    for place in places:
        with contextlib.suppress(OSError):
            status = os.statvfs(place)
            free[os.stat(place).st_dev] = status.f_bfree * status.f_frsize
    return sum(free.values())


class DiskWatch(threading.Thread):
    """Watches the places of one sandbox; calls ``on_passed(bytes)`` once if they grow too far."""

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
        """Walk once for what was there before, then look on."""
        with self._looking:
            self._initial_size = size_of(self._places)
            self._free = free_of(self._places)
            self._walk_start = time.monotonic()
        while not self._stop_event.wait(LOOK_SECONDS):
            if self.check():
                return

    def check(self, *, last: bool = False) -> bool:
        """Walk if it is time to; whether more than allowed has come.

        The ``last`` look of a run is always one if it is a short one.
        """
        with self._looking:
            if self._passed or self._initial_size is None or self._stop_event.is_set():
                return self._passed
            # Of all that is allowed, what is not used yet may have been written since: then look,
            # but no more than half of the time.
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
        """End the watch and wait for its thread, unless called from it."""
        self._stop_event.set()
        if self.is_alive() and threading.current_thread() is not self:
            self.join()
