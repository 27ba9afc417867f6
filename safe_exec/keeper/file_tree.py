"""Copies of folders, made and taken back without following anything. Standard library only.

What a hostile program leaves is never walked by recursion, nor deeper than paths go: it may nest folders as deep as it likes.
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
TAKEN = frozenset({stat.S_IFDIR, stat.S_IFREG, stat.S_IFLNK})
PIECE = 64 << 20
CLOCK_REALTIME_COARSE = 5
NO_FILE_ANY_MORE = frozenset({errno.ELOOP, errno.ESTALE, errno.ENXIO})
"""By the time a file is opened it is a link, or a pipe or device."""


Mark = tuple[object, ...]
"""What tells whether an entry is the one that it was: kind and mode, of files size and time, of links where they lead."""


def mark(path: Path, status: os.stat_result) -> Mark:
    """The mark of an entry. Raises OSError for a link that is gone."""
    kind = stat.S_IFMT(status.st_mode)
    if stat.S_ISLNK(status.st_mode):
        return kind, os.readlink(path)
    # A copy that was given to another user has lost the special bits by that alone.
    mode = stat.S_IMODE(status.st_mode) & ~SPECIAL_BITS
    return (
        (kind, mode, status.st_size, status.st_mtime_ns)
        if stat.S_ISREG(status.st_mode)
        else (kind, mode)
    )


def walk(
    folder: Path, *, but: frozenset[Path] = frozenset()
) -> Iterator[tuple[Path, os.stat_result]]:
    """All entries below a folder, parents first, links not followed; what cannot be read is left out."""
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
        with os.scandir(folder) as found:
            return iter(sorted(found, key=lambda entry: entry.name))
    except OSError:
        return iter(())


def copy_tree(
    source: Path,
    target: Path,
    *,
    but: frozenset[Path] = frozenset(),
    owner: int | None = None,
    twins: Mapping[str, Path] | None = None,
) -> dict[str, Mark]:
    """Copy a folder with its times and modes; sockets, pipes and devices are left out, as is what cannot be read.

    ``twins`` are earlier copies of files, by path in the folder: nobody writes to either, so they may be one file under two names.

    Returns what was copied, by its path in the folder. All of it belongs to ``owner`` then, where one is given; where we are root, else,
    to whom it belonged. Raises OSError for a disk that is full: a part of a folder is not the folder.
    """
    target.mkdir(mode=0o700)
    directories: list[tuple[Path, Path]] = [(source, target)]
    marks: dict[str, Mark] = {}
    for path, status in walk(source, but=but):
        name = str(path.relative_to(source))
        made = target / name
        if (twins and name in twins and _linked(twins[name], made)) or _copied(path, made, status):
            marks[name] = mark(path, status)
            if stat.S_ISDIR(status.st_mode):
                directories.append((path, made))
            _give(made, status, owner)
    for path, made in reversed(
        directories
    ):  # last, and inner ones first: to fill a directory changes its times
        with contextlib.suppress(OSError):
            shutil.copystat(path, made)
    _give(target, os.stat(source), owner)
    return marks


def _linked(twin: Path, made: Path) -> bool:
    try:
        os.link(twin, made, follow_symlinks=False)
    except OSError:  # it is gone with its run, or may have no more names
        return False
    return True


def _copied(path: Path, made: Path, status: os.stat_result) -> bool:
    """Copy one entry; whether it was one that is copied."""
    try:
        if stat.S_ISDIR(status.st_mode):
            made.mkdir()
        elif stat.S_ISLNK(status.st_mode):
            made.symlink_to(os.readlink(path))
        elif stat.S_ISREG(status.st_mode):
            _copy_file(path, made)
            shutil.copystat(path, made, follow_symlinks=False)
        else:
            return False
    except (PermissionError, FileNotFoundError):
        return False
    except OSError as error:
        if error.errno not in NO_FILE_ANY_MORE:
            raise
        return False
    return True


def _give(made: Path, status: os.stat_result, owner: int | None) -> None:
    if os.geteuid() == 0:
        uid, gid = (status.st_uid, status.st_gid) if owner is None else (owner, owner)
        with contextlib.suppress(OSError):
            os.chown(made, uid, gid, follow_symlinks=False)


# --- removing ---------------------------------------------------------------------------------------------------


def remove_tree(path: str | Path) -> bool:
    """Remove a directory and all below, what is read-only in it too (overlayfs leaves one without any right); whether it is gone.

    What lies deeper is moved up first, so that no path gets long.
    """
    top = os.fspath(path)
    if os.path.isdir(top) and not os.path.islink(top):
        numbers = itertools.count()
        stuck: set[str] = set()
        _open(top)
        while below := [entry for entry in _entries(Path(top)) if entry.name not in stuck]:
            for entry in below:
                if not _removed(entry, top, numbers):
                    stuck.add(entry.name)
        with contextlib.suppress(OSError):
            os.rmdir(top)
    return not os.path.lexists(top)


def _removed(entry: os.DirEntry[str], top: str, numbers: Iterator[int]) -> bool:
    """Remove one entry right below ``top``; a directory's own directories come up beside it."""
    try:
        if not entry.is_dir(follow_symlinks=False):
            os.unlink(entry.path)
            return True
        _open(entry.path)
        for inner in _entries(Path(entry.path)):
            if inner.is_dir(follow_symlinks=False):
                _open(inner.path)
                os.rename(inner.path, _free(top, numbers))
            else:
                os.unlink(inner.path)
        os.rmdir(entry.path)
    except OSError:
        return False
    return True


