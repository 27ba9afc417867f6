"""Records the restrictions of a run, and the places whose files are kept or discarded. Pure.

The keeper lists the files of the discarded places.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from msgspec import Struct

from safe_exec.keeper.protocol import FOLDER as OF_FOLDER
from safe_exec.keeper.protocol import HOME as OF_HOME
from safe_exec.keeper.protocol import SHM as OF_SHM
from safe_exec.keeper.protocol import TMP as OF_TMP
from safe_exec.keeper.protocol import DiscardedPlace
from safe_exec.model.evidence import IsolationFacts
from safe_exec.model.limits import FolderUse, Mechanism, RepositoryUse, Wall
from safe_exec.sandbox.host.repository import RepositoryAccess
from safe_exec.sandbox.plan import SpawnPlan

TMP, SHM = "/tmp", "/dev/shm"  # noqa: S108 - named, not used
LANDLOCK_WRITABLE = (TMP, "/dev")


class KernelPaths(Struct, frozen=True, kw_only=True):
    """The paths around one kernel, without links.

    ``homes`` are to be hidden, ``readable`` stay visible in hidden places. ``kernel_home`` is the
    kernel's HOME, ``runtime`` the directory of its sockets. ``interpreters`` are part of
    ``readable``.
    """

    folder: Path
    runtime: Path
    homes: tuple[Path, ...]
    readable: tuple[Path, ...]
    kernel_home: str | None
    interpreters: tuple[Path, ...] = ()
    repository: RepositoryAccess = RepositoryAccess()


def facts_of(plan: SpawnPlan, paths: KernelPaths) -> IsolationFacts:
    """Return the facts of a plan, whose ``isolation`` has paths without links.

    A wall that no mechanism enforces restricts nothing.
    """
    isolation = plan.isolation
    hidden_homes = tuple(map(str, paths.homes)) if _is_held(plan, Wall.HOME) else ()
    hidden = isolation.hide if _is_held(plan, Wall.HIDDEN) else ()
    kept_paths, discarded = _bubblewrap(plan, paths) if plan.enclosed else _landlock(plan, paths)
    covered = (*hidden_homes, *hidden, *discarded)
    visible = [*paths.readable, *map(Path, isolation.show)]
    if paths.repository.root is not None and paths.repository.use is RepositoryUse.READ:
        visible.append(paths.repository.root)
    return IsolationFacts(
        by=Mechanism.BUBBLEWRAP
        if plan.enclosed
        else Mechanism.LANDLOCK
        if plan.landlock
        else Mechanism.NONE,
        home=paths.kernel_home,
        folder=str(paths.folder),
        repository=str(paths.repository.root) if paths.repository.root is not None else None,
        repository_use=paths.repository.use,
        hidden_homes=hidden_homes,
        hidden=hidden,
        readable=tuple(
            str(path) for path in visible if any(path.is_relative_to(top) for top in covered)
        ),
        writable=kept_paths,
        discarded=discarded,
        read_only=_is_held(plan, Wall.SYSTEM),
        network=not _is_held(plan, Wall.NETWORK),
    )


def _is_held(plan: SpawnPlan, wall: Wall) -> bool:
    return wall in plan.walls and plan.walls[wall].by is not Mechanism.NONE


def is_folder_kept(plan: SpawnPlan) -> bool:
    """Whether files that a run inside bubblewrap writes into its folder are kept."""
    return plan.isolation.folder is FolderUse.WRITE and (
        plan.disk is None or plan.isolation.write_back
    )


def _written_repository(paths: KernelPaths) -> list[str]:
    """Return the repository, if files written there are kept."""
    access = paths.repository
    return (
        [str(access.root)] if access.root is not None and access.use is RepositoryUse.WRITE else []
    )


def _bubblewrap(plan: SpawnPlan, paths: KernelPaths) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the places whose files are kept, and those whose files are discarded."""
    isolation, folder = plan.isolation, str(paths.folder)
    kept_paths = [
        *([folder] if is_folder_kept(plan) else []),
        *_written_repository(paths),
        *isolation.writable,
    ]
    discarded = (
        [folder] if isolation.folder is not FolderUse.READ and not is_folder_kept(plan) else []
    )
    if isolation.read_only_system or plan.disk is not None or isolation.folder is FolderUse.COPY:
        discarded.append(TMP)
    if isolation.read_only_system or plan.shm is not None:
        discarded.append(SHM)
    if isolation.hide_home:
        discarded += map(str, paths.homes[:1])
    return tuple(kept_paths), tuple(path for path in discarded if path not in isolation.writable)


