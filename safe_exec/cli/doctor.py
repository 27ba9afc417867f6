"""``safe-exec doctor``: show what enforces each limit on this machine, and how to improve it."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterator
from typing import Any

import click
from msgspec import Struct

from safe_exec._version import __version__
from safe_exec.cli import tables
from safe_exec.errors import SandboxError
from safe_exec.model.limits import Isolation, LimitName, Limits, Mechanism
from safe_exec.reports.terminal import Style
from safe_exec.sandbox.advice.isolation import WallRemedy, advise_walls
from safe_exec.sandbox.advice.limits import Remedy, advise, swap_state, weak_limits
from safe_exec.sandbox.host.capabilities import HostCapabilities, detect, probe_isolation
from safe_exec.sandbox.host.facts import CgroupTree, Container, HostFacts, collect, dead_runs
from safe_exec.sandbox.plan import RUNNER_LIMITS, SpawnPlan, weak_walls
from safe_exec.sandbox.planner import (
    ALL_LIMITS,
    ALL_WALLS,
    CHOOSABLE,
    build_plan,
    parse_mechanisms,
)

EVERY_LIMIT, EVERY_WALL = ALL_LIMITS, ALL_WALLS

# The width of the text: longer lines are harder to read. Commands are never wrapped.
WIDTH = 100


class Diagnosis(Struct, frozen=True, kw_only=True):
    """The whole diagnosis; ``dead_runs`` is a count, or the reason why it is unknown."""

    machine: HostCapabilities
    host: HostFacts
    plan: SpawnPlan
    remedies: tuple[Remedy, ...]
    wall_remedies: tuple[WallRemedy, ...]
    kernels: tuple[str, ...]
    dead_runs: int | str

    @property
    def weak(self) -> tuple[LimitName, ...]:
        """The limits that an operating system can enforce, but this one does not."""
        return weak_limits(self.plan)

    @property
    def exit_code(self) -> int:
        """1 if a limit is weak, else 0."""
        # Scripts use it to check a machine before they rely on --require all.
        return 1 if self.weak else 0


@click.command(
    "doctor",
    short_help="Show what enforces each limit on this machine, and how to fix the rest.",
)
@click.option(
    "--limits",
    "profile",
    metavar="NAME|FILE",
    help="Only the limits and walls of this profile or file [all].",
)
@click.option(
    "--mechanisms", metavar="NAME,...", help=f"Only these mechanisms: {', '.join(CHOOSABLE)}."
)
@click.option(
    "--cluster",
    metavar="WHERE",
    help="Check every worker of a dask cluster: tcp://host:8786, a scheduler file, dask, ...",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(profile: str | None, mechanisms: str | None, cluster: str | None, as_json: bool) -> int:
    """Show what enforces each limit and wall on this machine, and how to fix the weak ones.

    Exit codes: 0 if the operating system enforces memory, cpus, processes, open_files and file_size
    (with --limits: those of them that are set there), so that `safe-exec run --require all` would
    run; 1 if it does not; 2 bad usage. With --cluster: 0 only if that holds on every worker.
    """
    if cluster is not None:
        from safe_exec.cli import doctor_cluster

        return doctor_cluster.show(cluster, profile, mechanisms, as_json=as_json)
    diagnosis = diagnose(profile, mechanisms)
    if as_json:
        click.echo(json.dumps(as_document(diagnosis), indent=2))
    else:
        style = Style.of(sys.stdout)
        tables.write(report(diagnosis, style), style)
    return diagnosis.exit_code


def diagnose(profile: str | None = None, mechanisms: str | None = None) -> Diagnosis:
    """Diagnose this machine. Raises UsageError for unknown mechanisms and for a wrong profile."""
    # The version costs another process, and only this command shows it.
    machine = probe_isolation(detect(_allowed(mechanisms)), version=True)
    host = collect()
    limits, isolation = _requested_limits(profile, machine)
    plan = build_plan(limits, machine, "doctor", isolation)
    return Diagnosis(
        machine=machine,
        host=host,
        plan=plan,
        remedies=advise(machine, host, plan),
        wall_remedies=advise_walls(machine, host, plan.walls, plan.enforcement),
        kernels=_kernels(),
        dead_runs=_dead_runs(),
    )


def _allowed(text: str | None) -> frozenset[Mechanism]:
    return parse_mechanisms(None if text is None else [part.strip() for part in text.split(",")])


def _requested_limits(profile: str | None, machine: HostCapabilities) -> tuple[Limits, Isolation]:
    if profile is None:
        return EVERY_LIMIT, EVERY_WALL
    from safe_exec.limits.profiles import load_profile

    profile_limits = load_profile(profile, machine_memory=machine.memory_total)
    return profile_limits.limits, profile_limits.isolation


def _kernels() -> tuple[str, ...]:
    # Imported late: the import takes longer than the help text.
    from jupyter_client.kernelspec import KernelSpecManager

    return tuple(sorted(KernelSpecManager().find_kernel_specs()))


def _dead_runs() -> int | str:
    # Runs leave their notes on Linux only.
    if not sys.platform.startswith("linux"):
        return 0
    try:
        # Unreadable directories of other users are reported, not hidden.
        return dead_runs()
    except (OSError, SandboxError) as error:
        return str(error)


# --- as text ------------------------------------------------------------------------------------


def report(diagnosis: Diagnosis, style: Style) -> Iterator[str]:
    """Yield the lines: machine, limits, walls, facts, fixes."""
    # A wide terminal would put notes far away from their limits.
    style = Style(width=min(style.width, WIDTH), colour=style.colour, encoding=style.encoding)
    yield style.paint(
        "bold", f"safe-exec {__version__} on {place(diagnosis.machine, diagnosis.host)}"
    )
    yield ""
    yield from tables.table(_rows(diagnosis.plan), style)
    yield ""
    if diagnosis.plan.walls:
        yield style.paint("bold", "walls")
        yield from tables.table(tables.wall_rows(diagnosis.plan.walls), style)
        yield ""
    for label, text in facts(diagnosis):
        yield from tables.labelled(label, text, style)
    for remedy in diagnosis.remedies:
        yield ""
        yield from tables.remedy(
            [name.value for name in remedy.limits] or ["limits"], remedy.reason, remedy.fixes, style
        )
    for wall_remedy in diagnosis.wall_remedies:
        yield ""
        yield from tables.remedy(wall_remedy.names, wall_remedy.reason, wall_remedy.fixes, style)


def place(machine: HostCapabilities, host: HostFacts) -> str:
    """Describe the machine: system, user, cgroups, container."""
    system = platform.system() if machine.platform == sys.platform else machine.platform
    parts = [
        f"{system} {host.release}".strip(),
        "root" if machine.uid == 0 else f"user {host.user}",
    ]
    trees = {
        CgroupTree.V2: "cgroup v2",
        CgroupTree.V1: "cgroup v1",
        CgroupTree.HYBRID: "cgroup v1 beside v2",
    }
    parts.append(trees.get(host.tree, "no control groups"))
    if host.container is not Container.NONE:
        parts.append(
            "a container"
            if host.container is Container.OTHER
            else f"{host.container.value} container"
        )
    if host.wsl is not None:
        parts.append(f"WSL {host.wsl}")
    if host.github:
        parts.append("GitHub Actions")
    return " · ".join(parts)


def _rows(plan: SpawnPlan) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name, enforcement in plan.enforcement.items():
        # The limits of the runner follow as a group: they hold on every machine.
        if enforcement.by is not Mechanism.RUNNER:
            rows.append(
                (tables.mark(enforcement), name.value, *tables.enforcement_columns(enforcement))
            )
    ours = [name for name in RUNNER_LIMITS if name in plan.enforcement]
    runner = "by safe-exec itself, which waits and takes the output"
    # The first row explains the whole group.
    for number, name in enumerate(ours):
        rows.append((tables.PLAIN, name.value, "runner", "", runner if number == 0 else ""))
    return rows


def facts(diagnosis: Diagnosis) -> Iterator[tuple[str, str]]:
    """Yield what else ``doctor`` says about this machine: pairs of label and text."""
    groups = _groups(diagnosis.machine)
    if groups:
        yield "groups", groups
    yield "swap", swap_state(diagnosis.machine, diagnosis.plan)
    # Root may write to the control groups that hold its own run.
    if diagnosis.machine.uid == 0 and diagnosis.machine.platform.startswith("linux"):
        yield (
            "root",
            "as root a notebook without walls can undo its limits: use --limits untrusted",
        )
    yield "kernels", ", ".join(diagnosis.kernels) or "none is installed: pip install ipykernel"
    yield "bubblewrap", _bubblewrap(diagnosis.machine)
    abi = diagnosis.machine.landlock
    yield (
        "landlock",
        f"version {abi}; it stands in where bubblewrap cannot work"
        if abi
        else "not offered by this system",
    )
    reason = diagnosis.machine.seccomp_why_not
    yield "seccomp", f"no filter: {reason}" if reason else "a filter for this machine is shipped"
    if isinstance(diagnosis.dead_runs, str):
        yield "left over", diagnosis.dead_runs
    elif diagnosis.dead_runs:
        yield (
            "left over",
            f"{diagnosis.dead_runs} earlier runs were killed; the next run cleans up",
        )


def _groups(machine: HostCapabilities) -> str:
    """Describe the location of a run's cgroups."""
    scope = machine.scope
    if scope is not None and machine.allows(Mechanism.SYSTEMD):
        owner = "the system's" if scope.runtime is None else "the user's"
        return f"each kernel in a scope that {owner} systemd makes in {scope.slice}"
    if machine.v2 is not None and machine.allows(Mechanism.CGROUP_V2):
        stepped = (
            ", which is safe-exec's alone: it moves one group down first"
            if machine.v2_needs_leaf
            else ""
        )
        return f"below {machine.v2}{stepped}"
    # One controller stands for all: they usually share a path.
    above = machine.v1.get("memory")
    return (
        f"below {above} and those of other controllers"
        if above and machine.allows(Mechanism.CGROUP_V1)
        else ""
    )


