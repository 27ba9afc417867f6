"""``safe-exec run``: run one notebook."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
from msgspec.structs import replace

from safe_exec.cli.grouped_help import GroupedCommand
from safe_exec.cli.options.job import JobOptions, job_of, job_options
from safe_exec.cli.options.outputs import follow_option
from safe_exec.cli.options.retries import retry_of
from safe_exec.kernel.prestart import PrestartedKernel
from safe_exec.model.verdict import Verdict
from safe_exec.workflows.job import PreparedJob
from safe_exec.workflows.prepare import prepare, refuse_same

if TYPE_CHECKING:
    from safe_exec.model.events import EventSink
    from safe_exec.workflows.retry import RetryPolicy


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
    help="Path of the verdict, JSON [NB.verdict.json].",
)
@job_options(
    kernel_help="Kernel to use instead of the notebook's own.",
    cwd_help="Working directory [the notebook's folder].",
    budget_help="Time of the search [60s, or 3 times a run].",
)
@click.option(
    "--events",
    type=click.Path(path_type=Path),
    help="Write events to this file, as JSON lines.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the verdict instead of the diagnosis.")
@follow_option
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
def command(
    *,
    notebook: Path,
    out: Path | None,
    verdict: Path | None,
    options: JobOptions,
    as_json: bool,
    quiet: bool,
    follow: bool,
    events: Path | None,
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
    job = replace(job_of(notebook, options), output=out, verdict=verdict)
    quiet_progress = quiet or (as_json and not sys.stderr.isatty())
    while True:
        # Ends a kernel that was started early if the input turns out to be invalid.
        with PrestartedKernel() as kernel:
            # All input is checked here. From the next line on every outcome is a verdict.
            prepared = prepare(job, kernel)
            _refuse_same_events(prepared, events)
            # The kernel starts already: this imports what the run needs.
            policy = retry_of(options.retry)
            result = _run(prepared, policy, events, quiet=quiet_progress, follow=follow)
        if not policy.allows(result, len(job.earlier_attempts) + 1):
            break
        from safe_exec.workflows.retry import after_attempt

        job = after_attempt(job, result)
        if not quiet_progress:
            click.echo(f"trying again: {job.earlier_attempts[-1]}", err=True)
    _show(result, as_json=as_json, quiet=quiet)
    return result.exit_code


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
