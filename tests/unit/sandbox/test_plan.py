"""Folding offers: the strongest holds a limit, nothing is left out, and only what is wanted of an offer is carried out."""

from __future__ import annotations

import math
import resource
from pathlib import Path

import pytest
from msgspec.structs import replace

from safe_exec.errors import EnforcementError
from safe_exec.model.limits import Enforcement, Isolation, LimitName, Limits, Mechanism, Wall
from safe_exec.sandbox.host.capabilities import HostCapabilities
from safe_exec.sandbox.host.cgroup_delegation import Scope
from safe_exec.sandbox.mechanisms import rlimits, watchdog
from safe_exec.sandbox.plan import (
    REQUIRE_ALL,
    RUNNER_LIMITS,
    CgroupPlan,
    Offer,
    SpawnPlan,
    fold,
    require,
)
from safe_exec.sandbox.planner import (
    REQUIRABLE,
    Required,
    build_plan,
    parse_required,
    requirable_name,
)

L, M = LimitName, Mechanism
MIB = 1 << 20
LIMITS = Limits(
    memory=100 * MIB, cpus=1.5, cpu_time=10.0, cell_timeout=3.0, timeout=9.0, processes=20, open_files=50, file_size=MIB,
    start_timeout=60.0, cell_output=MIB, output=4 * MIB, disk=8 * MIB, shm=MIB,
)  # fmt: skip
V1 = {name: Path(f"/cg/{name}") for name in ("memory", "pids", "cpu", "cpuacct")}
ROOT_V1 = HostCapabilities(v1=V1, v2_plain=Path("/cg/unified"), swap_total=0)
ROOT_V2 = HostCapabilities(
    v2=Path("/cg"), v2_controllers=frozenset({"memory", "pids", "cpu"}), swap_total=1
)
BY_SYSTEMD = Scope(
    slice="app.slice",
    directory=Path("/cg/app.slice"),
    controllers=ROOT_V2.v2_controllers,
    runtime=Path("/run/user/1"),
)
SCOPED = HostCapabilities(uid=1, scope=BY_SYSTEMD, v1=V1, swap_total=1)
ROOT_BARE = HostCapabilities(uid=0)
USER_BARE = HostCapabilities(uid=1000, user_tasks=30)
WATCH_ALONE = HostCapabilities(uid=1000, user_tasks=30, allowed=frozenset({M.WATCHDOG}))
NOTHING = HostCapabilities(allowed=frozenset())
WALLS = HostCapabilities(bubblewrap="/usr/bin/bwrap", bubblewrap_why_not="")


def plan_for(machine: HostCapabilities, limits: Limits = LIMITS) -> SpawnPlan:
    return build_plan(limits, machine, "id")


def rows_of(plan: SpawnPlan) -> dict[int, tuple[int, int]]:
    assert len({number for number, *_ in plan.rlimits}) == len(plan.rlimits)
    return {number: (soft, hard) for number, soft, hard in plan.rlimits}


def holding(mechanism: Mechanism, *names: LimitName, rows: bool = False) -> Offer:
    """A mechanism that offers to hold some limits."""
    return Offer(
        mechanism=mechanism,
        holds={name: Enforcement(by=mechanism, hard=mechanism is not M.WATCHDOG) for name in names},
        rlimits=dict.fromkeys(names, ((7, 1, 2),)) if rows else {},
    )


