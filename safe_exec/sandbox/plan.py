"""Folds the mechanisms' offers, strongest first, into the frozen plan for the keeper.

Pure: nothing here touches the system.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec import Struct, field

from safe_exec.errors import EnforcementError
from safe_exec.keeper import protocol
from safe_exec.limits.spec import ROWS
from safe_exec.model.limits import Enforcement, Isolation, LimitName, Limits, Mechanism, Wall

RUNNER_LIMITS = tuple(LimitName(row.name) for row in ROWS if row.by_runner)

# What ``--require all`` stands for.
REQUIRE_ALL = tuple(LimitName(row.name) for row in ROWS if row.in_require_all)


class Delegation(Struct, frozen=True, kw_only=True):
    """A cgroup that contains our processes and shall delegate controllers.

    The processes move to ``leaf`` first: a cgroup that contains processes cannot delegate
    controllers (cgroups(7)). ``launcher`` and ``environment`` start the keeper in that cgroup; they
    are empty if the runner is in it too.
    """

    group: str
    leaf: str
    controllers: tuple[str, ...]
    launcher: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


class CgroupPlan(Struct, frozen=True, kw_only=True):
    """Cgroups to make (parents first), files to write, and files that join, kill and count.

    ``memory_file`` says how much memory is charged now.
    """

    dirs: tuple[str, ...] = ()
    writes: tuple[tuple[str, str], ...] = ()
    writes_where_present: tuple[tuple[str, str], ...] = ()
    joins: tuple[str, ...] = ()
    kill_files: tuple[str, ...] = ()
    counter_files: tuple[str, ...] = ()
    memory_file: str | None = None
    delegation: Delegation | None = None

    def plus(self, other: CgroupPlan) -> CgroupPlan:
        """Both, one after the other."""
        return CgroupPlan(
            dirs=self.dirs + other.dirs,
            writes=self.writes + other.writes,
            writes_where_present=self.writes_where_present + other.writes_where_present,
            joins=self.joins + other.joins,
            kill_files=self.kill_files + other.kill_files,
            counter_files=self.counter_files + other.counter_files,
            memory_file=self.memory_file or other.memory_file,
            delegation=self.delegation or other.delegation,
        )


class Offer(Struct, frozen=True, kw_only=True):
    """The limits that one mechanism can enforce, and the keeper's work for it.

    ``rlimits`` maps a limit to rows of (resource number, soft, hard); ``watch`` are the limits that
    the watchdog in the runner must look after. Only what is wanted of an offer is carried out.
    """

    mechanism: Mechanism
    holds: Mapping[LimitName, Enforcement]
    cgroup: CgroupPlan = field(default_factory=CgroupPlan)
    rlimits: Mapping[LimitName, tuple[tuple[int, int, int], ...]] = field(default_factory=dict)


class SpawnPlan(Struct, frozen=True, kw_only=True):
    """Everything that the keeper builds, and which mechanism enforces which limit.

    ``mounts`` are made in a mount namespace of the kernel's own (see keeper/mounts.py), with
    ``user_namespace`` in one of both kinds. ``enclosed`` is the program bubblewrap where the kernel
    is to run inside it, ``disk`` and ``shm`` the sizes of its file systems. ``directories`` are
    removed with the sandbox, ``cleanup_if_runner_dies`` only when the runner is gone and nobody
    else will.
    """

    cgroup: CgroupPlan
    rlimits: tuple[tuple[int, int, int], ...]
    open_files_soft: int | None
    watch: frozenset[LimitName]
    enforcement: Mapping[LimitName, Enforcement]
    memory_limit: int | None = None
    mounts: tuple[Mapping[str, str], ...] = ()
    user_namespace: bool = False
    isolation: Isolation = field(default_factory=Isolation)
    walls: Mapping[Wall, Enforcement] = field(default_factory=dict)
    enclosed: str | None = None
    landlock: bool = False
    disk: int | None = None
    shm: int | None = None
    directories: tuple[str, ...] = ()
    cleanup_if_runner_dies: tuple[str, ...] = ()

    def cgroup_setup(self) -> protocol.CgroupSetup:
        """Return the keeper's part of the cgroups."""
        plan, delegation = self.cgroup, self.cgroup.delegation
        return protocol.CgroupSetup(
            delegation=None
            if delegation is None
            else protocol.Delegation(delegation.group, delegation.leaf, delegation.controllers),
            dirs=plan.dirs,
            writes=plan.writes,
            optional_writes=plan.writes_where_present,
            joins=plan.joins,
            kill_files=plan.kill_files,
            counter_files=plan.counter_files,
            memory_file=plan.memory_file,
            memory_limit=self.memory_limit,
        )


