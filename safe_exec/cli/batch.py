"""``safe-exec batch``: run many notebooks, as in CI."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click
from msgspec.structs import replace

from safe_exec.batch.admission import AUTO, capacity_for, parse_jobs
from safe_exec.batch.cluster.connection import LOCAL, ClusterAddress, demand_dask, parse_cluster
from safe_exec.batch.ordering import cut, parse_shard, read_timings
from safe_exec.batch.selection import SelectedNotebook, select
from safe_exec.cli.grouped_help import GroupedCommand
from safe_exec.cli.inputs import input_options
from safe_exec.cli.outputs import follow_option, output_options
from safe_exec.cli.retries import retry_of, retry_options
from safe_exec.cli.run import job_of, limit_options, wall_options
from safe_exec.errors import OutputPathError, UsageError
from safe_exec.files import one_line
from safe_exec.notebook.kernel_choice import KernelFallback
from safe_exec.reports.batch.progress import BatchProgress, line_of
from safe_exec.reports.batch.results import NOT_RUN, UNCHANGED, BatchResult, NotebookResult
from safe_exec.reports.terminal import Style
from safe_exec.sandbox.host.capabilities import detect, probe_isolation
from safe_exec.sandbox.host.resources import cpus_available, memory_available
from safe_exec.sandbox.planner import CHOOSABLE, parse_mechanisms
from safe_exec.workflows.prepare import Bisect, command_line

if TYPE_CHECKING:
    from safe_exec.batch.scheduler import SchedulerFactory

log = logging.getLogger("safe_exec")

DEFAULT_OUT = Path("safe-exec-out")
STDIN = "-"


@click.command(
    "batch", cls=GroupedCommand, short_help="Run many notebooks, and report on all of them."
)
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=DEFAULT_OUT,
    help=f"Directory for all output [{DEFAULT_OUT}].",
)
@click.option(
    "-j",
    "--jobs",
    default=AUTO,
    metavar="N",
    help="Notebooks at a time, if their memory fits [processors].",
)
@click.option(
    "--cluster",
    metavar="WHERE",
    help="Run on a dask cluster: tcp://host:8786, a scheduler file, local:N, slurm:N, or dask.",
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
@click.option(
    "--only-changed", is_flag=True, help="Skip notebooks that passed before and have not changed."
)
@click.option("--fail-fast", is_flag=True, help="Start no more notebooks after a failure.")
@retry_options
@click.option("--shard", metavar="K/N", help="Run part K of N.")
@click.option(
    "--timings",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A summary.json, for shards of equal duration.",
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
@click.option(
    "--kernel",
    metavar="NAME",
    help="Kernel for all notebooks of its language.",
)
@click.option(
    "--kernel-fallback",
    type=click.Choice([choice.value for choice in KernelFallback]),
    default=KernelFallback.LANGUAGE.value,
    help="If the kernel is missing: use one of its language, or fail.",
)
@click.option(
    "--cwd",
    type=click.Path(path_type=Path),
    help="Working directory [each notebook's folder].",
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
    "--bisect",
    type=click.Choice([choice.value for choice in Bisect]),
    default=Bisect.AUTO.value,
    help="Search for the cells that cause a failure [auto].",
)
@click.option("--no-bisect", is_flag=True, help="Do not search for culprits (--bisect never).")
@click.option(
    "--bisect-budget",
    metavar="T",
    help="Time limit of each search [60s, or 3 times the first run].",
)
@click.option(
    "--github/--no-github",
    default=None,
    help="Print annotations and a summary [if on GitHub].",
)
@click.option(
    "--gitlab/--no-gitlab",
    default=None,
    help="Write codequality.json to --out [if GITLAB_CI is set].",
)
@follow_option
@click.option("-q", "--quiet", is_flag=True, help="Print the last line only.")
def command(paths: tuple[str, ...], out: Path, quiet: bool, follow: bool, **options: Any) -> int:
    """Run the notebooks in PATH..., each in its own folder and inside its own limits.

    PATH is a file, a folder or a pattern; - reads a list from standard input. With --limits ci a
    notebook can read and write its folder and the git repository around it; with strict and
    untrusted only its folder.

    The last line of output is for scripts. The exit code is that of the worst notebook, from good
    to bad: 0 passed, 1 a cell raised, 5 a limit, 4 timeout, 3 the kernel died, 6 it did not start,
    2 unreadable input, 7 safe-exec failed, 130 stopped.
    """
    # Imported here, because --help needs none of these modules.
    from safe_exec.batch import ci
    from safe_exec.batch.queue import Plan
    from safe_exec.batch.report_registry import write_all
    from safe_exec.batch.scheduler import run_batch

    # Detected from the environment, unless an option decides.
    github = ci.on_github() if options["github"] is None else options["github"]
    gitlab = ci.on_gitlab() if options["gitlab"] is None else options["gitlab"]
    more = ci.reports(github=github, gitlab=gitlab)

    cwd = Path.cwd()
    # All input is checked before the output directory is created.
    shard = parse_shard(options["shard"]) if options["shard"] is not None else None
    timings = read_timings(options["timings"])
    cluster = options["cluster"]
    address = _cluster(cluster) if cluster is not None else None
    if address is not None and (follow or options["retry_on"] is not None):
        # Workers send no output, and decide alone whether a failure is transient.
        name = "--follow" if follow else "--retry-on"
        raise UsageError(f"{name}: not available with --cluster; leave one of them out")
    jobs = parse_jobs(options["jobs"], cpus_available())
    # Workers decide how many notebooks run at a time, unless the user limits their number.
    most = 0 if address is not None and options["jobs"] == AUTO else jobs
    local_jobs = address.count if address is not None and address.kind == LOCAL else jobs
    listed = _listed(sys.stdin) if STDIN in paths else []
    # "-" may be combined with paths; the list may be empty then.
    arguments = [path for path in paths if path != STDIN]
    selection = select(arguments, listed=listed, exclude=options["exclude"], cwd=cwd, out=cwd / out)
    plan = Plan(
        notebooks=_of_shard(selection.notebooks, shard, timings),
        root=selection.root,
        out=make_out(cwd / out),
        capacity=capacity_for(most, memory_available()),
        template=_template(options, local_jobs),
        command=command_line(),
        **{key: options[key] for key in ("fail_fast", "resume", "only_changed", "limits")},
        shard=shard,
        retry=retry_of(options),
    )
    notes = [
        *selection.notes,
        *([f"skipped {selection.ours} that safe-exec wrote"] if selection.ours else []),
    ]
    # Standard output has the result only, so scripts can read it.
    with BatchProgress(sys.stderr, quiet=quiet, follow=follow, github=github) as progress:
        for note in notes:
            progress.note(note)
        report = partial(write_all, more=more)
        batch = asyncio.run(run_batch(plan, progress, report, _scheduler_on(address)))
    # Printed after the progress display has ended: GitHub needs whole lines.
    for line in ci.github_lines(batch) if github else ():
        click.echo(line)
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


def make_out(out: Path) -> Path:
    """Create the output directory and return its path without links. Raises OutputPathError."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputPathError(f"--out {one_line(out)}: cannot be made: {error.strerror}") from None
    # The root of all documents must contain no link: see OutputRoot.
    return Path(out.resolve())


