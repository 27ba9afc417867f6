"""Patterns of paths, as in ``safe-exec.yaml``. Standard library only."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import PurePosixPath


def matches(pattern: str, path: str) -> bool:
    """Tell whether a relative path matches a pattern that is relative to the same directory."""
    # ``dir/`` means everything below ``dir``.
    segments = PurePosixPath(pattern).parts + (("**",) if pattern.endswith("/") else ())
    parts = PurePosixPath(path).parts
    # A pattern covers its own directory only.
    if ".." in parts:
        return False
    # The numbers of leading parts that the segments so far can match. Tracking all of them avoids
    # the exponential time of backtracking over several ``**``.
    reached = {0}
    for segment in segments:
        if not reached:
            return False
        if segment == "**":
            reached = set(range(min(reached), len(parts) + 1))
        else:
            reached = {n + 1 for n in reached if n < len(parts) and fnmatchcase(parts[n], segment)}
    return len(parts) in reached


def matches_anywhere(pattern: str, path: str) -> bool:
    """Tell whether a path matches; a pattern without ``/`` matches a name at any depth."""
    return matches(pattern if "/" in pattern else f"**/{pattern}", path)
