"""What doctor makes of machines of every kind, faked, and of this one."""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result
from msgspec.structs import replace

from safe_exec.cli import doctor, tables
from safe_exec.cli.doctor import (
    EVERY_LIMIT,
    EVERY_WALL,
    Diagnosis,
    as_document,
    command,
    facts,
    place,
    report,
)
from safe_exec.errors import LimitsError, UsageError
from safe_exec.keeper import procfs
from safe_exec.model.limits import Enforcement, LimitName, Mechanism, Wall
from safe_exec.reports.terminal import Style
from safe_exec.sandbox import stale_runs
from safe_exec.sandbox.advice.isolation import advise_walls
from safe_exec.sandbox.advice.limits import Remedy, advise, swap_state, weak_limits
from safe_exec.sandbox.host import bwrap_probe
from safe_exec.sandbox.host.bwrap_probe import NOT_INSTALLED, BwrapProbe
from safe_exec.sandbox.host.capabilities import (
    HostCapabilities,
    probe_isolation,
)
from safe_exec.sandbox.host.cgroup_delegation import Scope
from safe_exec.sandbox.host.facts import CgroupTree, Container, HostFacts, collect, dead_runs
from safe_exec.sandbox.plan import REQUIRE_ALL, weak_walls
from safe_exec.sandbox.planner import CHOOSABLE, build_plan
from safe_exec.workflows.job import Job
from safe_exec.workflows.prepare import prepare
from tests.support import MARK, make_notebook, marked_processes

G = 2**30
V1 = {name: Path("/sys/fs/cgroup") / name for name in ("memory", "pids", "cpu", "cpuacct")}
V2_ALL = frozenset({"memory", "pids", "cpu"})
MEMORY, CPUS, PROCESSES = LimitName.MEMORY, LimitName.CPUS, LimitName.PROCESSES

NO_V2 = "no group above this process hands memory and pids on to new groups"
USER = HostCapabilities(
    uid=1000, v2_why_not=NO_V2, v1_why_not="cgroup v1 controllers are not mounted", user_tasks=40
)
ROOT = replace(USER, uid=0, user_tasks=None)
SYSTEMD = HostFacts(
    user="ann", tree=CgroupTree.V2, controllers=V2_ALL, systemd=True, systemd_run=True, user_manager=True,
    user_controllers=V2_ALL, runtime_dir=True, linger=True,
)  # fmt: skip
IN_DOCKER = HostFacts(
    user="root",
    tree=CgroupTree.V2,
    controllers=V2_ALL,
    container=Container.DOCKER,
    read_only=True,
    systemd_run=True,
)
USERS_SCOPE = Scope(
    slice="app.slice",
    directory=Path("/sys/fs/cgroup/app.slice"),
    controllers=V2_ALL,
    runtime=Path("/run/user/1000"),
)
SCOPE = "systemd-run --user --scope -p Delegate=yes safe-exec run NOTEBOOK"
SUDO = 'sudo -E env "PATH=$PATH" safe-exec run NOTEBOOK'
LINGER = "sudo loginctl enable-linger ann"
MOVE_DOWN = "xargs -rn1 < /sys/fs/cgroup/cgroup.procs > /sys/fs/cgroup/init/cgroup.procs || :"
HAND_ON = 'echo "+memory +pids +cpu" > /sys/fs/cgroup/cgroup.subtree_control'


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """A place, the limits that are weak there, and what must (not) be among the steps, in that order."""

    machine: HostCapabilities
    host: HostFacts
    weak: tuple[LimitName, ...] = (MEMORY, CPUS, PROCESSES)
    steps: tuple[str, ...] = ()
    never: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


