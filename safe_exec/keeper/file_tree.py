"""Copies folders, writes changed copies back, and removes trees, without following any link.

A hostile program may nest folders as deeply as it likes, so nothing here recurses. Standard library
only.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shutil
import stat
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

SPECIAL_BITS = stat.S_ISUID | stat.S_ISGID
COPIED_KINDS = frozenset({stat.S_IFDIR, stat.S_IFREG, stat.S_IFLNK})
PIECE = 64 << 20
CLOCK_REALTIME_COARSE = 5
# Errors of opening a file that has become a link, a pipe or a device in the meantime.
REPLACED_ERRORS = frozenset({errno.ELOOP, errno.ESTALE, errno.ENXIO})


# Kind and mode of an entry; also size and time of a file, or the target of a link.
Fingerprint = tuple[object, ...]


def fingerprint(path: Path, status: os.stat_result) -> Fingerprint:
    """Return attributes that differ if an entry has changed.

    Raises OSError if a link has vanished.
    """
    kind = stat.S_IFMT(status.st_mode)
    if stat.S_ISLNK(status.st_mode):
        return kind, os.readlink(path)
    # A change of owner clears the special bits (chown(2)), so a copy may have lost them.
    mode = stat.S_IMODE(status.st_mode) & ~SPECIAL_BITS
    if stat.S_ISREG(status.st_mode):
        return kind, mode, status.st_size, status.st_mtime_ns
    return kind, mode


def walk(
    folder: Path, *, but: frozenset[Path] = frozenset()
) -> Iterator[tuple[Path, os.stat_result]]:
    """Yield all readable entries below a folder, parents first, without following links."""
    levels = [_entries(folder)]
    while levels:
        entry = next(levels[-1], None)
        if entry is None:
            levels.pop()
            continue
        path = Path(entry.path)
        try:
            status = entry.stat(follow_symlinks=False)
        except OSError:
            continue
        if path not in but:
            yield path, status
            if stat.S_ISDIR(status.st_mode):
                levels.append(_entries(path))


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return iter(sorted(entries, key=lambda entry: entry.name))
    except OSError:
        return iter(())


# --- copying ------------------------------------------------------------------------------------


def copy_tree(
    source: Path,
    target: Path,
    *,
    but: frozenset[Path] = frozenset(),
    owner: int | None = None,
    hardlink_candidates: Mapping[str, Path] | None = None,
) -> dict[str, Fingerprint]:
    """Copy a folder with its times and modes; return the fingerprints by path in the folder.

    Sockets, pipes, devices and unreadable entries are left out. Everything belongs to ``owner``
    afterwards; without one, root preserves the owners. ``hardlink_candidates`` are earlier copies
    by path in the folder. Raises OSError if the disk is full.
    """
    target.mkdir(mode=0o700)
    directories: list[tuple[Path, Path]] = [(source, target)]
    candidates = hardlink_candidates or {}
    fingerprints: dict[str, Fingerprint] = {}
    for path, status in walk(source, but=but):
        name = str(path.relative_to(source))
        copy = target / name
        # Nobody writes to either copy, so they may be one file under two names.
        is_linked = name in candidates and _link(candidates[name], copy)
        if is_linked or _copy_entry(path, copy, status):
            fingerprints[name] = fingerprint(path, status)
            if stat.S_ISDIR(status.st_mode):
                directories.append((path, copy))
            _set_owner(copy, status, owner)
    # Filling a directory changes its times, so they come last, inner directories first.
    for path, copy in reversed(directories):
        with contextlib.suppress(OSError):
            shutil.copystat(path, copy)
    _set_owner(target, os.stat(source), owner)
    return fingerprints


def _link(candidate: Path, copy: Path) -> bool:
    try:
        os.link(candidate, copy, follow_symlinks=False)
    except OSError:
        # It was removed with its run, or it has reached its largest number of links.
        return False
    return True


def _copy_entry(path: Path, copy: Path, status: os.stat_result) -> bool:
    """Copy one entry; false if its kind is not copied or it cannot be read."""
    try:
        if stat.S_ISDIR(status.st_mode):
            copy.mkdir()
        elif stat.S_ISLNK(status.st_mode):
            copy.symlink_to(os.readlink(path))
        elif stat.S_ISREG(status.st_mode):
            _copy_file(path, copy)
            shutil.copystat(path, copy, follow_symlinks=False)
        else:
            return False
    except (PermissionError, FileNotFoundError):
        return False
    except OSError as error:
        if error.errno not in REPLACED_ERRORS:
            raise
        return False
    return True


def _set_owner(copy: Path, status: os.stat_result, owner: int | None) -> None:
    if os.geteuid() == 0:
        uid, gid = (status.st_uid, status.st_gid) if owner is None else (owner, owner)
        with contextlib.suppress(OSError):
            os.chown(copy, uid, gid, follow_symlinks=False)


# --- removing -----------------------------------------------------------------------------------


def remove_tree(path: str | Path) -> bool:
    """Remove a directory and everything below it, read-only entries too.

    False if something remains.
    """
    top = os.fspath(path)
    if os.path.isdir(top) and not os.path.islink(top):
        numbers = itertools.count()
        stuck: set[str] = set()
        _open(top)
        while entries := [entry for entry in _entries(Path(top)) if entry.name not in stuck]:
            for entry in entries:
                if not _remove_entry(entry, top, numbers):
                    stuck.add(entry.name)
        with contextlib.suppress(OSError):
            os.rmdir(top)
    return not os.path.lexists(top)


def _remove_entry(entry: os.DirEntry[str], top: str, numbers: Iterator[int]) -> bool:
    """Remove one entry of ``top``.

    If it is a directory, move its subdirectories to ``top`` first.
    """
    # Moving them up keeps paths short, however deep the tree is.
    try:
        if not entry.is_dir(follow_symlinks=False):
            os.unlink(entry.path)
            return True
        _open(entry.path)
        for inner in _entries(Path(entry.path)):
            if inner.is_dir(follow_symlinks=False):
                _open(inner.path)
                os.rename(inner.path, _free_name(top, numbers))
            else:
                os.unlink(inner.path)
        os.rmdir(entry.path)
    except OSError:
        return False
    return True


def _free_name(top: str, numbers: Iterator[int]) -> str:
    paths = (os.path.join(top, f"up-{number}") for number in numbers)
    return next(path for path in paths if not os.path.lexists(path))


def _open(folder: str) -> None:
    # overlayfs leaves a work directory without any permission bits.
    with contextlib.suppress(OSError):
        os.chmod(folder, 0o700)


# --- writing back -------------------------------------------------------------------------------


class ConcurrentChanges:
    """Tells which entries of a folder others changed while a program worked on it.

    ``copies`` are the fingerprints of a copy: whatever differs from them was changed by others.
    ``since`` is the start of an overlay, in nanoseconds: others' changes are visible through it at
    once, so only entries that both sides changed may conflict. Without both, no other program is
    assumed to write.
    """

    def __init__(
        self, *, copies: dict[str, Fingerprint] | None = None, since: int | None = None
    ) -> None:
        self._copies, self._since = copies, since

    def is_untouched(self, name: str, path: Path, status: os.stat_result) -> bool:
        """Whether the program left this entry of the copy unchanged."""
        return self._copies is not None and self._copies.get(name) == fingerprint(path, status)

    def is_as_copied(self, name: str, status: os.stat_result) -> bool:
        """Whether the program left this file of the copy unchanged; false if there is no copy."""
        return self.is_untouched(name, Path(name), status)

    def is_new(self, name: str) -> bool:
        """Whether an entry of the folder was made after the copy."""
        return self._copies is not None and name not in self._copies

    def changed(self, name: str, path: Path, status: os.stat_result) -> bool:
        """Whether others changed this entry of the folder.

        Changes inside a directory do not count as changes of the directory.
        """
        if stat.S_ISDIR(status.st_mode):
            return self._copies is not None and self._copies.get(name, (0,))[0] != stat.S_IFDIR
        if self._copies is not None:
            return self._copies.get(name) != fingerprint(path, status)
        # Nobody can set the time of the last status change back (inode(7), st_ctime).
        return self._since is not None and status.st_ctime_ns > self._since


def now() -> int:
    """Return the clock by which Linux sets the times of files, in nanoseconds."""
    # time.time_ns() is finer, so a change right after it may bear an earlier stamp.
    return time.clock_gettime_ns(CLOCK_REALTIME_COARSE)


def write_back(
    source: Path, target: Path, concurrent_changes: ConcurrentChanges | None = None
) -> list[str]:
    """Make ``target`` equal to ``source``, a copy of it that a program has changed.

    Entries that others changed stay; returns the names of those that the program had changed too. A
    file is written completely or not at all. Raises OSError for entries that could not be written,
    after all others.
    """
    # The program's files are hostile data: links are copied as links and never followed,
    # set-user-id bits are dropped, devices, pipes and sockets are left out, holes stay holes. What
    # no copy contains (devices, unreadable files) is not touched in the target either.
    concurrent_changes = concurrent_changes or ConcurrentChanges()
    owner = os.stat(target)
    copied = {
        str(path.relative_to(source)): status
        for path, status in walk(source)
        if stat.S_IFMT(status.st_mode) in COPIED_KINDS
    }
    disputed = _remove_deleted(target, copied, concurrent_changes)
    errors: list[OSError] = []
    # Directories that were verified: a link among the parents would lead out of the target.
    folders = {"."}
    changed = [
        name
        for name, status in copied.items()
        if not concurrent_changes.is_untouched(name, source / name, status)
    ]
    required = {parent for name in changed for parent in _with_parents(name)}
    for name, status in copied.items():
        if name not in required or (os.path.dirname(name) or ".") not in folders:
            continue
        if _is_disputed(name, source, target, status, concurrent_changes):
            disputed.append(name)
            continue
        try:
            if stat.S_ISDIR(status.st_mode):
                _write_folder(target / name, owner)
                folders.add(name)
            else:
                _write_entry(source / name, target / name, status, owner)
        except OSError as error:
            errors.append(error)
    # Modes of directories come last: one may become read-only.
    for name in reversed([name for name in changed if name in folders]):
        _set_mode(target / name, copied[name])
    if errors:
        first, count = errors[0], len(errors) - 1
        more = f", and {count} more" if count else ""
        raise OSError(first.errno, f"{first.filename or target}: {first.strerror}{more}")
    return sorted(disputed)


def _remove_deleted(
    target: Path, copied: dict[str, os.stat_result], concurrent_changes: ConcurrentChanges
) -> list[str]:
    """Remove entries that the program removed; return the names of those that others changed."""
    disputed: list[str] = []
    for path, status in reversed(list(walk(target))):
        name = str(path.relative_to(target))
        if name in copied or concurrent_changes.is_new(name) or not _is_copied(path, status):
            continue
        if concurrent_changes.changed(name, path, status):
            disputed.append(name)
        else:
            _remove(path)
    return disputed


def _with_parents(name: str) -> Iterator[str]:
    while name:
        yield name
        name = os.path.dirname(name)


def _is_disputed(
    name: str,
    source: Path,
    target: Path,
    status: os.stat_result,
    concurrent_changes: ConcurrentChanges,
) -> bool:
    """Whether the program and others changed an entry in different ways."""
    path = target / name
    current = _status(path)
    if current is None or (stat.S_ISDIR(status.st_mode) and stat.S_ISDIR(current.st_mode)):
        return False
    if _is_same(source / name, path, status, current):
        return False
    return concurrent_changes.changed(name, path, current)


def _is_copied(path: Path, status: os.stat_result) -> bool:
    """Whether a copy of the folder would contain this entry at all."""
    if stat.S_ISREG(status.st_mode):
        return os.access(path, os.R_OK, effective_ids=True)
    return stat.S_IFMT(status.st_mode) in COPIED_KINDS


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink()


def _write_folder(path: Path, owner: os.stat_result) -> None:
    current = _status(path)
    if current is not None and stat.S_ISDIR(current.st_mode):
        return
    if current is not None:
        path.unlink()
    path.mkdir(mode=0o700)
    _set_owner(path, owner, None)


def _write_entry(source: Path, path: Path, status: os.stat_result, owner: os.stat_result) -> None:
    """Write a file or a link beside its path, then move it there."""
    current = _status(path)
    if current is not None and _is_same(source, path, status, current):
        return
    if current is not None and stat.S_ISDIR(current.st_mode):
        # The program's entries in the directory are removed by now; those that others made keep it
        # from being removed.
        path.rmdir()
    temporary = path.with_name(f".safe-exec-{os.urandom(6).hex()}")
    try:
        if stat.S_ISLNK(status.st_mode):
            temporary.symlink_to(os.readlink(source))
        else:
            _copy_file(source, temporary)
        _set_owner(temporary, owner, None)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.lstat()
    except FileNotFoundError:
        return None


def _set_mode(path: Path, status: os.stat_result) -> None:
    with contextlib.suppress(OSError):
        if (path.lstat().st_mode ^ status.st_mode) & ~SPECIAL_BITS:
            path.chmod(stat.S_IMODE(status.st_mode) & ~SPECIAL_BITS)


def _copy_file(path: Path, copy: Path) -> None:
    """Copy bytes, times and mode of a regular file; the copy is never set-user-id."""
    # The path may have become a link, a pipe or a device since it was listed. O_NONBLOCK keeps the
    # open from waiting for a pipe's writer.
    source = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(source)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.ESTALE, "no file any more", str(path))
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        target = os.open(copy, flags, 0o600)
        try:
            _copy_data(source, target, status.st_size)
            os.fchmod(target, stat.S_IMODE(status.st_mode) & ~SPECIAL_BITS)
            os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
        finally:
            os.close(target)
    finally:
        os.close(source)


def _copy_data(source: int, target: int, size: int) -> None:
    """Copy the first ``size`` bytes between two descriptors; holes stay holes."""
    # A sparse file of a few bytes may be longer than the disk, and a growing file has no end.
    end = 0
    while end < size:
        try:
            start = os.lseek(source, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            # ENXIO: only a hole remains (lseek(2)).
            break
        end = min(size, os.lseek(source, start, os.SEEK_HOLE))
        os.lseek(target, start, os.SEEK_SET)
        while start < end and (
            count := os.sendfile(target, source, start, min(PIECE, end - start))
        ):
            start += count
    os.ftruncate(target, size)


def _is_same(source: Path, path: Path, status: os.stat_result, current: os.stat_result) -> bool:
    """Whether two entries are equal by kind, mode, size and time, or by the target of a link."""
    # A program may reset a file's times, but not to the nanosecond by accident.
    if stat.S_IFMT(status.st_mode) != stat.S_IFMT(current.st_mode):
        return False
    if stat.S_ISLNK(status.st_mode):
        return os.readlink(source) == os.readlink(path)
    # A change of owner clears the special bits (chown(2)); the original may keep its own.
    modes = {entry.st_mode & ~SPECIAL_BITS for entry in (status, current)}
    return len(modes) == 1 and (status.st_size, status.st_mtime_ns) == (
        current.st_size,
        current.st_mtime_ns,
    )
