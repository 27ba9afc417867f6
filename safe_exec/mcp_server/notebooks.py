"""Runs, explains and searches notebooks for agents; one run at a time."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from msgspec.structs import replace

from safe_exec.errors import UsageError
from safe_exec.mcp_server.settings import Settings
from safe_exec.model.events import EventSink
from safe_exec.model.verdict import Verdict
from safe_exec.notebook import notebook
from safe_exec.notebook.inputs import CellSelection, NotebookInputs
from safe_exec.notebook.literals import Value
from safe_exec.trial.request import Cancellation
from safe_exec.workflows.earlier_run import prepare_again, read_verdict
from safe_exec.workflows.job import Bisect, Job
from safe_exec.workflows.prepare import command_line, prepare
from safe_exec.workflows.run import bisect_job, run_job


class Notebooks:
    """The notebooks of the server's folder."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        # One run at a time: the limits of a profile are chosen for one, and agents call in
        # parallel.
        self._turn = asyncio.Lock()
        self._runs: dict[asyncio.Task[Verdict], Cancellation] = {}

    async def run(
        self, path: str, parameters: Mapping[str, Value], until: str | None, sink: EventSink
    ) -> Verdict:
        """Run a notebook. Raises SafeExecError."""
        inputs = NotebookInputs(parameters=parameters, selection=CellSelection(until=until))
        return await self._run(replace(self._job(path), inputs=inputs), sink)

    async def bisect(self, path: str, budget_seconds: float, sink: EventSink) -> Verdict:
        """Run a notebook and search for the culprits of its failure. Raises SafeExecError."""
        # Not from the verdict beside the notebook: whoever wrote the notebook may have written that
        # too, with limits and isolation of their choice.
        job = replace(self._job(path), bisect=Bisect.ALWAYS, bisect_budget=budget_seconds)
        return await self._run(job, sink)

    async def bisect_session(self, path: Path, budget_seconds: float, sink: EventSink) -> Verdict:
        """Search a session that safe-exec recorded for the culprits. Raises SafeExecError."""

        async def work(cancellation: Cancellation) -> Verdict:
            verdict_path = notebook.default_outputs(path).verdict
            verdict = read_verdict(verdict_path)
            prepared = prepare_again(verdict, verdict_path, budget_seconds)
            return await bisect_job(prepared, verdict, (sink,), cancellation=cancellation)

        return await self._call(work)

    def verdict(self, path: str) -> Verdict:
        """Return the verdict of the last run of a notebook. Raises UsageError."""
        verdict_path = notebook.default_outputs(self._settings.notebook(path)).verdict
        if not verdict_path.exists():
            raise UsageError(f"{path}: it has no verdict yet; call run_notebook first")
        return read_verdict(verdict_path)

    async def close(self) -> None:
        """Stop all runs and wait until their processes have ended."""
        for cancellation in self._runs.values():
            cancellation.arrive(signal.SIGTERM)
        await asyncio.gather(*self._runs, return_exceptions=True)

    def _job(self, path: str) -> Job:
        return Job(
            path=self._settings.notebook(path),
            limits=self._settings.limits,
            options=self._settings.figures,
            walls=self._settings.walls,
            command=command_line(),
        )

    async def _run(self, job: Job, sink: EventSink) -> Verdict:
        async def work(cancellation: Cancellation) -> Verdict:
            return await run_job(prepare(job), (sink,), cancellation=cancellation)

        return await self._call(work)

    async def _call(self, work: Callable[[Cancellation], Awaitable[Verdict]]) -> Verdict:
        cancellation = Cancellation()

        async def wait_and_work() -> Verdict:
            async with self._turn:
                return await work(cancellation)

        # A task of its own: if the client cancels the call, the run still ends properly, with its
        # sandbox removed.
        task = asyncio.get_running_loop().create_task(wait_and_work())
        self._runs[task] = cancellation
        task.add_done_callback(self._runs.pop)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            cancellation.arrive(signal.SIGTERM)
            raise