TABLE: list[tuple[str, HostCapabilities, dict[LimitName, Mechanism]]] = [
    (
        "v2",
        ROOT_V2,
        {
            L.MEMORY: M.CGROUP_V2,
            L.PROCESSES: M.CGROUP_V2,
            L.CPUS: M.CGROUP_V2,
            L.CPU_TIME: M.RLIMIT,
        },
    ),
    (
        "scope",
        SCOPED,
        {L.MEMORY: M.SYSTEMD, L.PROCESSES: M.SYSTEMD, L.CPUS: M.SYSTEMD, L.CPU_TIME: M.RLIMIT},
    ),
    (
        "v1",
        ROOT_V1,
        {
            L.MEMORY: M.CGROUP_V1,
            L.PROCESSES: M.CGROUP_V1,
            L.CPUS: M.CGROUP_V1,
            L.CPU_TIME: M.RLIMIT,
        },
    ),
    (
        "root",
        ROOT_BARE,
        {L.MEMORY: M.RLIMIT, L.PROCESSES: M.WATCHDOG, L.CPUS: M.NONE, L.CPU_TIME: M.RLIMIT},
    ),
    (
        "user",
        USER_BARE,
        {L.MEMORY: M.RLIMIT, L.PROCESSES: M.RLIMIT, L.CPUS: M.NONE, L.CPU_TIME: M.RLIMIT},
    ),
    (
        "watchdog",
        WATCH_ALONE,
        {
            L.MEMORY: M.WATCHDOG,
            L.PROCESSES: M.WATCHDOG,
            L.CPUS: M.NONE,
            L.CPU_TIME: M.WATCHDOG,
            L.OPEN_FILES: M.NONE,
            L.FILE_SIZE: M.NONE,
        },
    ),
    ("nothing", NOTHING, dict.fromkeys((*REQUIRE_ALL, L.DISK, L.SHM), M.NONE)),
    ("bubblewrap", WALLS, {L.DISK: M.BUBBLEWRAP, L.SHM: M.BUBBLEWRAP, L.MEMORY: M.RLIMIT}),
]


@pytest.mark.parametrize(
    ("machine", "by"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE]
)
def test_who_holds_what(machine: HostCapabilities, by: dict[LimitName, Mechanism]) -> None:
    held = plan_for(machine).enforcement
    assert {name: held[name].by for name in by} == by
    assert list(held) == list(LimitName), "each limit that is set is written down, in order"
    assert {held[name].by for name in RUNNER_LIMITS} == {M.RUNNER}
    assert all(
        not held[name].hard for name in held if held[name].by in (M.RUNNER, M.WATCHDOG, M.NONE)
    )
    assert all(held[name].note for name in held if held[name].by is M.NONE)


@pytest.mark.parametrize("machine", [row[1] for row in TABLE], ids=[row[0] for row in TABLE])
def test_what_is_not_limited_is_not_held(machine: HostCapabilities) -> None:
    plan = plan_for(machine, Limits(start_timeout=None))
    assert (dict(plan.enforcement), plan.rlimits, plan.watch, plan.open_files_soft) == (
        {},
        (),
        frozenset(),
        None,
    )
    assert plan.cgroup.writes == ()


def test_the_first_offer_holds() -> None:
    offers = [holding(M.CGROUP_V2, L.MEMORY), holding(M.RLIMIT, L.MEMORY, L.OPEN_FILES, rows=True)]
    limits = Limits(memory=1, open_files=7, start_timeout=None)
    plan = fold(limits, offers)
    assert {name: held.by for name, held in plan.enforcement.items()} == {
        L.MEMORY: M.CGROUP_V2,
        L.OPEN_FILES: M.RLIMIT,
    }
    assert plan.rlimits == ((7, 1, 2),), "the rows of the limit that it holds, not of the other"
    turned = fold(limits, offers[::-1])
    assert turned.enforcement[L.MEMORY].by is M.RLIMIT and len(turned.rlimits) == 2


def test_without_offers_all_is_held_by_none_but_what_the_runner_holds() -> None:
    plan = fold(LIMITS, [])
    assert {name for name, held in plan.enforcement.items() if held.by is not M.NONE} == set(
        RUNNER_LIMITS
    )


@pytest.mark.parametrize(
    ("machine", "watched"),
    [
        (ROOT_V2, {L.CPU_TIME, L.DISK}),
        (ROOT_V1, {L.CPU_TIME, L.DISK}),
        # A limit of each process alone wants the watch over all of them beside it.
        (USER_BARE, {L.MEMORY, L.PROCESSES, L.CPU_TIME, L.DISK}),
        (ROOT_BARE, {L.MEMORY, L.PROCESSES, L.CPU_TIME, L.DISK}),
        (WATCH_ALONE, {L.MEMORY, L.PROCESSES, L.CPU_TIME, L.DISK}),
        (WALLS, {L.MEMORY, L.PROCESSES, L.CPU_TIME}),  # a file system of its own needs no watch
        (NOTHING, set()),
    ],
    ids=["v2", "v1", "user", "root", "watchdog", "bubblewrap", "nothing"],
)
def test_what_is_watched(machine: HostCapabilities, watched: set[LimitName]) -> None:
    assert plan_for(machine).watch == watched


