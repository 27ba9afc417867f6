"""Selects the mechanism for each wall from the requested isolation and the host. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from msgspec import Struct, field

from safe_exec.model.limits import (
    Enforcement,
    FolderUse,
    Isolation,
    LimitName,
    Limits,
    Mechanism,
    RepositoryUse,
    SystemCalls,
    Wall,
)
from safe_exec.sandbox.host.capabilities import HostCapabilities
from safe_exec.sandbox.mechanisms import bubblewrap
from safe_exec.sandbox.mechanisms.offers import ANYWHERE, Placement
from safe_exec.sandbox.plan import Offer

# bubblewrap enforces walls that need namespaces. If it does not work here, Landlock enforces some
# of them. System calls, privileges and the environment need neither.

# The first Landlock ABI with rules for TCP (Linux 6.7).
LANDLOCK_TCP = 4
# The first Landlock ABI with a rule for truncate(2) (Linux 6.2).
LANDLOCK_TRUNCATE = 3
NOT_ALLOWED = "it is not among the mechanisms allowed"


class IsolationPlan(Struct, frozen=True, kw_only=True):
    """The mechanism of each wall.

    ``enclosed`` is true if the kernel runs in bubblewrap, ``landlock`` if it restricts itself.
    """

    walls: Mapping[Wall, Enforcement] = field(default_factory=dict)
    enclosed: bool = False
    landlock: bool = False


def plan_isolation(
    isolation: Isolation, limits: Limits, machine: HostCapabilities
) -> IsolationPlan:
    """Return the mechanism for each wall of one run."""
    # A wall that no mechanism enforces is recorded with ``none``, so that reports can show it.
    is_needed = bubblewrap.is_needed(
        isolation, disk=limits.disk is not None, shm=limits.shm is not None
    )
    enclosed = is_needed and machine.bubblewrap is not None and machine.allows(Mechanism.BUBBLEWRAP)
    landlock = (
        is_needed and not enclosed and machine.landlock > 0 and machine.allows(Mechanism.LANDLOCK)
    )
    walls = dict(_namespaced(isolation, machine, enclosed=enclosed, landlock=landlock))
    walls |= dict(_own(isolation, machine, enclosed=enclosed))
    return IsolationPlan(
        walls={wall: walls[wall] for wall in Wall if wall in walls},
        enclosed=enclosed,
        landlock=landlock,
    )


def _namespaced(
    isolation: Isolation, machine: HostCapabilities, *, enclosed: bool, landlock: bool
) -> Iterator[tuple[Wall, Enforcement]]:
    reason = machine.bubblewrap_why_not if machine.allows(Mechanism.BUBBLEWRAP) else NOT_ALLOWED
    for wall, note in _asked(isolation):
        if enclosed:
            yield wall, Enforcement(by=Mechanism.BUBBLEWRAP, hard=True, note=note)
        elif landlock and wall in (Wall.HOME, Wall.HIDDEN):
            yield (
                wall,
                Enforcement(
                    by=Mechanism.LANDLOCK,
                    hard=True,
                    note=f"refused rather than hidden; no bubblewrap: {reason}",
                ),
            )
        elif landlock and wall in (Wall.SYSTEM, Wall.FOLDER):
            yield wall, _unwritten(wall, machine.landlock, reason)
        elif landlock and wall is Wall.NETWORK and machine.landlock >= LANDLOCK_TCP:
            yield (
                wall,
                Enforcement(
                    by=Mechanism.LANDLOCK,
                    hard=False,
                    note=f"TCP only, loopback too; no bubblewrap: {reason}",
                ),
            )
        else:
            yield wall, Enforcement(by=Mechanism.NONE, hard=False, note=f"no bubblewrap: {reason}")


def _unwritten(wall: Wall, abi: int, reason: str) -> Enforcement:
    scope = (
        "the folder cannot be written to"
        if wall is Wall.FOLDER
        else "nothing can be written but the folder, /tmp and /dev"
    )
    empty = "" if abi >= LANDLOCK_TRUNCATE else ", but files can be emptied (until Linux 6.2)"
    note = f"{scope}{empty}; no bubblewrap: {reason}"
    return Enforcement(by=Mechanism.LANDLOCK, hard=abi >= LANDLOCK_TRUNCATE, note=note)


def _asked(isolation: Isolation) -> Iterator[tuple[Wall, str]]:
    if isolation.hide_home:
        yield Wall.HOME, "home directories are empty but for what the interpreter needs"
    if isolation.read_only_system:
        more = " and its repository" if isolation.repository is RepositoryUse.WRITE else ""
        yield (
            Wall.SYSTEM,
            (
                f"nothing can be written but the folder{more}, and a /tmp, /dev/shm and home of "
                "its own"
            ),
        )
    if isolation.folder is not FolderUse.WRITE:
        note = (
            "cannot be written"
            if isolation.folder is FolderUse.READ
            else "a copy; nothing comes back"
        )
        yield Wall.FOLDER, note
    if isolation.hide:
        yield Wall.HIDDEN, ", ".join(isolation.hide)
    if not isolation.network:
        yield Wall.NETWORK, "loopback alone"
    if isolation.own_processes:
        yield Wall.PROCESSES, "process ids, ipc and host name of its own"


def _own(
    isolation: Isolation, machine: HostCapabilities, *, enclosed: bool
) -> Iterator[tuple[Wall, Enforcement]]:
    """Yield the walls that need no namespaces: a process can raise them by itself."""
    if isolation.system_calls is not SystemCalls.ALL:
        missing = machine.seccomp_why_not if machine.allows(Mechanism.SECCOMP) else NOT_ALLOWED
        effect = (
            "refused with EPERM"
            if isolation.system_calls is SystemCalls.REFUSE
            else "end the kernel with SIGSYS"
        )
        none = Enforcement(by=Mechanism.NONE, hard=False, note=f"no filter: {missing}")
        filtered = Enforcement(
            by=Mechanism.SECCOMP, hard=True, note=f"those that no notebook needs {effect}"
        )
        yield Wall.SYSTEM_CALLS, none if missing else filtered
        given_up = Enforcement(
            by=Mechanism.KERNEL, hard=True, note="no new ones (no_new_privs), no core dumps"
        )
        yield Wall.PRIVILEGES, none if missing else given_up
    if isolation.listed_environment:
        yield (
            Wall.ENVIRONMENT,
            Enforcement(by=Mechanism.RUNNER, hard=True, note="only variables that are on the list"),
        )
    if isolation.other_user:
        if machine.uid == 0 and enclosed:
            yield (
                Wall.USER,
                Enforcement(by=Mechanism.KERNEL, hard=True, note="a user that owns nothing"),
            )
        else:
            # Without a mount namespace, another user may lack access even to the interpreter.
            reason = (
                "without bubblewrap it stays the same"
                if machine.uid == 0
                else "only root can become somebody else"
            )
            yield Wall.USER, Enforcement(by=Mechanism.NONE, hard=False, note=reason)


# --- the limits that walls hold -------------------------------------------------------------------


def offer(
    limits: Limits, machine: HostCapabilities, _placement: Placement = ANYWHERE
) -> Offer | None:
    """Return the offer of bubblewrap's file systems of limited size."""
    if machine.bubblewrap is None or not machine.allows(Mechanism.BUBBLEWRAP):
        return None
    holds: dict[LimitName, Enforcement] = {}
    if limits.disk is not None:
        note = (
            "folder (a copy), /tmp and home together, on a tmpfs: what is written there counts as "
            "memory too"
        )
        holds[LimitName.DISK] = Enforcement(by=Mechanism.BUBBLEWRAP, hard=True, note=note)
    if limits.shm is not None:
        holds[LimitName.SHM] = Enforcement(
            by=Mechanism.BUBBLEWRAP, hard=True, note="a tmpfs: it counts as memory too"
        )
    return Offer(mechanism=Mechanism.BUBBLEWRAP, holds=holds)