CASES = {
    "root on v1": Case(
        machine=replace(ROOT, v1=V1),
        host=HostFacts(user="root", tree=CgroupTree.HYBRID),
        weak=(),
        never=("sudo",),
    ),
    "root on v2": Case(
        machine=replace(ROOT, v2=Path("/sys/fs/cgroup/system.slice"), v2_controllers=V2_ALL),
        host=replace(SYSTEMD, user="root"),
        weak=(),
    ),
    "root on v2 where cpu is not handed on": Case(
        machine=replace(ROOT, v2=Path("/sys/fs/cgroup"), v2_controllers=V2_ALL - {"cpu"}),
        host=replace(SYSTEMD, user="root", systemd=False),
        weak=(CPUS,),
        steps=(HAND_ON,),
    ),
    "root on v2 where nothing is handed on": Case(
        machine=ROOT,
        host=HostFacts(user="root", tree=CgroupTree.V2, controllers=V2_ALL),
        weak=(MEMORY, CPUS, PROCESSES),
        steps=(HAND_ON,),
        never=("sudo", "xargs"),
    ),
    "root on v1 without pids": Case(
        machine=replace(ROOT, v1={k: v for k, v in V1.items() if k != "pids"}),
        host=HostFacts(user="root", tree=CgroupTree.V1),
        weak=(PROCESSES,),
        steps=("mount -t cgroup -o pids cgroup /sys/fs/cgroup/pids",),
    ),
    "root without any control groups": Case(
        machine=ROOT,
        host=HostFacts(user="root"),
        weak=(MEMORY, CPUS, PROCESSES),
        steps=("mount -t cgroup2 none /sys/fs/cgroup", HAND_ON),
    ),
    "user with a systemd session": Case(
        machine=USER,
        host=SYSTEMD,
        steps=(SCOPE, SUDO),
        never=("enable-linger", "delegate.conf", "XDG_RUNTIME_DIR"),
    ),
    "user with a systemd session, not lingering": Case(
        machine=USER, host=replace(SYSTEMD, linger=False), steps=(SCOPE, SUDO), notes=(LINGER,)
    ),
    "user after su": Case(
        machine=USER,
        host=replace(SYSTEMD, runtime_dir=False),
        steps=(f"XDG_RUNTIME_DIR=/run/user/1000 {SCOPE}",),
    ),
    "user whose systemd does not run": Case(
        machine=USER,
        host=replace(
            SYSTEMD, user_manager=False, runtime_dir=False, linger=False, user_controllers=None
        ),
        steps=(LINGER, SUDO),
        never=(SCOPE,),
    ),
    "user whose systemd has no cpu controller": Case(
        machine=USER,
        host=replace(SYSTEMD, user_controllers=frozenset({"memory", "pids"})),
        steps=(
            SCOPE,
            r"printf '[Service]\nDelegate=cpu cpuset io memory pids\n' | sudo tee /etc/systemd/system/user@.service.d/delegate",
            "sudo systemctl daemon-reload",
        ),
    ),
    "user in a scope without the cpu controller": Case(
        machine=replace(USER, v2=Path("/sys/fs/cgroup/app.slice"), v2_controllers=V2_ALL - {"cpu"}),
        host=replace(SYSTEMD, user_controllers=frozenset({"memory", "pids"})),
        weak=(CPUS,),
        steps=("delegate.conf", "sudo systemctl daemon-reload"),
        never=(SCOPE,),
    ),
    "user who gets scopes without the cpu controller": Case(
        machine=replace(USER, scope=replace(USERS_SCOPE, controllers=V2_ALL - {"cpu"})),
        host=replace(SYSTEMD, user_controllers=frozenset({"memory", "pids"})),
        weak=(CPUS,),
        steps=("delegate.conf", "sudo systemctl daemon-reload"),
        never=(SCOPE,),
    ),
    "user who gets scopes": Case(machine=replace(USER, scope=USERS_SCOPE), host=SYSTEMD, weak=()),
    "user whose systemd cannot be reached": Case(
        machine=replace(
            USER, v2_why_not="not ours", scope_why_not="no systemd of user 1000 is running"
        ),
        host=SYSTEMD,
        steps=(SCOPE,),
    ),
    "user in a slice without the cpu controller": Case(
        machine=replace(USER, v2=Path("/sys/fs/cgroup/app.slice"), v2_controllers=V2_ALL - {"cpu"}),
        host=SYSTEMD,
        weak=(CPUS,),
        steps=(SCOPE,),
        never=("delegate.conf",),
    ),
    "user without anything on v2": Case(
        machine=USER,
        host=HostFacts(user="ann", tree=CgroupTree.V2, controllers=V2_ALL),
        steps=(
            "sudo sh -c 'mkdir -p /sys/fs/cgroup/safe-exec-ann/shell'",
            f"sudo sh -c '{HAND_ON}'",
            "echo $$ | sudo tee /sys/fs/cgroup/safe-exec-ann/shell/cgroup.procs > /dev/null",
            SUDO,
        ),
        never=("systemd-run",),
    ),
    "user without anything on v1": Case(
        machine=USER,
        host=HostFacts(user="ann", tree=CgroupTree.HYBRID),
        steps=(
            "for c in memory pids cpu cpuacct; do",
            "g=/sys/fs/cgroup/$c/safe-exec-ann",
            "done",
            SUDO,
        ),
        never=("systemd-run", "reboot"),
    ),
    "user on v1 with systemd": Case(
        machine=USER,
        host=replace(SYSTEMD, tree=CgroupTree.HYBRID),
        steps=(
            "for c in memory",
            "systemd.unified_cgroup_hierarchy=1",
            "sudo update-grub && sudo reboot",
            SUDO,
        ),
        never=("systemd-run",),
    ),
    "docker on v2": Case(
        machine=ROOT,
        host=IN_DOCKER,
        weak=(MEMORY, CPUS, PROCESSES),
        steps=(
            "docker run --security-opt writable-cgroups=true IMAGE",
            "mkdir -p /sys/fs/cgroup/init",
            MOVE_DOWN,
            HAND_ON,
            "docker run --privileged IMAGE",
            MOVE_DOWN,
        ),
        never=("sudo", "chown", "systemd-run"),
        notes=("refused by rootless Docker", "what root can"),
    ),
    "docker on v2, an ordinary user": Case(
        machine=USER,
        host=replace(IN_DOCKER, user="ann"),
        steps=("chown ann /sys/fs/cgroup /sys/fs/cgroup/cgroup.procs",),
    ),
    "docker on v2, groups writable already": Case(
        machine=ROOT,
        host=replace(IN_DOCKER, read_only=False),
        weak=(MEMORY, CPUS, PROCESSES),
        steps=(MOVE_DOWN, HAND_ON),
        never=("docker run",),
    ),
    "docker on v1": Case(
        machine=ROOT,
        host=replace(IN_DOCKER, tree=CgroupTree.V1),
        weak=(MEMORY, CPUS, PROCESSES),
        steps=("docker run --privileged IMAGE",),
        never=("writable-cgroups", "xargs"),
    ),
    "docker with systemd in it": Case(
        machine=USER,
        host=replace(SYSTEMD, container=Container.DOCKER),
        steps=(SCOPE,),
        never=("docker",),
    ),
    "docker in a github workflow": Case(
        machine=ROOT,
        host=replace(IN_DOCKER, github=True),
        weak=(MEMORY, CPUS, PROCESSES),
        steps=("--privileged",),
        notes=("container: options:",),
    ),
    "podman on v2": Case(
        machine=ROOT,
        host=replace(IN_DOCKER, container=Container.PODMAN),
        weak=(MEMORY, CPUS, PROCESSES),
        steps=("podman run --security-opt unmask=/sys/fs/cgroup IMAGE", MOVE_DOWN, HAND_ON),
        never=("docker", "--privileged"),
    ),
    "podman on v1": Case(
        machine=ROOT,
        host=replace(IN_DOCKER, container=Container.PODMAN, tree=CgroupTree.V1),
        weak=(MEMORY, CPUS, PROCESSES),
        steps=("sudo podman run --privileged IMAGE",),
        never=("unmask",),
    ),
    "kubernetes": Case(
        machine=ROOT,
        host=replace(IN_DOCKER, container=Container.KUBERNETES),
        weak=(MEMORY, CPUS, PROCESSES),
        steps=("securityContext: {privileged: true}", MOVE_DOWN),
    ),
    "github runner": Case(
        machine=USER,
        host=replace(SYSTEMD, github=True, user_manager=False, runtime_dir=False, linger=False),
        steps=(SUDO, LINGER),
        never=(SCOPE,),
        notes=("no password",),
    ),
    "wsl 2 with mixed groups and no systemd": Case(
        machine=USER,
        host=HostFacts(user="ann", wsl=2, tree=CgroupTree.HYBRID),
        steps=(
            "wsl.exe --update",
            "[wsl2]",
            "kernelCommandLine=cgroup_no_v1=all",
            "wsl.exe --shutdown",
            r"printf '[boot]\nsystemd=true\n' | sudo tee -a /etc/wsl.conf",
            "wsl.exe --shutdown",
            SUDO,
        ),
    ),
    "wsl 2 with systemd on v2": Case(
        machine=USER, host=replace(SYSTEMD, wsl=2), steps=(SCOPE,), never=("wsl",)
    ),
    "wsl 1": Case(
        machine=USER,
        host=HostFacts(user="ann", wsl=1),
        steps=("wsl --set-version NAME-OF-THIS-DISTRIBUTION 2",),
    ),
    "macOS": Case(
        machine=HostCapabilities(platform="darwin", uid=501),
        host=HostFacts(user="ann"),
        weak=(MEMORY, CPUS, PROCESSES, LimitName.OPEN_FILES, LimitName.FILE_SIZE),
    ),
    "memory controller switched off": Case(
        machine=replace(ROOT, v1={k: v for k, v in V1.items() if k != "memory"}),
        host=HostFacts(user="root", tree=CgroupTree.HYBRID, disabled=frozenset({"memory"})),
        weak=(MEMORY,),
        steps=("cgroup_enable=memory", "reboot"),
    ),
    "without mechanisms": Case(
        machine=replace(ROOT, v1=V1, allowed=frozenset({Mechanism.WATCHDOG})),
        host=HostFacts(user="root", tree=CgroupTree.HYBRID),
        weak=(MEMORY, CPUS, PROCESSES, LimitName.OPEN_FILES, LimitName.FILE_SIZE),
        never=("sudo", "mount"),
    ),
}


