"""Finds the git repository around a folder. Reads names of files only."""

from __future__ import annotations

import os
from pathlib import Path

# This is a directory, or in a work tree or a submodule a file that names one.
GIT = ".git"


def find_root(folder: Path) -> Path | None:
    """Return the nearest directory with a ``.git``, from the absolute path ``folder`` upwards."""
    return next((directory for directory in (folder, *folder.parents) if is_root(directory)), None)


def is_root(directory: Path) -> bool:
    """Tell whether a directory is the root of a repository."""
    # False for a .git that we may not access: we could not use such a repository.
    return os.path.exists(directory / GIT)
