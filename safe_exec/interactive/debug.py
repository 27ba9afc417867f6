"""Runs a notebook up to just before its failure, and hands the kernel over to the user.

The kernel is that of a trial: fresh, in a sandbox of its own, with a copy of the folder and the
limits of the run. It is served to clients as by ``safe-exec kernel``, so a death that the user
triggers is diagnosed in the same way. May import the rest of this package and workflows.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import queue
import secrets
import sys
import termios
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jupyter_core.paths import jupyter_runtime_dir
from msgspec import Struct
from msgspec.structs import replace
from nbformat.notebooknode import NotebookNode

from safe_exec.errors import SandboxError
from safe_exec.interactive.diagnosis import Diagnosis
from safe_exec.interactive.front import KINDS, read_connection_file
from safe_exec.interactive.inner import Inner
from safe_exec.interactive.proxy import OnDeath, Proxy
from safe_exec.interactive.start import weak_points
from safe_exec.keeper.file_tree import remove_tree
from safe_exec.model.ending import CellFailed, Ending, Passed
from safe_exec.model.events import EventSink
from safe_exec.reports.masking import mask_for
from safe_exec.sandbox.plan import require
from safe_exec.trial.cell_loop import CellLoop, Stop
from safe_exec.trial.request import TrialRequest, TrialResult
from safe_exec.workflows.job import PreparedJob
from safe_exec.workflows.run import run_info
from safe_exec.workflows.run_events import run_started
from safe_exec.workflows.scratch import open_scratch

if TYPE_CHECKING:
    from safe_exec.interactive.wire import Message
    from safe_exec.model.verdict import Verdict

# The key of the connection, in bytes.
KEY_BYTES = 32
# How long output may take that the kernel wrote before it asked for input.
OUTPUT_SECONDS = 0.1


class DebugTarget(Struct, frozen=True, kw_only=True):
    """The cells to run before the kernel is handed over.

    ``cells`` are indexes over all cells, in order; ``end`` is the index behind the last cell that
    the notebook may reach. With ``expects_error`` the last of the cells has to raise.
    """

    cells: frozenset[int]
    end: int
    expects_error: bool = False


class NotReached(Exception):  # noqa: N818 - an outcome, which the command reports
    """The notebook failed before the cell at which its kernel was to be handed over."""

    def __init__(self, result: TrialResult) -> None:
        super().__init__(repr(result.ending))
        self.result = result


class DebugOutcome(Struct, frozen=True, kw_only=True):
    """The result of ``safe-exec debug``.

    ``reached`` is true if the kernel stopped at the intended cell. ``verdict`` describes the
    failure before that, or else the last failure in the console, if there was one.
    """

    exit_code: int
    verdict: Verdict | None
    reached: bool


class PreparedKernel(Inner):
    """A kernel that has run the first cells of a notebook before clients see it."""

    def __init__(
        self,
        request: TrialRequest,
        target: DebugTarget,
        *,
        key: bytes,
        on_message: Callable[[str, Message], None],
    ) -> None:
        super().__init__(request, key=key, arguments=(), on_message=on_message)
        self._target = target

    async def start(self) -> Ending | None:
        """Start the kernel and run the cells. Raises NotReached and SandboxError."""
        ending = await super().start()
        if ending is not None:
            return ending
        sampling = asyncio.get_running_loop().create_task(self._sampler.run())
        try:
            ending = await CellLoop(self.state).run()
        except Stop as stop:
            ending = stop.ending
        finally:
            sampling.cancel()
        if not self._is_reached(ending):
            raise NotReached(await self.observe(ending))
        # Cells of the user follow those of the notebook, in the same numbering.
        self._code_cells = len(self.state.metrics.records)
        self.state.current = None
        return None

    def _is_reached(self, ending: Ending) -> bool:
        if self._target.expects_error:
            return isinstance(ending, CellFailed) and ending.cell == max(self._target.cells)
        return isinstance(ending, Passed)


@contextlib.contextmanager
def connection_file(run_id: str, kernel_name: str) -> Iterator[Path]:
    """Create a connection file in a folder of its own, and remove both at the end.

    Raises OSError.
    """
    # A keeper that outlives us removes folders only, and JupyterLab takes a folder for kernels of
    # others.
    folder = Path(jupyter_runtime_dir()) / f"safe-exec-{run_id}"
    folder.mkdir(mode=0o700, parents=True)
    path = folder / f"kernel-safe-exec-{run_id}.json"
    document = {
        "ip": "127.0.0.1",
        "transport": "tcp",
        "signature_scheme": "hmac-sha256",
        # A Jupyter server ignores connection files without it.
        "kernel_name": kernel_name,
        "key": secrets.token_hex(KEY_BYTES),
        # The system chooses the ports; they are written into the file then.
        **{f"{name}_port": 0 for name in KINDS},
    }
    # Whoever reads the key can run code in the kernel.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as stream:
            json.dump(document, stream)
        yield path
    finally:
        remove_tree(folder)


async def debug(
    prepared: PreparedJob,
    target: DebugTarget,
    hand_over: Callable[[Path, Proxy], Awaitable[None]],
    sink: EventSink,
) -> DebugOutcome:
    """Run the cells, and serve the kernel until ``hand_over`` returns or the kernel ends.

    Raises SandboxError, KernelStartError and EnforcementError.
    """
    from safe_exec.experiments.rerun import RerunFailed, isolated_request

    require(prepared.plan(), prepared.limits.required)
    # The progress display needs the number of cells before the first of them starts.
    sink(run_started(prepared))
    verdicts: list[Verdict] = []
    mask = mask_for({**os.environ, **(prepared.job.env or {})})
    async with open_scratch(prepared) as scratch:
        template, workspaces = scratch.rerunner.template, scratch.rerunner.workspaces
        with connection_file(prepared.run_id, prepared.kernel_name) as path:
            owned = (str(workspaces.snapshot.scratch), str(path.parent))
            try:
                request = isolated_request(template, workspaces, cleanup_if_runner_dies=owned)
            except RerunFailed as trouble:
                raise SandboxError(str(trouble)) from trouble
            node = NotebookNode(request.node)
            node.cells = request.node.cells[: target.end]
            request = replace(
                request,
                node=node,
                cells=target.cells,
                # A session lasts for as long as its user wants.
                limits=replace(request.limits, timeout=None, output=None),
                sink=sink,
            )

            def make_inner(on_message: Callable[[str, Message], None]) -> Inner:
                key = read_connection_file(path).key
                return PreparedKernel(request, target, key=key, on_message=on_message)

            def diagnose(inner: Inner, result: TrialResult) -> Diagnosis:
                own = inner.state.request
                run = replace(run_info(prepared, own), run_id=own.run_id)
                diagnosis = Diagnosis(run, result, own.plan, mask)
                verdicts.append(diagnosis.verdict)
                return diagnosis

            return await _serve(
                prepared,
                path,
                make_inner=make_inner,
                diagnose=diagnose,
                hand_over=hand_over,
                verdicts=verdicts,
            )


async def _serve(
    prepared: PreparedJob,
    path: Path,
    *,
    make_inner: Callable[[Callable[[str, Message], None]], Inner],
    diagnose: Callable[[Inner, Any], Diagnosis],
    hand_over: Callable[[Path, Proxy], Awaitable[None]],
    verdicts: list[Verdict],
) -> DebugOutcome:
    tasks: list[asyncio.Task[None]] = []

    async def session() -> None:
        try:
            await hand_over(path, proxy)
        finally:
            proxy.stop()

    proxy = Proxy(
        read_connection_file(path),
        make_inner=make_inner,
        diagnose=diagnose,
        recording=None,
        on_death=OnDeath.EXIT,
        notes=[f"[safe-exec: {line}]\n" for line in weak_points(prepared, prepared.plan())],
        on_ready=lambda: tasks.append(asyncio.get_running_loop().create_task(session())),
    )
    try:
        code = await proxy.run()
    except NotReached as stop:
        verdict = diagnose(proxy.inner, stop.result).verdict
        return DebugOutcome(exit_code=verdict.exit_code, verdict=verdict, reached=False)
    finally:
        for task in tasks:
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
    for error in ends:
        if isinstance(error, Exception):
            raise error
    return DebugOutcome(exit_code=code, verdict=verdicts[-1] if code else None, reached=True)


# --- clients --------------------------------------------------------------------------------------


def console_command(path: Path) -> list[str] | None:
    """Return the command of Jupyter's console for this kernel; ``None`` if it is not installed."""
    from importlib.util import find_spec

    if find_spec("jupyter_console") is None:
        return None
    return [sys.executable, "-m", "jupyter_console", "--existing", str(path)]


