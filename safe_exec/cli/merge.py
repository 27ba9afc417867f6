"""``safe-exec merge``: combine the output directories of shards."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from msgspec.structs import replace

from safe_exec.cli.batch_result import show
from safe_exec.cli.options.reports import ReportOptions, make_out, out_option, report_options


@click.command("merge", short_help="Combine the output directories of shards into one.")
@click.argument("outs", nargs=-1, required=True, metavar="OUT...", type=click.Path(path_type=Path))
@out_option("Directory for the result")
@report_options
@click.option("-q", "--quiet", is_flag=True, help="Print the last line only.")
def command(outs: tuple[Path, ...], out: Path, reports: ReportOptions, quiet: bool) -> int:
    """Combine the --out directories OUT... of the shards of a batch.

    The result has the documents of all notebooks, one summary, one JUnit file, one page and one
    journal, as if a single batch had written it. The exit code is that of the worst notebook; 7 if
    a shard is missing or was killed.
    """
    from safe_exec.batch.merge import merge
    from safe_exec.batch.report_registry import write_all
    from safe_exec.files import one_line
    from safe_exec.workflows.prepare import command_line

    choice = reports.choose()
    merged = merge(outs, make_out(Path.cwd() / out), command_line())
    for gap in merged.gaps:
        click.echo(f"safe-exec: {one_line(gap)}", err=True)
    code = write_all(merged.batch, more=choice.files)
    batch = replace(merged.batch, exit_code=code)
    choice.print_annotations(batch)
    show(batch, sys.stdout, quiet=quiet)
    return batch.exit_code
