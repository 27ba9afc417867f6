"""``safe-exec.yaml``: the limits that a repository sets for its notebooks.

The file::

    limits:                        # the first entry with a matching path applies
      - path: "docs/slow/*.ipynb"  # relative to this file; * and ? stay within a directory
        profile: ci                # optional: a profile that ships with safe-exec
        memory: 4G                 # any limit
        longest_cell_timeout: 30m  # optional: the notebook and its cells may set cell_timeout up to
                                   # this under every profile
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from msgspec import Struct

from safe_exec.errors import LimitsError
from safe_exec.files import one_line
from safe_exec.keeper.path_patterns import matches
from safe_exec.limits.repository import find_root, is_root
from safe_exec.limits.values import Layer, nearest, parse_layer
from safe_exec.limits.yaml_source import Value, load

PROJECT_FILE = "safe-exec.yaml"


class ProjectLimits(Struct, frozen=True, kw_only=True):
    """The entry of a project file for one notebook: a shipped profile, if any, and limits.

    Up to ``longest_cell_timeout``, in seconds, the notebook may set its cell timeouts itself.
    """

    file: Path
    profile: str | None
    layer: Layer
    longest_cell_timeout: float | None = None


def find_project_file(notebook_path: Path | str) -> Path | None:
    """Find the nearest ``safe-exec.yaml`` above a notebook, up to the repository's root.

    Raises LimitsError if it is a link to a file outside the repository.
    """
    folder = _absolute(notebook_path).parent
    for directory in (folder, *folder.parents):
        if (directory / PROJECT_FILE).is_file() and _is_ours(directory / PROJECT_FILE, folder):
            _demand_inside(directory / PROJECT_FILE)
            return directory / PROJECT_FILE
        # Files above the root belong to other projects.
        if is_root(directory):
            return None
    return None


def _is_ours(file: Path, folder: Path) -> bool:
    """Tell whether the owner of a file may set limits: we, root, or the notebook folder's owner."""
    # Otherwise anybody could plant one in a shared directory such as /tmp.
    owner = file.stat().st_uid
    return owner in (_user(), 0, folder.stat().st_uid)


def _demand_inside(file: Path) -> None:
    """Raise LimitsError if the file is a link that leads out of the repository."""
    # Error messages quote the file, in logs that others may read. A link must not expose a secret
    # in another place.
    real = Path(os.path.realpath(file))
    root = find_root(file.parent) or file.parent
    inside = Path(os.path.realpath(root))
    # .git/config may contain a token.
    if not real.is_relative_to(inside) or ".git" in real.relative_to(inside).parts:
        raise LimitsError(
            f"{one_line(file)}: is a link that leads out of {one_line(root)}; put the file itself there"
        )


def _user() -> int:
    # Windows has no user ids, and `safe-exec limits` works there too.
    return os.geteuid() if hasattr(os, "geteuid") else 0


def project_overrides(
    file: Path, notebook_path: Path | str, *, profiles: Sequence[str], machine_memory: int | None
) -> ProjectLimits | None:
    """Return the notebook's entry in ``file``; ``None`` if none matches. Raises LimitsError.

    ``profiles`` are the names of the profiles that ship.
    """
    # All entries are parsed, so that an error in any of them is reported.
    entries = [_entry(item, file, profiles, machine_memory) for item in _entries(file)]
    inside = os.path.relpath(_absolute(notebook_path), _absolute(file).parent)
    return next((limits for pattern, limits in entries if matches(pattern, inside)), None)


def _entries(file: Path) -> tuple[Value, ...]:
    document = load(file)
    sections = document.mapping("the document")
    for key, value in sections.items():
        if key not in ("limits", "description"):
            raise LimitsError(
                f"{value.location}: unknown section {key!r}; {nearest(key, ('limits', 'description'))}"
            )
    return sections["limits"].items("limits") if "limits" in sections else ()


def _entry(
    item: Value, file: Path, profiles: Sequence[str], machine_memory: int | None
) -> tuple[str, ProjectLimits]:
    keys = dict(item.mapping("limits"))
    pattern = _pattern(keys.pop("path", None), item)
    profile = _profile(keys.pop("profile", None), profiles)
    longest = _longest_cell_timeout(keys.pop("longest_cell_timeout", None))
    layer = parse_layer(keys, machine_memory=machine_memory)
    return pattern, ProjectLimits(
        file=file, profile=profile, layer=layer, longest_cell_timeout=longest
    )


def _longest_cell_timeout(value: Value | None) -> float | None:
    if value is None:
        return None
    # It is written like the limit that it bounds.
    seconds = parse_layer({"cell_timeout": value}, machine_memory=None).values["cell_timeout"]
    if seconds is None:
        raise LimitsError(
            f"{value.location}: longest_cell_timeout: expected a time such as 30m, found none"
        )
    return float(seconds)


def _pattern(value: Value | None, item: Value) -> str:
    if value is None:
        raise LimitsError(f'{item.location}: an entry needs path, such as path: "docs/**/*.ipynb"')
    pattern = value.text("path")
    if pattern.startswith("/") or ".." in PurePosixPath(pattern).parts:
        raise LimitsError(
            f"{value.location}: path: {pattern!r} leaves the directory of the file; it is relative to that"
        )
    return pattern


def _profile(value: Value | None, profiles: Sequence[str]) -> str | None:
    if value is None:
        return None
    name = value.text("profile")
    # Paths are not accepted: a shipped name means the same on every machine.
    if name not in profiles:
        raise LimitsError(
            f"{value.location}: profile: unknown profile {one_line(name)!r}; {nearest(name, profiles)}"
        )
    return name


def _absolute(path: Path | str) -> Path:
    # Not resolve(): a notebook that is a symlink belongs to the directory in which it is seen.
    return Path(os.path.abspath(path))
