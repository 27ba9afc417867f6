"""``safe-exec batch``: run many notebooks, as in CI."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import click
from msgspec.structs import replace

from safe_exec.batch.admission import AUTO, capacity_for, parse_jobs
from safe_exec.batch.cluster.connection import LOCAL, ClusterAddress, demand_dask, parse_cluster
from safe_exec.batch.ordering import cut, parse_shard, read_timings
from safe_exec.batch.selection import SelectedNotebook, select
from safe_exec.cli.batch_result import show, unused_inputs
from safe_exec.cli.grouped_help import GroupedCommand
from safe_exec.cli.options.job import JobOptions, check_limits, job_of, job_options
from safe_exec.cli.options.outputs import follow_option
from safe_exec.cli.options.reports import ReportOptions, make_out, out_option, report_options
from safe_exec.cli.options.retries import retry_of
from safe_exec.errors import UsageError
from safe_exec.reports.batch.progress import BatchProgress
from safe_exec.sandbox.host.capabilities import detect, probe_isolation
from safe_exec.sandbox.host.resources import cpus_available, memory_available
from safe_exec.sandbox.planner import parse_mechanisms
from safe_exec.workflows.job import Job
from safe_exec.workflows.prepare import command_line

if TYPE_CHECKING:
    from safe_exec.batch.scheduler import SchedulerFactory

log = logging.getLogger("safe_exec")

STDIN = "-"


@click.command(
    "batch", cls=GroupedCommand, short_help="Run many notebooks, and report on all of them."
)
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@out_option("Directory for all output")
@click.option(
    "-j",
    "--jobs",
    default=AUTO,
    metavar="N",
    help="Notebooks at a time, if they fit [processors].",
)
@click.option(
    "--cluster",
    metavar="WHERE",
    help="Run on a cluster: slurm:N, local:N, tcp://...",
)
@click.option(
    "--exclude",
    multiple=True,
    metavar="PATTERN",
    help="Skip these notebooks (slow-*.ipynb, drafts/).",
)
@click.option(
    "--resume",
    is_flag=True,
    help="Continue the interrupted batch in --out.",
)
@click.option("--only-changed", is_flag=True, help="Skip those that passed and have not changed.")
@click.option("--fail-fast", is_flag=True, help="Start no more notebooks after a failure.")
@click.option("--shard", metavar="K/N", help="Run part K of N.")
@click.option(
    "--timings",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A summary.json, for shards of equal duration.",
)
@job_options(
    kernel_help="Kernel for all notebooks of its language.",
    cwd_help="Working directory [each notebook's folder].",
    budget_help="Time of each search [60s, or 3 times a run].",
)
@report_options
@follow_option
@click.option("-q", "--quiet", is_flag=True, help="Print the last line only.")
def command(
    *,
    paths: tuple[str, ...],
    out: Path,
    jobs: str,
    cluster: str | None,
    exclude: tuple[str, ...],
    resume: bool,
    only_changed: bool,
    fail_fast: bool,
    shard: str | None,
    timings: tuple[Path, ...],
    options: JobOptions,
    reports: ReportOptions,
    follow: bool,
    quiet: bool,
) -> int:
    """Run the notebooks in PATH..., each in its own folder and inside its own limits.

    PATH is a file, a folder or a pattern; - reads a list from standard input. With --limits ci a
    notebook can read and write its folder and the git repository around it; with strict and
    untrusted only its folder.

    The last line of output is for scripts. The exit code is that of the worst notebook, from good
    to bad: 0 passed, 1 a cell raised, 5 a limit, 4 timeout, 3 the kernel died, 6 it did not start,
    2 unreadable input, 7 safe-exec failed, 130 stopped.
    """
    # Imported here, because --help needs none of these modules.
    from safe_exec.batch.queue import Plan
    from safe_exec.batch.report_registry import write_all
    from safe_exec.batch.scheduler import run_batch

    choice = reports.choose()
    cwd = Path.cwd()
    # All input is checked before the output directory is created.
    part = parse_shard(shard) if shard is not None else None
    durations = read_timings(timings)
    address = _cluster(cluster) if cluster is not None else None
    without_cluster = {
        # Workers send no output and no data files, and decide alone if a failure is transient.
        "--follow": follow,
        "--coverage": options.output.coverage,
        "--retry-on": options.retry.retry_on is not None,
    }
    name = next((name for name, is_used in without_cluster.items() if is_used), None)
    if address is not None and name is not None:
        raise UsageError(f"{name}: not available with --cluster; leave one of them out")
    check_limits(options.limits, options.figures, options.require)
    number = parse_jobs(jobs, cpus_available())
    # Workers decide how many notebooks run at a time, unless the user limits their number.
    most = 0 if address is not None and jobs == AUTO else number
    local_jobs = address.count if address is not None and address.kind == LOCAL else number
    listed = _listed(sys.stdin) if STDIN in paths else []
    # "-" may be combined with paths; the list may be empty then.
    arguments = [path for path in paths if path != STDIN]
    selection = select(arguments, listed=listed, exclude=exclude, cwd=cwd, out=cwd / out)
    plan = Plan(
        notebooks=_of_shard(selection.notebooks, part, durations),
        root=selection.root,
        out=make_out(cwd / out),
        capacity=capacity_for(most, memory_available()),
        template=_template(options, local_jobs),
        command=command_line(),
        fail_fast=fail_fast,
        resume=resume,
        only_changed=only_changed,
        limits=options.limits,
        shard=part,
        retry=retry_of(options.retry),
    )
    notes = [
        *selection.notes,
        *([f"skipped {selection.ours} that safe-exec wrote"] if selection.ours else []),
    ]
    # Standard output has the result only, so scripts can read it.
    with BatchProgress(sys.stderr, quiet=quiet, follow=follow, github=choice.github) as progress:
        for note in notes:
            progress.note(note)
        report = partial(write_all, more=choice.files)
        batch = asyncio.run(run_batch(plan, progress, report, _scheduler_on(address)))
        for note in unused_inputs(batch):
            progress.note(note)
    # Printed after the progress display has ended: GitHub needs whole lines.
    choice.print_annotations(batch)
    show(batch, sys.stdout, quiet=quiet)
    return batch.exit_code


def _cluster(text: str) -> ClusterAddress:
    """Parse ``--cluster``, and check that dask is installed. Raises UsageError."""
    address = parse_cluster(text)
    demand_dask(address)
    return address


def _scheduler_on(address: ClusterAddress | None) -> SchedulerFactory:
    """Return the scheduler for this machine, or for a cluster."""
    from safe_exec.batch.scheduler import Scheduler

    if address is None:
        return Scheduler
    # Imported only here: dask takes most of a second.
    from safe_exec.batch.cluster.scheduler import ClusterScheduler

    return partial(ClusterScheduler, address=address)


def _listed(stream: TextIO) -> list[str]:
    """Return the paths on standard input, separated by line breaks or by NUL characters."""
    # NUL as in the output of `git ls-files -z`: a file name may contain line breaks.
    text = stream.read()
    return [
        path for path in (text.split("\0") if "\0" in text else text.splitlines()) if path.strip()
    ]


def _of_shard(
    notebooks: Sequence[SelectedNotebook], shard: tuple[int, int] | None, timings: dict[str, float]
) -> tuple[SelectedNotebook, ...]:
    if shard is None:
        return tuple(notebooks)
    number, shards = shard
    # Every shard computes all parts and keeps its own.
    mine = set(cut([notebook.path for notebook in notebooks], timings, shards)[number - 1])
    return tuple(notebook for notebook in notebooks if notebook.path in mine)


def _template(options: JobOptions, jobs: int) -> Job:
    """Return the job that every notebook of the batch starts from; it has no paths yet."""
    # Host capabilities are detected once. Each of the parallel notebooks gets its share of memory.
    cwd = options.cwd.absolute() if options.cwd is not None else None
    # Lenient: among many notebooks some have no cell with a given tag.
    job = job_of(Path(), replace(options, cwd=cwd), lenient=True)
    machine = probe_isolation(detect(parse_mechanisms(job.mechanisms)))
    memory = machine.memory_total
    return replace(
        job, machine=replace(machine, memory_total=memory // jobs if memory is not None else None)
    )