def remedies_of(case: Case) -> tuple[Remedy, ...]:
    return advise(case.machine, case.host, build_plan(EVERY_LIMIT, case.machine, "test"))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_weak_limits_and_their_remedies(case: Case) -> None:
    plan = build_plan(EVERY_LIMIT, case.machine, "test")
    remedies = remedies_of(case)
    assert set(weak_limits(plan)) == set(case.weak)
    assert {name for remedy in remedies for name in remedy.limits} == set(case.weak), (
        "each weakness has a remedy, no more"
    )
    steps = [step for remedy in remedies for fix in remedy.fixes for step in fix.steps]
    rest = iter(steps)
    for wanted in case.steps:
        assert any(wanted in step for step in rest), (
            f"{wanted!r} is missing, or out of order, in {steps}"
        )
    text = "\n".join(steps)
    assert not [unwanted for unwanted in case.never if unwanted in text]
    notes = "\n".join(fix.note for remedy in remedies for fix in remedy.fixes)
    assert not [note for note in case.notes if note not in notes]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_remedy_says_why_and_what(case: Case) -> None:
    for remedy in remedies_of(case):
        assert remedy.reason
        assert remedy.fixes
        assert all(fix.title for fix in remedy.fixes)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_command_is_one_that_a_shell_can_read(case: Case) -> None:
    for remedy in remedies_of(case):
        for fix in remedy.fixes:
            script = "\n".join(
                step
                for step in fix.steps
                if step not in ("[wsl2]", "securityContext: {privileged: true}")
            )
            checked = subprocess.run(
                ["sh", "-n"], input=script, capture_output=True, text=True, check=False
            )
            assert checked.returncode == 0, checked.stderr


