"""``safe-exec limits``: show a profile or file, list the profiles, check a file."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import click

from safe_exec.cli import tables
from safe_exec.errors import LimitsError
from safe_exec.limits import profiles
from safe_exec.limits.isolation import as_metadata
from safe_exec.limits.profiles import Resolved, format_limit
from safe_exec.limits.values import parse_layer
from safe_exec.limits.yaml_source import Value, load
from safe_exec.model.limits import Isolation, LimitName
from safe_exec.reports.json_text import plain
from safe_exec.reports.terminal import Style
from safe_exec.reports.text.common import single_line
from safe_exec.sandbox.advice.isolation import WallRemedy, advise_walls
from safe_exec.sandbox.host.capabilities import detect, probe_isolation
from safe_exec.sandbox.host.facts import collect
from safe_exec.sandbox.host.resources import memory_and_swap
from safe_exec.sandbox.mechanisms.bubblewrap import is_needed
from safe_exec.sandbox.plan import SpawnPlan
from safe_exec.sandbox.planner import build_plan

BAD_INPUT = 2
_LIMITS = frozenset(name.value for name in LimitName)

# Keys of an entry of safe-exec.yaml that are not limits.
_NOT_LIMITS = ("path", "profile")


@click.group("limits", short_help="Show the limits that a profile or file gives.")
def command() -> None:
    """Show the limits of a profile or file, list the profiles, check a file."""


# --- show ---------------------------------------------------------------------------------------


@command.command("show")
@click.argument("profile", metavar="[NAME|FILE]", default=profiles.DEFAULT_PROFILE)
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON, in bytes and seconds.")
def show(profile: str, as_json: bool) -> int:
    """Show each limit of a profile or file [default], its source, and its enforcement here.

    The isolation follows: what the file requests, what enforces each wall here, and how to fix the
    rest.
    """
    machine = detect()
    resolved = profiles.resolve(chosen=profile, machine_memory=machine.memory_total)
    if is_needed(
        resolved.isolation,
        disk=resolved.limits.disk is not None,
        shm=resolved.limits.shm is not None,
    ):
        # Testing bubblewrap starts a process, so only profiles with walls do it.
        machine = probe_isolation(machine)
    plan = build_plan(resolved.limits, machine, "limits", resolved.isolation)
    if as_json:
        click.echo(json.dumps(_document(resolved, plan), indent=2))
        return 0
    style = Style.of(sys.stdout)
    about = profiles.load_profile(profile, machine_memory=machine.memory_total).description
    remedies = advise_walls(machine, collect(), plan.walls, plan.enforcement)
    tables.write(
        [*_shown(resolved, plan, about, style), *_walls(resolved.isolation, plan, remedies, style)],
        style,
    )
    return 0


def _shown(resolved: Resolved, plan: SpawnPlan, about: str, style: Style) -> Iterator[str]:
    yield style.paint("bold", single_line(resolved.profile)) + (
        f": {single_line(about)}" if about else ""
    )
    yield from tables.table([_row(name, resolved, plan) for name in profiles.LIMIT_NAMES], style)


def _row(name: str, resolved: Resolved, plan: SpawnPlan) -> tuple[str, ...]:
    value = getattr(resolved.limits, name)
    enforcement = plan.enforcement.get(LimitName(name)) if name in _LIMITS else None
    # An unlimited resource has no mechanism.
    sign, by = (tables.mark(enforcement), enforcement.by.value) if enforcement else ("", "")
    return name, format_limit(name, value), sign, by, single_line(resolved.sources[name])


def _walls(
    isolation: Isolation, plan: SpawnPlan, remedies: Sequence[WallRemedy], style: Style
) -> Iterator[str]:
    """Yield the requested isolation, its enforcement here, and fixes."""
    walls = as_metadata(isolation)
    if isolation.hide_home or isolation.read_only_system:
        # These walls close everything around the repository, so its use is worth a line even if it
        # is the default.
        walls.setdefault("repository", isolation.repository.value)
    requested = [(key, _word(value)) for key, value in walls.items()]
    yield ""
    yield style.paint("bold", "isolation") + (
        "" if requested else ": none, the notebook may reach what you may"
    )
    yield from tables.table(requested, style) if requested else ()
    if plan.walls:
        yield ""
        yield from tables.table(tables.wall_rows(plan.walls), style)
    for remedy in remedies:
        yield ""
        yield from tables.remedy(remedy.names, remedy.reason, remedy.fixes, style)


def _word(value: object) -> str:
    """Format a value as a limits file contains it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return single_line(", ".join(value)) if isinstance(value, list) else single_line(str(value))


