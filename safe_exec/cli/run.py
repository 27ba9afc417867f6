"""``safe-exec run``: run one notebook."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from msgspec.structs import replace

from safe_exec.cli.grouped_help import GroupedCommand
from safe_exec.cli.inputs import (
    comparison_of,
    environment_with,
    input_options,
    inputs_of,
    variables_of,
    walls_with,
)
from safe_exec.cli.outputs import follow_option, form_of, output_options
from safe_exec.cli.retries import retry_of, retry_options
from safe_exec.errors import UsageError
from safe_exec.kernel.prestart import PrestartedKernel
from safe_exec.limits import spec
from safe_exec.model.limits import FolderUse, LimitName
from safe_exec.model.verdict import Verdict
from safe_exec.notebook.kernel_choice import KernelFallback
from safe_exec.sandbox.planner import CHOOSABLE
from safe_exec.units import UnitError, parse_duration
from safe_exec.workflows.prepare import Bisect, Job, PreparedJob, command_line, prepare, refuse_same

if TYPE_CHECKING:
    from safe_exec.model.events import EventSink
    from safe_exec.workflows.retry import RetryPolicy


def limit_options(function: Any) -> Any:
    """Add an option for each limit."""
    return options_of(spec.OPTIONS)(function)


def options_of(rows: Sequence[spec.LimitSpec]) -> Callable[[Any], Any]:
    """Return a decorator that adds an option for each of these limits."""

    def decorate(function: Any) -> Any:
        # Decorators apply from the inside out, so the last option is added first.
        for row in reversed(rows):
            option = click.option(f"--{row.option}", row.name, metavar=row.metavar, help=row.help)
            function = option(function)
        return function

    return decorate


def wall_options(function: Any) -> Any:
    """Add the options of isolation."""
    # Decorators apply from the inside out, so the last option is added first.
    for option in reversed(WALL_OPTIONS):
        function = option(function)
    return function


WALL_OPTIONS = (
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
        help="Let the notebook read a path that isolation hides.",
    ),
    click.option(
        "--writable",
        multiple=True,
        metavar="PATH",
        help="Let the notebook write to this path; the files stay.",
    ),
    click.option(
        "--hide", multiple=True, metavar="PATH", help="Hide a directory or file from the notebook."
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
)


@click.command(
    "run",
    cls=GroupedCommand,
    short_help="Run a notebook inside limits, and explain why its kernel died.",
)
@click.argument("notebook", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output-notebook",
    "out",
    type=click.Path(path_type=Path),
    help="Path of the annotated notebook [NB.out.ipynb].",
)
@click.option(
    "--verdict",
    type=click.Path(path_type=Path),
    help="Path of the verdict, a JSON document [NB.verdict.json].",
)
@click.option(
    "--limits",
    metavar="NAME|FILE",
    help="Profile default, ci, strict or untrusted, or your YAML file.",
)
@limit_options
@wall_options
@input_options
@output_options
@retry_options
@click.option("--kernel", metavar="NAME", help="Kernel to use instead of the notebook's own.")
@click.option(
    "--kernel-fallback",
    type=click.Choice([choice.value for choice in KernelFallback]),
    default=KernelFallback.LANGUAGE.value,
    help="If the kernel is missing: use one of its language, or fail.",
)
@click.option(
    "--cwd", type=click.Path(path_type=Path), help="Working directory [the notebook's folder]."
)
@click.option(
    "--allow-errors", is_flag=True, help="Continue after a cell that raises an exception."
)
@click.option(
    "--keep-going",
    is_flag=True,
    help="Continue after each failure, even a death, and report all.",
)
@click.option(
    "--require",
    metavar="LIMIT,...",
    help="Refuse to run unless the system enforces these (or: all).",
)
@click.option(
    "--mechanisms",
    metavar="NAME,...",
    help=f"Use only these mechanisms: {', '.join(CHOOSABLE)}.",
)
@click.option(
    "--locals",
    "with_locals",
    is_flag=True,
    help="Show local variables in the native stack of a crash; secrets are masked.",
)
@click.option(
    "--bisect",
    type=click.Choice([choice.value for choice in Bisect]),
    default=Bisect.AUTO.value,
    help="Search for the cells that cause a failure [auto].",
)
@click.option("--no-bisect", is_flag=True, help="Do not search for culprits (--bisect never).")
@click.option(
    "--bisect-budget",
    metavar="T",
    help="Time limit of the search [60s, or 3 times the first run].",
)
@click.option(
    "--events",
    type=click.Path(path_type=Path),
    help="Write events as JSON lines to this file during the run.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print the verdict as JSON instead of the diagnosis."
)
@follow_option
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
def command(
    *,
    notebook: Path,
    out: Path | None,
    as_json: bool,
    quiet: bool,
    follow: bool,
    events: Path | None,
    **options: Any,
) -> int:
    """Run NOTEBOOK inside limits, write an annotated notebook and a verdict, and explain failures.

    By default the notebook can read and write your files and use the network. With --limits ci it
    can read and write its folder and the git repository around it; with strict and untrusted only
    its folder. --show, --writable and --env allow more.

    Exit codes: 0 passed, 1 a cell raised an exception, 2 bad usage, 3 the kernel died, 4 timeout,
    5 another limit, 6 the kernel did not start, 7 safe-exec failed, 130 stopped by a signal.

    After a death, a timeout or an error caused by a limit, safe-exec searches for the culprits,
    unless the notebook contacted other hosts, because a search runs cells again. Ctrl-C during the
    search keeps the best result so far.
    """
    job = replace(job_of(notebook, options), output=out)
    quiet_progress = quiet or (as_json and not sys.stderr.isatty())
    while True:
        # Ends a kernel that was started early if the input turns out to be invalid.
        with PrestartedKernel() as kernel:
            # All input is checked here. From the next line on every outcome is a verdict.
            prepared = prepare(job, kernel)
            _refuse_same_events(prepared, events)
            # The kernel starts already: this imports what the run needs.
            policy = retry_of(options)
            verdict = _run(prepared, policy, events, quiet=quiet_progress, follow=follow)
        if not policy.allows(verdict, len(job.earlier_attempts) + 1):
            break
        from safe_exec.workflows.retry import after_attempt

        job = after_attempt(job, verdict)
        if not quiet_progress:
            click.echo(f"trying again: {job.earlier_attempts[-1]}", err=True)
    _show(verdict, as_json=as_json, quiet=quiet)
    return verdict.exit_code


def job_of(notebook: Path, options: Mapping[str, Any], *, lenient: bool = False) -> Job:
    """Build the job that the options of a command describe. Raises UsageError."""
    variables = variables_of(options)
    limits = {
        name.value: options[name.value] for name in LimitName if options[name.value] is not None
    }
    # A single cell may use all of the output, unless its own limit says otherwise.
    if "output" in limits and "cell_output" not in limits:
        limits["cell_output"] = limits["output"]
    mechanisms = options["mechanisms"]
    # An unset variable in a script (--limits "$LIMITS") must not mean the default profile.
    if options["limits"] == "":
        raise UsageError("--limits: expected the name of a profile or a file, found nothing")
    return Job(
        path=notebook,
        limits=options["limits"],
        options=limits,
        inputs=inputs_of(options, lenient=lenient),
        comparison=comparison_of(options),
        form=form_of(options),
        keep_files=tuple(options["keep_files"]),
        repeat=options["repeat"],
        env=environment_with(variables),
        walls=walls_with(walls_of(options), variables),
        verdict=options["verdict"],
        kernel=options["kernel"],
        # Among many notebooks, a kernel is meant for those that it can run.
        kernel_of_language=lenient,
        kernel_fallback=KernelFallback(options["kernel_fallback"]),
        cwd=options["cwd"],
        allow_errors=options["allow_errors"],
        with_locals=options.get("with_locals", False),
        keep_going=options["keep_going"],
        require=options["require"],
        mechanisms=None
        if mechanisms is None
        else tuple(part.strip() for part in mechanisms.split(",")),
        command=command_line(),
        bisect=Bisect.NEVER if options["no_bisect"] else Bisect(options["bisect"]),
        bisect_budget=parse_budget(options["bisect_budget"]),
    )


def walls_of(options: Mapping[str, Any], prefix: str = "--") -> dict[str, Any]:
    """Return the changes to isolation that the options request.

    ``prefix`` starts the names of options in errors. Raises UsageError for a path that does not
    exist or is /, and for a variable with a value.
    """
    walls: dict[str, Any] = {}
    # None means neither --network nor --no-network: the profile decides.
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


def parse_budget(text: str | None, option: str = "--bisect-budget") -> float | None:
    """Parse the seconds of a budget. Raises UsageError."""
    if text is None:
        return None
    try:
        seconds = parse_duration(text)
    except UnitError as error:
        raise UsageError(f"{option}: {error}") from None
    # parse_duration accepts "none" for limits; a search without an end helps nobody.
    if seconds is None:
        raise UsageError(
            f"{option}: expected a time such as 90s or 5m; a search without an end is not offered"
        )
    return seconds


def _refuse_same_events(prepared: PreparedJob, events: Path | None) -> None:
    if events is not None:
        refuse_same(
            {
                "the notebook": prepared.job.path,
                "-o": prepared.paths.notebook,
                "--verdict": prepared.paths.verdict,
                "--events": events,
            }
        )


def _run(
    prepared: PreparedJob,
    policy: RetryPolicy,
    events: Path | None,
    *,
    quiet: bool,
    follow: bool,
) -> Verdict:
    # Imported here, while the kernel starts.
    import asyncio

    from safe_exec.reports import progress
    from safe_exec.reports.event_log import EventLog
    from safe_exec.workflows.run import run_job

    with contextlib.ExitStack() as stack:
        sinks: list[EventSink] = []
        if events is not None:
            # Opened first: an unwritable event log is reported before anything runs.
            sinks.append(stack.enter_context(EventLog(events)))
        display = stack.enter_context(progress.Progress(sys.stderr, quiet=quiet))
        follower = None
        if follow:
            from safe_exec.batch.ci import on_github
            from safe_exec.reports.follow import OutputFollower

            follower = OutputFollower(display.write_line, github=on_github())
            sinks.append(follower)
        sinks.append(display)
        on_output = None if follower is None else follower.take
        attempt = len(prepared.job.earlier_attempts) + 1
        return asyncio.run(
            run_job(
                prepared,
                tuple(sinks),
                on_output=on_output,
                worth_a_search=lambda verdict: not policy.allows(verdict, attempt),
            )
        )


def _show(verdict: Verdict, *, as_json: bool, quiet: bool) -> None:
    from safe_exec.reports import terminal, verdict_json

    if as_json:
        # Bytes, because the document is UTF-8 whatever the locale is.
        sys.stdout.buffer.write(verdict_json.dumps(verdict))
        sys.stdout.buffer.flush()
    elif not quiet:
        terminal.print_diagnosis(verdict, sys.stdout)