def test_elsewhere_than_on_linux_it_says_that_nothing_runs() -> None:
    (remedy,) = remedies_of(CASES["macOS"])
    assert "Linux only" in remedy.reason
    assert doctor_of(CASES["macOS"]).exit_code == 1


def test_a_reason_in_a_container_is_the_systems_own() -> None:
    assert NO_V2 in remedies_of(CASES["docker on v2"])[0].reason


# --- swap -------------------------------------------------------------------------------------------------------


def v1_machine(tmp_path: Path, *, accounted: bool) -> HostCapabilities:
    groups = {name: tmp_path / name for name in V1}
    for group in groups.values():
        group.mkdir()
    if accounted:
        (groups["memory"] / "memory.memsw.limit_in_bytes").touch()
    return replace(ROOT, v1=groups, swap_total=G)


def test_swap_that_is_not_accounted_for_is_a_weakness(tmp_path: Path) -> None:
    machine = v1_machine(tmp_path, accounted=False)
    plan = build_plan(EVERY_LIMIT, machine, "test")
    (remedy,) = advise(machine, HostFacts(tree=CgroupTree.V1), plan)
    assert remedy.limits == (MEMORY,)
    assert "swapaccount=1" in remedy.fixes[0].steps[0]
    assert swap_state(machine, plan) == "may extend the memory limit"


def test_swap_that_is_accounted_for_is_none(tmp_path: Path) -> None:
    machine = v1_machine(tmp_path, accounted=True)
    plan = build_plan(EVERY_LIMIT, machine, "test")
    assert advise(machine, HostFacts(tree=CgroupTree.V1), plan) == ()
    assert swap_state(machine, plan) == "kept from extending the memory limit"


@pytest.mark.parametrize(
    ("machine", "said"),
    [
        (replace(ROOT, v2=Path("/x"), v2_controllers=V2_ALL, swap_total=G), "kept from"),
        (replace(USER, swap_total=G), "not counted"),
        (replace(USER, swap_total=0), "none"),
    ],
)
def test_what_is_said_of_swap(machine: HostCapabilities, said: str) -> None:
    assert said in swap_state(machine, build_plan(EVERY_LIMIT, machine, "test"))


# --- where we are -----------------------------------------------------------------------------------------------