def _document(resolved: Resolved, plan: SpawnPlan) -> dict[str, object]:
    return {
        "schema": "safe-exec/limits/1",
        "profile": resolved.profile,
        "limits": resolved.limits.as_dict(),
        "sources": dict(resolved.sources),
        "enforcement": tables.enforcement_document(plan.enforcement),
        "isolation": plain(resolved.isolation),
        "walls": tables.enforcement_document(plan.walls),
    }


# --- list ---------------------------------------------------------------------------------------


@command.command("list")
def list_profiles() -> int:
    """List the built-in profiles, for --limits and for "extends" in your own files."""
    style = Style.of(sys.stdout)
    # Profiles may contain percentages of the memory. Mechanisms are not detected, since a list does
    # not need them.
    memory, _ = memory_and_swap()
    profiles_by_name = [
        profiles.load_profile(name, machine_memory=memory) for name in profiles.shipped_profiles()
    ]
    tables.write(
        tables.table([(profile.name, profile.description) for profile in profiles_by_name], style),
        style,
    )
    return 0


# --- check --------------------------------------------------------------------------------------


@command.command("check")
@click.argument("file", type=click.Path(path_type=Path))
def check(file: Path) -> int:
    """Check a limits file or a safe-exec.yaml; each error is one line on standard error.

    Exit codes: 0 no errors, 2 errors.
    """
    problems = errors_of(file)
    for problem in problems:
        click.echo(problem, err=True)
    if not problems:
        click.echo(f"{file}: right")
    return BAD_INPUT if problems else 0


def errors_of(file: Path) -> list[str]:
    """Return every error in a file, in order."""
    # Reading the file stops at the first error; reading each value alone finds the others.
    try:
        _read_whole(file)
    except LimitsError as first:
        errors = [str(error) for error in _errors_of_figures(file)]
        return errors if str(first) in errors else [str(first), *errors]
    return []


def _read_whole(file: Path) -> None:
    memory = memory_and_swap()[0]
    if _is_project_file(file):
        profiles.project_overrides(
            # Any notebook beside the file: its entries are checked, whatever they match.
            file,
            file.absolute().parent / "any.ipynb",
            machine_memory=memory,
        )
    else:
        # "./" makes a file name of it: a file may have the name of a built-in profile.
        profiles.load_profile(os.path.join(".", file), machine_memory=memory)


def _is_project_file(file: Path) -> bool:
    """Return whether a file is a safe-exec.yaml, by its name or its content. Raises LimitsError."""
    return file.name == profiles.PROJECT_FILE or isinstance(_limits_of(file), tuple)


def _limits_of(file: Path) -> object:
    sections = load(file).mapping("the document")
    return sections["limits"].data if "limits" in sections else None


def _errors_of_figures(file: Path) -> Iterator[LimitsError]:
    """Yield the errors of single values; nothing if the file as a whole is invalid."""
    try:
        limits = _limits_of(file)
    except LimitsError:
        return
    # A safe-exec.yaml has a list of entries, a limits file a single mapping.
    mappings = (
        [item.data for item in limits if isinstance(item, Value)]
        if isinstance(limits, tuple)
        else [limits]
    )
    memory = memory_and_swap()[0]
    for mapping in mappings:
        for key, value in mapping.items() if isinstance(mapping, Mapping) else ():
            try:
                # Each value alone, because the parser stops at its first error.
                parse_layer({key: value} if key not in _NOT_LIMITS else {}, machine_memory=memory)
            except LimitsError as error:
                yield error
