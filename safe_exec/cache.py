"""The user's own cache: its directory, and the names of entries in it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

APPLICATION = "safe-exec"


def cache_root() -> Path:
    """Return the cache directory, created if necessary.

    It is ``$XDG_CACHE_HOME/safe-exec`` or ``~/.cache/safe-exec``, else a directory in /tmp that
    belongs to the user. Raises OSError if none of them can be written.
    """
    # Most runs make no search and need no cache.
    import platformdirs

    usual = platformdirs.user_cache_path(APPLICATION, appauthor=False)
    own = Path(tempfile.gettempdir()) / f"{APPLICATION}-cache-{os.geteuid()}"
    # Without a home directory the usual path is relative.
    for path in (usual, own) if usual.is_absolute() else (own,):
        with contextlib.suppress(OSError):
            # 0o700: the cache contains copies of folders, for later searches.
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.mkdir(mode=0o700, exist_ok=True)
            if _is_ours(path):
                return path
    raise OSError(f"no place for a cache: neither {usual.parent} nor {own} can be written")


def _is_ours(path: Path) -> bool:
    # lstat(2): another user could put a link to a directory of ours into /tmp.
    status = path.lstat()
    return (
        stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and os.access(path, os.W_OK)
    )


def key_of(parts: Mapping[str, Any]) -> str:
    """Return the name of a cache entry: a hash of everything that its content depends on."""
    # sort_keys: equal parts must have one name, whatever their order.
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
