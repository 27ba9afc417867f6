"""The folder a notebook runs in, as it was before the first run, for every trial anew. Imports mounts only.

A small folder is copied before the first cell runs; of a large one the names, sizes and times are noted, and a trial gets it as the
lower layer of an overlay, if the first run changed no file that was there. With a mount namespace a trial sees its folder at the
folder's own path, an empty /dev/shm, and in /tmp what was there before the first run; without one it runs in the copy, elsewhere.
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

COPY_BYTES = 32 << 20
COPY_ENTRIES = 2000
NOTE_ENTRIES = 20_000
TMP_ENTRIES = 500
MOST_FOLDERS = 32
"""Of so many the last copy is remembered."""
TICK_NS = 100_000_000
"""Ten ticks of the slowest clock."""
TMP = Path("/tmp")  # noqa: S108 - the one that every program uses
SHM = Path("/dev/shm")  # noqa: S108


class Entry(Struct, frozen=True, kw_only=True):
    """What tells whether a file is still the same: changes of content show in ``ctime_ns`` whatever a program sets."""

    mode: int
    size: int
    mtime_ns: int
    ctime_ns: int


class Snapshot(Struct, frozen=True, kw_only=True):
    """A folder before the first run. ``copy`` is ``None`` for a large one, ``entries`` for one too large to be noted.

    ``entries`` are by path within the folder. ``tmp`` are the names in /tmp, ``None`` where there are too many. ``taken_ns`` is when it was
    begun, on the clock of files. ``repository`` is the one around the folder, if it may be written.
    """

    folder: Path
    scratch: Path
    copy: Path | None
    entries: Mapping[str, Entry] | None
    tmp: frozenset[str] | None
    taken_ns: int = 0
    repository: RepositoryNotes | None = None

    def fingerprint(self) -> str:
        """A hash of what the folder held: of the contents where there is a copy, else of names, sizes and times."""
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
            # What it holds may be unknown: then no answer of another run is believed.
            digest.update((self.repository.fingerprint() or self.scratch.name).encode())
        return digest.hexdigest()


def take(
    folder: Path,
    scratch: Path,
    *,
    ours: frozenset[Path] = frozenset(),
    repository: Path | None = None,
) -> Snapshot:
    """Note, and if it is small copy, a folder. Raises nothing for files that go or cannot be read meanwhile: they are left out.

    ``ours`` are files that we write into it ourselves: no part of what the notebook starts from. ``repository`` is the root of the
    repository around the folder, if the notebook may write to it.
    """
    snapshot = _take(folder, scratch, ours)
    if repository is None or repository == snapshot.folder:
        return snapshot
    notes = note(repository, snapshot.folder, ours=ours | {scratch.resolve()})
    notes.save(scratch)
    return replace(snapshot, repository=notes)


def _take(folder: Path, scratch: Path, ours: frozenset[Path]) -> Snapshot:
    folder, but, start_ns = folder.resolve(), ours | {scratch.resolve()}, now()
    entries: dict[str, Entry] = {}
    total = 0
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


_latest: dict[Path, Snapshot] = {}
"""The last copy of each folder: the notebooks of one folder share what did not change."""


def _hardlink_candidates(earlier: Snapshot | None, entries: Mapping[str, Entry]) -> dict[str, Path]:
    """The files of an earlier copy that are still the same, by path within the folder.

    Times of files have the grain of the system's clock tick: one that changed just before it was copied may have changed again in the same tick.
    """
    if earlier is None or earlier.copy is None or not earlier.entries:
        return {}
    settled = earlier.taken_ns - TICK_NS
    same = (
        name
        for name, entry in entries.items()
        if entry.ctime_ns < settled and earlier.entries.get(name) == entry
    )
    return {name: earlier.copy / name for name in same if stat.S_ISREG(entries[name].mode)}


def reopen(folder: Path, scratch: Path) -> Snapshot | None:
    """The snapshot of an earlier run that has left its copy in ``scratch``."""
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


# --- what a trial sees ------------------------------------------------------------------------------------------


class Workspace(Struct, frozen=True, kw_only=True):
    """Where a trial runs and what is mounted for it; ``directory`` holds all that it writes and is to be removed after it."""

    cwd: Path
    directory: Path
    mounts: tuple[Mapping[str, str], ...] = ()
    user_namespace: bool = False


class WorkspaceFactory(Struct, frozen=True, kw_only=True):
    """Makes views of one snapshot. ``namespace_kind`` is as in :func:`mounts.namespaces`; ``new`` are the paths that an overlay hides.

    ``gaps`` say in a few words what a trial may still see of an earlier one.
    """

    snapshot: Snapshot
    namespace_kind: str | None
    overlay: bool
    new: tuple[str, ...] = ()
    gaps: tuple[str, ...] = ()
    repository: RepositoryLayer | None = None

    def make(self, name: str, runtime: Path) -> Workspace:
        """A view for the trial ``name`` whose runtime directory (sockets) is ``runtime``. Raises OSError."""
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
        # The folder comes after /tmp: where our cache lies within it, that hides what the others are mounted from.
        folder = self.snapshot.folder
        mount_list = [] if folder == TMP and mount else self._tmp(directory, runtime)
        if self.repository is not None:  # the folder lies in it, and is mounted over it
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
        """The folder's mount; where the folder is /tmp itself it would hide the runtime directory, and brings it along."""
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
        """An overlay; what the first run added is hidden by whiteouts (character devices 0:0, overlayfs.rst)."""
        for name in ("upper", "work"):
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
        """A /tmp with what was there before: every name of then bound into a fresh directory, which is bound over /tmp last."""
        if self.snapshot.tmp is None:
            return []
        fresh = directory / "tmp"
        fresh.mkdir()
        fresh.chmod(0o1777)
        binds = [_bound(TMP / name, fresh / name) for name in sorted(self.snapshot.tmp)]
        if runtime.parent == TMP:  # the keeper makes it before it mounts anything
            (fresh / runtime.name).mkdir()
            binds.append(
                {"kind": "bind", "source": str(runtime), "target": str(fresh / runtime.name)}
            )
        return [
            *(mount for mount in binds if mount),
            {"kind": "bind", "source": str(fresh), "target": str(TMP)},
        ]