def test_processor_time_is_held_for_each_process_and_watched_for_all() -> None:
    for machine in (ROOT_V1, ROOT_V2, USER_BARE, ROOT_BARE):
        plan = plan_for(machine)
        assert rows_of(plan)[resource.RLIMIT_CPU] == (10, 10 + rlimits.CPU_HARD_SECONDS)
        assert L.CPU_TIME in plan.watch


@pytest.mark.parametrize(("seconds", "soft"), [(0.2, 1), (1.0, 1), (1.01, 2), (10.0, 10)])
def test_processor_time_is_whole_seconds_rounded_up(seconds: float, soft: int) -> None:
    plan = plan_for(USER_BARE, Limits(cpu_time=seconds))
    assert rows_of(plan)[resource.RLIMIT_CPU][0] == soft == max(1, math.ceil(seconds))


def test_rows_of_an_ordinary_user() -> None:
    rows = rows_of(plan_for(USER_BARE))
    assert rows[resource.RLIMIT_NOFILE] == (50, 50)
    assert rows[resource.RLIMIT_FSIZE] == (MIB, MIB)
    assert rows[resource.RLIMIT_DATA] == (100 * MIB + rlimits.WATCHED_DATA_HEADROOM,) * 2
    assert rows[resource.RLIMIT_NPROC] == (50, 50), "what the user runs already counts"
    assert resource.RLIMIT_AS not in rows


@pytest.mark.parametrize(
    ("machine", "count", "hard"),
    [
        (USER_BARE, 50, False),
        (replace(USER_BARE, bubblewrap="/usr/bin/bwrap"), 50, False),
        (
            replace(USER_BARE, bubblewrap="/usr/bin/bwrap", counts_in_namespaces=True),
            20 + rlimits.INIT_TASKS,
            True,
        ),
    ],
    ids=[
        "no walls",
        "a system that counts each user once, or a set-user-id bubblewrap",
        "a user namespace of its own",
    ],
)
def test_the_processes_of_an_ordinary_user_are_held_where_they_are_counted_alone(
    machine: HostCapabilities, count: int, hard: bool
) -> None:
    plan = build_plan(LIMITS, machine, "id", Isolation(own_processes=True))
    assert rows_of(plan)[resource.RLIMIT_NPROC] == (count, count)
    assert (plan.enforcement[L.PROCESSES].by, plan.enforcement[L.PROCESSES].hard) == (
        M.RLIMIT,
        hard,
    )
    assert L.PROCESSES in plan.watch


def test_without_walls_a_namespace_that_could_be_had_changes_nothing() -> None:
    machine = replace(USER_BARE, bubblewrap="/usr/bin/bwrap", counts_in_namespaces=True)
    plan = build_plan(Limits(processes=20), machine, "id")
    assert (
        rows_of(plan)[resource.RLIMIT_NPROC] == (50, 50) and not plan.enforcement[L.PROCESSES].hard
    )


def test_rows_of_root_leave_out_what_root_is_exempt_from() -> None:
    assert resource.RLIMIT_NPROC not in rows_of(plan_for(ROOT_BARE))


@pytest.mark.parametrize("machine", [ROOT_V1, ROOT_V2], ids=["v1", "v2"])
def test_a_control_group_spares_the_weaker_rows(machine: HostCapabilities) -> None:
    assert set(rows_of(plan_for(machine))) == {
        resource.RLIMIT_NOFILE,
        resource.RLIMIT_FSIZE,
        resource.RLIMIT_CPU,
    }


@pytest.mark.parametrize("mechanism", [M.RLIMIT, M.WATCHDOG])
def test_a_mechanism_that_may_not_be_used_offers_nothing(mechanism: Mechanism) -> None:
    machine = HostCapabilities(allowed=frozenset(Mechanism) - {mechanism})
    offer = (
        rlimits.offer(LIMITS, machine) if mechanism is M.RLIMIT else watchdog.offer(LIMITS, machine)
    )
    assert offer is None


@pytest.mark.parametrize("machine", [ROOT_V1, ROOT_V2], ids=["v1", "v2"])
def test_swap_never_extends_the_memory(machine: HostCapabilities) -> None:
    work = plan_for(machine).cgroup
    written = dict((*work.writes, *work.writes_where_present))
    swap = {path: value for path, value in written.items() if "swap" in path}
    assert list(swap.values()) == (["0"] if machine is ROOT_V2 else []), (
        "version 1 is given a machine without swap"
    )
    assert not any("oom.group" in path or "oom_control" in path for path in written), (
        "a killed worker takes nobody with it"
    )


