"""Read and write files safely, even if other programs put FIFOs or symlinks in their place."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from copy import copy
from pathlib import Path
from typing import BinaryIO, Self

from safe_exec.errors import OutputPathError, UsageError

# Bytes that are read at a time.
_PIECE = 2**20
# Errors of open(2) if the file system or the kernel does not support O_TMPFILE.
_NO_TMPFILE = {errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL}


class _NotRegularError(OSError):
    """A path is not a regular file; ``str(error)`` names its type."""


def one_line(text: object) -> str:
    """Return ``text`` for a one-line message, with unprintable characters escaped."""
    # A name with a line break would fake a second message, and one with an escape sequence would
    # control the terminal.
    plain = str(text)
    return plain if plain.isprintable() else repr(plain)[1:-1]


# --- reading ------------------------------------------------------------------------------------


_READ = os.O_RDONLY
# Only Windows has O_BINARY, and it lacks the others.
for _name in ("O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_BINARY"):
    _READ |= getattr(os, _name, 0)


def read_regular(path: Path, *, most: int, error: type[UsageError]) -> bytes:
    """Return the bytes of a regular file of at most ``most`` bytes.

    Raises ``error``, with a one-line message, for anything else.
    """
    name = one_line(path)
    try:
        with os.fdopen(_open_regular(path), "rb") as file:
            # One byte more, to tell a file of exactly this size from a larger one.
            data = _read_up_to(file, most + 1)
    except FileNotFoundError:
        raise error(f"{name}: no such file{nearest_file(path)}") from None
    # ValueError: no file can have this name.
    except (OSError, ValueError) as problem:
        raise error(f"{name}: {_reason(problem)}") from None
    if len(data) > most:
        raise error(f"{name}: larger than {most // 2**20} MiB, which is the most that is read")
    return data


def _read_up_to(file: BinaryIO, most: int) -> bytes:
    """Read up to ``most`` bytes, in pieces."""
    # Not st_size bytes, because the file may be growing; not one read(most), which would allocate
    # all of it at once.
    pieces: list[bytes] = []
    while most > 0 and (piece := file.read(min(most, _PIECE))):
        pieces.append(piece)
        most -= len(piece)
    return b"".join(pieces)


def _open_regular(path: Path) -> int:
    """Open a regular file. Raises OSError."""
    # Checked before opening, because opening some devices has an effect.
    _demand_regular(path.stat())
    # O_NONBLOCK: if a FIFO has taken the file's place meanwhile, opening it must not wait for a
    # writer.
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
    """Return the system's error text, or our own text for a name with invalid characters."""
    if isinstance(problem, UnicodeEncodeError):
        return f"its name is not {problem.encoding.upper()} text"
    if isinstance(problem, ValueError):
        return "a file name cannot contain a NUL character"
    text = problem.strerror or str(problem)
    # The system's texts begin with a capital, and continue a sentence here.
    return text[:1].lower() + text[1:]


def nearest_file(path: Path) -> str:
    """Return a hint at a file with a similar name."""
    try:
        names = [
            entry.name for entry in os.scandir(path.parent) if entry.name.endswith(path.suffix)
        ]
        if path.name and not path.suffix and f"{path.name}.ipynb" in names:
            return f"; did you mean {one_line(path)}.ipynb?"
    except OSError:
        return f" (nor a directory {one_line(path.parent)})" if not path.parent.is_dir() else ""
    # Imported only for this error: a run that is in order saves three milliseconds.
    from difflib import get_close_matches

    close = get_close_matches(path.name, names, n=1)
    return f"; did you mean {one_line(path.with_name(close[0]))}?" if close else ""


# --- writing ------------------------------------------------------------------------------------


