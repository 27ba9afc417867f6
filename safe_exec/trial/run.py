"""Runs a trial, from the start of its kernel to its end.

The ending is an observation, determined by the first rule that applies: the run was cancelled;
safe-exec had decided to kill the kernel; the kernel ended, or asked to, before the shutdown
request; a cell raised; all cells ran. May import the rest of the package, kernel, events and model.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from safe_exec.errors import IsolationError, KernelMissingError, KernelStartError
from safe_exec.keeper import procfs
from safe_exec.keeper.protocol import CleanupResult
from safe_exec.kernel.coverage_file import lost_rows
from safe_exec.kernel.session import KernelSession, SessionRequest, was_polite
from safe_exec.kernel.session_start import open_sandbox, open_session
from safe_exec.model import events
from safe_exec.model.ending import (
    Cancelled,
    CellFailed,
    Died,
    Ending,
    InternalError,
    LimitHit,
    Passed,
    StartFailed,
    TerminationReason,
    TimedOut,
)
from safe_exec.trial import own_process
from safe_exec.trial.cell_loop import CellLoop, Stop
from safe_exec.trial.discarded import discarded_warning
from safe_exec.trial.evidence import collect_evidence, evidence_without_kernel, trial_result
from safe_exec.trial.option_warnings import option_warnings
from safe_exec.trial.request import TrialRequest, TrialResult
from safe_exec.trial.sampler import Sampler
from safe_exec.trial.state import TrialState

if TYPE_CHECKING:
    from safe_exec.kernel.client import TrialClient
    from safe_exec.kernel.launch import LaunchedKernel
    from safe_exec.kernel.snapshots import SleepingKernel

# A kernel that dies of SIGTERM may die of the same shutdown that is about to reach us: wait this
# long for our own.
LATE_SIGNAL_SECONDS = 0.3
# A kernel that is not wanted gets this long to be started before it is killed.
DISCARD_SECONDS = 5.0


class Trial:
    """The run of one request; call ``run()`` once."""

    def __init__(self, request: TrialRequest) -> None:
        self.state = TrialState(request)
        self._cleanup, self._is_closed = CleanupResult(), False
        self._sampler = Sampler(self.state)
        self._starting: asyncio.Task[Ending | None] | None = None
        self._launched: LaunchedKernel | None = None

    @property
    def session(self) -> KernelSession:
        """The session of the kernel, which has been started."""
        return self.state.session

    def close(self) -> None:
        """Kill all processes and remove the sandbox. Can be called again."""
        if self.state.opened is not None:
            self.state.opened.close()
            self._cleanup = self.state.opened.cleanup
        elif self.state.sandbox is not None and not self._is_closed:
            self._is_closed = True
            self._cleanup = self.state.sandbox.shutdown()

    # --- the whole --------------------------------------------------------------------------------

    def warm(self) -> None:
        """Start sandbox and kernel in the background, to be followed by ``run`` or ``discard``.

        Starting a kernel takes longer than most trials.
        """
        self.state.loop = asyncio.get_running_loop()
        self._starting = asyncio.create_task(self._start())

    async def discard(self) -> None:
        """End a kernel that was started in advance and is not needed.

        A kernel that is still starting is first allowed to finish. A login shell that is killed
        while it reads the user's start-up files leaves their locks behind (pyenv's lock makes every
        later shell wait for a minute). After a signal there is no time for that.
        """
        if self._starting is not None:
            if not self.state.signals:
                await asyncio.wait({self._starting}, timeout=DISCARD_SECONDS)
            self._starting.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await self._starting
        self.close()

    def _assign_request(self, request: TrialRequest) -> None:
        """Assign the actual request to a kernel that was started in advance."""
        self.state.take_on(request)
        # A kernel that did not start has no client.
        if self.state.opened is not None:
            client = self.session.client
            # The client was created for the template's notebook.
            client.nb = request.node
            client.reset_execution_trackers()
            self._welcome(client.info)

    def _welcome(self, info: Mapping[str, Any]) -> None:
        """Record that the kernel is ready for the notebook."""
        if "language_info" in info:
            self.state.request.node.metadata["language_info"] = info["language_info"]
        self.state.metrics.ready(self.state.now())

    async def run(self, request: TrialRequest | None = None) -> TrialResult:
        """Run the trial. Whatever happens, all processes are dead when this returns.

        After ``warm``, ``request`` is the actual request: other cells, another notebook or another
        time limit in the same sandbox.
        """
        self.state.loop = asyncio.get_running_loop()
        # Attach before the start: a signal must end a slow start too.
        self.state.request.cancellation.attach(self._cancelled)
        sampler: asyncio.Task[None] | None = None
        try:
            ending = await (self._starting or self._start())
            if request is not None:
                self._assign_request(request)
            if ending is None:
                if self.state.request.before_cells is not None:
                    await self.state.request.before_cells()
                # Start sampling only now: the start of a kernel is not part of any cell.
                sampler = asyncio.create_task(self._sampler.run())
                ending = await CellLoop(self.state).run()
        except Stop as stop:
            ending = stop.ending
        except IsolationError as error:
            # Raised before the kernel starts, so there is none to kill.
            ending = InternalError(message=str(error), unfit=True)
        except Exception as error:  # noqa: BLE001
            # A failure of safe-exec is an ending too: the outputs so far are still written.
            ending = InternalError(
                message=f"{type(error).__name__}: {error}", cell=self.state.current
            )
            self.state.kill(TerminationReason.INTERNAL)
        except (
            BaseException
        ):  # our task was cancelled: the caller wants no verdict, and nothing may live on
            self.close()
            raise
        finally:
            if sampler is not None:
                sampler.cancel()
        try:
            return await self._finish(ending)
        finally:
            self.close()

    async def _finish(self, ending: Ending) -> TrialResult:
        """Collect the evidence while it exists, then remove the sandbox."""
        if self.state.opened is None:
            return self._finish_without_kernel(ending)
        if self.state.current is not None:
            self.state.metrics.abandon(self.state.current)
        # The order matters: a dying kernel still delivers facts and output.
        ending = await self._end_kernel(ending)
        self.session.take_facts()
        self._warn_of_messages()
        self.state.warnings += option_warnings(self.state, ending)
        # After a death, later cells cannot be slowed down any more.
        if isinstance(ending, Passed | CellFailed):
            self._warn_of_tracing()
        self._warn_of_coverage()
        evidence, location = collect_evidence(self.state, ending)
        for message in self.state.warnings:
            self.state.sink(events.Warned(time=self.state.now(), message=message))
        sleeping = self._sleeping(ending)
        self._remove_sandbox()
        result = trial_result(self.state, ending, evidence, location)
        return replace(
            result,
            kept_files=self.session.sandbox.discarded.kept_files,
            sleeping=sleeping,
            no_copy=self.state.request.snapshots.trouble if self.state.request.snapshots else "",
        )

    def _sleeping(self, ending: Ending) -> SleepingKernel | None:
        """Return the copy of the kernel from before the cell that failed, with the sandbox."""
        snapshots, launched = self.state.request.snapshots, self._launched
        if snapshots is None or launched is None or self.state.signals:
            return None
        cell = getattr(ending, "cell", None)
        is_failure = isinstance(ending, Died | CellFailed | TimedOut | LimitHit)
        snapshot = snapshots.hand_over()
        if snapshot is None:
            return None
        index = self.session.client.cells_by_request.get(snapshot.request_id)
        if not is_failure or cell is None or index is None or index > cell:
            snapshot.channel.close()
            return None
        from safe_exec.kernel.snapshots import SleepingKernel

        self.session.close(keep_sandbox=True)
        return SleepingKernel(
            self.session.sandbox,
            snapshot,
            cell=index,
            records=self.state.metrics.records,
            facts=self.session.agent_facts,
            launched=launched,
        )

    def _finish_without_kernel(self, ending: Ending) -> TrialResult:
        """Return the result of a trial whose kernel's process did not start."""
        if self.state.signals:
            ending = Cancelled(signal=self.state.signals[0], cell=None)
        evidence = evidence_without_kernel(self.state)
        for message in self.state.warnings:
            self.state.sink(events.Warned(time=self.state.now(), message=message))
        self._remove_sandbox()
        return TrialResult(
            ending=ending,
            evidence=evidence,
            metrics=self.state.metrics,
            node=self.state.request.node,
            location=None,
            hello={},
            warnings=tuple(self.state.warnings),
            instrumented=False,
        )

    def _remove_sandbox(self) -> None:
        """Remove the sandbox, and warn of everything that remains."""
        self.close()
        self._warn_of_sandbox()
        if self._cleanup.surviving_pids or self._cleanup.remaining_paths:
            self.state.warnings.append(
                f"left behind: processes {list(self._cleanup.surviving_pids)}, paths "
                f"{list(self._cleanup.remaining_paths)}; the next run tries again"
            )
        self.state.metrics.close(self.state.now())

    def _warn_of_sandbox(self) -> None:
        """Add the keeper's warnings about the removal of the sandbox."""
        sandbox, plan = self.state.sandbox, self.state.request.plan
        if sandbox is None:
            return
        self.state.warnings += sandbox.troubles
        # Another user than the owner may write to no directory that is opened for it.
        writable_helps = not (plan.isolation.other_user and plan.enclosed and os.geteuid() == 0)
        warning = discarded_warning(
            sandbox.discarded, sandbox.isolation, writable_helps=writable_helps
        )
        self.state.warnings += [warning] if warning is not None else []

    def _warn_of_tracing(self) -> None:
        """Warn about a trace function that a cell left active.

        It silently slows down all later cells.
        """
        facts = self.session.agent_facts
        for name in facts.own_actions.tracing:
            setters = [
                a
                for a in facts.own_actions.all(facts.index_of, facts.frames)
                if a.kind == "trace" and a.call == name
            ]
            if setters and setters[-1].cell is not None:
                number = self.state.metrics.code_index(setters[-1].cell) + 1
                self.state.warnings.append(
                    f"code cell {number} left a function of {name}() on, which slows all Python "
                    "code after it"
                )

    def _warn_of_coverage(self) -> None:
        """Warn if a cell ended the measurement of coverage, or if its record was lost."""
        coverage = self.state.request.coverage
        if coverage is None:
            return
        error = self.session.agent_facts.coverage_errno
        if error is not None:
            self.state.warnings.append(lost_rows(error))
        number = coverage.read().replaced
        index = None if number is None else self.session.agent_facts.index_of(number)
        if index is not None:
            code_cell = self.state.metrics.code_index(index) + 1
            self.state.warnings.append(
                f"coverage is incomplete: code cell {code_cell} replaced the trace function "
                "(sys.settrace); kernels with Python 3.12 or newer are measured without one"
            )

    def _warn_of_messages(self) -> None:
        """Warn about malformed messages from the kernel."""
        count, first = self.session.malformed()
        if count:
            self.state.warnings.append(
                f"{count} malformed message(s) from the kernel were dropped or repaired: {first}"
            )

    async def _end_kernel(self, ending: Ending) -> Ending:
        """Shut down a live kernel or wait for a dying one; a cancellation takes precedence."""
        if isinstance(ending, Passed | CellFailed) and not self.state.signals:
            ending = await self._shut_down(ending)
        elif not self.session.died.is_set():
            self.state.kill(TerminationReason.SHUTDOWN)
            await self.session.wait_dead(10.0)
        ended = self.session.ended
        if ended is not None:
            raw = ended.status.raw if ended.status else None
            self.state.sink(
                events.KernelEnded(
                    time=self.state.now(), status=raw, expected=not isinstance(ending, Died)
                )
            )
        if (
            ended is not None
            and ended.reason is None
            and ended.status
            and was_polite(ended.status.signal)
        ):
            await self._wait_for_signal()
        if self.state.signals:
            return Cancelled(signal=self.state.signals[0], cell=self.state.current)
        return ending

    async def _wait_for_signal(self) -> None:
        deadline = time.monotonic() + LATE_SIGNAL_SECONDS
        # A signal handler fills the list, so there is no event to wait for.
        while not self.state.signals and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    async def _shut_down(self, ending: Ending) -> Ending:
        """End a kernel whose cells have run."""
        # A kernel that ended before the shutdown request has died. A crash in an exit hook is only
        # a warning.
        await self._read_last_counters(ending)
        if not await self.session.may_be_asked_to_end():
            return await CellLoop(self.state).ending_by_death(None)
        exiting_cell = self.session.client.asked_to_exit
        if (
            exiting_cell is not None
        ):  # comes before an error that a later, quick cell may have raised
            ending = Died(cell=exiting_cell, exit=None, asked_to_exit=True)
        if self.state.request.hasty:
            self.state.kill(TerminationReason.SHUTDOWN)
            await self.session.wait_dead(10.0)
        elif not await self.session.shut_down():
            self.state.warnings.append(
                "the kernel did not end within 3 s of the shutdown request (an exit hook, or a "
                "child it waits for), and was killed"
            )
            self.state.kill(TerminationReason.SHUTDOWN)
            await self.session.wait_dead(10.0)
        elif (
            self.session.ended
            and self.session.ended.status
            and self.session.ended.status.signal is not None
        ):
            self.state.warnings.append(
                "the kernel crashed in an exit hook, after all cells had run: "
                f"{self.session.ended.status}"
            )
        return ending

    async def _read_last_counters(self, ending: Ending) -> None:
        self.session.note_process()
        self.state.metrics.counters = self.session.meter.counters()
        with contextlib.suppress(OSError):
            self.state.open_files = len(os.listdir(f"/proc/{self.session.pid}/fd"))
        self.state.kernel_resident_peak = procfs.status_bytes(self.session.pid, "VmHWM")
        self.state.memory_maps = own_process.memory_maps(self.session.pid)
        if isinstance(ending, CellFailed):
            text = f"{ending.error.ename}: {ending.error.evalue}"
            current = self.state.current
            # The file may be named in a function of an earlier cell.
            cells = self.state.request.node.cells[: 1 + (current or 0)]
            source = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
            self.state.named_lock = self.session.named_lock(text, source)

    # --- signals ----------------------------------------------------------------------------------

    def _cancelled(self) -> None:
        """Stop as soon as possible: record the cancellation and kill the kernel."""
        self.state.stopping.set()
        self.state.kill(TerminationReason.CANCELLED)

    # --- the start --------------------------------------------------------------------------------

    async def _start(self) -> Ending | None:
        """Start the kernel; return an ending if it did not start."""
        request = self.state.request
        self.state.sink(
            events.SandboxBuilt(time=self.state.now(), enforcement=request.plan.enforcement)
        )
        start_time = time.monotonic()
        try:
            early, session_request = request.continues or request.early, self.session_request()
            self.state.sandbox = (
                early.sandbox_for(request.plan) if early else open_sandbox(session_request)
            )
            self._launched = early.outcome() if early else None
            self.state.opened = await open_session(
                session_request, self.state.sandbox, self._make_client, self._launched
            )
            self._launched = self.state.opened.launched
            if request.continues is not None:
                self.session.agent_facts.follow(request.continues.facts, request.continues.cell)
            self.state.sink(events.KernelStarted(time=self.state.now(), pid=self.session.pid))
            info = await self._connect()
        except KernelStartError as error:
            return self._start_failed(error, time.monotonic() - start_time)
        if info is None:
            return Cancelled(
                signal=self.state.signals[0] if self.state.signals else signal.SIGTERM, cell=None
            )
        self.state.sink(events.KernelReady(time=self.state.now()))
        self.session.client.info = info
        self._welcome(info)
        return None

    def session_request(self) -> SessionRequest:
        """Return the request for the session of this trial's kernel."""
        return self.state.session_request()

    def _make_client(self, manager: Any, died: asyncio.Event) -> TrialClient:
        # nbclient is imported while the kernel starts.
        from safe_exec.kernel.client import TrialClient

        request = self.state.request
        client = TrialClient(
            request.node,
            manager,
            died=died,
            on_output=self._sampler.note_output,
            allow_errors=request.allow_errors,
        )
        client.reset_execution_trackers()
        client.total_cap = request.limits.output
        client.on_message = request.on_message
        return client

    async def _connect(self) -> dict[str, Any] | None:
        """Connect to the kernel and return its info.

        ``None`` if the run was cancelled meanwhile.
        """
        connect = asyncio.create_task(self.session.connect(self.state.request.limits.start_timeout))
        # Whoever discards us does not ask how the connection went.
        connect.add_done_callback(lambda task: task.cancelled() or task.exception())
        # A signal must interrupt the wait for a kernel that never answers.
        stop = asyncio.create_task(self.state.stopping.wait())
        try:
            await asyncio.wait({connect, stop}, return_when=asyncio.FIRST_COMPLETED)
            if connect.done():
                return connect.result()
        finally:
            stop.cancel()
            connect.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await connect
        return None

    def _start_failed(self, error: KernelStartError, waited: float) -> Ending:
        if isinstance(error, KernelMissingError):
            return StartFailed(reason=str(error), installed=error.installed)
        ended = self.state.sandbox.exit if self.state.sandbox is not None else None
        if ended is None:
            self.state.kill(TerminationReason.START_TIMEOUT)
        return StartFailed(reason=str(error), exit=ended.status if ended else None, waited=waited)


async def run_trial(request: TrialRequest) -> TrialResult:
    """Run one trial. Raises SandboxError and EnforcementError only before anything has run."""
    return await Trial(request).run()
