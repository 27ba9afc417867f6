"""Builds a plan from limits and host capabilities by asking every mechanism.

A new mechanism is added to OFFERS.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from safe_exec.errors import UsageError
from safe_exec.limits.spec import OPTIONS, Kind
from safe_exec.model.limits import (
    FolderUse,
    Isolation,
    LimitName,
    Limits,
    Mechanism,
    SystemCalls,
    Wall,
)
from safe_exec.sandbox.host.capabilities import HostCapabilities
from safe_exec.sandbox.mechanisms import cgroup_v1, cgroup_v2, rlimits, watchdog
from safe_exec.sandbox.mechanisms import isolation as walls
from safe_exec.sandbox.mechanisms.offers import OfferFunction, Placement
from safe_exec.sandbox.plan import REQUIRE_ALL, SpawnPlan, fold

# Strongest first: each limit goes to the first mechanism that can enforce it. cgroups come before
# rlimits since they count all processes together. The watchdog is last, since it notices an excess
# only afterwards.
OFFERS: tuple[OfferFunction, ...] = (
    cgroup_v2.offer,
    cgroup_v1.offer,
    rlimits.offer,
    walls.offer,
    watchdog.offer,
)


def build_plan(
    limits: Limits, machine: HostCapabilities, run_id: str, isolation: Isolation | None = None
) -> SpawnPlan:
    """Build the plan for one sandbox."""
    requested = isolation or Isolation()
    wall_plan = walls.plan_isolation(requested, limits, machine)
    placement = Placement(cgroup=f"safe-exec-{run_id}", enclosed=wall_plan.enclosed)
    # Notebooks run on Linux only (platforms.py), so elsewhere no mechanism enforces anything.
    functions = OFFERS if machine.platform.startswith("linux") else ()
    offers = [function(limits, machine, placement) for function in functions]
    plan = fold(limits, [offer for offer in offers if offer is not None])
    return replace(
        plan,
        isolation=requested,
        walls=wall_plan.walls,
        enclosed=machine.bubblewrap if wall_plan.enclosed else None,
        landlock=wall_plan.landlock,
        disk=limits.disk if wall_plan.enclosed else None,
        shm=limits.shm if wall_plan.enclosed else None,
    )


# The values of ``--mechanisms``.
CHOOSABLE = (
    Mechanism.SYSTEMD,
    Mechanism.CGROUP_V2,
    Mechanism.CGROUP_V1,
    Mechanism.RLIMIT,
    Mechanism.WATCHDOG,
    Mechanism.BUBBLEWRAP,
    Mechanism.LANDLOCK,
    Mechanism.SECCOMP,
)


def parse_mechanisms(names: Sequence[str] | None) -> frozenset[Mechanism]:
    """Parse the names of allowed mechanisms; ``None`` allows all. Raises UsageError."""
    if names is None:
        return frozenset(Mechanism)
    choices = {mechanism.value: mechanism for mechanism in CHOOSABLE}
    wrong = [name for name in names if name not in choices]
    if wrong or not names:
        raise UsageError(
            f"--mechanisms: unknown mechanism {', '.join(wrong) or '(none given)'}; "
            f"there are {', '.join(choices)}"
        )
    return frozenset(choices[name] for name in names) | {Mechanism.RUNNER, Mechanism.NONE}


class Required(Struct, frozen=True, kw_only=True):
    """The limits and walls that ``--require`` names.

    ``isolation`` is true if every requested wall must be enforced; ``None`` leaves that to the
    profile.
    """

    names: tuple[LimitName | Wall, ...] = ()
    isolation: bool | None = None


# Every limit is set; only the mechanisms matter here, not the values.
_ANY_VALUE: Mapping[Kind, Any] = {
    Kind.SIZE: 2**30,
    Kind.COUNT: 1024,
    Kind.PROCESSORS: 1.0,
    Kind.TIME: 60.0,
}
ALL_LIMITS = Limits(**{row.name: _ANY_VALUE[row.kind] for row in OPTIONS})

# Every wall is requested, likewise.
ALL_WALLS = Isolation(
    hide_home=True,
    read_only_system=True,
    folder=FolderUse.COPY,
    write_back=False,
    network=False,
    own_processes=True,
    listed_environment=True,
    system_calls=SystemCalls.REFUSE,
    other_user=True,
)

EVERY_LIMIT, EVERY_WALL, NOTHING = "all", "walls", "none"
REQUIRABLE: Mapping[str, LimitName | Wall] = {
    **{wall.value: wall for wall in Wall if wall is not Wall.PROCESSES},
    # "processes" is the limit; the wall needs another name.
    "own_processes": Wall.PROCESSES,
    **{name.value: name for name in LimitName},
}


def requirable_name(item: LimitName | Wall) -> str:
    """Return the name by which ``--require`` distinguishes a limit or wall from all others."""
    return next(name for name, other in REQUIRABLE.items() if other is item)


def parse_required(text: str, limits: Limits) -> Required:
    """Parse ``--require memory,network``: names of limits and walls.

    ``all`` (the limits of REQUIRE_ALL that are set), ``walls`` and ``none`` are names too. Raises
    ValueError with the possible names.
    """
    requested = [part.strip().replace("-", "_") for part in text.split(",") if part.strip()]
    if requested == [NOTHING]:
        return Required(isolation=False)
    wrong = [word for word in requested if word not in (*REQUIRABLE, EVERY_LIMIT, EVERY_WALL)]
    if wrong or not requested:
        # Imported only for this error: a run that is in order saves three milliseconds.
        from difflib import get_close_matches

        requirable_names = (EVERY_LIMIT, EVERY_WALL, NOTHING, *sorted(REQUIRABLE))
        choices = ", ".join(requirable_names)
        near = get_close_matches(wrong[0], requirable_names, n=1) if wrong else []
        guess = f"did you mean {near[0]}? " if near else ""
        raise ValueError(
            f"{', '.join(wrong) or 'nothing'} is no limit and no wall; {guess}there are {choices}"
        )
    every = (
        [name for name in REQUIRE_ALL if limits.of(name) is not None]
        if EVERY_LIMIT in requested
        else []
    )
    names = (*every, *(REQUIRABLE[word] for word in requested if word in REQUIRABLE))
    return Required(
        names=tuple(dict.fromkeys(names)), isolation=True if EVERY_WALL in requested else None
    )