def world(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MOUNT_V2 = "31 23 0:28 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
MOUNT_V2_READ_ONLY = MOUNT_V2.replace("rw,nosuid", "ro,nosuid")
MOUNT_V1 = "35 31 0:32 /docker/a /sys/fs/cgroup/memory ro,relatime - cgroup cgroup rw,memory\n"
MOUNT_SYSTEMD = "40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd\n"
MOUNT_UNIFIED = "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n"


@pytest.mark.parametrize(
    ("mountinfo", "tree", "read_only"),
    [
        ("", CgroupTree.NONE, False),
        (MOUNT_V2, CgroupTree.V2, False),
        (MOUNT_V2_READ_ONLY, CgroupTree.V2, True),
        (MOUNT_V1, CgroupTree.V1, True),
        (MOUNT_V1 + MOUNT_UNIFIED, CgroupTree.HYBRID, True),
        (MOUNT_V2 + MOUNT_SYSTEMD, CgroupTree.V2, False),
    ],
)
def test_the_tree_is_read_from_the_mounts(
    tmp_path: Path, mountinfo: str, tree: CgroupTree, read_only: bool
) -> None:
    found = collect(root=world(tmp_path, {"proc/self/mountinfo": mountinfo}), environ={}, uid=1000)
    assert (found.tree, found.read_only) == (tree, read_only)


@pytest.mark.parametrize(
    ("files", "environ", "container"),
    [
        ({}, {}, Container.NONE),
        ({".dockerenv": ""}, {}, Container.DOCKER),
        ({"run/.containerenv": ""}, {}, Container.PODMAN),
        ({}, {"container": "podman"}, Container.PODMAN),
        ({"proc/self/cgroup": "0::/machine.slice/libpod-1.scope\n"}, {}, Container.PODMAN),
        ({"proc/self/cgroup": "4:memory:/docker/01ab\n"}, {}, Container.DOCKER),
        ({"proc/self/cgroup": "0::/system.slice/docker-01ab.scope\n"}, {}, Container.DOCKER),
        (
            {".dockerenv": "", "proc/self/cgroup": "0::/kubepods.slice/a\n"},
            {},
            Container.KUBERNETES,
        ),
        ({}, {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, Container.KUBERNETES),
        ({}, {"container": "lxc"}, Container.OTHER),
        ({"run/systemd/container": "systemd-nspawn\n"}, {}, Container.OTHER),
        ({"run/systemd/container": "wsl\n"}, {}, Container.NONE),
    ],
)
def test_containers_are_told_apart(
    tmp_path: Path, files: dict[str, str], environ: dict[str, str], container: Container
) -> None:
    assert collect(root=world(tmp_path, files), environ=environ, uid=0).container is container


@pytest.mark.parametrize(
    ("release", "wsl"),
    [
        ("6.1.0-18-amd64", None),
        ("5.15.90.1-microsoft-standard-WSL2", 2),
        ("4.4.0-19041-Microsoft", 1),
    ],
)
def test_wsl_is_told_by_its_kernel(tmp_path: Path, release: str, wsl: int | None) -> None:
    assert collect(root=tmp_path, environ={}, uid=0, release=release).wsl == wsl


def test_systemd_and_its_user_manager_are_found(tmp_path: Path) -> None:
    root = world(
        tmp_path,
        {
            "etc/passwd": "root:x:0:0::/root:/bin/sh\nann:x:1000:1000::/home/ann:/bin/sh\n",
            "proc/self/mountinfo": MOUNT_V2,
            "proc/cgroups": "#subsys_name\thierarchy\tnum_cgroups\tenabled\nmemory\t0\t1\t0\npids\t0\t1\t1\n",
            "sys/fs/cgroup/cgroup.controllers": "cpu memory pids\n",
            "sys/fs/cgroup/user.slice/user-1000.slice/user@1000.service/cgroup.controllers": "memory pids\n",
            "run/systemd/system/x": "",
            "run/user/1000/systemd/private": "",
            "var/lib/systemd/linger/ann": "",
            "usr/bin/systemd-run": "",
        },
    )
    environ = {
        "XDG_RUNTIME_DIR": "/run/user/1000",
        "GITHUB_ACTIONS": "true",
        "PATH": "/usr/local/bin:/usr/bin",
    }
    assert collect(root=root, environ=environ, uid=1000, release="6.1") == HostFacts(
        release="6.1",
        user="ann",
        tree=CgroupTree.V2,
        controllers=V2_ALL,
        disabled=frozenset({"memory"}),
        github=True,
        systemd=True,
        systemd_run=True,
        user_manager=True,
        user_controllers=frozenset({"memory", "pids"}),
        runtime_dir=True,
        linger=True,
    )


def test_nothing_is_found_in_an_empty_place(tmp_path: Path) -> None:
    found = collect(root=tmp_path, environ={}, uid=4_000_001, release="6.1")
    assert found == HostFacts(release="6.1", user="4000001")


def test_notes_of_dead_runs_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    own = procfs.stat(os.getpid())
    assert own is not None
    dead = {
        "owner": own.pid,
        "owner_started": own.started - 1,
        "keeper": own.pid,
        "keeper_started": own.started - 1,
    }
    stale_runs.write_note(stale_runs.note_path("dead"), dead)
    stale_runs.write_note(stale_runs.note_path("alive"), {**dead, "keeper_started": own.started})
    stale_runs.notes_directory().joinpath("half-written.json").write_text('{"owner": 1')
    assert dead_runs() == 1


# --- the report and the command ---------------------------------------------------------------------------------


def doctor_of(case: Case, **changes: object) -> Diagnosis:
    plan = build_plan(EVERY_LIMIT, case.machine, "test", EVERY_WALL)
    found = Diagnosis(
        machine=case.machine,
        host=case.host,
        plan=plan,
        remedies=advise(case.machine, case.host, plan),
        wall_remedies=advise_walls(case.machine, case.host, plan.walls, plan.enforcement),
        kernels=("python3",),
        dead_runs=0,
    )
    return replace(found, **changes)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_exit_code_is_that_of_require_all(case: Case) -> None:
    plan = build_plan(EVERY_LIMIT, case.machine, "test")
    assert doctor_of(case).exit_code == (
        0 if all(plan.enforcement[name].hard for name in REQUIRE_ALL) else 1
    )


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_report_has_each_limit_once_and_never_breaks_a_command(case: Case) -> None:
    found = doctor_of(case)
    lines = list(report(found, Style(width=60)))
    for name in (*LimitName, *(wall for wall in Wall if wall is not Wall.HIDDEN)):
        count = 2 if name.value == "processes" else 1  # a limit and a wall
        assert (
            sum(re.match(rf"  [✓~✗·]  {name.value} ", line) is not None for line in lines) == count
        )
    fixes = [
        *(fix for remedy in found.remedies for fix in remedy.fixes),
        *(fix for r in found.wall_remedies for fix in r.fixes),
    ]
    for step in (step for fix in fixes for step in fix.steps):
        assert f"      {step}" in lines


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_json_can_be_written(case: Case) -> None:
    document = json.loads(json.dumps(as_document(doctor_of(case))))
    assert set(document["limits"]) == {name.value for name in LimitName}
    assert sorted(document["weak"]) == sorted(case.weak)
    assert document["exit_code"] == (1 if case.weak else 0)
    assert set(document["walls"]) == set(Wall) - {Wall.HIDDEN}


def test_columns_stay_aligned_without_signs_and_with_colours() -> None:
    found = doctor_of(CASES["user without anything on v1"])
    plain = [
        line
        for line in report(found, Style(encoding="ascii"))
        if "rlimit" in line or "nothing" in line
    ]
    assert plain[0].startswith("  ~   memory")
    assert plain[1].startswith("  x   cpus")
    assert plain[2].startswith("  ok  cpu_time")
    coloured = "\n".join(report(found, Style(colour=True)))
    assert "\x1b[33m~" in coloured
    assert re.sub("\x1b\\[[0-9;]*m", "", coloured) == "\n".join(report(found, Style()))


def test_what_else_there_is_to_know() -> None:
    machine = replace(
        CASES["root on v1"].machine,
        bubblewrap="/usr/bin/bwrap",
        bubblewrap_version="0.8.0",
        landlock=4,
    )
    text = "\n".join(
        report(doctor_of(replace(CASES["root on v1"], machine=machine), dead_runs=2), Style())
    )
    assert "2 earlier runs were killed" in text
    assert "version 0.8.0, works here" in text
    assert "version 4; it stands in where bubblewrap cannot work" in text
    assert "as root a notebook without walls can undo its limits" in text
    text = "\n".join(
        report(doctor_of(CASES["github runner"], kernels=(), dead_runs="/x is not ours"), Style())
    )
    assert "none is installed" in text
    assert "/x is not ours" in text
    assert "as root a notebook" not in text
    assert "it was not looked for" in text and "not offered by this system" in text


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("root on v1", "root · cgroup v1 beside v2"),
        ("docker on v2", "root · cgroup v2 · docker container"),
        ("github runner", "user ann · cgroup v2 · GitHub Actions"),
        ("wsl 1", "user ann · no control groups · WSL 1"),
        ("macOS", "darwin · user ann · no control groups"),
    ],
)
def test_the_place_is_named(name: str, said: str) -> None:
    assert said in place(CASES[name].machine, CASES[name].host)


