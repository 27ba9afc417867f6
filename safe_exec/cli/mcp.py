"""``safe-exec mcp``: a server of the Model Context Protocol for agents."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import click

from safe_exec.cli.options.limits import (
    Figures,
    WallOptions,
    figure_arguments,
    limit_options,
    wall_options,
    walls_of,
)
from safe_exec.limits import spec


@click.command("mcp", short_help="Serve tools for agents: run notebooks and cells inside limits.")
@click.argument(
    "folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=".",
)
@click.option(
    "--limits",
    metavar="NAME|FILE",
    default="untrusted",
    show_default=True,
    help="Profile default, ci, strict or untrusted, or your YAML file.",
)
@limit_options()
@wall_options
@click.option(
    "--kernel",
    default="python3",
    metavar="NAME",
    show_default=True,
    help="The kernel for cells; notebooks name their own.",
)
def command(*, folder: Path, limits: str, figures: Figures, walls: WallOptions, kernel: str) -> int:
    """Serve an agent on stdin and stdout: it may run notebooks in FOLDER, and cells.

    An MCP client starts this command; docs/integrations.md shows a configuration. The tools are
    run_notebook, run_cells, explain and bisect. Agents cannot change the limits. Needs the extra
    safe-exec[mcp].
    """
    from safe_exec.errors import UsageError

    if find_spec("mcp") is None:
        raise UsageError("the package mcp is missing; install safe-exec[mcp]")
    from safe_exec.limits import profiles
    from safe_exec.mcp_server.server import serve
    from safe_exec.mcp_server.settings import Settings
    from safe_exec.sandbox.host.capabilities import detect

    # Checked now, so that a mistake is an error of the command and not of each call.
    profiles.resolve_simple(
        {"limits": limits, **figures}, None, machine_memory=detect().memory_total
    )
    for_cells = {key: value for key, value in figures.items() if spec.SPECS[key].of_session}
    serve(
        Settings(
            folder=folder.resolve(),
            limits=limits,
            figures=figures,
            walls=walls_of(walls),
            arguments=(*figure_arguments(for_cells), *walls.absolute().arguments()),
            kernel=kernel,
        )
    )
    return 0
