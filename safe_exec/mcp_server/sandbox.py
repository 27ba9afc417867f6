"""The persistent sandbox: one kernel behind ``safe-exec kernel`` that keeps its variables."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from jupyter_client.kernelspec import NoSuchKernel
from nbclient.exceptions import DeadKernelError
from nbformat import v4
from traitlets import default

from safe_exec.errors import KernelStartError, SafeExecError, UsageError
from safe_exec.interactive import recording
from safe_exec.interactive.recording import SessionFacts
from safe_exec.mcp_server.answers import CellResult, SandboxAnswer, cell_result, short_verdict
from safe_exec.mcp_server.settings import Settings
from safe_exec.model.verdict import Verdict
from safe_exec.nbclient import NotebookClient
from safe_exec.notebook.notebook import default_outputs
from safe_exec.workflows.earlier_run import read_verdict

_NOT_RUN = CellResult(status="not_run", output="", error=None)


class Client(NotebookClient):
    """A client whose kernel is recorded, so that ``bisect`` finds the culprits of a death."""

    @default("on_death")  # type: ignore[untyped-decorator]
    def _default_on_death(self) -> str:
        return "restart"

    def kernel_command(self, kernel_name: str) -> list[str]:
        """Return the command of a kernel that records its session."""
        return [part for part in super().kernel_command(kernel_name) if part != "--no-history"]


class Sandbox:
    """One kernel, started at the first cell."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._turn = asyncio.Lock()
        self._client: Client | None = None
        self._session: SessionFacts | None = None
        self._stderr: TextIO | None = None

    async def run(self, sources: Sequence[str], *, restart: bool) -> SandboxAnswer:
        """Run cells until one fails. Raises SafeExecError if there is no kernel."""
        async with self._turn:
            # A diagnosis of a call that was cancelled belongs to no answer.
            self._diagnosed_session()
            if restart:
                await self._stop()
            client = self._client or await self._start()
            results: list[CellResult] = []
            for source in sources:
                results.append(cell_result(await self._run_cell(client, source)))
                if results[-1].status == "error":
                    break
            results += [_NOT_RUN] * (len(sources) - len(results))
            session = self._diagnosed_session()
            if session is not None:
                # The verdict says all of it, and better.
                results = [_with_reference(result) for result in results]
            return SandboxAnswer(
                cells=results,
                kernel_died=session is not None and not session.survived,
                verdict=None if session is None else short_verdict(_verdict_of(session)),
            )

    async def _run_cell(self, client: Client, source: str) -> list[Any]:
        cell = v4.new_code_cell(source)
        client.nb.cells.append(cell)
        try:
            await client.async_execute_cell(cell, len(client.nb.cells) - 1)
        except DeadKernelError:
            reason = self._last_words()
            await self._stop()
            raise SafeExecError(
                f"the sandbox ended: {reason or 'safe-exec kernel was killed'}; call again for a fresh one"
            ) from None
        except asyncio.CancelledError:
            # The cell may still run; nobody waits for it, and the next call must not either.
            with contextlib.suppress(RuntimeError):
                await client.km.interrupt_kernel()
            raise
        outputs: list[Any] = cell.outputs
        # A sandbox can live for days: only the answer needs the outputs.
        client.nb.cells[-1] = v4.new_code_cell()
        return outputs

    async def _start(self) -> Client:
        node = v4.new_notebook()
        settings = self._settings
        client = Client(
            node,
            kernel_name=settings.kernel,
            resources={"metadata": {"path": str(settings.folder)}},
            limits=settings.limits,
            kernel_options=list(settings.arguments),
            allow_errors=True,
            timeout=None,
        )
        # A kernel that cannot start says why in one line on its stderr.
        self._stderr = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        try:
            client.create_kernel_manager()
            self._client = client
            await client.async_start_new_kernel(stderr=self._stderr)
            await client.async_start_new_kernel_client()
        except (RuntimeError, NoSuchKernel) as error:
            reason = self._last_words() or str(error)
            await self._stop()
            raise KernelStartError(f"the sandbox did not start: {reason}") from None
        except BaseException:
            await self._stop()
            raise
        self._session = recording.of_process(client.km.provisioner.process.pid)
        return client

    def _last_words(self) -> str:
        assert self._stderr is not None
        self._stderr.seek(0)
        lines = self._stderr.read().splitlines()
        return lines[-1].removeprefix("safe-exec: ") if lines else ""

    # --- the last diagnosis ----------------------------------------------------------------------

    def _diagnosed_session(self) -> SessionFacts | None:
        """Return the session, if a cell was diagnosed since the last call."""
        # The recording lies outside of the sandbox. The kernel can forge the error in a cell, but
        # not a diagnosis there.
        former = self._session
        if former is None:
            return None
        self._session = recording.facts_of(former.path)
        return self._session if self._session.diagnoses > former.diagnoses else None

    def notebook(self) -> Path:
        """Return the notebook of a session with a diagnosis. Raises UsageError."""
        return _notebook_of(self._session)

    def verdict(self) -> Verdict:
        """Return the last diagnosis. Raises UsageError."""
        return _verdict_of(self._session)

    # --- the end ----------------------------------------------------------------------------------

    async def _stop(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client._async_cleanup_kernel()  # noqa: SLF001 - nbclient has no public name for it
        if self._stderr is not None:
            self._stderr.close()
            self._stderr = None

    async def close(self) -> None:
        """End the kernel."""
        await self._stop()


def _with_reference(result: CellResult) -> CellResult:
    return result if result.error is None else replace(result, error="see verdict")


def _notebook_of(session: SessionFacts | None) -> Path:
    if session is None or session.notebook is None:
        raise UsageError("no kernel has died in this sandbox; name a notebook")
    return session.notebook


def _verdict_of(session: SessionFacts | None) -> Verdict:
    return read_verdict(default_outputs(_notebook_of(session)).verdict)
