"""Folds the mechanisms' offers, strongest first, into the frozen plan for the keeper. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec import Struct, field

from safe_exec.errors import EnforcementError
from safe_exec.keeper import protocol
from safe_exec.limits.spec import ROWS
from safe_exec.model.limits import Enforcement, Isolation, LimitName, Limits, Mechanism, Wall

RUNNER_LIMITS = tuple(LimitName(row.name) for row in ROWS if row.by_runner)

# The limits of ``--require all``.
REQUIRE_ALL = tuple(LimitName(row.name) for row in ROWS if row.in_require_all)


class Delegation(Struct, frozen=True, kw_only=True):
    """A cgroup with our processes in it that must delegate controllers.

    The processes move to ``leaf`` first. ``launcher`` and ``environment`` start the keeper in that
    cgroup; they are empty if the runner is in it too.
    """

    # A cgroup that contains processes cannot enable controllers for its children ("no internal
    # processes", cgroups(7)).
    group: str
    leaf: str
    controllers: tuple[str, ...]
    launcher: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


class CgroupPlan(Struct, frozen=True, kw_only=True):
    """Cgroups to make (parents first), files to write, and files for joining, killing, counting.

    ``memory_file`` contains the memory that is charged now.
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
        """Join two plans."""
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

    ``rlimits`` maps a limit to rows of (resource number, soft, hard).
    """

    mechanism: Mechanism
    holds: Mapping[LimitName, Enforcement]
    cgroup: CgroupPlan = field(default_factory=CgroupPlan)
    rlimits: Mapping[LimitName, tuple[tuple[int, int, int], ...]] = field(default_factory=dict)


class SpawnPlan(Struct, frozen=True, kw_only=True):
    """Everything that the keeper builds, and the mechanism of each limit and wall.

    ``mounts`` are made in the kernel's own mount namespace (keeper/mounts.py), with
    ``user_namespace`` in its own user namespace too. ``enclosed`` is the path of bubblewrap if the
    kernel runs inside it, ``disk`` and ``shm`` are the sizes of its file systems. ``directories``
    are removed with the sandbox, ``cleanup_if_runner_dies`` only if the runner has died. Files of a
    private copy of the folder that match ``keep_patterns`` are copied back.
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
    keep_patterns: tuple[str, ...] = ()

    def cgroup_setup(self) -> protocol.CgroupSetup:
        """Return the control groups as the keeper's message describes them."""
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
    """Assign each set limit to the first, and so strongest, offer that enforces it."""
    # A limit that no mechanism enforces is recorded with ``none``, so that reports can show it.
    enforcement: dict[LimitName, Enforcement] = {}
    for name in RUNNER_LIMITS:
        if limits.of(name) is not None:
            enforcement[name] = Enforcement(by=Mechanism.RUNNER, hard=False)
    for offer in offers:
        for name, offered in offer.holds.items():
            # setdefault: the first offer of a limit is the strongest and wins.
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
            # Processor time needs both: RLIMIT_CPU limits each process, the watchdog their sum.
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
    """Whether a limit is enforced for all processes together, so that no watchdog is needed."""
    tree_mechanisms = (
        Mechanism.CGROUP_V1,
        Mechanism.CGROUP_V2,
        Mechanism.SYSTEMD,
        Mechanism.BUBBLEWRAP,
    )
    return enforcement.by in tree_mechanisms and name is not LimitName.CPU_TIME


def weak_walls(walls: Mapping[Wall, Enforcement]) -> tuple[Wall, ...]:
    """Return the requested walls that Linux does not enforce here."""
    # Only root can run the kernel as another user, so a missing user wall is not a weakness.
    return tuple(
        wall
        for wall, enforcement in walls.items()
        if not enforcement.hard and wall is not Wall.USER
    )


def require_walls(plan: SpawnPlan) -> None:
    """Raise EnforcementError if isolation is required and a wall is not enforced."""
    weak = weak_walls(plan.walls) if plan.isolation.required else ()
    if weak:
        names = ", ".join(wall.value.replace("_", " ") for wall in weak)
        reason = plan.walls[weak[-1]].note.rpartition("; ")[2]
        raise EnforcementError(
            f"walls are required that do not stand here: {names} ({reason}); `safe-exec "
            "doctor` says how to fix it, --require none runs all the same"
        )


def require(plan: SpawnPlan, names: Sequence[LimitName | Wall]) -> None:
    """Raise EnforcementError if Linux does not enforce a required limit or wall."""
    require_walls(plan)
    for name in names:
        enforcement = plan.walls[name] if isinstance(name, Wall) else plan.enforcement[name]
        if not enforcement.hard:
            by = "nothing" if enforcement.by is Mechanism.NONE else f"the {enforcement.by} alone"
            raise EnforcementError(
                f"--require {name}: here {by} could hold it, not the system's kernel; "
                "`safe-exec doctor` says how to fix it"
            )
