"""Gives every trial the notebook's folder as it was before the first run.

A small folder is copied before the first cell runs. For a large folder only names, sizes and times
are recorded; a trial gets the folder as the lower layer of an overlay, provided that the first run
changed none of the existing files. In a mount namespace a trial sees its folder at the folder's own
path, an empty /dev/shm, and a /tmp with the entries from before the first run. Without a mount
namespace it runs in the copy, at another path.

Imports mounts only.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from safe_exec.experiments.repository_layer import (
    RepositoryLayer,
    RepositoryNotes,
    layer_of,
    load,
    note,
)
from safe_exec.keeper import mounts
from safe_exec.keeper.file_tree import copy_tree, now, walk

# Copying a folder of this size takes a fraction of a second; larger folders are overlaid.
COPY_BYTES = 32 << 20
# Many small files take as long to copy as a few large ones.
COPY_ENTRIES = 2000
# Beyond this, even recording the names and times would delay the first cell.
NOTE_ENTRIES = 20_000
# Each entry of /tmp needs a mount of its own.
TMP_ENTRIES = 500
# The last copy is remembered for this many folders.
MOST_FOLDERS = 32
# Ten ticks of the slowest clock.
TICK_NS = 100_000_000
TMP = Path("/tmp")  # noqa: S108 - the one that every program uses
SHM = Path("/dev/shm")  # noqa: S108


class Entry(Struct, frozen=True, kw_only=True):
    """The metadata that shows whether a file has changed.

    A change of content updates ``ctime_ns``, which no program can set.
    """

    mode: int
    size: int
    mtime_ns: int
    ctime_ns: int


class Snapshot(Struct, frozen=True, kw_only=True):
    """The state of a folder before the first run.

    ``copy`` is ``None`` for a large folder; ``entries``, by path within the folder, is ``None`` if
    there are too many files. ``tmp`` holds the names in /tmp, ``None`` if there are too many.
    ``taken_ns`` is the start of the snapshot on the file system's clock. ``repository`` is the
    repository around the folder, if the notebook may write to it.
    """

    folder: Path
    scratch: Path
    # None for a large folder.
    copy: Path | None
    # By path within the folder; None for a folder with too many files.
    entries: Mapping[str, Entry] | None
    # The names in /tmp; None if there are too many.
    tmp: frozenset[str] | None
    # The start of the snapshot on the file system's clock.
    taken_ns: int = 0
    # The repository around the folder, if the notebook may write to it.
    repository: RepositoryNotes | None = None

    def fingerprint(self) -> str:
        """Return a hash of the folder's contents, or of its metadata if there is no copy."""
        digest = hashlib.sha256()
        if self.copy is not None:
            for path, status in walk(self.copy):
                digest.update(
                    f"{path.relative_to(self.copy)}\0{status.st_mode}\0{status.st_size}\0".encode(
                        errors="surrogateescape"
                    )
                )
                if stat.S_ISREG(status.st_mode):
                    digest.update(path.read_bytes())
                elif stat.S_ISLNK(status.st_mode):
                    digest.update(os.fsencode(os.readlink(path)))
        for name, entry in sorted((self.entries or {}).items() if self.copy is None else ()):
            digest.update(
                f"{name}\0{entry.size}\0{entry.mtime_ns}\0".encode(errors="surrogateescape")
            )
        if self.repository is not None:
            # The content of the repository may be unknown: then no answer of another run is
            # believed.
            digest.update((self.repository.fingerprint() or self.scratch.name).encode())
        return digest.hexdigest()


def take(
    folder: Path,
    scratch: Path,
    *,
    ours: frozenset[Path] = frozenset(),
    repository: Path | None = None,
) -> Snapshot:
    """Record a folder and copy it if it is small.

    Files that vanish or cannot be read are left out. ``ours`` are files that safe-exec writes into
    the folder; they are not part of the notebook's input. ``repository`` is the root of the
    repository around the folder, if the notebook may write to it.
    """
    snapshot = _snapshot_folder(folder, scratch, ours)
    if repository is None or repository == snapshot.folder:
        return snapshot
    notes = note(repository, snapshot.folder, ours=ours | {scratch.resolve()})
    notes.save(scratch)
    return replace(snapshot, repository=notes)


