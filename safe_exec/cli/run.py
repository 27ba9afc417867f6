"""``safe-exec run``: the main job."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from msgspec.structs import replace

from safe_exec.cli.inputs import (
    environment_with,
    input_options,
    inputs_of,
    variables_of,
    walls_with,
)
from safe_exec.errors import UsageError
from safe_exec.kernel.prestart import PrestartedKernel
from safe_exec.limits import spec
from safe_exec.model.limits import FolderUse, LimitName
from safe_exec.model.verdict import Verdict
from safe_exec.sandbox.planner import CHOOSABLE
from safe_exec.units import UnitError, parse_duration
from safe_exec.workflows.prepare import Bisect, Job, PreparedJob, command_line, prepare, refuse_same

if TYPE_CHECKING:
    from safe_exec.model.events import EventSink


def limit_options(function: Any) -> Any:
    """An option for each limit."""
    return options_of(spec.OPTIONS)(function)


def options_of(rows: Sequence[spec.LimitSpec]) -> Callable[[Any], Any]:
    """An option for each of these limits."""

    def decorate(function: Any) -> Any:
        for row in reversed(rows):
            option = click.option(f"--{row.option}", row.name, metavar=row.metavar, help=row.help)
            function = option(function)
        return function

    return decorate


def wall_options(function: Any) -> Any:
    """The options of isolation."""
    for option in reversed(WALL_OPTIONS):
        function = option(function)
    return function


WALL_OPTIONS = (
    click.option(
        "--network/--no-network",
        default=None,
        help="Let it reach other hosts, or not; loopback always works.",
    ),
    click.option("--read-only", is_flag=True, help="Let it write nothing in its folder."),
    click.option(
        "--show",
        multiple=True,
        metavar="PATH",
        help="Let it read this directory or file, though isolation hides it.",
    ),
    click.option(
        "--writable",
        multiple=True,
        metavar="PATH",
        help="Let it write here too; what it writes is kept.",
    ),
    click.option("--hide", multiple=True, metavar="PATH", help="Hide a directory or file from it."),
    click.option(
        "--env",
        "env_names",
        multiple=True,
        metavar="NAME",
        help="Let it see this variable of the environment.",
    ),
    click.option(
        "--device",
        "devices",
        multiple=True,
        metavar="PATH",
        help="Let it use this device (/dev/nvidia0).",
    ),
)


@click.command("run", short_help="Run a notebook inside limits and say why its kernel died.")
@click.argument("notebook", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output-notebook",
    "out",
    type=click.Path(path_type=Path),
    help="The annotated notebook [NB.out.ipynb].",
)
@click.option(
    "--verdict", type=click.Path(path_type=Path), help="The verdict as JSON [NB.verdict.json]."
)
@click.option(
    "--limits",
    metavar="NAME|FILE",
    help="A profile (default, ci, strict, untrusted) or a YAML file of your own.",
)
@limit_options
@wall_options
@input_options
@click.option(
    "--kernel", metavar="NAME", help="Run with this kernel instead of the notebook's own."
)
@click.option(
    "--cwd", type=click.Path(path_type=Path), help="Run in this directory [the notebook's]."
)
@click.option("--allow-errors", is_flag=True, help="Go on after a cell that raises.")
@click.option(
    "--require",
    metavar="LIMIT,...",
    help="Refuse to run unless the system's kernel holds these limits and walls (or: all, walls, none).",
)
@click.option("--mechanisms", metavar="NAME,...", help=f"Use only these: {', '.join(CHOOSABLE)}.")
@click.option(
    "--bisect",
    type=click.Choice([choice.value for choice in Bisect]),
    default=Bisect.AUTO.value,
    help="Search for the culprits [auto].",
)
@click.option("--no-bisect", is_flag=True, help="Do not search for the culprits (--bisect never).")
@click.option(
    "--bisect-budget",
    metavar="T",
    help="Time that the search may take [60s, or 3 times the first run].",
)
@click.option(
    "--events",
    type=click.Path(path_type=Path),
    help="Write the run as JSON lines while it happens.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print the verdict as JSON instead of the diagnosis."
)
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
def command(
    notebook: Path,
    out: Path | None,
    as_json: bool,
    quiet: bool,
    events: Path | None,
    **options: Any,
) -> int:
    """Run NOTEBOOK inside limits; write the annotated notebook and the verdict; say why its kernel died, if it did.

    With --limits ci the notebook sees and writes its folder and the git repository around it; with strict and untrusted its folder
    alone. --show, --writable and --env open more.

    Exit codes: 0 passed, 1 a cell raised, 2 bad usage, 3 the kernel died, 4 timeout, 5 another limit, 6 the kernel did
    not start, 7 safe-exec failed, 130 stopped.

    After a death, a timeout or an error whose cause is a limit, the culprits are searched for, unless the notebook talked to other
    hosts: a search runs cells again. Ctrl-C then keeps the best so far.
    """
    with PrestartedKernel() as kernel:
        # One look and all input is checked: from here on whatever happens ends in a verdict.
        prepared = prepare(replace(job_of(notebook, options), output=out), kernel)
        if events is not None:
            refuse_same(
                {
                    "the notebook": notebook,
                    "-o": prepared.paths.notebook,
                    "--verdict": prepared.paths.verdict,
                    "--events": events,
                }
            )
        verdict = _run(prepared, events, quiet=quiet or (as_json and not sys.stderr.isatty()))
    _show(verdict, as_json=as_json, quiet=quiet)
    return verdict.exit_code


def job_of(notebook: Path, options: Mapping[str, Any], *, lenient: bool = False) -> Job:
    """The job that the options of a command describe. Raises UsageError."""
    variables = variables_of(options)
    limits = {
        name.value: options[name.value] for name in LimitName if options[name.value] is not None
    }
    if "output" in limits and "cell_output" not in limits:
        limits["cell_output"] = limits["output"]
    mechanisms = options["mechanisms"]
    if options["limits"] == "":
        raise UsageError("--limits: expected the name of a profile or a file, found nothing")
    return Job(
        path=notebook,
        limits=options["limits"],
        options=limits,
        inputs=inputs_of(options, lenient=lenient),
        env=environment_with(variables),
        walls=walls_with(walls_of(options), variables),
        verdict=options["verdict"],
        kernel=options["kernel"],
        cwd=options["cwd"],
        allow_errors=options["allow_errors"],
        require=options["require"],
        mechanisms=None
        if mechanisms is None
        else tuple(part.strip() for part in mechanisms.split(",")),
        command=command_line(),
        bisect=Bisect.NEVER if options["no_bisect"] else Bisect(options["bisect"]),
        bisect_budget=parse_budget(options["bisect_budget"]),
    )


def walls_of(options: Mapping[str, Any], prefix: str = "--") -> dict[str, Any]:
    """The changes of isolation that the options ask for; ``prefix`` begins their names in errors.

    Raises UsageError for a path that does not exist or is /, and for a variable's name with a value.
    """
    walls: dict[str, Any] = {}
    if options["network"] is not None:
        walls["network"] = options["network"]
    if options["read_only"]:
        walls["folder"] = FolderUse.READ
    if options["env_names"]:
        walls["env"] = tuple(_variable(f"{prefix}env", name) for name in options["env_names"])
    for name in ("show", "writable", "hide", "devices"):
        if options[name]:
            walls[name] = tuple(
                existing_path(f"{prefix}{name.removesuffix('s')}", path) for path in options[name]
            )
    return walls


def _variable(option: str, name: str) -> str:
    if not name or "=" in name:
        raise UsageError(
            f"{option} {name}: expected the name of a variable that is set for safe-exec itself"
        )
    return name


def existing_path(option: str, path: str) -> str:
    """The absolute path that an option names; a link stays one. Raises UsageError."""
    full = os.path.abspath(path)
    if not os.path.exists(full):
        raise UsageError(f"{option} {path}: no such file or directory")
    if os.path.realpath(full) == "/":
        raise UsageError(
            f"{option} {path}: / itself cannot be named; name a directory or file in it"
        )
    return full


def parse_budget(text: str | None, option: str = "--bisect-budget") -> float | None:
    """Seconds of a budget. Raises UsageError."""
    if text is None:
        return None
    try:
        seconds = parse_duration(text)
    except UnitError as error:
        raise UsageError(f"{option}: {error}") from None
    if seconds is None:
        raise UsageError(
            f"{option}: expected a time such as 90s or 5m; a search without an end is not offered"
        )
    return seconds


def _run(prepared: PreparedJob, events: Path | None, *, quiet: bool) -> Verdict:
    import asyncio  # all of this while the kernel starts

    from safe_exec.reports import progress
    from safe_exec.reports.event_log import EventLog
    from safe_exec.workflows.run import run_job

    with contextlib.ExitStack() as stack:
        sinks: list[EventSink] = []
        if events is not None:
            sinks.append(stack.enter_context(EventLog(events)))
        sinks.append(stack.enter_context(progress.Progress(sys.stderr, quiet=quiet)))
        return asyncio.run(run_job(prepared, tuple(sinks)))


def _show(verdict: Verdict, *, as_json: bool, quiet: bool) -> None:
    from safe_exec.reports import terminal, verdict_json

    if as_json:
        sys.stdout.buffer.write(verdict_json.dumps(verdict))
        sys.stdout.buffer.flush()
    elif not quiet:
        terminal.print_diagnosis(verdict, sys.stdout)
