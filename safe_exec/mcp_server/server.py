"""The tools of the server, on the official ``mcp`` package. Serves one client over stdio."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable
from typing import Annotated, Any, TypeVar

from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from pydantic import Field

from safe_exec._version import __version__
from safe_exec.errors import SafeExecError
from safe_exec.mcp_server.answers import (
    Explanation,
    SandboxAnswer,
    ShortVerdict,
    explanation,
    short_verdict,
)
from safe_exec.mcp_server.notebooks import Notebooks
from safe_exec.mcp_server.sandbox import Sandbox
from safe_exec.mcp_server.settings import Settings
from safe_exec.model.events import CellStarted, Event, EventSink, RunStarted

INSTRUCTIONS = """\
Runs Jupyter notebooks and Python cells inside hard limits and isolation ({limits}). When a kernel \
dies, hangs or exceeds a limit, the answer says why, with evidence, the cell and the line. Use \
run_notebook for a notebook file, run_cells to try code with variables that stay, explain for more \
about the last failure, bisect for the smallest set of cells that causes it. Paths are relative to \
{folder}. Limits cannot be changed from here; the advice names the option that a person can change.\
"""
BUDGET_SECONDS = 120.0
MOST_BUDGET_SECONDS = 3600.0
MOST_CELLS = 100

T = TypeVar("T")
Notebook = Annotated[str, Field(description="Path of an .ipynb file, relative to the folder.")]
NotebookOrSandbox = Annotated[
    str | None,
    Field(description="Path of an .ipynb file; leave it out for the last failure in run_cells."),
]


def serve(settings: Settings) -> None:
    """Serve the client on stdin and stdout until it closes them."""
    build_server(settings).run("stdio")


def build_server(settings: Settings) -> MCPServer:
    """Declare the tools."""
    notebooks, sandbox = Notebooks(settings), Sandbox(settings)

    @contextlib.asynccontextmanager
    async def lifespan(_server: MCPServer) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await notebooks.close()
            await sandbox.close()

    server = MCPServer(
        "safe-exec",
        version=__version__,
        instructions=INSTRUCTIONS.format(limits=settings.limits, folder=settings.folder),
        lifespan=lifespan,
        # Logs go to stderr; each request is no news for the person who reads them.
        log_level="WARNING",
    )

    async def run_notebook(
        path: Notebook,
        ctx: Context,
        parameters: Annotated[
            dict[str, Any] | None, Field(description="Values to set, as papermill does.")
        ] = None,
        until: Annotated[
            str | None,
            Field(description="Stop after this code cell: its number from 1, id or tag."),
        ] = None,
    ) -> ShortVerdict:
        """Run a notebook in a fresh kernel inside limits and explain how it ended.

        After a death or a timeout the cells that cause it are searched for. The outputs are in the
        annotated notebook, documents["notebook"].
        """
        run = notebooks.run(path, parameters or {}, until, _progress(ctx))
        return short_verdict(await _answer(run))

    async def run_cells(
        cells: Annotated[
            list[str],
            Field(description="Source of each cell.", min_length=1, max_length=MOST_CELLS),
        ],
        restart: Annotated[
            bool, Field(description="First replace the kernel; all variables are lost.")
        ] = False,
    ) -> SandboxAnswer:
        """Run cells in the persistent sandbox until one fails.

        Variables stay until the kernel dies. Files that cells write are visible to later cells. If
        kernel_died, the next call gets a fresh kernel without any variables, and verdict says why.
        """
        return await _answer(sandbox.run(cells, restart=restart))

    async def explain(path: NotebookOrSandbox = None) -> Explanation:
        """Give details of the last run of a notebook, or of the last failure in run_cells.

        Nothing is run: stack, figures of each cell, limits, the end of stderr.
        """
        with _tool_errors():
            return explanation(sandbox.verdict() if path is None else notebooks.verdict(path))

    async def bisect(
        ctx: Context,
        path: NotebookOrSandbox = None,
        budget_seconds: Annotated[
            float, Field(gt=0, le=MOST_BUDGET_SECONDS, description="Time for the search.")
        ] = BUDGET_SECONDS,
    ) -> ShortVerdict:
        """Find the smallest set of cells that still fails the same way, by running subsets.

        documents["repro"] is a notebook of these cells alone.
        """
        with _tool_errors():
            sink = _progress(ctx)
            search = (
                notebooks.bisect_session(sandbox.notebook(), budget_seconds, sink)
                if path is None
                else notebooks.bisect(path, budget_seconds, sink)
            )
            return short_verdict(await search)

    for tool in (run_notebook, run_cells, explain, bisect):
        server.add_tool(tool)
    return server


async def _answer(work: Awaitable[T]) -> T:
    with _tool_errors():
        return await work


@contextlib.contextmanager
def _tool_errors() -> Any:
    """Turn errors of usage into answers that the agent reads."""
    try:
        yield
    except SafeExecError as error:
        raise ToolError(str(error)) from error


def _progress(ctx: Context) -> EventSink:
    """Return a sink that reports each cell; clients may extend their timeouts at each report."""
    total: float | None = None
    count = 0
    reports: set[asyncio.Task[None]] = set()

    def sink(event: Event) -> None:
        nonlocal total, count
        if isinstance(event, RunStarted):
            total = event.code_cells
        elif isinstance(event, CellStarted):
            count += 1
            text = f"code cell {event.code_index + 1}"
            # The event loop holds tasks weakly.
            task = asyncio.get_running_loop().create_task(ctx.report_progress(count, total, text))
            reports.add(task)
            task.add_done_callback(reports.discard)

    return sink