@pytest.mark.parametrize("machine", [ROOT_V1, ROOT_V2], ids=["v1", "v2"])
def test_every_group_that_is_written_to_is_made_and_joined(machine: HostCapabilities) -> None:
    work = plan_for(machine).cgroup
    made = set(work.dirs)
    assert len(work.dirs) == len(made)
    for path in (
        *work.joins,
        *(path for path, _ in work.writes),
        *work.kill_files,
        *work.counter_files,
    ):
        assert str(Path(path).parent) in made
    assert {str(Path(path).parent) for path in work.joins} == made
    assert {Path(path).name for path in made} == {"safe-exec-id"}


def test_the_keeper_gets_the_cgroups_of_the_plan() -> None:
    plan = plan_for(ROOT_V1)
    setup = plan.cgroup_setup()
    assert setup.delegation is None and setup.memory_limit == plan.memory_limit
    for name in ("dirs", "writes", "joins", "kill_files", "counter_files", "memory_file"):
        assert getattr(setup, name) == getattr(plan.cgroup, name) != ()


def test_walls_are_carried_out_only_where_they_stand() -> None:
    plan = build_plan(LIMITS, WALLS, "id")
    assert (plan.enclosed, plan.disk, plan.shm, plan.landlock) == (
        "/usr/bin/bwrap",
        8 * MIB,
        MIB,
        False,
    )
    without = build_plan(LIMITS, ROOT_V1, "id", Isolation(hide_home=True))
    assert (without.enclosed, without.disk, without.shm, without.landlock) == (
        None,
        None,
        None,
        False,
    )
    assert set(without.walls) == {Wall.HOME} and without.walls[Wall.HOME].by is M.NONE


@pytest.mark.parametrize("machine", [ROOT_V1, WALLS], ids=["v1", "bubblewrap"])
def test_a_run_without_walls_and_sizes_is_not_enclosed(machine: HostCapabilities) -> None:
    plan = build_plan(Limits(memory=MIB), machine, "id")
    assert (plan.enclosed, plan.landlock, dict(plan.walls)) == (None, False, {})


def test_work_is_put_together_in_order() -> None:
    both = CgroupPlan(dirs=("a",), writes=(("a/x", "1"),)).plus(
        CgroupPlan(dirs=("b",), kill_files=("b/k",))
    )
    assert both == CgroupPlan(dirs=("a", "b"), writes=(("a/x", "1"),), kill_files=("b/k",))


# --- required enforcement ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("machine", [ROOT_V1, ROOT_V2], ids=["v1", "v2"])
def test_control_groups_satisfy_all_that_can_be_required(machine: HostCapabilities) -> None:
    require(build_plan(LIMITS, machine, "id"), parse_required("all", LIMITS).names)


@pytest.mark.parametrize(
    ("machine", "name", "words"),
    [
        (USER_BARE, L.MEMORY, ("--require memory", "rlimit", "doctor")),
        (WATCH_ALONE, L.MEMORY, ("--require memory", "watchdog", "doctor")),
        (ROOT_BARE, L.PROCESSES, ("--require processes", "watchdog", "doctor")),
        (USER_BARE, L.CPUS, ("--require cpus", "nothing", "doctor")),
        (ROOT_V2, L.CELL_TIMEOUT, ("--require cell_timeout", "runner")),
    ],
)
def test_less_than_the_systems_kernel_is_refused(
    machine: HostCapabilities, name: LimitName, words: tuple[str, ...]
) -> None:
    with pytest.raises(EnforcementError) as caught:
        require(plan_for(machine), [name])
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)


def test_no_limit_and_no_wall_share_a_name() -> None:
    # As texts the limit and the wall of processes are equal.
    items: list[LimitName | Wall] = [*LimitName, *Wall]
    names = [requirable_name(item) for item in items]
    assert len(set(names)) == len(names)
    assert [REQUIRABLE[name] for name in names] == items


