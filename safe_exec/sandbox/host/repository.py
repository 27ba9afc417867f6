"""Decides how much of the repository around a notebook's folder isolation leaves open."""

from __future__ import annotations

import contextlib
import os
import pwd
from collections.abc import Iterable
from pathlib import Path

from msgspec import Struct

from safe_exec.files import one_line
from safe_exec.limits.repository import GIT, find_root
from safe_exec.model.limits import FolderUse, Isolation, RepositoryUse

# ``Isolation.repository`` is an exception from the walls, as ``writable`` is, but for a place that
# nobody named: whoever can put a ``.git`` above a folder would choose what the walls leave open. So
# a root is left closed if it would open a home or a part of the system, or if its ``.git`` belongs
# to a stranger.

HOMES = Path("/home")
SYSTEM = tuple(
    map(Path, ("/tmp", "/var/tmp", "/run", "/dev", "/proc", "/sys", "/etc", "/usr"))  # noqa: S108
)
STAYS_CLOSED = "only the notebook's folder is left open (--show PATH or --writable PATH opens more)"


class RepositoryAccess(Struct, frozen=True, kw_only=True):
    """The root of the repository, ``None`` without one, and its use in this run.

    ``warning`` says why less is open than was asked for.
    """

    root: Path | None = None
    use: RepositoryUse = RepositoryUse.CLOSED
    warning: str = ""

    @property
    def is_visible(self) -> bool:
        """Whether the repository is left open at all."""
        return self.use is not RepositoryUse.CLOSED


def repository_access(
    isolation: Isolation, folder: Path, *, homes: Iterable[Path], has_disk_limit: bool
) -> RepositoryAccess:
    """The access of one run. ``isolation`` and ``folder`` have paths without links.

    ``homes`` are what ``hide_home`` hides.
    """
    # With a disk limit, and with a folder that is not written to, the repository is at most read:
    # what is written there would be counted by nothing, and would stay.
    root = find_root(folder)
    if (
        root is None
        or isolation.repository is RepositoryUse.CLOSED
        or not (isolation.hide_home or isolation.read_only_system)
    ):
        return RepositoryAccess(root=root)
    if any(root.is_relative_to(path) for path in isolation.hide):
        return RepositoryAccess(root=root)
    reason = _why_closed(root, folder, tuple(homes))
    if reason:
        return RepositoryAccess(
            root=root, warning=f"the repository {one_line(root)} {reason}: {STAYS_CLOSED}"
        )
    is_narrowed = has_disk_limit or isolation.folder is not FolderUse.WRITE
    return RepositoryAccess(
        root=root, use=RepositoryUse.READ if is_narrowed else isolation.repository
    )


def _why_closed(root: Path, folder: Path, homes: tuple[Path, ...]) -> str:
    """The reason to leave a root closed that isolation would open.

    Empty for an ordinary repository.
    """
    if (
        any(home.is_relative_to(root) for home in homes)
        or root.parent == HOMES
        or root == _home_of_owner(root)
    ):
        return "is a home directory, or holds one"
    if any(path.is_relative_to(root) for path in SYSTEM):
        return "is a part of the system, or holds one"
    with contextlib.suppress(OSError):
        owner = (root / GIT).stat().st_uid
        # As for a safe-exec.yaml: anybody can make a .git in a directory that all may write to.
        if owner not in (os.geteuid(), 0, folder.stat().st_uid):
            return "belongs to another user"
    return ""


def _home_of_owner(root: Path) -> Path | None:
    """Return the home of the user that a directory belongs to."""
    # As root we meet other users' repositories, wherever they are.
    with contextlib.suppress(OSError, KeyError):
        return Path(pwd.getpwuid(root.stat().st_uid).pw_dir).resolve()
    return None