def _bubblewrap(machine: HostCapabilities) -> str:
    version = f"version {machine.bubblewrap_version}" if machine.bubblewrap_version else ""
    state = "works here" if machine.bubblewrap is not None else machine.bubblewrap_why_not
    return ", ".join(part for part in (version, state) if part)


# --- as JSON ------------------------------------------------------------------------------------


def as_document(diagnosis: Diagnosis) -> dict[str, Any]:
    """Return the diagnosis as JSON values; ``hard`` means enforced by the operating system."""
    host = diagnosis.host
    return {
        "schema": "safe-exec/doctor/1",
        "safe_exec_version": __version__,
        "exit_code": diagnosis.exit_code,
        "place": {
            "platform": diagnosis.machine.platform,
            "release": host.release,
            "uid": diagnosis.machine.uid,
            "cgroups": host.tree.value,
            "container": host.container.value,
            "wsl": host.wsl,
            "github": host.github,
            "systemd": host.systemd,
        },
        "limits": tables.enforcement_document(diagnosis.plan.enforcement),
        "weak": [name.value for name in diagnosis.weak],
        "remedies": [_remedy_document(remedy) for remedy in diagnosis.remedies],
        "walls": tables.enforcement_document(diagnosis.plan.walls),
        "weak_walls": [wall.value for wall in weak_walls(diagnosis.plan.walls)],
        "wall_remedies": [
            {"walls": remedy.walls, **_remedy_document(remedy)}
            for remedy in diagnosis.wall_remedies
        ],
        "groups": {
            "v2": None if diagnosis.machine.v2 is None else str(diagnosis.machine.v2),
            "scope": None
            if diagnosis.machine.scope is None
            else str(diagnosis.machine.scope.directory),
        },
        "swap": {
            "bytes": diagnosis.machine.swap_total,
            "state": swap_state(diagnosis.machine, diagnosis.plan),
        },
        "bubblewrap": {
            "version": diagnosis.machine.bubblewrap_version,
            "works": diagnosis.machine.bubblewrap is not None,
            "why_not": diagnosis.machine.bubblewrap_why_not,
        },
        "landlock": diagnosis.machine.landlock,
        "seccomp": not diagnosis.machine.seccomp_why_not,
        "kernels": list(diagnosis.kernels),
        "dead_runs": diagnosis.dead_runs if isinstance(diagnosis.dead_runs, int) else None,
    }


def _remedy_document(remedy: Remedy | WallRemedy) -> dict[str, Any]:
    return {
        "limits": remedy.limits,
        "why": remedy.reason,
        # The keys are part of the published document and differ from the names in the code.
        "ways": [{"what": fix.title, "steps": fix.steps, "note": fix.note} for fix in remedy.fixes],
    }
