"""``safe-exec merge``: combine the output directories of shards."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from msgspec.structs import replace

from safe_exec.cli.batch import DEFAULT_OUT, make_out, show


@click.command("merge", short_help="Combine the output directories of shards into one.")
@click.argument("outs", nargs=-1, required=True, metavar="OUT...", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=DEFAULT_OUT,
    help=f"Directory for the result [{DEFAULT_OUT}].",
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
@click.option("-q", "--quiet", is_flag=True, help="Print the last line only.")
def command(
    outs: tuple[Path, ...], out: Path, github: bool | None, gitlab: bool | None, quiet: bool
) -> int:
    """Combine the --out directories OUT... of the shards of a batch.

    The result has the documents of all notebooks, one summary, one JUnit file, one page and one
    journal, as if a single batch had written it. The exit code is that of the worst notebook; 7 if
    a shard is missing or was killed.
    """
    from safe_exec.batch import ci
    from safe_exec.batch.merge import merge
    from safe_exec.batch.report_registry import write_all
    from safe_exec.files import one_line
    from safe_exec.workflows.prepare import command_line

    github = ci.on_github() if github is None else github
    gitlab = ci.on_gitlab() if gitlab is None else gitlab
    merged = merge(outs, make_out(Path.cwd() / out), command_line())
    for gap in merged.gaps:
        click.echo(f"safe-exec: {one_line(gap)}", err=True)
    code = write_all(merged.batch, more=ci.reports(github=github, gitlab=gitlab))
    batch = replace(merged.batch, exit_code=code)
    for line in ci.github_lines(batch) if github else ():
        click.echo(line)
    show(batch, sys.stdout, quiet=quiet)
    return batch.exit_code
