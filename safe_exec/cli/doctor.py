"""``safe-exec doctor``: what holds each limit and each wall on this machine, and the commands that mend what is weak."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterator
from typing import Any

import click
from msgspec import Struct, to_builtins

from safe_exec._version import __version__
from safe_exec.cli import tables
from safe_exec.model.limits import FolderUse, Isolation, LimitName, Limits, Mechanism, SystemCalls
from safe_exec.reports.terminal import Style
from safe_exec.sandbox.advice.isolation import WallRemedy, advise_walls
from safe_exec.sandbox.advice.limits import Remedy, advise, swap_state, weak_limits
from safe_exec.sandbox.host.capabilities import Machine, detect, look_for_walls
from safe_exec.sandbox.host.facts import CgroupTree, Container, Surroundings, dead_runs, look
from safe_exec.sandbox.plan import RUNNER_LIMITS, SpawnPlan, weak_walls
from safe_exec.sandbox.planner import CHOOSABLE, build_plan, parse_mechanisms

EVERY_LIMIT = Limits(
    memory=2**30,
    cpus=1.0,
    cpu_time=60.0,
    cell_timeout=60.0,
    timeout=60.0,
    start_timeout=60.0,
    processes=256,
    open_files=1024,
    file_size=2**30,
    cell_output=2**20,
    output=2**20,
    disk=2**30,
    shm=2**30,
)
"""Every limit is set: what would hold it is asked, and the figures do not matter."""

EVERY_WALL = Isolation(
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

WIDTH = 100
"""Columns that are enough: a longer line is harder to read, and commands are not broken at any width."""


class Diagnosis(Struct, frozen=True, kw_only=True):
    """All that doctor says. ``dead_runs`` is a count, or why there is none."""

    machine: Machine
    around: Surroundings
    plan: SpawnPlan
    remedies: tuple[Remedy, ...]
    wall_remedies: tuple[WallRemedy, ...]
    kernels: tuple[str, ...]
    dead_runs: int | str

    @property
    def weak(self) -> tuple[LimitName, ...]:
        """The limits that the system's kernel could hold and here does not."""
        return weak_limits(self.plan)

    @property
    def exit_code(self) -> int:
        """1 where one of them is weak."""
        return 1 if self.weak else 0


@click.command(
    "doctor",
    short_help="Say, limit by limit, what this machine can enforce, and how to mend what it cannot.",
)
@click.option(
    "--limits",
    "profile",
    metavar="NAME|FILE",
    help="Look at the limits and walls of this profile or file only [all].",
)
@click.option(
    "--mechanisms", metavar="NAME,...", help=f"Look at these only: {', '.join(CHOOSABLE)}."
)
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def command(profile: str | None, mechanisms: str | None, as_json: bool) -> int:
    """Say, limit by limit and wall by wall, what this machine can enforce and by what, and for each weakness what mends it.

    Exit codes: 0 when the system's kernel can hold memory, cpus, processes, open_files and file_size (with --limits,
    those of them that are set there), so that `safe-exec run --require all` would run; 1 when it cannot; 2 bad usage.
    """
    found = diagnose(profile, mechanisms)
    if as_json:
        click.echo(json.dumps(as_document(found), indent=2))
    else:
        style = Style.of(sys.stdout)
        tables.write(report(found, style), style)
    return found.exit_code


def diagnose(profile: str | None = None, mechanisms: str | None = None) -> Diagnosis:
    """Look at the machine. Raises UsageError for unknown mechanisms, LimitsError for a wrong profile."""
    machine = look_for_walls(detect(_allowed(mechanisms)), version=True)
    around = look()
    limits, isolation = _asked(profile, machine)
    plan = build_plan(limits, machine, "doctor", isolation)
    return Diagnosis(
        machine=machine,
        around=around,
        plan=plan,
        remedies=advise(machine, around, plan),
        wall_remedies=advise_walls(machine, around, plan.walls, plan.enforcement),
        kernels=_kernels(),
        dead_runs=_dead_runs(),
    )


def _allowed(text: str | None) -> frozenset[Mechanism]:
    return parse_mechanisms(None if text is None else [part.strip() for part in text.split(",")])


def _asked(profile: str | None, machine: Machine) -> tuple[Limits, Isolation]:
    if profile is None:
        return EVERY_LIMIT, EVERY_WALL
    from safe_exec.limits.profiles import load_profile

    found = load_profile(profile, machine_memory=machine.memory_total)
    return found.limits, found.isolation


def _kernels() -> tuple[str, ...]:
    from jupyter_client.kernelspec import KernelSpecManager

    return tuple(sorted(KernelSpecManager().find_kernel_specs()))


def _dead_runs() -> int | str:
    if not sys.platform.startswith("linux"):
        return 0
    try:
        return dead_runs()
    except OSError as error:
        return str(error)


# --- in words ---------------------------------------------------------------------------------------------------


def report(found: Diagnosis, style: Style) -> Iterator[str]:
    """The diagnosis line by line: place, limits, what else there is to know, how to mend what is weak."""
    style = Style(width=min(style.width, WIDTH), colour=style.colour, encoding=style.encoding)
    yield style.paint("bold", f"safe-exec {__version__} on {place(found.machine, found.around)}")
    yield ""
    yield from tables.table(_rows(found.plan), style)
    yield ""
    if found.plan.walls:
        yield style.paint("bold", "walls")
        yield from tables.table(tables.wall_rows(found.plan.walls), style)
        yield ""
    for label, words in facts(found):
        yield from tables.labelled(label, words, style)
    for remedy in found.remedies:
        yield ""
        yield from tables.remedy(
            [name.value for name in remedy.limits] or ["limits"], remedy.why, remedy.ways, style
        )
    for wall_remedy in found.wall_remedies:
        yield ""
        yield from tables.remedy(wall_remedy.names, wall_remedy.why, wall_remedy.ways, style)