@pytest.mark.parametrize(
    ("held", "sign"),
    [
        (Enforcement(by=Mechanism.CGROUP_V2, hard=True), "✓"),
        (Enforcement(by=Mechanism.WATCHDOG, hard=False), "~"),
        (Enforcement(by=Mechanism.NONE, hard=False), "✗"),
        (Enforcement(by=Mechanism.RUNNER, hard=False), "·"),
    ],
)
def test_signs(held: Enforcement, sign: str) -> None:
    assert tables.mark(held) == sign


def call(*arguments: str) -> Result:
    return CliRunner().invoke(command, list(arguments), standalone_mode=False)


def test_on_this_machine_with_every_mechanism_and_with_each_alone() -> None:
    assert call().return_value in (0, 1)
    for mechanism in CHOOSABLE:
        result = call("--mechanisms", mechanism.value, "--json")
        assert result.exception is None
        found = json.loads(result.stdout)
        allowed = {mechanism.value, "runner", "none"}
        assert {held["by"] for held in found["limits"].values()} <= allowed
        assert {held["by"] for held in found["walls"].values()} <= {*allowed, "kernel"}, (
            "what a process gives up by itself"
        )
        assert result.return_value == found["exit_code"] == 1, "no mechanism alone holds all five"


def test_a_profile_narrows_the_question(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("extends: default\nlimits: {memory: null, processes: null, cpus: null}\n")
    result = call("--limits", str(file), "--mechanisms", "rlimit", "--json")
    assert "memory" not in json.loads(result.stdout)["limits"]
    assert result.return_value == 0


def test_bad_usage() -> None:
    assert isinstance(call("--mechanisms", "cgroup-v3").exception, UsageError)
    assert isinstance(call("--limits", "nonesuch").exception, LimitsError)


def test_no_bubblewrap_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = doctor.diagnose()
    assert (found.machine.bubblewrap, found.machine.bubblewrap_version) == (None, None)
    assert "install the package bubblewrap" in found.machine.bubblewrap_why_not
    assert any("install it" in fix.title for remedy in found.wall_remedies for fix in remedy.fixes)


def test_the_walls_of_a_profile_alone() -> None:
    assert json.loads(call("--limits", "default", "--json").stdout)["walls"] == {}
    assert set(json.loads(call("--limits", "ci", "--json").stdout)["walls"]) == {
        "home", "system", "processes", "environment", "system_calls", "privileges",
    }  # fmt: skip


# --- bubblewrap -------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A directory in which programs are found before those of the system."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.defpath}")
    return tmp_path


def fake_bubblewrap(folder: Path, version: str, *, fails: str = "") -> None:
    path = folder / "bwrap"
    path.write_text(
        f'#!/bin/sh\necho "$1" >> {folder}/calls\n[ "$1" = --version ] && {version} || {fails or "exit 0"}\n'
    )
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("version", "fails", "works", "why_not"),
    [
        ("echo bubblewrap 0.5.0", "", True, ""),
        ("echo bubblewrap 0.11.2", "", True, ""),
        ("echo bubblewrap 1.0", "", True, ""),
        ("echo something else", "", True, ""),  # it works, whatever it calls itself
        (
            "echo bubblewrap 0.4.1",
            "exit 1",
            False,
            "version 0.4.1 is too old (0.5.0 is the oldest that will do)",
        ),
        (
            "echo bubblewrap 0.8.0",
            "{ echo x >&2; echo bwrap: no permission >&2; exit 1; }",
            False,
            "bwrap: no permission",
        ),
        ("echo bubblewrap 0.8.0", "exit 3", False, "it failed without a word"),
        ("exit 1", "exit 3", False, "it failed without a word"),
    ],
)
def test_bubblewrap_is_tried(
    fake_path: Path, version: str, fails: str, works: bool, why_not: str
) -> None:
    fake_bubblewrap(fake_path, version, fails=fails)
    found = probe_isolation(HostCapabilities())
    assert (found.bubblewrap, found.bubblewrap_why_not) == (
        str(fake_path / "bwrap") if works else None,
        why_not,
    )


