"""Reading and writing files that somebody else may have put in our way: no FIFO hangs us, no symlink leads us astray.

Imports ``errors`` only.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from copy import copy
from difflib import get_close_matches
from pathlib import Path
from typing import BinaryIO, Self

from safe_exec.errors import OutputPathError, UsageError

_PIECE = 2**20
_NO_TMPFILE = {errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL}


class _NotRegularError(OSError):
    """``str(error)`` says what stands in the place of a regular file."""


def one_line(text: object) -> str:
    """``text`` fit for a message of one line: what cannot be printed (a file name may hold anything) is escaped."""
    plain = str(text)
    return plain if plain.isprintable() else repr(plain)[1:-1]


# --- reading ----------------------------------------------------------------------------------------------------


_READ = os.O_RDONLY
for _name in ("O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_BINARY"):  # Windows has the last alone
    _READ |= getattr(os, _name, 0)


def read_regular(path: Path, *, most: int, error: type[UsageError]) -> bytes:
    """The bytes of a regular file of at most ``most`` bytes; raises ``error`` with one line for anything else."""
    name = one_line(path)
    try:
        with os.fdopen(_open_regular(path), "rb") as file:
            data = _read_up_to(file, most + 1)
    except FileNotFoundError:
        raise error(f"{name}: no such file{_nearest(path)}") from None
    except (OSError, ValueError) as problem:  # ValueError: a name no file can have
        raise error(f"{name}: {_reason(problem)}") from None
    if len(data) > most:
        raise error(f"{name}: larger than {most // 2**20} MiB, which is the most that is read")
    return data


def _read_up_to(file: BinaryIO, most: int) -> bytes:
    """By pieces, not by st_size, which may be growing, nor by one read(most), which would allocate that much."""
    pieces: list[bytes] = []
    while most > 0 and (piece := file.read(min(most, _PIECE))):
        pieces.append(piece)
        most -= len(piece)
    return b"".join(pieces)


def _open_regular(path: Path) -> int:
    """A descriptor of the regular file ``path``. Raises OSError, _NotRegularError among them."""
    _demand_regular(path.stat())  # before the open: to open some devices is to act on them
    # O_NONBLOCK: should a FIFO have taken the file's place since, the open must not wait for a writer.
    descriptor = os.open(path, _READ)
    try:
        _demand_regular(os.fstat(descriptor))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _demand_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise _NotRegularError(f"is {_kind(status.st_mode)}, not a file")


def _kind(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "a directory"
    if stat.S_ISFIFO(mode):
        return "a pipe"
    if stat.S_ISSOCK(mode):
        return "a socket"
    return "a device"


def _reason(problem: OSError | ValueError) -> str:
    if isinstance(problem, PermissionError):
        return "cannot be read: permission denied; make it readable for this user"
    if isinstance(problem, _NotRegularError):
        return str(problem)
    return f"cannot be read: {_system_text(problem)}"


def _system_text(problem: OSError | ValueError) -> str:
    """What the system said. For a name that never reached it, words of our own: Python's change."""
    if isinstance(problem, UnicodeEncodeError):
        return f"its name is not {problem.encoding.upper()} text"
    if isinstance(problem, ValueError):
        return "a file name cannot contain a NUL character"
    text = problem.strerror or str(problem)
    return text[:1].lower() + text[1:]


def _nearest(path: Path) -> str:
    """A hint at the file that was meant."""
    try:
        names = [
            entry.name for entry in os.scandir(path.parent) if entry.name.endswith(path.suffix)
        ]
    except OSError:
        return f" (nor a directory {one_line(path.parent)})" if not path.parent.is_dir() else ""
    close = get_close_matches(path.name, names, n=1)
    return f"; did you mean {one_line(path.with_name(close[0]))}?" if close else ""


# --- writing ----------------------------------------------------------------------------------------------------


