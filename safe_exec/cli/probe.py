"""``safe-exec probe``: measure how much of a limit a notebook needs."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import sys
from pathlib import Path

import click
from msgspec import Struct

from safe_exec.cli import tables
from safe_exec.cli.options.group import option_group
from safe_exec.cli.options.job import parse_budget
from safe_exec.cli.options.limits import (
    Figures,
    WallOptions,
    demand_profile_name,
    figure_arguments,
    limit_options,
    mechanism_names,
    wall_options,
    walls_of,
)
from safe_exec.cli.probe_report import RunLines, as_document, report
from safe_exec.errors import UsageError
from safe_exec.experiments.threshold.scales import SCALES
from safe_exec.experiments.threshold.search import StopReason
from safe_exec.model.limits import LimitName
from safe_exec.reports.masking import mask_for
from safe_exec.reports.terminal import Style
from safe_exec.units import UnitError, parse_percent
from safe_exec.workflows.job import Bisect, Job, PreparedJob
from safe_exec.workflows.prepare import prepare
from safe_exec.workflows.probe import ProbeReport, probe

NOT_FOUND, CANCELLED = 1, 130
# A finer precision would measure only the noise between runs.
FINEST = 0.001
LIMITS = [name.value.replace("_", "-") for name in SCALES]


class ProbeOptions(Struct, frozen=True, kw_only=True):
    """The options that every run of a probe has, as the user gave them."""

    limits: str | None = None
    figures: Figures = {}
    walls: WallOptions = WallOptions()
    kernel: str | None = None
    cwd: Path | None = None
    allow_errors: bool = False
    mechanisms: str | None = None

    def arguments(self, *, without: LimitName) -> list[str]:
        """Return the arguments of `safe-exec run` with the same effect, except for one limit."""
        figures = {name: text for name, text in self.figures.items() if name != without.value}
        argv = ["--limits", self.limits] if self.limits is not None else []
        argv += [*figure_arguments(figures), *self.walls.arguments()]
        argv += ["--kernel", self.kernel] if self.kernel is not None else []
        argv += ["--cwd", str(self.cwd)] if self.cwd is not None else []
        argv += ["--allow-errors"] if self.allow_errors else []
        argv += ["--mechanisms", self.mechanisms] if self.mechanisms is not None else []
        return argv


probe_options = option_group(
    "options",
    ProbeOptions,
    (
        click.option(
            "--limits",
            metavar="NAME|FILE",
            help="A profile (default, ci, strict) or your own YAML file.",
        ),
        limit_options(),
        wall_options,
        click.option(
            "--kernel", metavar="NAME", help="Kernel to use instead of the notebook's own."
        ),
        click.option(
            "--cwd",
            type=click.Path(path_type=Path),
            help="Directory whose copy the notebook runs in [the notebook's folder].",
        ),
        click.option(
            "--allow-errors", is_flag=True, help="Continue after a cell that raises an exception."
        ),
        click.option(
            "--mechanisms",
            metavar="NAME,...",
            help="Use only these mechanisms: cgroup-v2, cgroup-v1, rlimit, watchdog.",
        ),
    ),
)


@click.command(
    "probe",
    short_help="Measure how much of a limit a notebook needs.",
)
@click.argument("notebook", type=click.Path(path_type=Path))
@click.argument("limit", metavar="LIMIT", type=click.Choice(LIMITS))
@click.option(
    "--precision",
    metavar="PERCENT",
    default="5%",
    show_default=True,
    help="Stop when the passing and the failing value differ by less than this.",
)
@click.option(
    "--budget",
    metavar="T",
    default="10m",
    show_default=True,
    help="Time limit of all runs together.",
)
@probe_options
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
def command(
    *,
    notebook: Path,
    limit: str,
    precision: str,
    budget: str,
    options: ProbeOptions,
    as_json: bool,
    quiet: bool,
) -> int:
    """Find the smallest LIMIT with which NOTEBOOK passes and the largest with which it fails.

    LIMIT is one of memory, cpu-time, cell-timeout, timeout, processes, open-files, file-size. The
    first run uses the given limits, and its usage tells where to search. Counts are exact; other
    limits are found to --precision. Each run uses a copy of the folder, and nothing is written
    beside the notebook. All cells run many times, even if they contact other hosts.

    Exit codes: 0 found, 1 not found (another failure, or time ran out), 2 bad usage, 130 stopped.
    """
    name = LimitName(limit.replace("-", "_"))
    share, seconds = parse_precision(precision), parse_budget(budget, "--budget")
    prepared = prepare(_job(notebook, options))
    with RunLines(
        sys.stderr, SCALES[name], quiet=quiet or (as_json and not sys.stderr.isatty())
    ) as lines:
        report = asyncio.run(
            probe(prepared, name, precision=share, budget=seconds or 0.0, observer=lines)
        )
    # Summaries of failures may quote secrets of the environment.
    mask = mask_for({**os.environ, **(prepared.job.env or {})})
    _show(mask.everywhere(report), prepared, options, as_json=as_json, quiet=quiet)
    return exit_code(report)


def exit_code(report: ProbeReport) -> int:
    """Return 0 if both sides of the limit were found, 130 if the probe was interrupted, else 1."""
    if report.bracket.ended is StopReason.CANCELLED:
        return CANCELLED
    return 0 if report.bracket.found else NOT_FOUND


def parse_precision(text: str) -> float:
    """Parse a percentage such as ``5%`` into a share (0.05). Raises UsageError."""
    try:
        share = parse_percent(text)
    except UnitError as error:
        raise UsageError(f"--precision: {text!r} is not more than 0% and up to 100%") from error
    if share is None or share < FINEST:
        raise UsageError(
            f"--precision: {text!r:.60} is not a percentage from {FINEST:.1%} to 100%, such as 5%"
        )
    return share


def _job(path: Path, options: ProbeOptions) -> Job:
    demand_profile_name(options.limits)
    return Job(
        path=path,
        limits=options.limits,
        options=options.figures,
        walls=walls_of(options.walls),
        kernel=options.kernel,
        cwd=options.cwd,
        allow_errors=options.allow_errors,
        mechanisms=mechanism_names(options.mechanisms),
        # Every run of the probe would start its own search.
        bisect=Bisect.NEVER,
        writes=False,
    )


def reproduce_command(path: Path, options: ProbeOptions, probed: LimitName, value: str) -> str:
    """Return the ``run`` command that repeats the run with this value."""
    # A name with a leading dash would be an option.
    name = f"./{path}" if str(path).startswith("-") else str(path)
    value_of_probe = figure_arguments({probed.value: value})
    # All options of the probe are repeated: each may decide whether the run fails.
    return shlex.join(
        ["safe-exec", "run", name, *value_of_probe, *options.arguments(without=probed)]
    )


def _show(
    probe_report: ProbeReport,
    prepared: PreparedJob,
    options: ProbeOptions,
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    path, failing = prepared.job.path, probe_report.failing()
    command = None
    # Without a failing run there is nothing to reproduce.
    if failing is not None:
        command = reproduce_command(
            path, options, probe_report.scale.name, probe_report.scale.written(failing.value)
        )
    if as_json:
        sys.stdout.write(
            json.dumps(
                as_document(probe_report, str(path), command),
                indent=2,
                ensure_ascii=False,
                allow_nan=False,
            )
            + "\n"
        )
    elif not quiet:
        style = Style.of(sys.stdout)
        tables.write(report(probe_report, str(path), command, style), style)
