"""``safe-exec kernel``: the command of a kernelspec, for any Jupyter client."""

from __future__ import annotations

import re
from pathlib import Path

import click

from safe_exec.cli.options.limits import (
    Figures,
    WallOptions,
    limit_options,
    mechanism_names,
    wall_options,
    walls_of,
)
from safe_exec.limits import spec

# A setting of traitlets; some clients append them to the command of an ipykernel.
_SETTING = re.compile(r"--[A-Za-z]\w*\.\w+=")


@click.command(
    "kernel",
    short_help="Run a kernel inside limits for a Jupyter client, which starts this command.",
    # For such settings, whose names click cannot know.
    context_settings={"ignore_unknown_options": True},
)
@click.option(
    "-f",
    "--connection-file",
    required=True,
    type=click.Path(path_type=Path),
    help="The connection file that the client has written.",
)
@click.option(
    "--kernel",
    default="python3",
    metavar="NAME",
    show_default=True,
    help="The kernel to run inside limits.",
)
@click.option(
    "--limits",
    metavar="NAME|FILE",
    help="A profile (default, ci, strict, untrusted) or a YAML file of your own.",
)
@limit_options()
@wall_options
@click.option(
    "--require",
    metavar="LIMIT,...",
    help="Refuse to start unless the system's kernel holds these limits and walls (or: all, walls, none).",
)
@click.option("--mechanisms", metavar="NAME,...", help="Use only these mechanisms, as `run` does.")
@click.option(
    "--on-death",
    type=click.Choice(["exit", "restart"]),
    default="exit",
    show_default=True,
    help="After the kernel died: end, so that the client restarts it, or start a fresh kernel at once.",
)
@click.option(
    "--restore",
    is_flag=True,
    help="After the kernel died, go on with the variables from before the cell, if possible (Python on Linux).",
)
@click.option("--no-history", is_flag=True, help="Do not record the session.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[--CLASS.TRAIT=VALUE]...")
def command(
    *,
    connection_file: Path,
    kernel: str,
    limits: str | None,
    figures: Figures,
    walls: WallOptions,
    require: str | None,
    mechanisms: str | None,
    on_death: str,
    restore: bool,
    no_history: bool,
    arguments: tuple[str, ...],
) -> int:
    """Run a kernel inside limits for the client that wrote the connection file.

    Jupyter clients call this; `safe-exec kernelspec install` tells them to. Settings of an ipykernel that a client adds
    (--HistoryManager.hist_file=:memory:) go to the kernel. When the kernel dies, the running cell gets the
    diagnosis as its error.

    Exit codes: 0 the client asked for the end, 2 bad usage, 3 the kernel died, 4 a cell's time was up and the kernel did not
    answer, 5 another limit, 6 the kernel did not start, 7 safe-exec failed.
    """
    from safe_exec.errors import UsageError
    from safe_exec.interactive.proxy import OnDeath
    from safe_exec.interactive.start import KernelOptions, serve

    for name in figures:
        # A session ends with its client, so only its cells have limits of time and output.
        if not spec.SPECS[name].of_session:
            raise UsageError(f"--{name}: a session has no such limit; use --cell-{name}")
    # A misspelt option of ours must be an error, and not reach the kernel.
    for argument in arguments:
        if not _SETTING.match(argument):
            raise UsageError(f"no such option: {argument}; `safe-exec kernel --help` lists them")
    return serve(
        KernelOptions(
            connection_file=connection_file,
            kernel=kernel,
            limits=limits,
            figures=figures,
            walls=walls_of(walls),
            require=require,
            mechanisms=mechanism_names(mechanisms),
            on_death=OnDeath(on_death),
            restores=restore,
            records=not no_history,
            arguments=arguments,
        )
    )
