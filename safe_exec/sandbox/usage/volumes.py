"""The free space of the file systems that a kernel can write to, measured from outside."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable

from msgspec.structs import replace

from safe_exec.model.evidence import Volume

# The directories are opened once, through ``/proc/PID/root``, since the runner's own paths lead to
# other file systems. An open directory outlives the mount namespace, so the free space can still be
# read after the kernel's death.


class Volumes:
    """The volumes of one kernel, with the lowest free space since the last ``begin``."""

    # A program that filled a disk may delete its files when the write fails, so the free space at
    # the end explains nothing.
    def __init__(self, pid: int, places: Iterable[str]) -> None:
        """Open the places as seen by the process ``pid``, except those that cannot be opened."""
        self._directories: dict[int, int] = {}
        self._own: set[int] = set()
        self._places: dict[int, list[str]] = {}
        self._lowest: dict[int, Volume] = {}
        self._initial_free: dict[int, int] = {}
        for place in dict.fromkeys(places):
            with contextlib.suppress(OSError):
                self._open(f"/proc/{pid}/root{place}", place)

    def _open(self, path: str, place: str) -> None:
        directory = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        device = os.fstat(directory).st_dev
        if device in self._directories:
            os.close(directory)
        else:
            self._directories[device] = directory
        self._places.setdefault(device, []).append(place)
        with contextlib.suppress(OSError):
            if os.stat(place).st_dev != device:
                self._own.add(device)

    def begin(self) -> None:
        """Reset the lowest free space at the start of a cell."""
        self._lowest.clear()
        self.measure(own=True)
        self._initial_free = {device: volume.free for device, volume in self._lowest.items()}

    def measure(self, *, own: bool = False) -> None:
        """Measure the free space; with ``own`` only of the sandbox's own file systems."""
        # A machine's file server may take long to answer, so it is measured less often.
        for device, directory in self._directories.items():
            if own and device not in self._own:
                continue
            with contextlib.suppress(OSError):
                self._note(device, _measure(directory))

    def _note(self, device: int, volume: Volume) -> None:
        lowest = self._lowest.get(device)
        if lowest is None or volume.free < lowest.free:
            self._lowest[device] = volume

    def lowest(self) -> tuple[Volume, ...]:
        """Return each measured volume with its lowest free space since the last ``begin``."""
        return tuple(
            replace(
                volume,
                places=tuple(self._places[device]),
                free_at_start=self._initial_free.get(device),
                own=device in self._own,
            )
            for device, volume in self._lowest.items()
        )

    def close(self) -> None:
        """Close the directories."""
        # An open directory keeps its file system alive.
        for directory in self._directories.values():
            os.close(directory)
        self._directories.clear()


def _measure(directory: int) -> Volume:
    figures = os.fstatvfs(directory)
    # Without a free inode no file can be created, even if blocks are free. File systems that do not
    # count inodes report 0 of 0.
    free = 0 if figures.f_files and not figures.f_favail else figures.f_bavail * figures.f_frsize
    return Volume(places=(), size=figures.f_blocks * figures.f_frsize, free=free)
