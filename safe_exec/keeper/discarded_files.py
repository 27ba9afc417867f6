"""Lists the files that disappear with a sandbox, in its own home, /tmp or /dev/shm.

Standard library only.

The keeper lists them when all processes of the sandbox are dead, so nothing changes meanwhile. Its
open descriptors of their roots keep the file systems in place. The notebook chose the names, so
directories are walked by descriptors, no link is followed, and depth, number and time are bounded.

Most files that a run leaves in such places are no loss: caches, locks, sockets, temporary files.
The rules below recognise these; all other files are reported. Only mkstemp(3), mkdtemp(3) and
Python's tempfile make entries that nobody else may read (0600 and 0700) under a name with random
characters, so such an entry is temporary. A plain ``open`` makes files that others may read, unless
the umask forbids it; then only the usual names identify temporary files.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import time

from safe_exec.keeper.protocol import HOME, SHM, TMP, Discarded, DiscardedGroup

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator
    from typing import Any

SECONDS = 0.5
MOST_ENTRIES = 20_000
MOST_DEPTH = 16
# Descriptors that are open at a time.
MOST_DIRECTORIES = 200
# Names right below a place that are reported; the others are only counted.
MOST_GROUPS = 50

PRIVATE = 0o077
TEMPORARY_ENDS = (".tmp", ".temp", ".lock", ".lck", ".pid", ".sock", ".swp", ".part", "~")
# Python's tempfile uses eight of these characters, mkstemp(3) six. Six plain lower-case letters do
# not count, since too many words look like that.
_RANDOM = re.compile(r"[a-z0-9_]{8}|(?=[A-Za-z0-9]*[A-Z0-9])[A-Za-z0-9]{6}")
# Python's and mktemp(1)'s own prefix, a random long of Java's (a time of day is shorter), a UUID.
_SURELY_RANDOM = re.compile(
    r"^tmp[a-z0-9_]{8}|^tmp\.[A-Za-z0-9]{6}|\d{17}|[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-", re.ASCII
)
# Directories in /tmp.
_OF_PROGRAMS = re.compile(
    r"ipykernel_|matplotlib-|Rtmp|jl_|pymp-|joblib_memmapping|loky-|pip-|npm-|torchinductor_"
    r"|torchelastic_|dask-(?:scratch|worker)-space"
    r"|hsperfdata_|runtime-|safe-exec-|(?:ray|triton|polars)$"
)
_SHARED_MEMORY = re.compile(
    r"psm_|wnsm_|sem\.|torch_|joblib_memmapping|loky-|pym-|nccl-|ompi|vader_segment|sm_segment"
    r"|plasma|lttng-ust|pulse-shm"
)
# Directories in homes where libraries keep what they have downloaded or built.
HOME_DOWNLOADS = (
    "nltk_data",
    "scikit_learn_data",
    "seaborn-data",
    "statsmodels_data",
    "gensim-data",
    "tensorflow_datasets",
    "R",
    "go",
    "snap",
)


def is_passing_name(name: str, *, is_directory: bool) -> bool:
    """Whether a name is that of a cache, a lock or a similar file in any directory."""
    return name.endswith(TEMPORARY_ENDS) or (
        is_directory and ("cache" in name.lower() or name == ".ipynb_checkpoints")
    )


def is_passing_at_top(kind: str, name: str, mode: int, *, mode_tells: bool) -> bool:
    """Whether a program, not the notebook's own code, left an entry directly below a place.

    ``mode_tells`` is true if the umask lets others read files made by ``open``, so that a private
    mode is significant.
    """
    if kind == HOME:
        return name.startswith(".") or name in HOME_DOWNLOADS
    if kind == TMP:
        of_a_program = stat.S_ISDIR(mode) and _OF_PROGRAMS.match(name)
        is_private = mode_tells and not mode & PRIVATE
        return bool(
            name.startswith(".")
            or of_a_program
            or _SURELY_RANDOM.search(name)
            or (is_private and _RANDOM.search(name))
        )
    if (
        kind == SHM
    ):  # a piece of shared memory is a file here that others may not read, whatever its name
        return bool(not mode & PRIVATE or _SHARED_MEMORY.match(name))
    return False


class Listing:
    """The files of several places, grouped by the entry directly below the place.

    The listing ends when its budget of time or of entries is used up.
    """

    def __init__(
        self, *, mode_tells: bool, seconds: float = SECONDS, entries: int = MOST_ENTRIES
    ) -> None:
        self.is_complete = True
        self._groups: dict[tuple[str, str], list[Any]] = {}
        self._mode_tells = mode_tells
        self._deadline = time.monotonic() + seconds
        self._budget = entries

    def add(
        self,
        place: str,
        kind: str,
        fd: int,
        *,
        skip: Collection[str] = (),
        is_old: Callable[[str, os.stat_result], bool] | None = None,
        is_kept: Callable[[int, str, int], bool] | None = None,
    ) -> None:
        """List the files below the directory ``fd``; ``place`` is its path in the notebook.

        ``skip`` are paths in it that do not belong to the notebook: mount points. ``is_old`` says
        whether a file was there before; ``is_kept`` copies a file and says whether it did.
        """
        for name, status in self._files(fd, kind, frozenset(skip)):
            if is_old is not None and is_old(name, status):
                continue
            if is_kept is not None and is_kept(fd, name, status.st_size):
                continue
            top, _, inner = name.partition("/")
            group = self._groups.setdefault((place, top), [0, 0, None])
            group[0] += 1
            group[1] += status.st_size
            group[2] = name if group[0] == 1 and inner else None

    def as_message(self) -> Discarded:
        """Return the message to the runner: the largest groups, and the number of all files."""
        largest = sorted(self._groups.items(), key=lambda item: item[1][1], reverse=True)[
            :MOST_GROUPS
        ]
        groups = tuple(
            DiscardedGroup(place=place, name=only or top, files=files, bytes=size)
            for (place, top), (files, size, only) in largest
        )
        return Discarded(
            groups=groups,
            files=sum(group[0] for group in self._groups.values()),
            is_complete=self.is_complete,
        )

    def _files(
        self, root: int, kind: str, skip: frozenset[str]
    ) -> Iterator[tuple[str, os.stat_result]]:
        """Yield the regular files with their path below ``root``.

        Each directory's files come before those of its subdirectories. Other file systems below
        ``root`` are left out.
        """
        device = os.fstat(root).st_dev
        todo = [("", os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=root))]
        try:
            while todo:
                folder, fd = todo.pop()
                inner: list[str] = []
                with contextlib.closing(_Directory(fd)) as directory:
                    for name, status in directory.entries():
                        if not self._has_budget():
                            return
                        path = f"{folder}{name}"
                        is_directory = stat.S_ISDIR(status.st_mode)
                        if (
                            status.st_dev != device
                            or path in skip
                            or is_passing_name(name, is_directory=is_directory)
                        ):
                            continue
                        if not folder and is_passing_at_top(
                            kind, name, status.st_mode, mode_tells=self._mode_tells
                        ):
                            continue
                        if is_directory:
                            inner.append(name)
                        elif stat.S_ISREG(status.st_mode):
                            yield path, status
                    room = MOST_DIRECTORIES - len(todo) if folder.count("/") < MOST_DEPTH else 0
                    self.is_complete = self.is_complete and len(inner) <= room
                    for name in inner[:room]:
                        # Even we may not look into some directories.
                        with contextlib.suppress(OSError):
                            todo.append((f"{folder}{name}/", directory.open(name)))
        finally:
            for _, fd in todo:
                os.close(fd)

    def _has_budget(self) -> bool:
        self._budget -= 1
        if self._budget < 0 or time.monotonic() > self._deadline:
            self.is_complete = False
            return False
        return True


class _Directory:
    """An open directory; closing it closes its descriptor."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def entries(self) -> Iterator[tuple[str, os.stat_result]]:
        with os.scandir(self._fd) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    yield entry.name, entry.stat(follow_symlinks=False)

    def open(self, name: str) -> int:
        return os.open(
            name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._fd
        )

    def close(self) -> None:
        os.close(self._fd)


def umask() -> int:
    """Return the umask of this process, which its children inherit."""
    mask = os.umask(PRIVATE)
    os.umask(mask)
    return mask