def _landlock(plan: SpawnPlan, paths: KernelPaths) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the kept and the discarded places under Landlock."""
    # Landlock has no mounts, so /tmp is the machine's own. HOME and TMPDIR lead into the directory
    # of the sockets, which is removed with the run.
    isolation = plan.isolation
    kept_paths = [str(paths.folder)] if isolation.folder is FolderUse.WRITE else []
    system = LANDLOCK_WRITABLE if plan.landlock and isolation.read_only_system else ()
    return (*kept_paths, *_written_repository(paths), *isolation.writable, *system), (
        str(paths.runtime),
    ) if plan.landlock else ()


# --- places whose files are discarded, for the keeper to list -------------------------------------

HOME_NAME, TMP_NAME = "~", "$TMPDIR"
# Files of safe-exec in the directory of the sockets, which are not the notebook's.
OURS = ("home", "tmp", "disk", "c.json")


def inside_places(plan: SpawnPlan, paths: KernelPaths) -> tuple[DiscardedPlace, ...]:
    """Return the discarded places that exist only inside bubblewrap: its file systems in memory."""
    return tuple(
        place
        for path, kind in _own(plan, paths)
        if kind == OF_SHM or not _has_disk(plan)
        for place in _place(plan, paths, path, kind)
    )


def outside_places(plan: SpawnPlan, paths: KernelPaths) -> tuple[DiscardedPlace, ...]:
    """Return the discarded places that exist outside: on the limited disk or beside the sockets."""
    if not plan.enclosed:
        return tuple(_beside_sockets(plan, paths))
    if not _has_disk(plan):
        return ()
    disk = paths.runtime / "disk"
    on_disk = {OF_TMP: disk / "tmp", OF_HOME: disk / "home"}
    places = [
        place._replace(path=str(on_disk[kind]))
        for path, kind in _own(plan, paths)
        if kind in on_disk
        for place in _place(plan, paths, path, kind)
    ]
    if plan.isolation.folder is not FolderUse.READ and not is_folder_kept(plan):
        places.append(DiscardedPlace(name=".", kind=OF_FOLDER, path=str(disk / "folder")))
    return tuple(places)


def _has_disk(plan: SpawnPlan) -> bool:
    return plan.disk is not None or plan.isolation.folder is FolderUse.COPY


def _own(plan: SpawnPlan, paths: KernelPaths) -> Iterator[tuple[Path, str]]:
    """Yield the writable home, /tmp and /dev/shm that belong to the run alone."""
    isolation = plan.isolation
    if isolation.hide_home and paths.homes:
        yield paths.homes[0], OF_HOME
    if isolation.read_only_system or _has_disk(plan):
        yield Path(TMP), OF_TMP
    if isolation.read_only_system or plan.shm is not None:
        yield Path(SHM), OF_SHM


def _place(plan: SpawnPlan, paths: KernelPaths, path: Path, kind: str) -> Iterator[DiscardedPlace]:
    """Yield one place, unless the user opened all of it."""
    opened = [*map(Path, plan.isolation.writable), *map(Path, plan.isolation.show)]
    if any(path.is_relative_to(other) for other in opened):
        return
    # Files of the machine that are mounted in there are not the notebook's.
    mounted = [*paths.readable, *opened, *map(Path, plan.isolation.hide)]
    skip = tuple(str(other.relative_to(path)) for other in mounted if other.is_relative_to(path))
    is_home = (
        kind == OF_HOME
        and paths.kernel_home is not None
        and Path(paths.kernel_home).resolve() == path
    )
    name = HOME_NAME if is_home else str(path)
    yield DiscardedPlace(name=name, kind=kind, path=str(path), skip=skip)


def _beside_sockets(plan: SpawnPlan, paths: KernelPaths) -> Iterator[DiscardedPlace]:
    """Yield the discarded places that lie in the directory of the kernel's sockets."""
    # Under Landlock the kernel has another home, and /tmp is the machine's. Only that home and
    # TMPDIR are discarded.
    if plan.landlock and plan.isolation.hide_home:
        yield DiscardedPlace(name=HOME_NAME, kind=OF_HOME, path=str(paths.runtime / "home"))
    if plan.landlock and plan.isolation.read_only_system:
        yield DiscardedPlace(name=TMP_NAME, kind=OF_TMP, path=str(paths.runtime), skip=OURS)
