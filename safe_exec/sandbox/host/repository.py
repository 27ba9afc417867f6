"""Decides how much of the repository around a notebook's folder stays open."""

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

# ``Isolation.repository`` is an exception from the walls, like ``writable``, but for a path that
# the user did not name. Anybody who can create a ``.git`` above the folder could open that
# directory. So a root stays closed if it is a home or a part of the system, or contains one, or if
# its ``.git`` belongs to another user.

HOMES = Path("/home")
SYSTEM = tuple(
    map(Path, ("/tmp", "/var/tmp", "/run", "/dev", "/proc", "/sys", "/etc", "/usr"))  # noqa: S108
)
STAYS_CLOSED = "only the notebook's folder is left open (--show PATH or --writable PATH opens more)"


class RepositoryAccess(Struct, frozen=True, kw_only=True):
    """The root of the repository, ``None`` without one, and its use in this run.

    ``warning`` tells why the notebook gets less access than requested.
    """

    root: Path | None = None
    use: RepositoryUse = RepositoryUse.CLOSED
    warning: str = ""

    @property
    def is_visible(self) -> bool:
        """Whether the repository can be read or written."""
        return self.use is not RepositoryUse.CLOSED


def repository_access(
    isolation: Isolation, folder: Path, *, homes: Iterable[Path], has_disk_limit: bool
) -> RepositoryAccess:
    """Return a run's access to the repository around the folder.

    ``isolation`` and ``folder`` have paths without links. ``homes`` are the directories that
    ``hide_home`` hides.
    """
    # With a disk limit, or with a folder that is not written to, the repository is at most
    # readable. Files written there would count against no limit, and would stay after the run.
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
    """Return the reason to keep a root closed; empty for an ordinary repository."""
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
        # Anybody can make a .git in a world-writable directory. A safe-exec.yaml gets the same
        # check.
        if owner not in (os.geteuid(), 0, folder.stat().st_uid):
            return "belongs to another user"
    return ""


def _home_of_owner(root: Path) -> Path | None:
    """Return the home of the owner of a directory."""
    # Root may run notebooks in other users' directories, and homes need not be in /home.
    with contextlib.suppress(OSError, KeyError):
        return Path(pwd.getpwuid(root.stat().st_uid).pw_dir).resolve()
    return None