def test_the_version_is_asked_of_one_that_fails_and_by_who_wants_to_know(fake_path: Path) -> None:
    fake_bubblewrap(fake_path, "echo bubblewrap 0.8.0")
    assert probe_isolation(HostCapabilities()).bubblewrap_version is None
    assert "--version" not in (fake_path / "calls").read_text()
    assert probe_isolation(HostCapabilities(), version=True).bubblewrap_version == "0.8.0"
    fake_bubblewrap(fake_path, "echo bubblewrap 0.8.0", fails="exit 1")
    assert probe_isolation(HostCapabilities()).bubblewrap_version == "0.8.0"


def test_a_probe_that_does_not_end_is_killed(
    fake_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bwrap_probe, "BUBBLEWRAP_SECONDS", 0.2)
    fake_bubblewrap(fake_path, "echo bubblewrap 0.8.0", fails="exec sleep 600")
    with BwrapProbe() as probe:
        assert probe._process is not None
    assert probe._process.returncode == -9


@pytest.mark.parametrize(
    ("profile", "options", "walls", "looks"),
    [
        ("default", {}, {}, 0),
        ("default", {"disk": "1G"}, {}, 1),
        ("default", {}, {"network": False}, 1),
        ("ci", {}, {}, 1),
    ],
)
def test_a_run_without_walls_does_not_look_for_them(
    fake_path: Path, profile: str, options: dict[str, object], walls: dict[str, object], looks: int
) -> None:
    fake_bubblewrap(fake_path, "echo bubblewrap 0.8.0")
    prepare(
        Job(
            path=make_notebook(fake_path / "nb.ipynb", "1"),
            limits=profile,
            options=options,
            walls=walls,
        )
    )
    calls = fake_path / "calls"
    assert (len(calls.read_text().splitlines()) if calls.exists() else 0) == looks


def test_elsewhere_than_on_linux_nothing_is_looked_for() -> None:
    found = probe_isolation(HostCapabilities(platform="darwin"))
    assert (found.bubblewrap, found.landlock, found.bubblewrap_why_not) == (
        None,
        0,
        "there is none for darwin",
    )


# --- what fixes walls -------------------------------------------------------------------------------------------

REFUSED = "bwrap: setting up uid map: Permission denied"
HAVE = replace(USER, bubblewrap_version="0.9.0", bubblewrap_why_not=REFUSED)
LACK = replace(USER, bubblewrap_why_not=NOT_INSTALLED)
WALL_CASES: dict[str, tuple[HostCapabilities, HostFacts, list[str], list[str]]] = {
    "debian": (LACK, HostFacts(distribution="debian"), ["sudo apt-get install bubblewrap"], []),
    "ubuntu, root": (
        replace(LACK, uid=0),
        HostFacts(distribution="ubuntu debian"),
        ["apt-get install bubblewrap"],
        ["sudo"],
    ),
    "fedora": (LACK, HostFacts(distribution="fedora"), ["sudo dnf install bubblewrap"], ["apt"]),
    "alma": (
        LACK,
        HostFacts(distribution="almalinux rhel centos fedora"),
        ["sudo dnf install bubblewrap"],
        [],
    ),
    "arch": (LACK, HostFacts(distribution="arch"), ["sudo pacman -S bubblewrap"], []),
    "unknown": (LACK, HostFacts(), ["sudo apt-get install bubblewrap"], []),
    "ubuntu 24.04": (
        HAVE,
        HostFacts(apparmor_userns=True),
        [
            "profile bwrap /usr/bin/bwrap flags=(unconfined)",
            "sudo systemctl reload apparmor",
            "sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0",
            "/etc/sysctl.d/",
        ],
        ["install"],
    ),
    "debian 10": (
        HAVE,
        HostFacts(no_userns_clone=True),
        ["sudo sysctl -w kernel.unprivileged_userns_clone=1"],
        ["apparmor"],
    ),
    "hardened": (
        HAVE,
        HostFacts(no_user_namespaces=True),
        ["sudo sysctl -w user.max_user_namespaces=10000"],
        [],
    ),
    "no known reason": (
        HAVE,
        HostFacts(),
        ["bwrap --ro-bind", "apt-get install bubblewrap"],
        ["sysctl"],
    ),
    "docker": (
        HAVE,
        HostFacts(container=Container.DOCKER),
        [
            "docker run --security-opt seccomp=unconfined --security-opt apparmor=unconfined --security-opt systempaths=unconfined",
            "docker run --privileged IMAGE",
        ],
        ["sysctl", "install"],
    ),
    "docker on ubuntu": (
        HAVE,
        HostFacts(container=Container.DOCKER, apparmor_userns=True),
        [
            "docker run",
            "# and on the host:",
            "sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0",
        ],
        [],
    ),
    "docker without it": (
        LACK,
        HostFacts(container=Container.DOCKER),
        ["apt-get install"],
        ["docker run"],
    ),
    "podman": (
        HAVE,
        HostFacts(container=Container.PODMAN),
        ["podman run --security-opt seccomp=unconfined"],
        ["docker"],
    ),
    "kubernetes": (
        HAVE,
        HostFacts(container=Container.KUBERNETES),
        ["procMount: Unmasked"],
        ["docker"],
    ),
    "other container": (
        HAVE,
        HostFacts(container=Container.OTHER),
        ["# how is for its manager to say"],
        ["docker"],
    ),
    "not allowed": (
        replace(HAVE, allowed=frozenset({Mechanism.RLIMIT})),
        HostFacts(apparmor_userns=True),
        [],
        ["sudo"],
    ),
}