def _snapshot_folder(folder: Path, scratch: Path, ours: frozenset[Path]) -> Snapshot:
    folder, but, start_ns = folder.resolve(), ours | {scratch.resolve()}, now()
    entries: dict[str, Entry] = {}
    total = 0
    # Sizes are summed while walking, so that a large folder is recognised early.
    for path, status in walk(folder, but=but):
        if len(entries) >= NOTE_ENTRIES:
            return Snapshot(
                folder=folder, scratch=scratch, copy=None, entries=None, tmp=_names_in_tmp()
            )
        entries[str(path.relative_to(folder))] = _entry(status)
        total += status.st_size if stat.S_ISREG(status.st_mode) else 0
    copy: Path | None = None
    if total <= COPY_BYTES and len(entries) <= COPY_ENTRIES:
        copy = scratch / "before"
        copy_tree(
            folder,
            copy,
            but=but,
            hardlink_candidates=_hardlink_candidates(_latest.get(folder), entries),
        )
    snapshot = Snapshot(
        folder=folder,
        scratch=scratch,
        copy=copy,
        entries=entries,
        tmp=_names_in_tmp(),
        taken_ns=start_ns,
    )
    if copy is not None:
        _latest[folder] = snapshot
        for oldest in list(_latest)[:-MOST_FOLDERS]:
            _latest.pop(oldest, None)
    return snapshot


# The last copy of each folder: the notebooks of one folder share what did not change.
_latest: dict[Path, Snapshot] = {}


def _hardlink_candidates(
    older_snapshot: Snapshot | None, entries: Mapping[str, Entry]
) -> dict[str, Path]:
    """Return the files of an earlier copy that have not changed, by path within the folder."""
    # File times have the granularity of the system's clock tick. A file that changed just before it
    # was copied may have changed again within the same tick, so such files are copied again.
    if older_snapshot is None or older_snapshot.copy is None or not older_snapshot.entries:
        return {}
    settled = older_snapshot.taken_ns - TICK_NS
    same = (
        name
        for name, entry in entries.items()
        if entry.ctime_ns < settled and older_snapshot.entries.get(name) == entry
    )
    return {name: older_snapshot.copy / name for name in same if stat.S_ISREG(entries[name].mode)}


def reopen(folder: Path, scratch: Path) -> Snapshot | None:
    """Return the snapshot whose copy an earlier run left in ``scratch``.

    ``None`` if there is none.
    """
    copy = scratch / "before"
    if not copy.is_dir():
        return None
    return Snapshot(
        folder=folder.resolve(),
        scratch=scratch,
        copy=copy,
        entries=None,
        tmp=None,
        repository=load(scratch),
    )


def _entry(status: os.stat_result) -> Entry:
    return Entry(
        mode=status.st_mode,
        size=status.st_size,
        mtime_ns=status.st_mtime_ns,
        ctime_ns=status.st_ctime_ns,
    )


def _names_in_tmp() -> frozenset[str] | None:
    try:
        names = frozenset(os.listdir(TMP))
    except OSError:
        return None
    return names if len(names) <= TMP_ENTRIES else None


# --- what a trial sees ----------------------------------------------------------------------------


class Workspace(Struct, frozen=True, kw_only=True):
    """The working directory of a trial and its mounts.

    ``directory`` holds all files that the trial writes; remove it after the trial.
    """

    cwd: Path
    directory: Path
    mounts: tuple[Mapping[str, str], ...] = ()
    user_namespace: bool = False


