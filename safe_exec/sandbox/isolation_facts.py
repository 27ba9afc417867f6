"""Records what isolation takes from one run and where its files stay: facts for causes, warnings and the verdict.

Pure; imports model, bubblewrap and the plan.
"""

from __future__ import annotations

from pathlib import Path

from safe_exec.model.evidence import IsolationFacts
from safe_exec.model.limits import FolderUse, Mechanism, Wall
from safe_exec.records import dataclass
from safe_exec.sandbox.plan import SpawnPlan

TMP, SHM = "/tmp", "/dev/shm"  # noqa: S108 - named, not used
LANDLOCK_WRITABLE = (TMP, "/dev")


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelPaths:
    """The paths around one kernel, without links. ``homes`` are those to hide, ``readable`` those that stay visible in hidden places.

    ``kernel_home`` is the kernel's HOME; ``runtime`` the directory of its sockets.
    """

    folder: Path
    runtime: Path
    homes: tuple[Path, ...]
    readable: tuple[Path, ...]
    kernel_home: str | None


def facts_of(plan: SpawnPlan, paths: KernelPaths) -> IsolationFacts:
    """The facts of a plan. A wall that nothing holds takes nothing away. ``plan.isolation`` has paths without links."""
    isolation = plan.isolation
    hidden_homes = tuple(map(str, paths.homes)) if _is_held(plan, Wall.HOME) else ()
    hidden = isolation.hide if _is_held(plan, Wall.HIDDEN) else ()
    kept, discarded = _bubblewrap(plan, paths) if plan.enclosed else _landlock(plan, paths)
    covered = (*hidden_homes, *hidden, *discarded)
    return IsolationFacts(
        by=Mechanism.BUBBLEWRAP if plan.enclosed else Mechanism.LANDLOCK if plan.landlock else Mechanism.NONE,
        home=paths.kernel_home,
        folder=str(paths.folder),
        hidden_homes=hidden_homes,
        hidden=hidden,
        readable=tuple(str(path) for path in paths.readable if any(path.is_relative_to(top) for top in covered)),
        writable=kept,
        discarded=discarded,
        read_only=_is_held(plan, Wall.SYSTEM),
        network=not _is_held(plan, Wall.NETWORK),
    )


def _is_held(plan: SpawnPlan, wall: Wall) -> bool:
    return wall in plan.walls and plan.walls[wall].by is not Mechanism.NONE


def _bubblewrap(plan: SpawnPlan, paths: KernelPaths) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The places whose files are kept, and those whose files are gone after the run."""
    isolation, folder = plan.isolation, str(paths.folder)
    comes_back = isolation.folder is FolderUse.WRITE and (plan.disk is None or isolation.write_back)
    kept = [*([folder] if comes_back else []), *isolation.writable]
    discarded = [folder] if isolation.folder is not FolderUse.READ and not comes_back else []
    if isolation.read_only_system or plan.disk is not None or isolation.folder is FolderUse.COPY:
        discarded.append(TMP)
    if isolation.read_only_system or plan.shm is not None:
        discarded.append(SHM)
    if isolation.hide_home:
        discarded += map(str, paths.homes[:1])
    return tuple(kept), tuple(discarded)


def _landlock(plan: SpawnPlan, paths: KernelPaths) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Landlock leaves /tmp the machine's own; HOME and TMPDIR lead into the directory of the sockets, which goes with the run."""
    isolation = plan.isolation
    kept = [str(paths.folder)] if isolation.folder is FolderUse.WRITE else []
    system = LANDLOCK_WRITABLE if plan.landlock and isolation.read_only_system else ()
    return (*kept, *isolation.writable, *system), (str(paths.runtime),) if plan.landlock else ()
