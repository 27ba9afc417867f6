"""The state that the parts of a trial share: the kernel, the figures, and the first decisions."""

from __future__ import annotations

import asyncio
import contextlib
import time

from msgspec.structs import replace

from safe_exec.kernel.input_answers import InputAnswers
from safe_exec.kernel.session import KernelSession, SessionRequest
from safe_exec.model import events
from safe_exec.model.ending import TerminationReason
from safe_exec.model.evidence import ActivityObservation, ProcessCount
from safe_exec.model.limits import LimitName
from safe_exec.model.observed import ObservedLock
from safe_exec.sandbox.sandbox import Sandbox
from safe_exec.trial.metrics import MetricsRecorder
from safe_exec.trial.request import TrialRequest

# No process writes faster, so a page that says so is not the agent's.
MOST_BYTES_PER_SECOND = 20 << 30


class TrialState:
    """The state of one trial.

    ``current`` is the index of the running cell. ``limit`` is the first limit reached, and its
    cell.
    """

    def __init__(self, request: TrialRequest) -> None:
        self.request = request
        self.sink = request.sink
        self.signals = request.cancellation.signals
        self.metrics = MetricsRecorder.for_notebook(request.node, request.started)
        if request.continues is not None:
            self.metrics.records.update(request.continues.records)
        # The sandbox comes first; the session when the kernel's process runs in it.
        self.sandbox: Sandbox | None = None
        self.opened: KernelSession | None = None
        self.warnings: list[str] = []
        self.stopping = asyncio.Event()
        self.current: int | None = None
        self.limit: tuple[LimitName, int | None] | None = None
        self.observation: ActivityObservation | None = None
        self.observed_at: float | None = None
        self.printed: tuple[int, str] | None = None
        self.stderr_in_time = ""
        self.named_lock: ObservedLock | None = None
        self.open_files: int | None = None
        self.memory_maps: tuple[int, int] | None = None
        self.tasks_at_timeout: ProcessCount | None = None
        self.kernel_resident_peak: int | None = None
        self.crowd_at_timeout: int | None = None
        self.oom_kills_in_time: int | None = None
        self.cell_active: bool | None = None
        self.loop: asyncio.AbstractEventLoop | None = None
        self._killing = False

    @property
    def session(self) -> KernelSession:
        """The session of the kernel, which has been started."""
        assert self.opened is not None, "the kernel has not been started"
        return self.opened

    def session_request(self) -> SessionRequest:
        """Return the request for the session of this trial's kernel."""
        request = self.request
        return SessionRequest(
            kernel_name=request.kernel_name,
            cwd=str(request.cwd),
            env=request.env,
            limits=replace(request.limits, cell_output=request.largest_output),
            plan=request.plan,
            run_id=request.run_id,
            on_limit=self._limit_from_watchdog,
            strict_shell=request.strict_shell,
            allocations=request.allocations,
            coverage=request.coverage,
            forks=request.forks,
            snapshots=request.snapshots,
            restorable=request.restorable,
            answers=None if request.stdin_lines is None else InputAnswers(request.stdin_lines),
            # A search only asks whether the kernel dies.
            reads_native=not request.hasty,
            with_locals=request.with_locals,
        )

    def now(self) -> float:
        """Return the seconds since the run began."""
        return time.monotonic() - self.request.started

    def take_on(self, request: TrialRequest) -> None:
        """Assign a request to a kernel that was started before the request was known."""
        self.request = request
        self.metrics = MetricsRecorder.for_notebook(request.node, request.started)

    # --- what is decided, once --------------------------------------------------------------------

    def kill(self, reason: TerminationReason) -> None:
        """Kill the process tree. The first reason is kept."""
        # A dead kernel keeps the reason that it died for.
        if self.sandbox is None or self.sandbox.exit is None:
            if not self._killing:
                self._killing = True
                self.sink(events.Killed(time=self.now(), reason=reason))
            # There is a moment before the session in which the kernel starts.
            if self.sandbox is not None:
                self.sandbox.kill(reason)

    def limit_reached(self, name: LimitName, used: float | None) -> None:
        """Record that a limit was reached; the first one counts."""
        # Ending the run makes further limits strike; only the first one is the cause.
        if self.limit is None:
            self.limit = (name, self.current)
            allowed = self.request.limits.of(name) or 0
            self.sink(events.LimitReached(time=self.now(), limit=name, used=used, allowed=allowed))

    def end_for(self, name: LimitName, reason: TerminationReason, used: float | None) -> None:
        """End the run because of a limit."""
        self.limit_reached(name, used)
        self.stopping.set()
        self.kill(reason)

    def check_cpu_time(self, used: float | None) -> None:
        """End the run if all processes together have exceeded their processor time."""
        allowed = self.request.limits.cpu_time
        # RLIMIT_CPU counts per process, so the sum needs a check of its own.
        if allowed is not None and used is not None and used > allowed:
            self.end_for(LimitName.CPU_TIME, TerminationReason.CPU_TIME, used)

    def _limit_from_watchdog(self, name: LimitName, used: float) -> None:
        """Record a limit; called on the watchdog's thread after it had the tree killed."""
        if self.loop is not None:
            with contextlib.suppress(RuntimeError):
                self.loop.call_soon_threadsafe(self._watched_limit_passed, name, used)

    def _watched_limit_passed(self, name: LimitName, used: float) -> None:
        if self.sandbox is not None and self.sandbox.kill_reason is not None:
            self.limit_reached(name, used)
        else:
            self.warn_once(
                f"the kernel passed its {name.value} limit while it was shutting down, and was "
                "killed"
            )

    def begin_again(self) -> None:
        """Forget a dead kernel's ending: a copy of it goes on with the cells before its last."""
        self.forget_observation()
        self.limit = self.named_lock = self.open_files = self.memory_maps = self.current = None
        self.warnings.clear()
        self.stopping.clear()
        self._killing = False
        self.metrics.begin_again()

    def forget_observation(self) -> None:
        """Drop the observation of a cell that continues."""
        self.observation = self.observed_at = self.printed = None
        self.stderr_in_time = ""
        self.tasks_at_timeout = self.oom_kills_in_time = self.cell_active = None

    def warn_once(self, message: str) -> None:
        """Add a warning unless it is already there."""
        if message not in self.warnings:
            self.warnings.append(message)

    # --- the cell that runs -----------------------------------------------------------------------

    def number(self, index: int) -> int:
        """Return the kernel's number for a cell that was sent.

        0 while the kernel has not begun it.
        """
        client = self.session.client
        if client.running is None or client.running[2] != index:
            return 0
        return self.session.agent_facts.number_of(client.running[0])

    def number_now(self) -> int:
        """Return the kernel's number for the current cell, 0 for none."""
        return self.number(self.current) if self.current is not None else 0

    def written(self) -> int:
        """Return the size of the running cell's output so far, sent or not."""
        client = self.session.client
        # The agent's count includes output that ipykernel has not sent yet.
        inside = 0
        page = self.session.page
        if page is not None:
            inside = sum(page.counts())
            record = self.metrics.records.get(self.current) if self.current is not None else None
            if (
                record is None
                or record.started is None
                or inside > MOST_BYTES_PER_SECOND * (self.now() - record.started + 1)
            ):
                # Nothing writes this fast: the page was written by somebody else.
                inside = 0
        return max(client.accounts.received, inside)
