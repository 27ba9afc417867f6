"""``safe-exec probe``: measure how much of a limit a notebook needs."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from safe_exec.cli import tables
from safe_exec.cli.probe_report import RunLines, as_document, report
from safe_exec.cli.run import limit_options, parse_budget, wall_options, walls_of
from safe_exec.errors import UsageError
from safe_exec.experiments.threshold.scales import SCALES
from safe_exec.experiments.threshold.search import StopReason
from safe_exec.model.limits import LimitName
from safe_exec.reports.masking import mask_for
from safe_exec.reports.terminal import Style
from safe_exec.units import UnitError, parse_percent
from safe_exec.workflows.prepare import Bisect, Job, PreparedJob, prepare
from safe_exec.workflows.probe import ProbeReport, probe

NOT_FOUND, CANCELLED = 1, 130
# A finer precision would measure only the noise between runs.
FINEST = 0.001
LIMITS = [name.value.replace("_", "-") for name in SCALES]


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
@click.option(
    "--limits",
    metavar="NAME|FILE",
    help="A profile (default, ci, strict) or your own YAML file.",
)
@limit_options
@wall_options
@click.option("--kernel", metavar="NAME", help="Kernel to use instead of the notebook's own.")
@click.option(
    "--cwd",
    type=click.Path(path_type=Path),
    help="Directory whose copy the notebook runs in [the notebook's folder].",
)
@click.option(
    "--allow-errors", is_flag=True, help="Continue after a cell that raises an exception."
)
@click.option(
    "--mechanisms",
    metavar="NAME,...",
    help="Use only these mechanisms: cgroup-v2, cgroup-v1, rlimit, watchdog.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
def command(notebook: Path, limit: str, as_json: bool, quiet: bool, **options: Any) -> int:
    """Find the smallest LIMIT with which NOTEBOOK passes and the largest with which it fails.

    LIMIT is one of memory, cpu-time, cell-timeout, timeout, processes, open-files, file-size. The
    first run uses the given limits, and its usage tells where to search. Counts are exact; other
    limits are found to --precision. Each run uses a copy of the folder, and nothing is written
    beside the notebook. All cells run many times, even if they contact other hosts.

    Exit codes: 0 found, 1 not found (another failure, or time ran out), 2 bad usage, 130 stopped.
    """
    name = LimitName(limit.replace("-", "_"))
    # Removed from the options, because the command that reproduces a run has no such options.
    share, seconds = (
        parse_precision(options.pop("precision")),
        parse_budget(options.pop("budget"), "--budget"),
    )
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
    """Return 0 for a bracket, 130 for an interrupted probe, else 1."""
    if report.bracket.ended is StopReason.CANCELLED:
        return CANCELLED
    return 0 if report.bracket.found else NOT_FOUND


def parse_precision(text: str) -> float:
    """Parse the share in ``5%``. Raises UsageError."""
    try:
        share = parse_percent(text)
    except UnitError as error:
        raise UsageError(f"--precision: {text!r} is not more than 0% and up to 100%") from error
    if share is None or share < FINEST:
        raise UsageError(
            f"--precision: {text!r:.60} is not a percentage from {FINEST:.1%} to 100%, such as 5%"
        )
    return share


def _job(path: Path, options: Mapping[str, Any]) -> Job:
    mechanisms = options["mechanisms"]
    # An unset variable in a script (--limits "$LIMITS") must not mean the default profile.
    if options["limits"] == "":
        raise UsageError("--limits: expected the name of a profile or a file, found nothing")
    return Job(
        path=path,
        limits=options["limits"],
        options={
            name.value: options[name.value]
            for name in LimitName
            if options.get(name.value) is not None
        },
        walls=walls_of(options),
        kernel=options["kernel"],
        cwd=options["cwd"],
        allow_errors=options["allow_errors"],
        mechanisms=None
        if mechanisms is None
        else tuple(part.strip() for part in mechanisms.split(",")),
        # Every run of the probe would start its own search.
        bisect=Bisect.NEVER,
        writes=False,
    )


# Parameters whose names differ from their options.
NAMES = {"env_names": "env", "devices": "device"}


def reproduce_command(path: Path, options: Mapping[str, Any], probed: LimitName, value: str) -> str:
    """Return the ``run`` command that repeats the run with this value."""
    # A name with a leading dash would be an option.
    name = f"./{path}" if str(path).startswith("-") else str(path)
    arguments = ["safe-exec", "run", name, f"--{probed.value.replace('_', '-')}", value]
    for key, option_value in options.items():
        option = NAMES.get(key, key).replace("_", "-")
        if key == probed.value or option_value is None:
            continue
        if isinstance(option_value, tuple):
            arguments += [word for item in option_value for word in (f"--{option}", str(item))]
        elif isinstance(option_value, bool):
            arguments += (
                [f"--{option}"] if option_value else [f"--no-{option}"] if key == "network" else []
            )
        else:
            # All options of the probe are repeated: each may decide whether the run fails.
            arguments += [f"--{option}", str(option_value)]
    return shlex.join(arguments)


def _show(
    probe_report: ProbeReport,
    prepared: PreparedJob,
    options: Mapping[str, Any],
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
