"""The options of ``run`` and ``batch``: everything that a job may get from the command line."""

from __future__ import annotations

from pathlib import Path

import click
from msgspec import Struct

from safe_exec.cli.options.group import Decorator, option_group
from safe_exec.cli.options.inputs import (
    InputOptions,
    comparison_of,
    environment_with,
    input_options,
    inputs_of,
    variables_of,
    walls_with,
)
from safe_exec.cli.options.limits import (
    Figures,
    WallOptions,
    demand_profile_name,
    limit_options,
    mechanism_names,
    wall_options,
    walls_of,
)
from safe_exec.cli.options.outputs import OutputOptions, coverage_of, form_of, output_options
from safe_exec.cli.options.retries import RetryOptions, retry_options
from safe_exec.errors import UsageError
from safe_exec.limits import profiles
from safe_exec.model.limits import Limits
from safe_exec.notebook.kernel_choice import KernelFallback
from safe_exec.sandbox.host.capabilities import detect
from safe_exec.sandbox.planner import parse_required
from safe_exec.units import UnitError, parse_duration
from safe_exec.workflows.job import Bisect, Job
from safe_exec.workflows.prepare import command_line


class JobOptions(Struct, frozen=True, kw_only=True):
    """The options that describe a job, as the user gave them.

    ``limits`` names a profile or a file; ``figures`` are single limits that override it.
    """

    limits: str | None
    figures: Figures
    walls: WallOptions
    inputs: InputOptions
    output: OutputOptions
    retry: RetryOptions
    kernel: str | None
    kernel_fallback: str
    cwd: Path | None
    allow_errors: bool
    keep_going: bool
    with_locals: bool
    require: str | None
    mechanisms: str | None
    bisect: str
    no_bisect: bool
    bisect_budget: str | None


def job_options(*, kernel_help: str, cwd_help: str, budget_help: str) -> Decorator:
    """Return a decorator with the options of a job; the command gets ``options``."""
    return option_group(
        "options",
        JobOptions,
        (
            click.option(
                "--limits",
                metavar="NAME|FILE",
                help="Profile (ci, strict, untrusted) or a YAML file.",
            ),
            limit_options(),
            wall_options,
            input_options,
            output_options,
            retry_options,
            click.option("--kernel", metavar="NAME", help=kernel_help),
            click.option(
                "--kernel-fallback",
                type=click.Choice([choice.value for choice in KernelFallback]),
                default=KernelFallback.LANGUAGE.value,
                metavar="HOW",
                help="Replace a missing kernel: language or never.",
            ),
            click.option("--cwd", type=click.Path(path_type=Path), help=cwd_help),
            click.option(
                "--allow-errors",
                is_flag=True,
                help="Continue after a cell that raises an exception.",
            ),
            click.option(
                "--keep-going",
                is_flag=True,
                help="Continue after every failure, even a death.",
            ),
            click.option(
                "--require",
                metavar="LIMIT,...",
                help="Run only if the system enforces these (or all).",
            ),
            click.option(
                "--mechanisms",
                metavar="NAME,...",
                help="Enforce limits only by these (rlimit,watchdog).",
            ),
            click.option(
                "--locals",
                "with_locals",
                is_flag=True,
                help="Show local variables in the stack of a crash.",
            ),
            click.option(
                "--bisect",
                type=click.Choice([choice.value for choice in Bisect]),
                default=Bisect.AUTO.value,
                metavar="WHEN",
                help="Find culprit cells: auto, always, never [auto].",
            ),
            click.option(
                "--no-bisect", is_flag=True, help="Do not search for culprits (--bisect never)."
            ),
            click.option(
                "--bisect-budget",
                metavar="T",
                help=budget_help,
            ),
        ),
    )


def job_of(notebook: Path, options: JobOptions, *, lenient: bool = False) -> Job:
    """Build the job that the options of a command describe. Raises UsageError.

    ``lenient`` is for batches, where a notebook may lack a tag or have another language than
    ``--kernel``.
    """
    variables = variables_of(options.inputs)
    figures = dict(options.figures)
    # A single cell may use all of the output, unless its own limit says otherwise.
    if "output" in figures:
        figures.setdefault("cell_output", figures["output"])
    demand_profile_name(options.limits)
    return Job(
        path=notebook,
        limits=options.limits,
        options=figures,
        inputs=inputs_of(options.inputs, lenient=lenient),
        comparison=comparison_of(options.inputs),
        form=form_of(options.output),
        keep_files=tuple(options.output.keep_files),
        coverage=coverage_of(options.output),
        repeat=options.retry.repeat,
        env=environment_with(variables),
        walls=walls_with(walls_of(options.walls), variables),
        kernel=options.kernel,
        # Among many notebooks, a kernel is meant for those that it can run.
        kernel_of_language=lenient,
        kernel_fallback=KernelFallback(options.kernel_fallback),
        cwd=options.cwd,
        allow_errors=options.allow_errors,
        keep_going=options.keep_going,
        with_locals=options.with_locals,
        require=options.require,
        mechanisms=mechanism_names(options.mechanisms),
        command=command_line(),
        bisect=Bisect.NEVER if options.no_bisect else Bisect(options.bisect),
        bisect_budget=parse_budget(options.bisect_budget),
    )


def check_limits(
    limits: str | None, figures: Figures, require: str | None, prefix: str = "--"
) -> profiles.Profile | None:
    """Check the limits of many notebooks, and return the profile that ``limits`` names.

    Raises LimitsError and UsageError: a wrong limit is one error, not one for each notebook.
    """
    demand_profile_name(limits)
    memory = detect().memory_total
    profiles.parse_overrides(figures, error_prefix=prefix, machine_memory=memory)
    if require is not None:
        try:
            # Which of them are set depends on the notebook.
            parse_required(require, Limits())
        except ValueError as error:
            raise UsageError(f"{prefix}require: {error}") from None
    return None if limits is None else profiles.load_profile(limits, machine_memory=memory)


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