class WorkspaceFactory(Struct, frozen=True, kw_only=True):
    """Creates workspaces from one snapshot.

    ``namespace_kind`` is the result of :func:`mounts.namespaces`. ``new`` are the paths that an
    overlay hides. ``gaps`` name the traces of earlier trials that a trial may still see.
    """

    snapshot: Snapshot
    # The result of mounts.namespaces().
    namespace_kind: str | None
    overlay: bool
    # The paths that an overlay hides.
    new: tuple[str, ...] = ()
    # The traces of earlier trials that a trial may still see.
    gaps: tuple[str, ...] = ()
    repository: RepositoryLayer | None = None

    def make(self, name: str, runtime: Path) -> Workspace:
        """Create the workspace of trial ``name``. Raises OSError.

        ``runtime`` is the directory with the trial's sockets.
        """
        directory = self.snapshot.scratch / f"trial-{name}"
        directory.mkdir(mode=0o700)
        if self.overlay:
            mount = self._layers(directory)
        elif self.snapshot.copy is not None:
            copy_tree(self.snapshot.copy, directory / "folder")
            mount = {
                "kind": "bind",
                "source": str(directory / "folder"),
                "target": str(self.snapshot.folder),
            }
        else:
            mount = None
        if self.namespace_kind is None:
            cwd = directory / "folder" if mount else self.snapshot.folder
            return Workspace(cwd=cwd, directory=directory)
        # The folder comes after /tmp: if our cache lies in the folder, its mount hides the
        # directories from which the others are mounted.
        folder = self.snapshot.folder
        mount_list = [] if folder == TMP and mount else self._tmp(directory, runtime)
        # The folder lies in the repository, and is mounted over it.
        if self.repository is not None:
            mount_list.append(self.repository.mount(directory))
        mount_list += self._beside_runtime(mount, directory, runtime) if mount else []
        if not folder.is_relative_to(SHM):
            mount_list.append({"kind": "tmpfs", "target": str(SHM), "options": "mode=1777"})
        return Workspace(
            cwd=folder,
            directory=directory,
            mounts=tuple(mount_list),
            user_namespace=self.namespace_kind == "user",
        )

    def _beside_runtime(
        self, mount: dict[str, str], directory: Path, runtime: Path
    ) -> list[dict[str, str]]:
        """Return the mounts of the folder, keeping the runtime directory reachable."""
        # If the folder is /tmp itself, its mount would hide the runtime directory, so that is bound
        # into it.
        if not runtime.is_relative_to(self.snapshot.folder):
            return [mount]
        place = (
            directory / "runtime"
            if self.overlay
            else directory / "folder" / runtime.relative_to(self.snapshot.folder)
        )
        place.mkdir(parents=True, exist_ok=True)
        binds = [{"kind": "bind", "source": str(runtime), "target": str(place)}, mount]
        return (
            [*binds, {"kind": "bind", "source": str(place), "target": str(runtime)}]
            if self.overlay
            else binds
        )

    def _layers(self, directory: Path) -> dict[str, str]:
        """Return the overlay mount of the folder."""
        # Whiteouts (character devices 0:0, see overlayfs.rst) hide the files that the first run
        # added.
        for name in ("upper", "work"):
            # overlayfs needs an upper and a work directory on the same file system.
            (directory / name).mkdir()
        for path in self.new:
            white = directory / "upper" / path
            white.parent.mkdir(parents=True, exist_ok=True)
            os.mknod(white, stat.S_IFCHR, os.makedev(0, 0))
        return {
            "kind": "overlay",
            "lower": str(self.snapshot.folder),
            "upper": str(directory / "upper"),
            "work": str(directory / "work"),
            "target": str(self.snapshot.folder),
        }

    def _tmp(self, directory: Path, runtime: Path) -> list[dict[str, str]]:
        """Return the mounts for a /tmp that has only the entries from before the first run."""
        # Each earlier name is bound into a fresh directory, which is bound over /tmp last.
        if self.snapshot.tmp is None:
            return []
        fresh = directory / "tmp"
        fresh.mkdir()
        # mkdir applies the umask, so the sticky mode must be set afterwards.
        fresh.chmod(0o1777)
        binds = [_bound(TMP / name, fresh / name) for name in sorted(self.snapshot.tmp)]
        # The keeper makes the runtime directory before it mounts anything.
        if runtime.parent == TMP:
            (fresh / runtime.name).mkdir()
            binds.append(
                {"kind": "bind", "source": str(runtime), "target": str(fresh / runtime.name)}
            )
        return [
            *(mount for mount in binds if mount),
            {"kind": "bind", "source": str(fresh), "target": str(TMP)},
        ]


def _bound(source: Path, target: Path) -> dict[str, str] | None:
    """Create a mount point of the same kind as ``source`` and return its bind mount."""
    # A symbolic link is created again; the result is `None` then, and for a file that has vanished.
    try:
        status = source.lstat()
        if stat.S_ISLNK(status.st_mode):
            target.symlink_to(os.readlink(source))
            return None
        if stat.S_ISDIR(status.st_mode):
            target.mkdir()
        else:
            target.touch()
    except OSError:
        return None
    # Other programs add and remove entries of /tmp: an entry that is gone when the mounts are made
    # is left out.
    return {"kind": "bind", "source": str(source), "target": str(target), "optional": "yes"}