def fold(limits: Limits, offers: Sequence[Offer]) -> SpawnPlan:
    """Give each limit that is set to the first offer that holds it.

    ``offers`` come strongest first.
    """
    # A limit that nothing holds is written down as held by ``none``, not left out.
    enforcement: dict[LimitName, Enforcement] = {}
    for name in RUNNER_LIMITS:
        if limits.of(name) is not None:
            enforcement[name] = Enforcement(by=Mechanism.RUNNER, hard=False)
    for offer in offers:
        for name, offered in offer.holds.items():
            # The first offer wins, and offers come strongest first.
            enforcement.setdefault(name, offered)
    for name in LimitName:
        if limits.of(name) is not None:
            enforcement.setdefault(
                name, Enforcement(by=Mechanism.NONE, hard=False, note="nothing here can hold it")
            )
    return _carry_out(limits, offers, enforcement)


def _carry_out(
    limits: Limits, offers: Sequence[Offer], enforcement: dict[LimitName, Enforcement]
) -> SpawnPlan:
    cgroup = CgroupPlan()
    rows: list[tuple[int, int, int]] = []
    watch: set[LimitName] = set()
    for offer in offers:
        cgroup = cgroup.plus(offer.cgroup)
        for name, limit_rows in offer.rlimits.items():
            # A limit on processor time wants both: RLIMIT_CPU for each process, the watch for their
            # sum.
            if (
                enforcement[name].by in (offer.mechanism, Mechanism.NONE)
                or name is LimitName.CPU_TIME
            ):
                rows.extend(limit_rows)
        if offer.mechanism is Mechanism.WATCHDOG:
            watch = {
                name for name in offer.holds if not _held_for_the_tree(enforcement[name], name)
            }
    ordered = {name: enforcement[name] for name in LimitName if name in enforcement}
    return SpawnPlan(
        cgroup=cgroup,
        rlimits=tuple(rows),
        open_files_soft=limits.open_files,
        watch=frozenset(watch),
        enforcement=ordered,
        memory_limit=limits.memory,
    )


def _held_for_the_tree(enforcement: Enforcement, name: LimitName) -> bool:
    """Whether a limit is already held for all processes together, so that no watch is needed."""
    tree_mechanisms = (
        Mechanism.CGROUP_V1,
        Mechanism.CGROUP_V2,
        Mechanism.SYSTEMD,
        Mechanism.BUBBLEWRAP,
    )
    return enforcement.by in tree_mechanisms and name is not LimitName.CPU_TIME


def weak_walls(walls: Mapping[Wall, Enforcement]) -> tuple[Wall, ...]:
    """The walls that the system does not hold here.

    That only root can become somebody else is no weakness.
    """
    return tuple(
        wall
        for wall, enforcement in walls.items()
        if not enforcement.hard and wall is not Wall.USER
    )


def require_walls(plan: SpawnPlan) -> None:
    """Refuse a plan whose isolation is required and in which a wall does not stand.

    Raises EnforcementError, naming them.
    """
    weak = weak_walls(plan.walls) if plan.isolation.required else ()
    if weak:
        names = ", ".join(wall.value.replace("_", " ") for wall in weak)
        reason = plan.walls[weak[-1]].note.rpartition("; ")[2]
        raise EnforcementError(
            f"walls are required that do not stand here: {names} ({reason}); `safe-exec "
            "doctor` says how to fix it, --require none runs all the same"
        )


def require(plan: SpawnPlan, names: Sequence[LimitName | Wall]) -> None:
    """Refuse a plan that holds a required limit or wall by less than the operating system's kernel.

    Raises EnforcementError, naming the limit, what would hold it, and where to look further.
    """
    require_walls(plan)
    for name in names:
        enforcement = plan.walls[name] if isinstance(name, Wall) else plan.enforcement[name]
        if not enforcement.hard:
            by = "nothing" if enforcement.by is Mechanism.NONE else f"the {enforcement.by} alone"
            raise EnforcementError(
                f"--require {name}: here {by} could hold it, not the system's kernel; "
                "`safe-exec doctor` says how to fix it"
            )