@pytest.mark.parametrize(
    ("text", "required"),
    [
        ("memory", Required(names=(L.MEMORY,))),
        ("memory,processes", Required(names=(L.MEMORY, L.PROCESSES))),
        (" open-files , cpus,", Required(names=(L.OPEN_FILES, L.CPUS))),
        ("all", Required(names=REQUIRE_ALL)),
        ("all,memory", Required(names=REQUIRE_ALL)),
        ("network, own-processes", Required(names=(Wall.NETWORK, Wall.PROCESSES))),
        ("walls", Required(isolation=True)),
        ("memory,walls", Required(names=(L.MEMORY,), isolation=True)),
        ("none", Required(isolation=False)),
    ],
)
def test_names_that_are_required(text: str, required: Required) -> None:
    found = parse_required(text, LIMITS)
    assert found == required
    assert list(map(type, found.names)) == list(map(type, required.names)), (
        "a limit and a wall have one name"
    )


def test_all_means_what_is_set() -> None:
    assert parse_required("all", Limits(memory=5)).names == (L.MEMORY,)


@pytest.mark.parametrize("text", ["", " , ", "memroy", "memory,none", "Memory"])
def test_names_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="memory"):
        parse_required(text, LIMITS)


# --- required walls ---------------------------------------------------------------------------------------------

WALLED = Isolation(hide_home=True, network=False, own_processes=True, other_user=True)
LANDLOCKED = HostCapabilities(uid=1000, bubblewrap_why_not="not permitted", landlock=7)


@pytest.mark.parametrize(
    ("machine", "weak"),
    [
        (WALLS, ()),
        (LANDLOCKED, ("network", "processes")),
        (USER_BARE, ("home", "network", "processes")),
    ],
)
def test_walls_that_are_required_must_stand(
    machine: HostCapabilities, weak: tuple[str, ...]
) -> None:
    plan = build_plan(LIMITS, machine, "id", replace(WALLED, required=True))
    if not weak:
        require(plan, [])
        return
    with pytest.raises(EnforcementError) as caught:
        require(plan, [])
    assert (
        f"do not stand here: {', '.join(weak)} (no bubblewrap: {machine.bubblewrap_why_not})"
        in str(caught.value)
    )
    require(build_plan(LIMITS, machine, "id", WALLED), [])


def test_a_wall_that_is_held_as_well_by_something_else_will_do() -> None:
    plan = build_plan(LIMITS, LANDLOCKED, "id", WALLED)
    require(plan, [Wall.HOME])
    for wall, words in ((Wall.NETWORK, "landlock alone"), (Wall.PROCESSES, "nothing")):
        with pytest.raises(EnforcementError, match=words):
            require(plan, [wall])


def test_in_a_scope_the_keeper_stands_beside_the_kernel() -> None:
    """A group that hands controllers on holds no processes: the scope has one group for the keeper and one for the kernel."""
    work = plan_for(SCOPED).cgroup
    assert work.dirs == ("/cg/app.slice/safe-exec-id.scope/safe-exec-id",)
    assert work.delegation is not None
    assert (work.delegation.group, work.delegation.leaf) == (
        "/cg/app.slice/safe-exec-id.scope",
        "/cg/app.slice/safe-exec-id.scope/keeper",
    )
    assert work.delegation.controllers == ("memory", "pids", "cpu")
    assert (
        work.delegation.launcher[:3] == ("systemd-run", "--user", "--scope")
        and work.delegation.launcher[-1] == "--"
    )
    assert {"--collect", "--unit=safe-exec-id.scope", "--slice=app.slice", "Delegate=yes"} <= set(
        work.delegation.launcher
    )
    assert work.delegation.environment["XDG_RUNTIME_DIR"] == "/run/user/1"


def test_a_group_that_hands_on_already_is_only_used() -> None:
    assert plan_for(ROOT_V2).cgroup.delegation is None
    stepping = plan_for(replace(ROOT_V2, v2_needs_leaf=True)).cgroup
    assert stepping.delegation is not None and (
        stepping.delegation.leaf,
        stepping.delegation.launcher,
    ) == (
        "/cg/safe-exec",
        (),
    )


def test_without_systemd_among_the_mechanisms_no_scope_is_asked_for() -> None:
    plan = plan_for(replace(SCOPED, allowed=frozenset(M) - {M.SYSTEMD}))
    assert plan.cgroup.delegation is None and plan.enforcement[L.MEMORY].by is not M.SYSTEMD
