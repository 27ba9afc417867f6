"""``safe-exec debug``: a console in the kernel just before a notebook fails."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click
from msgspec.structs import replace

from safe_exec.errors import UsageError
from safe_exec.model.verdict import CellStatus, Status, Verdict
from safe_exec.notebook import notebook
from safe_exec.reports import progress, terminal
from safe_exec.reports.text import common
from safe_exec.workflows.earlier_run import prepare_again, read_verdict
from safe_exec.workflows.job import Bisect, Job, PreparedJob
from safe_exec.workflows.prepare import command_line, prepare

if TYPE_CHECKING:
    from safe_exec.interactive.debug import DebugTarget
    from safe_exec.interactive.proxy import Proxy


@click.command("debug", short_help="Open a console in the kernel just before a notebook fails.")
@click.argument("target", metavar="NOTEBOOK|VERDICT.json", type=click.Path(path_type=Path))
@click.option(
    "--at",
    type=click.IntRange(1),
    metavar="N",
    help="Stop after code cell N [before the cell that failed].",
)
@click.option(
    "--before", "stops_before", is_flag=True, help="Stop before code cell N, not after it."
)
@click.option("--culprits", "only_culprits", is_flag=True, help="Run only the culprits.")
@click.option(
    "--python",
    "post_mortem",
    is_flag=True,
    help="Run the cell that failed too, and open a post-mortem debugger (pdb) at its exception.",
)
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors and the console.")
def command(
    target: Path,
    *,
    at: int | None,
    stops_before: bool,
    only_culprits: bool,
    post_mortem: bool,
    quiet: bool,
) -> int:
    """Run a notebook up to just before the cell that failed, and hand over its kernel.

    VERDICT.json is the verdict of a run; NOTEBOOK stands for the verdict beside it, or with --at
    needs none. The kernel has the limits and the isolation of the run, and a copy of the folder. On
    a terminal `jupyter console` opens, if it is installed; otherwise the connection file is printed,
    for JupyterLab, VS Code, Spyder or a console elsewhere. If the kernel dies, the cell shows why.
    The session ends with the console, or with Ctrl-C; nothing of it is left behind.

    Exit codes: 0 the session ended, 2 bad usage, and those of `safe-exec run` if the kernel died.
    """
    verdict, prepared = _prepare(target, at)
    cells = _target(
        verdict,
        prepared,
        at=at,
        stops_before=stops_before,
        only_culprits=only_culprits,
        post_mortem=post_mortem,
    )
    from safe_exec.interactive.debug import debug

    with contextlib.ExitStack() as display:
        listener = display.enter_context(progress.Progress(sys.stderr, quiet=quiet))
        session = _session(prepared, cells, post_mortem=post_mortem)

        async def hand_over(path: Path, proxy: Proxy) -> None:
            # The terminal belongs to the user now.
            display.close()
            await session(path, proxy)

        outcome = asyncio.run(debug(prepared, cells, hand_over, listener))
    if outcome.verdict is not None:
        if not outcome.reached:
            sys.stderr.write("the notebook did not get there: it failed before\n")
        terminal.print_diagnosis(outcome.verdict, sys.stdout)
    return outcome.exit_code


def _prepare(target: Path, at: int | None) -> tuple[Verdict | None, PreparedJob]:
    """Read the verdict and its notebook. Raises UsageError."""
    path = target if target.suffix == ".json" else notebook.default_outputs(target).verdict
    if target.suffix != ".json" and not path.exists():
        if at is None:
            raise UsageError(
                f"{target}: no verdict beside it; run `safe-exec run` first, or choose a cell (--at)"
            )
        job = Job(path=target, bisect=Bisect.NEVER, command=command_line(), writes=False)
        return None, prepare(job)
    verdict = read_verdict(path)
    if at is None and (verdict.crash_cell is None or verdict.status is Status.PASSED):
        raise UsageError(f"{path}: no cell failed in this run; choose one with --at")
    prepared = prepare_again(verdict, path, None)
    return verdict, replace(prepared, job=replace(prepared.job, writes=False))


def _target(
    verdict: Verdict | None,
    prepared: PreparedJob,
    *,
    at: int | None,
    stops_before: bool,
    only_culprits: bool,
    post_mortem: bool,
) -> DebugTarget:
    """Return the cells to run. Raises UsageError."""
    from safe_exec.interactive.debug import DebugTarget

    code = [n for n, cell in enumerate(prepared.node.cells) if cell.cell_type == "code"]
    if at is not None and at > len(code):
        raise UsageError(f"--at {at}: the notebook has {common.counted(len(code), 'code cell')}")
    if stops_before and at is None:
        raise UsageError("--before belongs to --at; without it the kernel stops before the failure")
    if at is not None:
        end = code[at - 1] + (0 if stops_before else 1)
    else:
        assert verdict is not None and verdict.crash_cell is not None
        end = verdict.crash_cell.index + (1 if post_mortem else 0)
    cells = {index for index in code if index < end}
    if only_culprits:
        search = verdict.culprits if verdict is not None else None
        if search is None or not search.cells:
            raise UsageError("--culprits: the verdict names none; `safe-exec bisect` searches")
        cells &= {culprit.index for culprit in search.cells}
    if verdict is not None:
        # What the run skipped has no part in its failure.
        cells -= {c.index for c in verdict.cells if c.status is CellStatus.SKIPPED}
    if post_mortem and (stops_before or not cells):
        raise UsageError("--python needs a cell that raises: leave out --before")
    return DebugTarget(cells=frozenset(cells), end=end, expects_error=post_mortem)


def _session(
    prepared: PreparedJob, target: DebugTarget, *, post_mortem: bool
) -> Callable[[Path, Proxy], Awaitable[None]]:
    """Return the function that runs the session with the user."""
    from safe_exec.interactive import debug

    async def session(path: Path, proxy: Proxy) -> None:
        if post_mortem:
            await asyncio.to_thread(debug.post_mortem, path)
            return
        on_terminal = terminal.is_terminal(sys.stdin) and terminal.is_terminal(sys.stdout)
        console = debug.console_command(path) if on_terminal else None
        sys.stdout.write(_introduction(prepared, target))
        if console is not None:
            sys.stdout.flush()
            await debug.run_console(console)
            return
        sys.stdout.write(_ways_to_connect(path, on_terminal=on_terminal))
        sys.stdout.flush()
        # There is no cell of ours that Ctrl-C could interrupt: it ends the session.
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, proxy.stop)
        await asyncio.Event().wait()

    return session


def _introduction(prepared: PreparedJob, target: DebugTarget) -> str:
    """Return the introduction to the session, with the source of the next cell."""
    numbers = [n for n, cell in enumerate(prepared.node.cells) if cell.cell_type == "code"]
    following = next((n for n in numbers if n >= target.end), None)
    count = common.counted(len(target.cells), "cell")
    lines = [f"The kernel is yours: {count} of the notebook ran."]
    if following is not None:
        source = common.printable(str(prepared.node.cells[following].source))
        lines.append(f"Next is {common.cell_name(numbers.index(following))}:")
        lines += [f"    {line}" for line in source.splitlines()]
    return "\n".join(lines) + "\n\n"


def _ways_to_connect(path: Path, *, on_terminal: bool) -> str:
    install = " (pip install jupyter-console)" if on_terminal else ""
    return (
        f"connection file   {path}\n"
        f"console           jupyter console --existing {path}{install}\n"
        "JupyterLab        jupyter lab --ServerApp.allow_external_kernels=True \\\n"
        f"                  --ServerApp.external_connection_dir={path.parent}\n"
        "Spyder            Consoles > Connect to an existing kernel\n"
        "end               Ctrl-C\n"
    )