def _bound(source: Path, target: Path) -> dict[str, str] | None:
    """Make a place of the same kind and say what to bind there; a link is made anew; ``None`` for what is gone."""
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
    # Others come and go in /tmp: what is gone when the mounts are made is no part of it any more.
    return {"kind": "bind", "source": str(source), "target": str(target), "optional": "yes"}


class WorkspaceUnavailable(Exception):  # noqa: N818 - an answer rather than an error
    """Trials cannot be given the folder as it was; the text says why."""


def workspace_factory(
    snapshot: Snapshot, *, ours: frozenset[Path], insist: bool = False
) -> WorkspaceFactory:
    """How trials get their folder here. ``ours`` are files that we write ourselves. Raises WorkspaceUnavailable with the reason.

    With ``insist`` there is always a way, and its gaps say what could not be ruled out.
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
            "what it left in /dev/shm, and files of the folder that are named by their full path",
        )
    )
    gaps += (
        ("what it left in /dev/shm",)
        if namespace_kind and snapshot.folder.is_relative_to(SHM)
        else ()
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
    """Why a large folder cannot be overlaid."""
    if snapshot.entries is None:
        return f"it holds more than {NOTE_ENTRIES} files"
    changed = next(
        (name for name in _changed(snapshot) if snapshot.folder / name not in ours), None
    )
    if changed is not None:
        return f"it is too large to copy ({COPY_BYTES >> 20} MiB, {COPY_ENTRIES} files), and the first run changed {changed} in it"
    if namespace_kind is None:
        return "it is too large to copy, and this system lets us make no mount namespace for an overlay"
    probe = snapshot.scratch / "probe"
    probe.mkdir(exist_ok=True)
    if not mounts.overlays(snapshot.folder, probe, namespace_kind):
        return "it is too large to copy, and its file system cannot be overlaid here"
    return None


def _changed(snapshot: Snapshot) -> Iterator[str]:
    """Files that are not what they were; directories change with what is in them."""
    for name, old_entry in (snapshot.entries or {}).items():
        try:
            current_entry = _entry((snapshot.folder / name).lstat())
        except OSError:
            yield name
            continue
        if current_entry != old_entry and not stat.S_ISDIR(old_entry.mode):
            yield name


def added(snapshot: Snapshot) -> tuple[str, ...]:
    """The paths that were not there before, without what is in new directories."""
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
