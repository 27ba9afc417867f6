"""Finds the holder of a file lock that a kernel waits for (proc(5), Linux 4.1)."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from safe_exec.keeper import procfs
from safe_exec.kernel.blocked import Call
from safe_exec.kernel.processes import command_text, descriptor_target, descriptors, read_bytes
from safe_exec.model.observed import ObservedLock
from safe_exec.model.patterns import lazy_pattern

SLEEPS = ("nanosleep", "clock_nanosleep")
# The bytes that SQLite locks in a database file (os.h: PENDING_BYTE).
SQLITE_LOCKS = range(0x40000000, 0x40000000 + 512)
# The bytes that it locks in the ``-shm`` file of a database with a write-ahead log (wal.c:
# WALINDEX_LOCK_OFFSET).
WAL_LOCKS = range(120, 128)


# HDF5, DuckDB, SQLite, LMDB, packages for lock files; netCDF gives EACCES for a file that is open
# already.
LOCK_REFUSED = lazy_pattern(
    r"\block(?:ed|ing)?\b|Resource temporarily unavailable|BlockingIOError|\[Errno 11\]"
    r"|Permission denied|already open",
    re.IGNORECASE,
)
SAYS_LOCK = lazy_pattern(r"\block(?:ed|ing)?\b|already open", re.IGNORECASE)
# SQLite names no file (SQLITE_BUSY, "Result and Error Codes").
LOCKED_DATABASE = "database is locked"
QUOTED = lazy_pattern(r"""['"]([^'"\n]{1,1000})['"]""")


class Entry(NamedTuple):
    """A line of /proc/locks. ``waits`` is true for a lock that is not granted yet.

    ``pid`` is -1 for locks of open files, and 0 for a process outside our pid namespace.
    """

    number: str
    waits: bool
    kind: str
    exclusive: bool
    pid: int
    inode: int
    start: int


def parse(text: str) -> list[Entry]:
    """Parse /proc/locks, or the ``lock:`` lines of a fdinfo file."""
    # A waiting lock follows the lock that blocks it, has the same number, and an arrow.
    entries = []
    for line in text.splitlines():
        number, _, tail = line.strip().removeprefix("lock:").strip().partition(":")
        fields = tail.split()
        waits = "->" in fields
        fields = [word for word in fields if word != "->"]
        try:
            kind, _, mode, pid, place, start = fields[:6]
            entries.append(
                Entry(
                    number,
                    waits,
                    kind,
                    mode == "WRITE",
                    int(pid),
                    int(place.rpartition(":")[2]),
                    int(start),
                )
            )
        except ValueError:
            continue
    return entries


def lock_of(kernel: int, call: Call | None, others: Sequence[int]) -> ObservedLock | None:
    """Return the file lock that a kernel waits for, or may be polling."""
    # SQLite and lock-file packages do not block in a lock call. They sleep between attempts.
    if call is not None and call.name in ("flock", "fcntl"):
        return awaited_lock(kernel, call, others)
    if call is not None and call.name in SLEEPS:
        return database_lock(kernel) or polled_lock(kernel, others)
    return None


def awaited_lock(kernel: int, call: Call | None, others: Iterable[int]) -> ObservedLock | None:
    """Return the lock that blocks a kernel in flock(2) or fcntl(2), with its holder.

    ``others`` are the sandbox's other processes.
    """
    if call is None or call.name not in ("flock", "fcntl") or call.descriptor is None:
        return None
    path = descriptor_target(kernel, call.descriptor)
    if path is None:
        return None
    entries = parse(_text("/proc/locks"))
    waiting = next((entry for entry in entries if entry.waits and entry.pid == kernel), None)
    granted = next(
        (e for e in entries if waiting and not e.waits and e.number == waiting.number), None
    )
    kind = "flock" if call.name == "flock" else "fcntl"
    # flock(2) locks belong to the open file, not to the process. A child that inherited the file
    # holds the lock even if the process that took it has ended.
    for pid in (kernel, *others):
        if any(target == path for target in held_files(pid)):
            return _lock(path, kind, pid, kernel)
    return _lock(path, kind, granted.pid if granted and granted.pid > 0 else None, kernel)


def held_files(pid: int) -> list[str]:
    """Return the paths of the files on which a process holds a lock."""
    files = []
    for number in descriptors(pid):
        if parse(
            "\n".join(
                line
                for line in _text(f"/proc/{pid}/fdinfo/{number}").splitlines()
                if line.startswith("lock:")
            )
        ):
            target = descriptor_target(pid, number)
            if target is not None and target.startswith("/"):
                files.append(target)
    return files


def polled_lock(kernel: int, others: Iterable[int]) -> ObservedLock | None:
    """Return a held file lock, for a kernel that sleeps between attempts to get one."""
    for pid in (kernel, *others):
        for path in held_files(pid):
            return _lock(path, "lock file", pid, kernel)
    return None


def named_lock(text: str, source: str, kernel: int, others: Iterable[int]) -> ObservedLock | None:
    """Return the lock that an error is about: on a file that it names, or on a database.

    If the error mentions a lock, files named in ``source`` (the code of the cells) count too.
    Returns ``None`` if the error does not read like a refused lock, or nobody holds one. ``others``
    are the sandbox's other processes; they come first, since a child may have inherited the
    kernel's open file. A holder outside the sandbox is found by the file's inode.
    """
    if not LOCK_REFUSED.search(text):
        return None
    if SAYS_LOCK.search(text):
        text = f"{text}\n{source}"
    for pid in (*others, kernel):
        for path in held_files(pid):
            name = re.escape(os.path.basename(path))
            if re.search(rf"(?<![\w.-]){name}(?![\w-])", text):
                return _lock(path, "file", pid, kernel)
    holders = {entry.inode: entry.pid for entry in parse(_text("/proc/locks")) if not entry.waits}
    for name in dict.fromkeys(match[1] for match in QUOTED.finditer(text)):
        inode = _inode_of(kernel, name)
        if inode in holders:
            holder = holders[inode]
            return _lock(name, "file", holder if holder > 0 else None, kernel)
    return database_lock(kernel) if LOCKED_DATABASE in text else None


def database_lock(kernel: int) -> ObservedLock | None:
    """Return an exclusive lock of SQLite on a database that the kernel has open."""
    # A process never waits for its own POSIX locks, but SQLite keeps the connections of one process
    # apart by itself. So the kernel counts as the holder if it has the database open more than
    # once. (SQLite opens a -shm file only once per process.)
    entries = [
        entry
        for entry in parse(_text("/proc/locks"))
        if entry.kind == "POSIX" and entry.exclusive and not entry.waits
    ]
    if not entries:
        return None
    opened: dict[str, list[int]] = {}
    for number in descriptors(kernel):
        target = descriptor_target(kernel, number)
        if target is not None and target.startswith("/"):
            opened.setdefault(target, []).append(number)
    for path, numbers in opened.items():
        inode = _inode(kernel, numbers[0])
        for entry in entries:
            locks = WAL_LOCKS if path.endswith("-shm") else SQLITE_LOCKS
            if (
                entry.inode == inode
                and entry.start in locks
                and (entry.pid != kernel or len(numbers) > 1 or path.endswith("-shm"))
            ):
                return _lock(
                    path.removesuffix("-shm"),
                    "sqlite",
                    entry.pid if entry.pid > 0 else None,
                    kernel,
                )
    return None


def _lock(path: str, kind: str, holder: int | None, kernel: int) -> ObservedLock:
    command = (
        command_text(read_bytes(f"/proc/{holder}/cmdline"))
        if holder not in (None, kernel)
        else None
    )
    return ObservedLock(
        path=path,
        kind=kind,
        holder=procfs.innermost_pid(holder) if holder is not None else None,
        command=command or None,
        own=holder == kernel,
    )


def _inode_of(kernel: int, name: str) -> int | None:
    """Return the inode of a file in a kernel's working directory.

    Files in other directories are not looked up: the kernel chooses the links on the way, and a
    lookup might block forever.
    """
    folder, base = os.path.split(name)
    try:
        if not base or folder not in ("", os.readlink(f"/proc/{kernel}/cwd")):
            return None
        status = os.lstat(f"/proc/{kernel}/cwd/{base}")
    except (OSError, ValueError):
        return None
    return status.st_ino if stat.S_ISREG(status.st_mode) else None


def _inode(pid: int, number: int) -> int | None:
    try:
        return os.stat(f"/proc/{pid}/fd/{number}").st_ino
    except OSError:
        return None


def _text(path: str) -> str:
    return read_bytes(path).decode("utf-8", "replace")
