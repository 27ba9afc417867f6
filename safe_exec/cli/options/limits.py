"""The options of limits and of isolation."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from msgspec import Struct
from msgspec.structs import replace

from safe_exec.cli.options.group import Decorator, collected, option_group
from safe_exec.errors import UsageError
from safe_exec.limits import spec
from safe_exec.model.limits import FolderUse

Figures = Mapping[str, str]
"""The limits that the user gave, by name, as text with units."""


class WallOptions(Struct, frozen=True, kw_only=True):
    """The options of isolation; ``network`` is ``None`` if the profile decides."""

    network: bool | None = None
    read_only: bool = False
    show: tuple[str, ...] = ()
    writable: tuple[str, ...] = ()
    hide: tuple[str, ...] = ()
    env_names: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()

    def arguments(self) -> list[str]:
        """Return the arguments of a command that have the same effect."""
        argv = []
        if self.network is not None:
            argv.append("--network" if self.network else "--no-network")
        argv += ["--read-only"] if self.read_only else []
        for option, items in (
            ("show", self.show),
            ("writable", self.writable),
            ("hide", self.hide),
            ("env", self.env_names),
            ("device", self.devices),
        ):
            argv += [word for item in items for word in (f"--{option}", item)]
        return argv

    def absolute(self) -> WallOptions:
        """Return the same options for a command that starts in another directory."""

        def full(paths: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(str(Path(path).absolute()) for path in paths)

        return replace(
            self,
            show=full(self.show),
            writable=full(self.writable),
            hide=full(self.hide),
            devices=full(self.devices),
        )


def limit_options(rows: Sequence[spec.LimitSpec] = spec.OPTIONS) -> Decorator:
    """Return a decorator with an option for each limit; the command gets ``figures``."""
    return collected(
        "figures",
        [
            click.option(f"--{row.option}", row.name, metavar=row.metavar, help=row.help)
            for row in rows
        ],
        [row.name for row in rows],
        lambda values: {name: text for name, text in values.items() if text is not None},
    )


wall_options = option_group(
    "walls",
    WallOptions,
    (
        click.option(
            "--network/--no-network",
            default=None,
            help="Allow or forbid connections to other hosts.",
        ),
        click.option("--read-only", is_flag=True, help="Forbid writing to the notebook's folder."),
        click.option(
            "--show",
            multiple=True,
            metavar="PATH",
            help="Let the notebook read what isolation hides.",
        ),
        click.option(
            "--writable",
            multiple=True,
            metavar="PATH",
            help="Let the notebook write here; the files stay.",
        ),
        click.option(
            "--hide",
            multiple=True,
            metavar="PATH",
            help="Hide a directory or file from the notebook.",
        ),
        click.option(
            "--env",
            "env_names",
            multiple=True,
            metavar="NAME",
            help="Pass on this environment variable of yours.",
        ),
        click.option(
            "--device",
            "devices",
            multiple=True,
            metavar="PATH",
            help="Let the notebook use this device (/dev/nvidia0).",
        ),
    ),
)


def figure_arguments(figures: Figures) -> list[str]:
    """Return the options of a command that set these limits.

    The key ``limits`` becomes `--limits`.
    """
    return [word for key, text in figures.items() for word in (f"--{key.replace('_', '-')}", text)]


def demand_profile_name(profile: str | None) -> None:
    """Raise UsageError if ``--limits`` is empty."""
    # An unset variable in a script (--limits "$LIMITS") must not mean the default profile.
    if profile == "":
        raise UsageError("--limits: expected the name of a profile or a file, found nothing")


def mechanism_names(text: str | None) -> tuple[str, ...] | None:
    """Split the value of ``--mechanisms``; ``None`` allows all."""
    return None if text is None else tuple(part.strip() for part in text.split(","))


def walls_of(options: WallOptions, prefix: str = "--") -> dict[str, Any]:
    """Return the changes to isolation that the options request.

    ``prefix`` starts the names of options in errors. Raises UsageError for a path that does not
    exist or is /, and for a variable with a value.
    """
    walls: dict[str, Any] = {}
    # None means neither --network nor --no-network: the profile decides.
    if options.network is not None:
        walls["network"] = options.network
    if options.read_only:
        walls["folder"] = FolderUse.READ
    if options.env_names:
        walls["env"] = tuple(_variable(f"{prefix}env", name) for name in options.env_names)
    for name, option, paths in (
        ("show", "show", options.show),
        ("writable", "writable", options.writable),
        ("hide", "hide", options.hide),
        ("devices", "device", options.devices),
    ):
        if paths:
            walls[name] = tuple(existing_path(f"{prefix}{option}", path) for path in paths)
    return walls


def _variable(option: str, name: str) -> str:
    # A value on the command line would be visible to every user, in the list of processes.
    if not name or "=" in name:
        raise UsageError(
            f"{option} {name.partition('=')[0]}: expected the name of a variable of yours; to set one,"
            " use --set-env NAME=VALUE"
        )
    return name


def existing_path(option: str, path: str) -> str:
    """Return the absolute path that an option names. Raises UsageError."""
    # A symlink stays one: bubblewrap mounts its target under the name that the notebook knows.
    full = os.path.abspath(path)
    if not os.path.exists(full):
        raise UsageError(f"{option} {path}: no such file or directory")
    # Opening / would open every directory that isolation hides.
    if os.path.realpath(full) == "/":
        raise UsageError(
            f"{option} {path}: / itself cannot be named; name a directory or file in it"
        )
    return full
