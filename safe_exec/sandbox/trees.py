"""Copies of folders, made and taken back without following anything. Standard library only."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

SPECIAL_BITS = stat.S_ISUID | stat.S_ISGID


def walk(folder: Path, *, but: frozenset[Path] = frozenset()) -> Iterator[tuple[Path, os.stat_result]]:
    """All entries below a folder, parents first, links not followed; what cannot be read is left out."""
    try:
        found = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in found:
        path = Path(entry.path)
        with contextlib.suppress(OSError):
            status = entry.stat(follow_symlinks=False)
            if path not in but:
                yield path, status
                if stat.S_ISDIR(status.st_mode):
                    yield from walk(path, but=but)


def copy_tree(source: Path, target: Path, *, but: frozenset[Path] = frozenset(), owner: int | None = None) -> None:
    """Copy a folder with its times and modes; sockets, pipes and devices are left out, as is what cannot be read.

    All of it belongs to ``owner`` then, where one is given; where we are root, else, to whom it belonged. Raises OSError for a disk that
    is full: a part of a folder is not the folder.
    """
    target.mkdir(mode=0o700)
    directories: list[tuple[Path, Path]] = [(source, target)]
    for path, status in walk(source, but=but):
        made = target / path.relative_to(source)
        if _copied(path, made, status):
            if stat.S_ISDIR(status.st_mode):
                directories.append((path, made))
            _give(made, status, owner)
    for path, made in reversed(directories):  # last, and inner ones first: to fill a directory changes its times
        with contextlib.suppress(OSError):
            shutil.copystat(path, made)
    _give(target, os.stat(source), owner)


def _copied(path: Path, made: Path, status: os.stat_result) -> bool:
    """Copy one entry; whether it was one that is copied."""
    try:
        if stat.S_ISDIR(status.st_mode):
            made.mkdir()
        elif stat.S_ISLNK(status.st_mode):
            made.symlink_to(os.readlink(path))
        elif stat.S_ISREG(status.st_mode):
            shutil.copy2(path, made, follow_symlinks=False)
        else:
            return False
    except (PermissionError, FileNotFoundError):
        return False
    return True


def _give(made: Path, status: os.stat_result, owner: int | None) -> None:
    if os.geteuid() == 0:
        uid, gid = (status.st_uid, status.st_gid) if owner is None else (owner, owner)
        with contextlib.suppress(OSError):
            os.chown(made, uid, gid, follow_symlinks=False)


def remove_tree(path: str | Path) -> bool:
    """Remove a directory and all below, what is read-only in it too (overlayfs leaves one without any right); whether it is gone."""
    shutil.rmtree(path, ignore_errors=True)
    if os.path.lexists(path):
        for top, names, _ in os.walk(path):
            for made in [top, *(inner for name in names if not os.path.islink(inner := os.path.join(top, name)))]:
                with contextlib.suppress(OSError):
                    os.chmod(made, 0o700)
        shutil.rmtree(path, ignore_errors=True)
    return not os.path.lexists(path)


# --- taking back ------------------------------------------------------------------------------------------------


def take_back(source: Path, target: Path) -> None:
    """Make ``target`` what ``source`` has become: a copy of it in which a program has worked.

    Whatever that program left is data: links are copied as links and never followed, set-user-id bits are dropped, devices, pipes and
    sockets are left out. Files that did not change are not touched.
    """
    owner = os.stat(target)
    wanted: dict[str, os.stat_result] = {str(path.relative_to(source)): status for path, status in walk(source)}
    for path, _ in reversed(list(walk(target))):
        if str(path.relative_to(target)) not in wanted:
            _remove(path)
    for name, status in wanted.items():
        _take(source / name, target / name, status, owner)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink()


def _take(path: Path, place: Path, status: os.stat_result, owner: os.stat_result) -> None:
    try:
        before: os.stat_result | None = place.lstat()
    except OSError:
        before = None
    if before is not None and _same(path, place, status, before):
        return
    if before is not None and (not stat.S_ISDIR(status.st_mode) or not stat.S_ISDIR(before.st_mode)):
        shutil.rmtree(place) if stat.S_ISDIR(before.st_mode) else place.unlink()
        before = None
    if before is None and not _copied(path, place, status):
        return
    if not stat.S_ISLNK(status.st_mode):
        place.chmod(stat.S_IMODE(status.st_mode) & ~SPECIAL_BITS)
    _give(place, owner, None)


def _same(path: Path, place: Path, status: os.stat_result, before: os.stat_result) -> bool:
    """Whether an entry is what it was. A program may set a file's times back, but not to the nanosecond without meaning to."""
    if stat.S_IFMT(status.st_mode) != stat.S_IFMT(before.st_mode):
        return False
    if stat.S_ISLNK(status.st_mode):
        return os.readlink(path) == os.readlink(place)
    if stat.S_ISDIR(status.st_mode):
        return status.st_mode == before.st_mode
    return (status.st_size, status.st_mtime_ns, status.st_mode) == (before.st_size, before.st_mtime_ns, before.st_mode)