def check_writable(path: Path | str) -> None:
    """Raise OutputPathError if ``write_atomically`` could not write to ``path``; leave no traces.

    A symlink to a file is accepted, because the write replaces the link. Everything else that is
    not a regular file is rejected, even behind a symlink: replacing /dev/null or /dev/stdout would
    break the machine.
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
    """Create and remove a file in ``directory``, to test whether that works. Raises OSError."""
    # access(2) ignores read-only file systems, quotas and the rules of some network file systems.
    try:
        # A file without a name: nobody sees it, and it disappears even if this process is killed.
        os.close(os.open(directory, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    except OSError as problem:
        # NFS, and overlayfs before Linux 6.3, do not support O_TMPFILE.
        if problem.errno not in _NO_TMPFILE:
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
    # A symlink that leads nowhere, or in a circle.
    except OSError:
        mode = stat.S_IFREG
    if not stat.S_ISREG(mode):
        raise OutputPathError(f"{one_line(path)}: is {_kind(mode)}; name a file to write")
    parent = path.parent.stat()
    mine = os.geteuid() in (0, entry.st_uid, parent.st_uid)
    # In a sticky directory only an owner may rename over a file (rename(2), EPERM).
    if parent.st_mode & stat.S_ISVTX and not mine:
        raise OutputPathError(
            f"{one_line(path)}: belongs to another user; choose another output path"
        )


def write_atomically(path: Path | str, data: bytes) -> None:
    """Write a file completely or not at all; it is durable on return. Raises OSError.

    A temporary file in the same directory is written, flushed to disk and renamed to ``path``. A
    symlink is replaced, not followed. After an error the temporary file is removed.
    """
    write_pieces_atomically(path, (data,))


def write_pieces_atomically(path: Path | str, pieces: Iterable[bytes]) -> None:
    """Write like ``write_atomically``, from pieces that are produced during the write."""
    path = Path(path)
    # The directory stays open: if it is renamed meanwhile, all steps still happen in the same one.
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _replace(directory, path.name, pieces)
        _sync_directory(directory)
    finally:
        os.close(directory)


def _replace(
    directory: int,
    name: str,
    pieces: Iterable[bytes],
    earlier_file: os.stat_result | None = None,
) -> None:
    temporary = _temporary_name()
    try:
        _fill(directory, temporary, pieces, earlier_file)
        os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
    # Also for KeyboardInterrupt: no temporary file may remain.
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=directory)
        raise


_FOLDER = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0)


def _current_path(path: Path, descriptor: int) -> Path:
    """Return the current path of an open directory that was ``path`` when it was opened."""
    # A deleted directory has no other path, so the old one is returned.
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
    """The output directory, opened before anything runs; a context manager.

    All paths in it are resolved from the open directory, without following links. Several notebooks
    write into it, and it may lie in the folder of one of them, which can move it away or replace it
    by a link while another one runs. Raises OSError if it cannot be opened.
    """

    def __init__(self, top: Path) -> None:
        """Open ``top``, a path without links."""
        self.top = top
        self._fd = os.open(top, _FOLDER | os.O_NOFOLLOW)

    @property
    def path(self) -> Path:
        """The current path of the directory."""
        return _current_path(self.top, self._fd)

    def current_path(self, path: Path) -> Path:
        """Return the current path for a document, and create its folder. Raises OutputPathError."""
        try:
            with contextlib.closing(OutputDirectory(path, self)) as folder:
                return folder.path
        except OSError as problem:
            raise OutputPathError(
                f"{one_line(path.parent)}: cannot be made: {_system_text(problem)}; choose another --out"
            ) from None

    def open(self, folder: Path) -> int:
        """Open a directory below ``top``, creating missing ones. Raises OSError."""
        descriptor = os.dup(self._fd)
        for name in folder.relative_to(self.top).parts:
            outer = descriptor
            try:
                with suppress(FileExistsError):
                    os.mkdir(name, dir_fd=outer)
                # O_NOFOLLOW at each step: a notebook may have replaced a directory by a link.
                descriptor = os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=outer)
            finally:
                os.close(outer)
        return descriptor

    def close(self) -> None:
        """Release the directory; its path is unknown from then on."""
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class OutputDirectory:
    """The folder of a future document, opened before anything runs.

    The document goes into this folder even if it is moved or replaced meanwhile. Raises OSError if
    the folder cannot be opened.
    """

    def __init__(self, path: Path, tree: OutputRoot | None = None) -> None:
        """Open the folder of ``path``, below ``tree`` if there is one."""
        self._path = path.absolute()
        parent = self._path.parent
        self._fd = os.open(parent, _FOLDER) if tree is None else tree.open(parent)

    @property
    def path(self) -> Path:
        """The current path of the document."""
        return _current_path(self._path.parent, self._fd) / self._path.name

    def remove(self) -> None:
        """Remove an existing file or link at the path. Raises OSError."""
        os.unlink(self._path.name, dir_fd=self._fd)

    def write(self, data: bytes | Iterable[bytes], *, keeps_owner: bool = False) -> None:
        """Write the document like ``write_atomically``, into this folder.

        With ``keeps_owner`` it gets the owner and the permissions of the file that it replaces.
        """
        earlier_file = os.stat(self._path.name, dir_fd=self._fd) if keeps_owner else None
        pieces = (data,) if isinstance(data, bytes) else data
        _replace(self._fd, self._path.name, pieces, earlier_file)
        _sync_directory(self._fd)

    def sibling(self, word: str) -> OutputDirectory:
        """Return another document in the folder, with ``word`` in its name."""
        other = copy(self)
        other._path = self._path.with_name(f"{self._path.stem}.{word}{self._path.suffix}")  # noqa: SLF001
        return other

    def close(self) -> None:
        """Release the directory; its path is unknown from then on."""
        os.close(self._fd)


class ReservedSpace:
    """Disk space reserved for the documents, in case the notebook fills its disk.

    The file has no name (O_TMPFILE, since Linux 3.11), so it disappears with its descriptor. If the
    file system does not support that, nothing is reserved.
    """

    def __init__(self, directory: Path, size: int) -> None:
        self._fd = -1
        with contextlib.suppress(OSError, AttributeError):
            self._fd = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
            # fallocate reserves blocks; a sparse file would reserve nothing.
            os.posix_fallocate(self._fd, 0, size)

    def release(self) -> None:
        """Release the space, just before the documents are written."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _temporary_name() -> str:
    # Not derived from the final name, which may already have the maximum length.
    return f".safe-exec-{os.urandom(8).hex()}.tmp"


def _fill(
    directory: int, name: str, pieces: Iterable[bytes], earlier_file: os.stat_result | None
) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    # 0o666: the umask decides, as for any other file that a user creates.
    with os.fdopen(os.open(name, flags, 0o666, dir_fd=directory), "wb") as file:
        if earlier_file is not None:
            # Only root may give a file away; the permissions are ours to set.
            with suppress(PermissionError):
                os.fchown(file.fileno(), earlier_file.st_uid, earlier_file.st_gid)
            os.fchmod(file.fileno(), stat.S_IMODE(earlier_file.st_mode))
        file.writelines(pieces)
        # Durable before the rename: after a crash the name must not lead to an empty file.
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(directory: int) -> None:
    try:
        os.fsync(directory)
    except OSError as problem:
        # Some network file systems cannot flush a directory.
        if problem.errno not in (
            errno.EINVAL,
            errno.EROFS,
            errno.ENOTSUP,
        ):
            raise
