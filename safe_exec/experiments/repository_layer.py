"""Shows trials the repository around a notebook's folder as it was before the first run.

Files that the first run added to the repository are hidden from trials. Files that a trial writes
go to a layer of its own: no other trial sees them, and they never reach the repository. Files that
the first run changed are not restored, since the repository may be too large to copy.

Imports mounts only.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from msgspec import Struct

from safe_exec.files import write_atomically
from safe_exec.keeper import mounts

# A repository with more entries is neither recorded nor hashed: that would take too long.
MOST_ENTRIES = 5000
# Directories of tools: large, and of no interest to a notebook.
PASSED_OVER = frozenset({".git", "node_modules", "__pycache__", ".ipynb_checkpoints"})
# A directory with this file is a Python environment, which trials do not change.
ENVIRONMENT = "pyvenv.cfg"
NOTES = "repository.json"
CHANGED = "files of the repository that the first run changed"
NO_LAYER = "files that it wrote to the repository outside the folder"

# Kind and mode, size, and time of the last change (st_ctime), which nobody sets back.
Mark = tuple[int, int, int]


class RepositoryNotes(Struct, frozen=True, kw_only=True):
    """The state of a repository, without the notebook's folder, before the first run.

    ``entries`` is ``None`` if the repository has too many files.
    """

    root: Path
    folder: Path
    entries: Mapping[str, Mark] | None

    def fingerprint(self) -> str | None:
        """Return a hash of names, sizes and times; ``None`` if there are too many entries."""
        if self.entries is None:
            return None
        digest = hashlib.sha256(os.fsencode(self.root))
        for name, mark in sorted(self.entries.items()):
            if not stat.S_ISDIR(mark[0]):
                digest.update(f"{name}\0{mark}".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def save(self, scratch: Path) -> None:
        """Save the notes for a search that is continued later. Raises OSError."""
        document = {"root": str(self.root), "folder": str(self.folder), "entries": self.entries}
        write_atomically(scratch / NOTES, json.dumps(document).encode())


def note(root: Path, folder: Path, *, ours: frozenset[Path]) -> RepositoryNotes:
    """Record the state of a repository outside the folder.

    ``ours`` are files that safe-exec writes.
    """
    entries: dict[str, Mark] = {}
    for name, mark in _walk(root, but=ours | {folder}):
        if len(entries) >= MOST_ENTRIES:
            return RepositoryNotes(root=root, folder=folder, entries=None)
        entries[name] = mark
    return RepositoryNotes(root=root, folder=folder, entries=entries)


def load(scratch: Path) -> RepositoryNotes | None:
    """Read the notes of an earlier run; ``None`` if there are none that can be read."""
    try:
        document = json.loads((scratch / NOTES).read_text())
        entries = document["entries"]
        marks = (
            None
            if entries is None
            else {name: (*map(int, mark),) for name, mark in entries.items()}
        )
        return RepositoryNotes(
            root=Path(document["root"]),
            folder=Path(document["folder"]),
            entries=marks,  # type: ignore[arg-type]
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _walk(root: Path, *, but: frozenset[Path]) -> Iterator[tuple[str, Mark]]:
    """Yield every entry with its path below the root, parents first.

    Files of tools, such as git, and virtual environments are left out.
    """
    todo = [root]
    while todo:
        directory = todo.pop()
        try:
            with os.scandir(directory) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError:
            continue
        # A virtual environment has thousands of files and belongs to no notebook.
        if directory != root and any(entry.name == ENVIRONMENT for entry in entries):
            continue
        for entry in entries:
            path = Path(entry.path)
            if entry.name in PASSED_OVER or path in but:
                continue
            try:
                status = entry.stat(follow_symlinks=False)
            except OSError:
                continue
            yield str(path.relative_to(root)), (status.st_mode, status.st_size, status.st_ctime_ns)
            if stat.S_ISDIR(status.st_mode):
                todo.append(path)


# --- the layer of a trial -------------------------------------------------------------------------


class RepositoryLayer(Struct, frozen=True, kw_only=True):
    """The repository as trials see it: without the entries in ``new``, under a writable layer."""

    root: Path
    new: tuple[str, ...] = ()

    def mount(self, directory: Path) -> dict[str, str]:
        """Return the overlay mount of one trial; its layers are in ``directory``.

        Raises OSError.
        """
        upper, work = directory / "repository-upper", directory / "repository-work"
        upper.mkdir()
        work.mkdir()
        for name in self.new:
            # A character device 0:0 in the upper layer hides the file below.
            white = upper / name
            white.parent.mkdir(parents=True, exist_ok=True)
            # A whiteout (overlayfs.rst).
            os.mknod(white, stat.S_IFCHR, os.makedev(0, 0))
        layers = {"lower": str(self.root), "upper": str(upper), "work": str(work)}
        return {"kind": "overlay", "target": str(self.root), **layers}


def layer_of(
    notes: RepositoryNotes, scratch: Path, namespace_kind: str | None, *, ours: frozenset[Path]
) -> tuple[RepositoryLayer | None, tuple[str, ...]]:
    """Return the layer for trials, and the traces of other runs that they may still see.

    The layer is ``None`` if the repository cannot be overlaid here.
    """
    probe = scratch / "repository-probe"
    probe.mkdir(exist_ok=True)
    if namespace_kind is None or not mounts.overlays(notes.root, probe, namespace_kind):
        return None, (NO_LAYER,)
    new, has_changed = _differences(notes, ours)
    return RepositoryLayer(root=notes.root, new=new), (CHANGED,) if has_changed else ()


def _differences(notes: RepositoryNotes, ours: frozenset[Path]) -> tuple[tuple[str, ...], bool]:
    """Return the outermost added entries, and whether an existing file was changed or removed."""
    if notes.entries is None:
        return (), False
    missing = {name for name, mark in notes.entries.items() if not stat.S_ISDIR(mark[0])}
    new: list[str] = []
    has_changed = False
    for number, (name, mark) in enumerate(_walk(notes.root, but=ours | {notes.folder})):
        if number >= 2 * MOST_ENTRIES:
            return tuple(new), True
        old_mark = notes.entries.get(name)
        if old_mark is None:
            new += [] if any(name.startswith(f"{other}/") for other in new) else [name]
        else:
            missing.discard(name)
            has_changed = has_changed or (not stat.S_ISDIR(mark[0]) and old_mark != mark)
    return tuple(new), has_changed or bool(missing)
