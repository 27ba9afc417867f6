"""Who holds which wall, by machine: bubblewrap, Landlock of each version, a filter of system calls, nothing."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

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
from safe_exec.sandbox.mechanisms.bubblewrap import is_needed
from safe_exec.sandbox.mechanisms.isolation import offer, plan_isolation

M, W = Mechanism, Wall
ALL = Isolation(
    hide_home=True,
    read_only_system=True,
    folder=FolderUse.COPY,
    write_back=False,
    network=False,
    own_processes=True,
    listed_environment=True,
    system_calls=SystemCalls.REFUSE,
    other_user=True,
    hide=("/srv/data",),
)
LOST = "bwrap: not permitted"
USER = HostCapabilities(uid=1000, bubblewrap_why_not=LOST)
BUBBLEWRAP = HostCapabilities(
    uid=1000, bubblewrap="/usr/bin/bwrap", bubblewrap_why_not="", landlock=7
)
NAMESPACED = (W.HOME, W.SYSTEM, W.FOLDER, W.HIDDEN, W.NETWORK, W.PROCESSES)
SOFT, HARD = False, True
Held = dict[Wall, tuple[Mechanism, bool]]
OWN: Held = {
    W.ENVIRONMENT: (M.RUNNER, HARD), W.SYSTEM_CALLS: (M.SECCOMP, HARD), W.PRIVILEGES: (M.KERNEL, HARD), W.USER: (M.NONE, SOFT),
}  # fmt: skip
FILES: Held = dict.fromkeys((W.HOME, W.SYSTEM, W.FOLDER, W.HIDDEN), (M.LANDLOCK, HARD))
NONE: Held = dict.fromkeys(NAMESPACED, (M.NONE, SOFT))

TABLE: dict[str, tuple[HostCapabilities, Held]] = {
    "bubblewrap": (BUBBLEWRAP, dict.fromkeys(NAMESPACED, (M.BUBBLEWRAP, HARD))),
    "bubblewrap, root": (
        replace(BUBBLEWRAP, uid=0),
        {**dict.fromkeys(NAMESPACED, (M.BUBBLEWRAP, HARD)), W.USER: (M.KERNEL, HARD)},
    ),
    "nothing": (USER, NONE),
    "nothing, root": (
        replace(USER, uid=0),
        NONE,
    ),  # another user may not even reach the interpreter
    "landlock 1": (
        replace(USER, landlock=1),
        {**NONE, **FILES, W.SYSTEM: (M.LANDLOCK, SOFT), W.FOLDER: (M.LANDLOCK, SOFT)},
    ),
    "landlock 3": (replace(USER, landlock=3), {**NONE, **FILES}),
    "landlock 4": (replace(USER, landlock=4), {**NONE, **FILES, W.NETWORK: (M.LANDLOCK, SOFT)}),
    "landlock 7": (replace(USER, landlock=7), {**NONE, **FILES, W.NETWORK: (M.LANDLOCK, SOFT)}),
    "landlock may not be used": (replace(USER, landlock=7, allowed=frozenset({M.SECCOMP})), NONE),
    "bubblewrap may not be used": (
        replace(BUBBLEWRAP, allowed=frozenset({M.LANDLOCK, M.SECCOMP})),
        {**NONE, **FILES, W.NETWORK: (M.LANDLOCK, SOFT)},
    ),
    "no filter for this machine": (
        replace(BUBBLEWRAP, seccomp_why_not="there is none for riscv64"),
        {
            **dict.fromkeys(NAMESPACED, (M.BUBBLEWRAP, HARD)),
            W.SYSTEM_CALLS: (M.NONE, SOFT),
            W.PRIVILEGES: (M.NONE, SOFT),
        },
    ),
    "seccomp may not be used": (
        replace(BUBBLEWRAP, allowed=frozenset({M.BUBBLEWRAP})),
        {
            **dict.fromkeys(NAMESPACED, (M.BUBBLEWRAP, HARD)),
            W.SYSTEM_CALLS: (M.NONE, SOFT),
            W.PRIVILEGES: (M.NONE, SOFT),
        },
    ),
}


@pytest.mark.parametrize(("machine", "held"), TABLE.values(), ids=TABLE)
def test_who_holds_what(machine: HostCapabilities, held: Held) -> None:
    plan = plan_isolation(ALL, Limits(), machine)
    assert {wall: (found.by, found.hard) for wall, found in plan.walls.items()} == {**OWN, **held}
    assert list(plan.walls) == list(Wall), "each wall that is asked for is written down, in order"
    assert all(found.note for found in plan.walls.values())
    assert plan.enclosed is any(found.by is M.BUBBLEWRAP for found in plan.walls.values())
    assert plan.landlock is any(found.by is M.LANDLOCK for found in plan.walls.values())
    assert not (plan.enclosed and plan.landlock)


@pytest.mark.parametrize("machine", [row[0] for row in TABLE.values()], ids=TABLE)
def test_what_is_not_asked_for_is_not_put_up(machine: HostCapabilities) -> None:
    plan = plan_isolation(Isolation(), Limits(), machine)
    assert (dict(plan.walls), plan.enclosed, plan.landlock) == ({}, False, False)


def test_why_there_is_no_bubblewrap_is_said() -> None:
    assert plan_isolation(ALL, Limits(), USER).walls[W.PROCESSES].note == f"no bubblewrap: {LOST}"
    forbidden = replace(BUBBLEWRAP, allowed=frozenset({M.RLIMIT}))
    found = plan_isolation(ALL, Limits(), forbidden).walls
    assert found[W.PROCESSES].note == "no bubblewrap: it is not among the mechanisms allowed"
    assert found[W.SYSTEM_CALLS].note == "no filter: it is not among the mechanisms allowed"


SINGLE: list[tuple[Isolation, set[Wall], bool]] = [
    (Isolation(hide_home=True), {W.HOME}, True),
    (Isolation(read_only_system=True), {W.SYSTEM}, True),
    (Isolation(folder=FolderUse.READ), {W.FOLDER}, True),
    (Isolation(folder=FolderUse.COPY), {W.FOLDER}, True),
    (Isolation(hide=("/x",)), {W.HIDDEN}, True),
    (Isolation(network=False), {W.NETWORK}, True),
    (Isolation(own_processes=True), {W.PROCESSES}, True),
    (Isolation(listed_environment=True), {W.ENVIRONMENT}, False),
    (Isolation(system_calls=SystemCalls.REFUSE), {W.SYSTEM_CALLS, W.PRIVILEGES}, False),
    (Isolation(system_calls=SystemCalls.KILL), {W.SYSTEM_CALLS, W.PRIVILEGES}, False),
    (Isolation(other_user=True), {W.USER}, False),  # alone it is not had
    (Isolation(write_back=False), set(), False),
    (Isolation(env=("A",), writable=("/x",), devices=("/dev/x",)), set(), False),
]


@pytest.mark.parametrize(("isolation", "walls", "enclosed"), SINGLE)
def test_each_key_is_its_own_wall(isolation: Isolation, walls: set[Wall], enclosed: bool) -> None:
    plan = plan_isolation(isolation, Limits(), BUBBLEWRAP)
    assert (set(plan.walls), plan.enclosed) == (walls, enclosed)
    assert is_needed(isolation, disk=False, shm=False) is enclosed


def test_the_two_refusals_are_told_apart() -> None:
    notes = {
        calls: plan_isolation(Isolation(system_calls=calls), Limits(), USER)
        .walls[W.SYSTEM_CALLS]
        .note
        for calls in (SystemCalls.REFUSE, SystemCalls.KILL)
    }
    assert "EPERM" in notes[SystemCalls.REFUSE] and "SIGSYS" in notes[SystemCalls.KILL]


# --- sizes of file systems --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "held"),
    [
        (Limits(), set()),
        (Limits(disk=1), {LimitName.DISK}),
        (Limits(shm=1), {LimitName.SHM}),
        (Limits(disk=0, shm=0), {LimitName.DISK, LimitName.SHM}),
    ],
)
def test_sizes_take_bubblewrap(limits: Limits, held: set[LimitName]) -> None:
    found = offer(limits, BUBBLEWRAP)
    assert found is not None
    assert set(found.holds) == held and all(
        one.hard and one.by is M.BUBBLEWRAP for one in found.holds.values()
    )
    assert plan_isolation(Isolation(), limits, BUBBLEWRAP).enclosed is bool(held)
    assert offer(limits, USER) is None
    assert offer(limits, replace(BUBBLEWRAP, allowed=frozenset({M.LANDLOCK}))) is None
