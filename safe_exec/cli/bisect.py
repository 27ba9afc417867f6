"""``safe-exec bisect``: continue a search for the culprits, or start one."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import click

from safe_exec.cli.options.job import parse_budget
from safe_exec.errors import UsageError
from safe_exec.model.verdict import CauseKind, Status, Verdict
from safe_exec.notebook import notebook
from safe_exec.reports import progress, terminal, verdict_json
from safe_exec.workflows.earlier_run import prepare_again, read_verdict
from safe_exec.workflows.job import Bisect, Job
from safe_exec.workflows.prepare import command_line, prepare
from safe_exec.workflows.run import bisect_job, run_job

NOT_FOUND = 1


@click.command(
    "bisect",
    short_help="Search for the cells that cause a failure.",
)
@click.argument("target", metavar="NOTEBOOK|VERDICT.json", type=click.Path(path_type=Path))
@click.option(
    "--budget", metavar="T", default="10m", show_default=True, help="Time limit of the search."
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print the verdict as JSON instead of the diagnosis."
)
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
def command(target: Path, budget: str, as_json: bool, quiet: bool) -> int:
    """Search for the cells that caused the failure in VERDICT.json, or in the verdict of NOTEBOOK.

    Results of earlier searches are reused. If there is no verdict for the current content of
    NOTEBOOK, it runs first. The search runs cells again even if they contact other hosts.

    Exit codes: 0 culprits found, 1 none found (the failure did not happen again, or time ran out),
    2 bad usage.
    """
    seconds = parse_budget(budget)
    with progress.Progress(
        sys.stderr, quiet=quiet or (as_json and not sys.stderr.isatty())
    ) as listener:
        # A notebook stands for the verdict beside it.
        path = target if target.suffix == ".json" else notebook.default_outputs(target).verdict
        earlier_verdict = read_verdict(path) if target.suffix == ".json" or path.exists() else None
        if earlier_verdict is None or (
            target.suffix != ".json" and not _is_of(earlier_verdict, target)
        ):
            verdict = asyncio.run(
                run_job(prepare(_job_with_first_run(target, seconds)), (listener,))
            )
        else:
            if (
                earlier_verdict.status is Status.PASSED
                or earlier_verdict.crash_cell is None
                or earlier_verdict.cause is None
                or earlier_verdict.cause.kind is CauseKind.OUTPUT_DIFFERS
            ):
                raise UsageError(
                    f"{path}: nothing to search for: the run {_ended(earlier_verdict)}"
                )
            verdict = asyncio.run(
                bisect_job(
                    prepare_again(earlier_verdict, path, seconds), earlier_verdict, (listener,)
                )
            )
    if as_json:
        sys.stdout.buffer.write(verdict_json.dumps(verdict))
    elif not quiet:
        terminal.print_diagnosis(verdict, sys.stdout)
    # Scripts can tell "found" from "not found" without reading JSON.
    return 0 if verdict.culprits is not None and verdict.culprits.cells else NOT_FOUND


def _ended(verdict: Verdict) -> str:
    if verdict.differences:
        return "ran all cells; their outputs differ (run it again with --compare)"
    return "passed" if verdict.status is Status.PASSED else "ended with no cell to blame"


def _job_with_first_run(path: Path, seconds: float | None) -> Job:
    return Job(path=path, bisect=Bisect.ALWAYS, bisect_budget=seconds, command=command_line())


def _is_of(verdict: Verdict, path: Path) -> bool:
    """Return whether a verdict describes a failure of the notebook's current content."""
    # Compared by content: the file may have been edited since, or only touched.
    return verdict.notebook.sha256 == notebook.read(path).sha256 and verdict.cause is not None