def check_writable(path: Path | str) -> None:
    """Raise OutputPathError if :func:`write_atomically` could not put a file at ``path``; leaves nothing behind.

    A symlink to a file is no obstacle: the write replaces it and does not follow it. Anything else that is no
    regular file is one, be it reached through a symlink: replacing /dev/null or /dev/stdout would break the machine.
    """
    path = Path(path)
    try:
        _check_parent(path)
        _check_target(path)
    except (OSError, ValueError) as problem:
        raise OutputPathError(
            f"{one_line(path)}: cannot be written: {_system_text(problem)}"
        ) from None


def _check_parent(path: Path) -> None:
    parent, name = path.parent, one_line(path)
    if not parent.exists():
        raise OutputPathError(
            f"{name}: the directory {one_line(parent)} does not exist; create it first"
        )
    if not parent.is_dir():
        raise OutputPathError(f"{name}: {one_line(parent)} is not a directory")
    try:
        _create_and_forget(parent)
    except OSError as problem:
        directory, reason = one_line(parent), _system_text(problem)
        raise OutputPathError(
            f"{name}: the directory {directory} cannot be written: {reason}; choose another"
        ) from None


def _create_and_forget(directory: Path) -> None:
    """Prove that a file can be made in ``directory``, which access(2) does not. Raises OSError."""
    try:
        # A file that never has a name: nobody sees it, and it is gone even if we are killed here.
        os.close(os.open(directory, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    except OSError as problem:
        if (
            problem.errno not in _NO_TMPFILE
        ):  # not every file system can: NFS, overlayfs before Linux 6.3
            raise
        probe = directory / _temporary_name()
        os.close(
            os.open(
                probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
            )
        )
        probe.unlink()


def _check_target(path: Path) -> None:
    try:
        entry = path.lstat()
    except FileNotFoundError:
        return
    try:
        mode = path.stat().st_mode
    except OSError:  # a symlink that leads nowhere, or round in circles
        mode = stat.S_IFREG
    if not stat.S_ISREG(mode):
        raise OutputPathError(f"{one_line(path)}: is {_kind(mode)}; name a file to write")
    parent = path.parent.stat()
    mine = os.geteuid() in (0, entry.st_uid, parent.st_uid)
    if (
        parent.st_mode & stat.S_ISVTX and not mine
    ):  # sticky: only an owner may rename over it (rename(2), EPERM)
        raise OutputPathError(
            f"{one_line(path)}: belongs to another user; choose another output path"
        )


def write_atomically(path: Path | str, data: bytes) -> None:
    """Put a file with ``data`` at ``path``: either all of it or nothing, durable on return.

    A temporary file beside it is filled, flushed to disk and renamed over ``path``; a symlink there is replaced, never
    followed. Whatever fails, the temporary file is removed. Raises OSError.
    """
    write_pieces_atomically(path, (data,))


def write_pieces_atomically(path: Path | str, pieces: Iterable[bytes]) -> None:
    """As :func:`write_atomically`, of a document that is made while it is written and never in memory as a whole."""
    path = Path(path)
    # The directory is held open, so that no rename of it in between can split our steps over two places.
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _replace(directory, path.name, pieces)
        _sync_directory(directory)
    finally:
        os.close(directory)


def _replace(directory: int, name: str, pieces: Iterable[bytes]) -> None:
    temporary = _temporary_name()
    try:
        _fill(directory, temporary, pieces)
        os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=directory)
        raise


_FOLDER = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0)


def _current_path(path: Path, descriptor: int) -> Path:
    """Where a directory is by now that was ``path`` when it was opened; one that was removed has no other place."""
    status = os.fstat(descriptor)
    with suppress(OSError):
        if os.path.samestat(os.stat(path), status):
            return path
    with suppress(OSError):
        current = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if os.path.samestat(os.stat(current), status):
            return current
    return path