async def run_console(argv: list[str]) -> None:
    """Run a client on the terminal until it ends; end it if this task is cancelled."""
    # A console that is ended at its prompt leaves the terminal without echo and line editing.
    settings = termios.tcgetattr(sys.stdin)
    process = await asyncio.create_subprocess_exec(*argv)
    try:
        await process.wait()
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, settings)


def _print_output(client: Any) -> None:
    """Print the text that the kernel sent before it asked for input.

    Text and requests for input arrive on different sockets.
    """
    with contextlib.suppress(queue.Empty):
        while True:
            content = client.get_iopub_msg(timeout=OUTPUT_SECONDS)["content"]
            sys.stdout.write(content.get("text", ""))
    sys.stdout.flush()


def post_mortem(path: Path) -> None:
    """Run a post-mortem debugger for the kernel's last exception on this terminal."""
    from jupyter_client.blocking.client import BlockingKernelClient

    client: Any = BlockingKernelClient(connection_file=str(path))
    client.load_connection_file()

    def answer(message: Any) -> None:
        # jupyter_client's own hook awaits a bool of a blocking client's channel, and fails (8.10).
        _print_output(client)
        try:
            client.input(input(message["content"]["prompt"]))
        except EOFError:
            # As at a terminal, the end of the input ends the debugger.
            client.input("quit")

    client.start_channels()
    try:
        client.wait_for_ready(timeout=60)
        client.execute_interactive(
            "%debug", allow_stdin=True, store_history=False, stdin_hook=answer
        )
    finally:
        client.stop_channels()