@pytest.mark.parametrize(
    ("machine", "host", "wanted", "never"), WALL_CASES.values(), ids=WALL_CASES
)
def test_what_mends_walls(
    machine: HostCapabilities, host: HostFacts, wanted: list[str], never: list[str]
) -> None:
    plan = build_plan(EVERY_LIMIT, machine, "test", EVERY_WALL)
    found = advise_walls(machine, host, plan.walls, plan.enforcement)
    assert {Wall.HOME, Wall.NETWORK, Wall.PROCESSES} <= set(found[0].walls)
    assert set(found[0].limits) == {LimitName.DISK, LimitName.SHM}
    assert found[0].reason
    steps = [step for remedy in found for fix in remedy.fixes for step in fix.steps]
    rest = iter(steps)
    for want in wanted:
        assert any(want in step for step in rest), (
            f"{want!r} is missing, or out of order, in {steps}"
        )
    assert not [word for word in never if word in "\n".join(steps)]
    script = "\n".join(step for step in steps if not step.startswith("securityContext"))
    assert (
        subprocess.run(
            ["sh", "-n"], input=script, capture_output=True, text=True, check=False
        ).returncode
        == 0
    )


def test_where_all_walls_stand_there_is_nothing_to_mend() -> None:
    machine = replace(USER, bubblewrap="/usr/bin/bwrap", bubblewrap_why_not="")
    plan = build_plan(EVERY_LIMIT, machine, "test", EVERY_WALL)
    assert advise_walls(machine, HostFacts(), plan.walls, plan.enforcement) == ()
    assert weak_walls(plan.walls) == (), "that only root can become somebody else is no weakness"


def test_elsewhere_nothing_is_said_of_walls_twice() -> None:
    machine = HostCapabilities(platform="darwin", uid=501)
    plan = build_plan(EVERY_LIMIT, machine, "test", EVERY_WALL)
    assert advise_walls(machine, HostFacts(), plan.walls, plan.enforcement) == ()
    assert Wall.HOME in weak_walls(plan.walls)


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        (
            {"etc/os-release": 'NAME="Ubuntu"\nID=ubuntu\nID_LIKE=debian\n'},
            {"distribution": "ubuntu debian"},
        ),
        (
            {"etc/os-release": 'ID="rocky"\nID_LIKE="rhel centos fedora"\n'},
            {"distribution": "rocky rhel centos fedora"},
        ),
        (
            {"proc/sys/kernel/apparmor_restrict_unprivileged_userns": "1\n"},
            {"apparmor_userns": True},
        ),
        ({"proc/sys/kernel/apparmor_restrict_unprivileged_userns": "0\n"}, {}),
        ({"proc/sys/kernel/unprivileged_userns_clone": "0\n"}, {"no_userns_clone": True}),
        ({"proc/sys/kernel/unprivileged_userns_clone": "1\n"}, {}),
        ({"proc/sys/user/max_user_namespaces": "0\n"}, {"no_user_namespaces": True}),
    ],
)
def test_what_keeps_users_from_namespaces_is_read(
    tmp_path: Path, files: dict[str, str], wanted: dict[str, Any]
) -> None:
    bare = collect(root=tmp_path / "none", environ={}, uid=7, release="6.1")
    assert collect(root=world(tmp_path, files), environ={}, uid=7, release="6.1") == replace(
        bare, **wanted
    )


@pytest.mark.parametrize(
    ("machine", "said"),
    [
        (
            replace(USER, scope=USERS_SCOPE),
            "each kernel in a scope that the user's systemd makes in app.slice",
        ),
        (
            replace(ROOT, scope=replace(USERS_SCOPE, slice="system.slice", runtime=None)),
            "that the system's systemd makes in system.slice",
        ),
        (replace(USER, v2=Path("/cg"), v2_controllers=V2_ALL), "below /cg"),
        (
            replace(USER, v2=Path("/cg"), v2_controllers=V2_ALL, v2_needs_leaf=True),
            "it moves one group down first",
        ),
        (USER, ""),
    ],
)
def test_where_groups_will_stand_is_said(machine: HostCapabilities, said: str) -> None:
    lines = [
        words
        for label, words in facts(replace(doctor_of(CASES["root on v1"]), machine=machine))
        if label == "groups"
    ]
    assert bool(lines) == bool(said) and all(said in line for line in lines)


@pytest.mark.bed("bubblewrap")
def test_a_probe_that_nobody_asks_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    mark = secrets.token_hex(8)
    monkeypatch.setenv(MARK, mark)
    for _ in range(20):
        with BwrapProbe():
            pass
    assert marked_processes(mark) == []