class OutputRoot:
    """A directory held open from before anything else runs, and all below it reached from there, through no link.

    Several notebooks write below one directory, which lies in the folder of some of them maybe: one may move it away while another
    runs, and put a link in its place or in that of a directory in it. A context manager. Raises OSError when it cannot be opened.
    """

    def __init__(self, top: Path) -> None:
        """``top`` is a path without links."""
        self.top = top
        self._fd = os.open(top, _FOLDER | os.O_NOFOLLOW)

    @property
    def path(self) -> Path:
        """Where the directory is by now."""
        return _current_path(self.top, self._fd)

    def current_path(self, path: Path) -> Path:
        """Where a document below ``top`` goes by now: its folder is made. Raises OutputPathError."""
        try:
            with contextlib.closing(OutputDirectory(path, self)) as folder:
                return folder.path
        except OSError as problem:
            raise OutputPathError(
                f"{one_line(path.parent)}: cannot be made: {_system_text(problem)}; choose another --out"
            ) from None

    def open(self, folder: Path) -> int:
        """A descriptor of a directory that was to be below ``top``; made, with all on the way, where it is not there. Raises OSError."""
        descriptor = os.dup(self._fd)
        for name in folder.relative_to(self.top).parts:
            outer = descriptor
            try:
                with suppress(FileExistsError):
                    os.mkdir(name, dir_fd=outer)
                descriptor = os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=outer)
            finally:
                os.close(outer)
        return descriptor

    def close(self) -> None:
        """Let go of it."""
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class OutputDirectory:
    """The folder of a document to come, held open from before anything else runs: it may be moved, or something put in its place.

    Raises OSError when the folder cannot be opened.
    """

    def __init__(self, path: Path, tree: OutputRoot | None = None) -> None:
        """``path`` is the document's, in ``tree`` if there is one."""
        self._path = path.absolute()
        parent = self._path.parent
        self._fd = os.open(parent, _FOLDER) if tree is None else tree.open(parent)

    @property
    def path(self) -> Path:
        """Where the document is by now: the path that was asked for, unless the folder was moved."""
        return _current_path(self._path.parent, self._fd) / self._path.name

    def remove(self) -> None:
        """Remove what stands there, if it is a file or a link. Raises OSError."""
        os.unlink(self._path.name, dir_fd=self._fd)

    def write(self, data: bytes | Iterable[bytes]) -> None:
        """As :func:`write_atomically`, in this very folder, in one piece or in several."""
        _replace(self._fd, self._path.name, (data,) if isinstance(data, bytes) else data)
        _sync_directory(self._fd)

    def sibling(self, word: str) -> OutputDirectory:
        """Another document in the folder: the same name with a word in it."""
        other = copy(self)
        other._path = self._path.with_name(f"{self._path.stem}.{word}{self._path.suffix}")  # noqa: SLF001
        return other

    def close(self) -> None:
        """Let go of the folder."""
        os.close(self._fd)


class ReservedSpace:
    """Room on a disk that is held for documents to come: a notebook that fills its disk must not cost us the verdict.

    The file has no name (O_TMPFILE, since Linux 3.11), so nobody sees it and it goes with its descriptor. Where a file
    system knows no such thing, nothing is held.
    """

    def __init__(self, directory: Path, size: int) -> None:
        self._fd = -1
        with contextlib.suppress(OSError, AttributeError):
            self._fd = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
            os.posix_fallocate(self._fd, 0, size)

    def release(self) -> None:
        """Give the room back; called just before the documents are written."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _temporary_name() -> str:
    # Not derived from the final name, which may be as long as a name can be.
    return f".safe-exec-{os.urandom(8).hex()}.tmp"


def _fill(directory: int, name: str, pieces: Iterable[bytes]) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(name, flags, 0o666, dir_fd=directory), "wb") as file:
        file.writelines(pieces)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(directory: int) -> None:
    try:
        os.fsync(directory)
    except OSError as problem:
        if problem.errno not in (
            errno.EINVAL,
            errno.EROFS,
            errno.ENOTSUP,
        ):  # some network file systems know no such thing
            raise