def _free(top: str, numbers: Iterator[int]) -> str:
    return next(
        place for n in numbers if not os.path.lexists(place := os.path.join(top, f"up-{n}"))
    )


def _open(folder: str) -> None:
    with contextlib.suppress(OSError):
        os.chmod(folder, 0o700)


# --- taking back ------------------------------------------------------------------------------------------------


class Meanwhile:
    """Tells what others made of a folder while a program worked in a copy of it, or in a layer over it.

    Of a copy it is known what was copied (``marks``): whatever differs from that was changed by somebody. Under a layer others are seen through
    it at once, and only what both have changed is in question: there the system's own time of the last change says so, which nobody
    sets back (``since``, in nanoseconds; inode(7), st_ctime). Without either nobody else is thought of.
    """

    def __init__(self, *, marks: dict[str, Mark] | None = None, since: int | None = None) -> None:
        self._marks, self._since = marks, since

    def is_untouched(self, name: str, path: Path, status: os.stat_result) -> bool:
        """Whether the program has left this entry of the copy as it was."""
        return self._marks is not None and self._marks.get(name) == mark(path, status)

    def is_as_copied(self, name: str, status: os.stat_result) -> bool:
        """Whether the program has left this file of the copy as it was; in a layer there is nothing that it has left."""
        return self._marks is not None and self._marks.get(name) == mark(Path(name), status)

    def is_new(self, name: str) -> bool:
        """Whether an entry of the folder was made since, and so is in no copy."""
        return self._marks is not None and name not in self._marks

    def changed(self, name: str, path: Path, status: os.stat_result) -> bool:
        """Whether others have changed this entry of the folder. What lies in directories has changes of its own."""
        if stat.S_ISDIR(status.st_mode):
            return self._marks is not None and self._marks.get(name, (0,))[0] != stat.S_IFDIR
        if self._marks is not None:
            return self._marks.get(name) != mark(path, status)
        return self._since is not None and status.st_ctime_ns > self._since


def now() -> int:
    """The time by which the system stamps changes: not as fine as time.time_ns(), and never before it."""
    return time.clock_gettime_ns(CLOCK_REALTIME_COARSE)


def take_back(source: Path, target: Path, meanwhile: Meanwhile | None = None) -> list[str]:
    """Make ``target`` what ``source`` has become: a copy of it in which a program has worked.

    Whatever that program left is data: links are copied as links and never followed, set-user-id bits are dropped, devices, pipes and
    sockets are left out, holes stay holes. Files that did not change are not touched, nor is what no copy has: devices, pipes, sockets,
    files that cannot be read. What others changed ``meanwhile`` stays; returned are the names of what the program had changed too. A file
    comes back whole or stays as it was. Raises OSError for what could not be taken, after all the rest.
    """
    meanwhile = meanwhile or Meanwhile()
    owner = os.stat(target)
    found = ((str(path.relative_to(source)), status) for path, status in walk(source))
    wanted = {name: status for name, status in found if stat.S_IFMT(status.st_mode) in TAKEN}
    kept = _take_away(target, wanted, meanwhile)
    troubles: list[OSError] = []
    folders = {"."}  # that were seen to be folders: a link among the parents would lead elsewhere
    touched = [
        name
        for name, status in wanted.items()
        if not meanwhile.is_untouched(name, source / name, status)
    ]
    needed = {parent for name in touched for parent in _with_parents(name)}
    for name, status in wanted.items():
        if name not in needed or (os.path.dirname(name) or ".") not in folders:
            continue
        if _is_disputed(name, source, target, status, meanwhile):
            kept.append(name)
            continue
        try:
            if stat.S_ISDIR(status.st_mode):
                _take_folder(target / name, owner)
                folders.add(name)
            else:
                _take(source / name, target / name, status, owner)
        except OSError as trouble:
            troubles.append(trouble)
    for name in reversed(
        [name for name in touched if name in folders]
    ):  # last: one may not be written to any more
        _settle(target / name, wanted[name])
    if troubles:
        more = f", and {len(troubles) - 1} more" if len(troubles) > 1 else ""
        raise OSError(
            troubles[0].errno, f"{troubles[0].filename or target}: {troubles[0].strerror}{more}"
        )
    return sorted(kept)