def place(machine: Machine, around: Surroundings) -> str:
    """Where we are: system, user, control groups, and what surrounds us."""
    system = platform.system() if machine.platform == sys.platform else machine.platform
    parts = [
        f"{system} {around.release}".strip(),
        "root" if machine.uid == 0 else f"user {around.user}",
    ]
    trees = {
        CgroupTree.V2: "cgroup v2",
        CgroupTree.V1: "cgroup v1",
        CgroupTree.HYBRID: "cgroup v1 beside v2",
    }
    parts.append(trees.get(around.tree, "no control groups"))
    if around.container is not Container.NONE:
        parts.append(
            "a container"
            if around.container is Container.OTHER
            else f"{around.container.value} container"
        )
    if around.wsl is not None:
        parts.append(f"WSL {around.wsl}")
    if around.github:
        parts.append("GitHub Actions")
    return " · ".join(parts)


def _rows(plan: SpawnPlan) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name, held in plan.enforcement.items():
        if held.by is not Mechanism.RUNNER:
            rows.append((tables.mark(held), name.value, *tables.held_columns(held)))
    ours = [name for name in RUNNER_LIMITS if name in plan.enforcement]
    runner = "by safe-exec itself, which waits and takes the output"
    for number, name in enumerate(ours):
        rows.append((tables.PLAIN, name.value, "runner", "", runner if number == 0 else ""))
    return rows


def facts(found: Diagnosis) -> Iterator[tuple[str, str]]:
    """What else there is to know, each with its label."""
    groups = _groups(found.machine)
    if groups:
        yield "groups", groups
    yield "swap", swap_state(found.machine, found.plan)
    if found.machine.uid == 0 and found.machine.platform.startswith("linux"):
        yield (
            "root",
            "as root a notebook without walls can undo its limits: run what you do not trust with --limits untrusted",
        )
    yield "kernels", ", ".join(found.kernels) or "none is installed: pip install ipykernel"
    yield "bubblewrap", _bubblewrap(found.machine)
    abi = found.machine.landlock
    yield (
        "landlock",
        f"version {abi}; it stands in where bubblewrap cannot work"
        if abi
        else "not offered by this system",
    )
    lost = found.machine.seccomp_why_not
    yield "seccomp", f"no filter: {lost}" if lost else "a filter for this machine is shipped"
    if isinstance(found.dead_runs, str):
        yield "left over", found.dead_runs
    elif found.dead_runs:
        yield (
            "left over",
            f"{found.dead_runs} earlier runs were killed with their keepers; the next run cleans up after them",
        )


def _groups(machine: Machine) -> str:
    """Where the control groups of a run will stand; empty where there are none."""
    scope = machine.scope
    if scope is not None and machine.may(Mechanism.SYSTEMD):
        whose = "the system's" if scope.runtime is None else "the user's"
        return f"each kernel in a scope that {whose} systemd makes in {scope.slice}"
    if machine.v2 is not None and machine.may(Mechanism.CGROUP_V2):
        stepped = (
            ", which is safe-exec's alone: it moves one group down first"
            if machine.v2_step_down
            else ""
        )
        return f"below {machine.v2}{stepped}"
    above = machine.v1.get("memory")
    return (
        f"below {above} and those of other controllers"
        if above and machine.may(Mechanism.CGROUP_V1)
        else ""
    )


def _bubblewrap(machine: Machine) -> str:
    version = f"version {machine.bubblewrap_version}" if machine.bubblewrap_version else ""
    state = "works here" if machine.bubblewrap is not None else machine.bubblewrap_why_not
    return ", ".join(part for part in (version, state) if part)


# --- as JSON ----------------------------------------------------------------------------------------------------


def as_document(found: Diagnosis) -> dict[str, Any]:
    """The diagnosis as JSON values. ``hard``: the system's kernel holds it."""
    around = found.around
    return {
        "schema": "safe-exec/doctor/1",
        "safe_exec_version": __version__,
        "exit_code": found.exit_code,
        "place": {
            "platform": found.machine.platform,
            "release": around.release,
            "uid": found.machine.uid,
            "cgroups": around.tree.value,
            "container": around.container.value,
            "wsl": around.wsl,
            "github": around.github,
            "systemd": around.systemd,
        },
        "limits": tables.enforcement_document(found.plan.enforcement),
        "weak": [name.value for name in found.weak],
        "remedies": [to_builtins(remedy) for remedy in found.remedies],
        "walls": tables.enforcement_document(found.plan.walls),
        "weak_walls": [wall.value for wall in weak_walls(found.plan.walls)],
        "wall_remedies": [to_builtins(remedy) for remedy in found.wall_remedies],
        "groups": {
            "v2": None if found.machine.v2 is None else str(found.machine.v2),
            "scope": None if found.machine.scope is None else str(found.machine.scope.directory),
        },
        "swap": {"bytes": found.machine.swap_total, "state": swap_state(found.machine, found.plan)},
        "bubblewrap": {
            "version": found.machine.bubblewrap_version,
            "works": found.machine.bubblewrap is not None,
            "why_not": found.machine.bubblewrap_why_not,
        },
        "landlock": found.machine.landlock,
        "seccomp": not found.machine.seccomp_why_not,
        "kernels": list(found.kernels),
        "dead_runs": found.dead_runs if isinstance(found.dead_runs, int) else None,
    }