def _template(options: dict[str, Any], jobs: int) -> Any:
    """Return the job of every notebook, except for its paths."""
    # Host capabilities are detected once. Each of the parallel notebooks gets its share of memory.
    cwd = options["cwd"].absolute() if options["cwd"] is not None else None
    # Lenient: among many notebooks some have no cell with a given tag.
    job = job_of(Path(), options | {"verdict": None, "cwd": cwd}, lenient=True)
    machine = probe_isolation(detect(parse_mechanisms(job.mechanisms)))
    memory = machine.memory_total
    return replace(
        job, machine=replace(machine, memory_total=memory // jobs if memory is not None else None)
    )


# --- the end of the output ----------------------------------------------------------------------


def show(batch: BatchResult, stream: TextIO, *, quiet: bool) -> None:
    """Print the failed notebooks, the output directory, and the line for scripts."""
    from safe_exec.batch.outcome import summary_line

    style = Style.of(stream)
    if not quiet:
        for result in batch.results:
            # The terminal shows the notebooks that need attention; the reports list all.
            if result.status not in ("passed", UNCHANGED, NOT_RUN) or result.flaky:
                click.echo(
                    style.paint(
                        "warn" if result.flaky else "bad",
                        style.fit(line_of(result, _headline(result))),
                    ),
                    file=stream,
                )
        click.echo(style.fit(f"wrote {one_line(batch.out)}"), file=stream)
        if batch.cancelled or any(result.status == NOT_RUN for result in batch.results):
            click.echo("continue with --resume", file=stream)
    # The last line, even with --quiet: scripts read it.
    click.echo(summary_line(batch), file=stream)


def _headline(result: NotebookResult) -> str:
    from safe_exec.reports.text.common import headline
    from safe_exec.reports.verdict_json import from_document

    document = result.document()
    try:
        return headline(from_document(document)) if document is not None else ""
    # Another program may have overwritten the verdict.
    except (ValueError, KeyError):
        return ""