def _take_away(target: Path, wanted: dict[str, os.stat_result], meanwhile: Meanwhile) -> list[str]:
    """Remove what the program has removed; the names of what others have changed meanwhile, which stays."""
    kept: list[str] = []
    for path, status in reversed(list(walk(target))):
        name = str(path.relative_to(target))
        if name in wanted or meanwhile.is_new(name) or not _is_copied(path, status):
            continue
        if meanwhile.changed(name, path, status):
            kept.append(name)
        else:
            _remove(path)
    return kept


def _with_parents(name: str) -> Iterator[str]:
    while name:
        yield name
        name = os.path.dirname(name)


def _is_disputed(
    name: str, source: Path, target: Path, status: os.stat_result, meanwhile: Meanwhile
) -> bool:
    """Whether both the program and others have made something else of an entry."""
    place = target / name
    before = _seen(place)
    if before is None or (stat.S_ISDIR(status.st_mode) and stat.S_ISDIR(before.st_mode)):
        return False
    return not _same(source / name, place, status, before) and meanwhile.changed(
        name, place, before
    )


def _is_copied(path: Path, status: os.stat_result) -> bool:
    """Whether a copy of the folder would have had this at all."""
    if stat.S_ISREG(status.st_mode):
        return os.access(path, os.R_OK, effective_ids=True)
    return stat.S_IFMT(status.st_mode) in TAKEN


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink()


def _take_folder(place: Path, owner: os.stat_result) -> None:
    before = _seen(place)
    if before is not None and stat.S_ISDIR(before.st_mode):
        return
    if before is not None:
        place.unlink()
    place.mkdir(mode=0o700)
    _give(place, owner, None)


def _take(path: Path, place: Path, status: os.stat_result, owner: os.stat_result) -> None:
    """A file or a link, put together beside its place."""
    before = _seen(place)
    if before is not None and _same(path, place, status, before):
        return
    if before is not None and stat.S_ISDIR(before.st_mode):
        place.rmdir()  # what was in it is gone by now, but for what is not ours to remove
    made = place.with_name(f".safe-exec-{os.urandom(6).hex()}")
    try:
        if stat.S_ISLNK(status.st_mode):
            made.symlink_to(os.readlink(path))
        else:
            _copy_file(path, made)
        _give(made, owner, None)
        made.replace(place)
    except OSError:
        made.unlink(missing_ok=True)
        raise


def _seen(place: Path) -> os.stat_result | None:
    try:
        return place.lstat()
    except FileNotFoundError:
        return None


def _settle(place: Path, status: os.stat_result) -> None:
    """A folder's mode."""
    with contextlib.suppress(OSError):
        if (place.lstat().st_mode ^ status.st_mode) & ~SPECIAL_BITS:
            place.chmod(stat.S_IMODE(status.st_mode) & ~SPECIAL_BITS)


def _copy_file(path: Path, made: Path) -> None:
    """Bytes, times and mode; neither links nor what else could be there by now is opened, and at no time is the copy set-user-id."""
    source = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(source)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.ESTALE, "no file any more", str(path))
        target = os.open(
            made, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
        )
        try:
            _copy_data(source, target, status.st_size)
            os.fchmod(target, stat.S_IMODE(status.st_mode) & ~SPECIAL_BITS)
            os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
        finally:
            os.close(target)
    finally:
        os.close(source)


def _copy_data(source: int, target: int, size: int) -> None:
    """What is there by now, and no holes: a file of a few bytes may be as long as a disk is large, and one that grows has no end."""
    end = 0
    while end < size:
        try:
            at = os.lseek(source, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            break  # a hole up to the end
        end = min(size, os.lseek(source, at, os.SEEK_HOLE))
        os.lseek(target, at, os.SEEK_SET)
        while at < end and (sent := os.sendfile(target, source, at, min(PIECE, end - at))):
            at += sent
    os.ftruncate(target, size)


def _same(path: Path, place: Path, status: os.stat_result, before: os.stat_result) -> bool:
    """Whether an entry is what it was. A program may set a file's times back, but not to the nanosecond without meaning to."""
    if stat.S_IFMT(status.st_mode) != stat.S_IFMT(before.st_mode):
        return False
    if stat.S_ISLNK(status.st_mode):
        return os.readlink(path) == os.readlink(place)
    # A copy that was given to another user has lost these bits by that alone, and the original may keep its own.
    modes = {found.st_mode & ~SPECIAL_BITS for found in (status, before)}
    return len(modes) == 1 and (status.st_size, status.st_mtime_ns) == (
        before.st_size,
        before.st_mtime_ns,
    )
