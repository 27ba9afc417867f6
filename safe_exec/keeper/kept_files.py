"""Copies chosen files out of a run's private copy of its folder, before the copy disappears.

Standard library only. All processes of the sandbox are dead, so the files do not change meanwhile.
The notebook chose the names and the contents: no link is followed on either side.
"""

from __future__ import annotations

import contextlib
import os

from safe_exec.keeper.path_patterns import matches_anywhere
from safe_exec.keeper.protocol import KeptFile

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

# The most names that are reported.
MOST_NAMED = 200
_PIECE = 1 << 20
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class KeptFiles:
    """Copies the files that match ``patterns`` to ``folder``, at the same relative path."""

    def __init__(self, patterns: Sequence[str], folder: str) -> None:
        self.files: list[KeptFile] = []
        self.failures: list[str] = []
        self._patterns, self._folder = tuple(patterns), folder

    def take(self, root: int, path: str, size: int) -> bool:
        """Copy a file below the directory ``root``; false if it does not match or failed."""
        if not any(matches_anywhere(pattern, path) for pattern in self._patterns):
            return False
        try:
            self._copy(root, path)
        except OSError as error:
            self.failures.append(f"{path}: {error.strerror}")
            return False
        self.files.append(KeptFile(path=path, bytes=size))
        return True

    def _copy(self, root: int, path: str) -> None:
        *folders, name = path.split("/")
        with contextlib.ExitStack() as stack:
            source = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=root)
            stack.callback(os.close, source)
            target = os.open(self._folder, _DIRECTORY)
            stack.callback(os.close, target)
            for folder in folders:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(folder, dir_fd=target)
                target = os.open(folder, _DIRECTORY, dir_fd=target)
                stack.callback(os.close, target)
            temporary = f".safe-exec-{os.urandom(8).hex()}.tmp"
            try:
                copy = os.open(temporary, _NEW_FILE, 0o666, dir_fd=target)
                with open(copy, "wb") as file:
                    while piece := os.read(source, _PIECE):
                        file.write(piece)
                os.rename(temporary, name, src_dir_fd=target, dst_dir_fd=target)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary, dir_fd=target)
                raise