class WorkspaceUnavailable(Exception):  # noqa: N818 - an answer rather than an error
    """Trials cannot get the folder as it was; the text says why."""


def workspace_factory(
    snapshot: Snapshot, *, ours: frozenset[Path], insist: bool = False
) -> WorkspaceFactory:
    """Return the factory of workspaces for this machine.

    Raises WorkspaceUnavailable with the reason.

    ``ours`` are files that safe-exec writes itself. With ``insist`` there is always a factory, and
    its ``gaps`` name the state that could not be restored.
    """
    namespace_kind = mounts.namespaces()
    gaps: tuple[str, ...] = (
        ()
        if namespace_kind and snapshot.tmp is not None
        else ("files that an earlier trial left in /tmp",)
    )
    gaps += (
        ()
        if namespace_kind
        else (
            (
                "its files in /dev/shm, and files of the folder that the notebook opens by their "
                "full path"
            ),
        )
    )
    gaps += (
        ("its files in /dev/shm",) if namespace_kind and snapshot.folder.is_relative_to(SHM) else ()
    )
    layer = None
    if snapshot.repository is not None:
        layer, more = layer_of(
            snapshot.repository,
            snapshot.scratch,
            namespace_kind,
            ours=ours | {snapshot.scratch.resolve()},
        )
        gaps += more
    if snapshot.copy is not None:
        return WorkspaceFactory(
            snapshot=snapshot,
            namespace_kind=namespace_kind,
            overlay=False,
            gaps=gaps,
            repository=layer,
        )
    reason = _why_no_overlay(snapshot, ours, namespace_kind)
    if reason is None:
        return WorkspaceFactory(
            snapshot=snapshot,
            namespace_kind=namespace_kind,
            overlay=True,
            new=added(snapshot),
            gaps=gaps,
            repository=layer,
        )
    if not insist:
        raise WorkspaceUnavailable(reason)
    gaps = (*gaps, f"files of the folder itself: {reason}")
    return WorkspaceFactory(
        snapshot=snapshot, namespace_kind=namespace_kind, overlay=False, gaps=gaps, repository=layer
    )


def _why_no_overlay(
    snapshot: Snapshot, ours: frozenset[Path], namespace_kind: str | None
) -> str | None:
    """Return the reason why a large folder cannot be overlaid, or ``None``."""
    if snapshot.entries is None:
        return f"it holds more than {NOTE_ENTRIES} files"
    changed = next(
        (name for name in _changed(snapshot) if snapshot.folder / name not in ours), None
    )
    if changed is not None:
        return (
            f"it is too large to copy ({COPY_BYTES >> 20} MiB, {COPY_ENTRIES} files), and "
            f"the first run changed {changed} in it"
        )
    # Without a mount namespace the copy is used at its own path.
    if namespace_kind is None:
        return (
            "it is too large to copy, and this system does not permit the "
            "mount namespace that an overlay needs"
        )
    probe = snapshot.scratch / "probe"
    probe.mkdir(exist_ok=True)
    if not mounts.overlays(snapshot.folder, probe, namespace_kind):
        return "it is too large to copy, and its file system cannot be overlaid here"
    return None


def _changed(snapshot: Snapshot) -> Iterator[str]:
    """Yield the files that have changed.

    Directories are skipped, as they change with their entries.
    """
    for name, old_entry in (snapshot.entries or {}).items():
        try:
            current_entry = _entry((snapshot.folder / name).lstat())
        except OSError:
            yield name
            continue
        if current_entry != old_entry and not stat.S_ISDIR(old_entry.mode):
            yield name


def added(snapshot: Snapshot) -> tuple[str, ...]:
    """Return the paths that did not exist before, without the contents of new directories."""
    old_entries = snapshot.entries or {}
    new: set[Path] = set()
    names: list[str] = []
    for path, _ in walk(snapshot.folder, but=frozenset({snapshot.scratch.resolve()})):
        name = str(path.relative_to(snapshot.folder))
        if path.parent in new:
            new.add(path)
        elif name not in old_entries:
            new.add(path)
            names.append(name)
    return tuple(names)
