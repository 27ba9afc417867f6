"""One trial: a list of cells run in a fresh kernel in a fresh sandbox. Gives facts, no opinions.

May import kernel, sandbox, notebook, events, model. Cells keep the index they have in the notebook. The ending is what was
observed, by one rule (the first that applies): we were cancelled; we had decided to kill; the kernel ended, or asked to, before our
shutdown request; a cell raised; all ran.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safe_exec import events
from safe_exec.errors import KernelStartError
from safe_exec.gather import gather
from safe_exec.kernel.look import look
from safe_exec.kernel.session import KernelSession, was_polite
from safe_exec.ledger import Ledger
from safe_exec.model import (
    Cancelled,
    CellError,
    CellFailed,
    CellStatus,
    Died,
    Ending,
    Evidence,
    InternalError,
    LimitHit,
    LimitName,
    Limits,
    Looked,
    Passed,
    Place,
    StartFailed,
    TerminationReason,
    TimedOut,
)
from safe_exec.records import dataclass, field, replace
from safe_exec.sandbox.machine import Machine
from safe_exec.sandbox.meter import Reading
from safe_exec.sandbox.plan import SpawnPlan

if TYPE_CHECKING:
    from safe_exec.early import Early
    from safe_exec.kernel.client import TrialClient

SAMPLE_SECONDS = 0.1
PEERS_EVERY = 3
"""Samples between two looks at the sockets."""
FRESH_SECONDS = 0.005
FLOOD_FACTOR = 16
"""A cell that writes so many times its cap is an endless flood: the run is ended."""
MOST_BYTES_PER_SECOND = 20 << 30
"""No process writes faster; what says so lies."""
LATE_SIGNAL_SECONDS = 0.3
"""A kernel that dies of SIGTERM may die of the same shutdown that is about to reach us: wait so long for our own."""
DISCARD_SECONDS = 5.0
"""A kernel that is not wanted gets so long to be started before it is killed."""


class Cancellation:
    """Signals that ask us to stop; those that come before a trial listens are not lost."""

    def __init__(self) -> None:
        self.signals: list[int] = []
        self._listener: Callable[[], None] | None = None

    def arrive(self, number: int) -> None:
        """A signal came."""
        self.signals.append(number)
        if self._listener is not None:
            self._listener()

    def attach(self, listener: Callable[[], None]) -> None:
        """Call ``listener`` at each signal from now on, and at once for one that came before."""
        self._listener = listener
        if self.signals:
            listener()


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialRequest:
    """What to run and how. ``node`` is a stripped notebook; it is filled with outputs in place.

    ``cells`` are the indexes to run (``None``: all); ``cell_limits`` gives the limits of one cell. ``before_cells`` is awaited once the
    kernel is ready. ``hasty``: a kernel whose cells are done is killed, not shut down: nobody asks what its exit hooks do. ``early`` is the
    sandbox that was opened ahead. ``heard`` is called with each message that put something into a cell (its index, and what is kept of
    the message); it must not raise.
    """

    run_id: str
    node: Any
    kernel_name: str
    cwd: Path
    limits: Limits
    machine: Machine
    plan: SpawnPlan
    cell_limits: Callable[[Any], Limits]
    largest_output: int | None = None
    allow_errors: bool = False
    cells: frozenset[int] | None = None
    env: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    sink: events.EventSink = lambda _event: None
    started: float = field(default_factory=time.monotonic)
    cancellation: Cancellation = field(default_factory=Cancellation)
    before_cells: Callable[[], Awaitable[None]] | None = None
    hasty: bool = False
    early: Early | None = None
    heard: Callable[[int, dict[str, Any]], None] = lambda _index, _message: None


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialResult:
    """What was observed. ``node`` is the notebook with the outputs gathered; ``fitted``: code of ours ran in the kernel."""

    ending: Ending
    evidence: Evidence
    ledger: Ledger
    node: Any
    place: Place | None
    hello: Mapping[str, Any]
    warnings: tuple[str, ...]
    fitted: bool = True


class Stop(Exception):  # noqa: N818 - no error: it leaves the run of cells
    """Leave the run of cells with an ending."""

    def __init__(self, ending: Ending) -> None:
        super().__init__(repr(ending))
        self.ending = ending


class Trial:
    """The run of one request; ``run()`` once."""

    def __init__(self, request: TrialRequest) -> None:
        self.request = request
        self.sink = request.sink
        self.ledger = Ledger.for_notebook(request.node, request.started)
        self.session = KernelSession(
            limits=replace(request.limits, cell_output=request.largest_output),
            plan=request.plan,
            run_id=request.run_id,
            on_limit=self._limit_from_watchdog,
        )
        self.signals = request.cancellation.signals
        self.warnings: list[str] = []
        self.limit: tuple[LimitName, int | None] | None = None
        self.stopping = asyncio.Event()
        self.current: int | None = None
        self.looked: Looked | None = None
        self.open_files: int | None = None
        self.cell_active: bool | None = None
        self._starting: asyncio.Task[Ending | None] | None = None
        self._killing = False
        self._last_reading: tuple[float, Reading] | None = None
        self._near: set[LimitName] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pending_output: dict[int, int] = {}

    def now(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self.request.started

    # --- the whole ----------------------------------------------------------------------------------------------

    def warm(self) -> None:
        """Start sandbox and kernel in the background; ``run`` or ``discard`` comes later. A kernel costs more than most trials."""
        self._loop = asyncio.get_running_loop()
        self._starting = asyncio.create_task(self._start())

    async def discard(self) -> None:
        """End a kernel that was started and is not wanted.

        One that starts comes to the end of it first: a shell that is killed while it reads the user's start-up files leaves behind what
        they hold (pyenv's lock, for which every later shell waits a minute). Whoever cancels does not wait for that.
        """
        if self._starting is not None:
            if not self.signals:
                await asyncio.wait({self._starting}, timeout=DISCARD_SECONDS)
            self._starting.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await self._starting
        self.session.close()

    def _take_on(self, request: TrialRequest) -> None:
        """The question for a kernel that was started before it was asked; the sandbox is the same."""
        self.request = request
        self.ledger = Ledger.for_notebook(request.node, request.started)
        client = self.session.client
        if client is not None:
            client.nb = request.node
            client.reset_execution_trackers()
            self._welcome(client.info)

    def _welcome(self, info: Mapping[str, Any]) -> None:
        """The kernel is ready for the notebook."""
        if "language_info" in info:
            self.request.node.metadata["language_info"] = info["language_info"]
        self.ledger.ready(self.now())

    async def run(self, request: TrialRequest | None = None) -> TrialResult:
        """Run; whatever happens, the tree is dead and everything removed when this returns.

        After ``warm``, ``request`` is what is asked in the end: other cells, another notebook, another time, the same sandbox.
        """
        self._loop = asyncio.get_running_loop()
        self.request.cancellation.attach(self._cancelled)
        sampler: asyncio.Task[None] | None = None
        try:
            ending = await (self._starting or self._start())
            if request is not None:
                self._take_on(request)
            if ending is None:
                if self.request.before_cells is not None:
                    await self.request.before_cells()
                sampler = asyncio.create_task(self._sample_forever())
                ending = await self._run_cells()
        except Stop as stop:
            ending = stop.ending
        except Exception as error:  # noqa: BLE001 - our own failure is an ending too: what was gathered gets written
            ending = InternalError(message=f"{type(error).__name__}: {error}", cell=self.current)
            self._kill(TerminationReason.INTERNAL)
        except BaseException:  # our task was cancelled: the caller wants no verdict, and nothing may live on
            self.session.close()
            raise
        finally:
            if sampler is not None:
                sampler.cancel()
        try:
            return await self._finish(ending)
        finally:
            self.session.close()

    async def _finish(self, ending: Ending) -> TrialResult:
        """Collect the evidence while it is there, then take everything down."""
        if self.current is not None:
            self.ledger.abandon(self.current)
        ending = await self._settle(ending)
        self.session.take_facts()
        self._warn_of_messages()
        evidence, place = gather(self, ending)
        for message in self.warnings:
            self.sink(events.Warned(time=self.now(), message=message))
        self.session.close()
        self.warnings += self.session.sandbox.troubles if self.session.sandbox else []
        departure = self.session.departure
        if departure.alive or departure.left:
            self.warnings.append(
                f"left behind: processes {list(departure.alive)}, paths {list(departure.left)}; the next run tries again"
            )
        self.ledger.close(self.now())
        return TrialResult(
            ending=ending,
            evidence=evidence,
            ledger=self.ledger,
            node=self.request.node,
            place=place,
            hello=self.session.told.hello,
            warnings=tuple(self.warnings),
            fitted=self.session.fitted,
        )

    def _warn_of_messages(self) -> None:
        """What came over the wire and was none, or not as it should be."""
        count, first = self.session.malformed()
        if count:
            self.warnings.append(f"{count} malformed message(s) from the kernel were left out or mended: {first}")

    async def _settle(self, ending: Ending) -> Ending:
        """Shut down a live kernel, wait for a dying one, and let a cancellation have the last word."""
        if isinstance(ending, Passed | CellFailed) and not self.signals:
            ending = await self._shut_down(ending)
        elif not self.session.died.is_set() and self.session.pid is not None:
            self._kill(TerminationReason.SHUTDOWN)
            await self.session.wait_dead(10.0)
        ended = self.session.ended
        if ended is not None:
            raw = ended.status.raw if ended.status else None
            self.sink(events.KernelEnded(time=self.now(), status=raw, expected=not isinstance(ending, Died)))
        if ended is not None and ended.reason is None and ended.status and was_polite(ended.status.signal):
            await self._wait_for_signal()
        if self.signals:
            return Cancelled(signal=self.signals[0], cell=self.current)
        return ending

    async def _wait_for_signal(self) -> None:
        deadline = time.monotonic() + LATE_SIGNAL_SECONDS
        while not self.signals and time.monotonic() < deadline:  # noqa: ASYNC110 - a signal handler fills it
            await asyncio.sleep(0.01)

    async def _shut_down(self, ending: Ending) -> Ending:
        """End a kernel whose cells are done. A kernel that ended before our request died; a hook that crashes only warns."""
        if self.session.died.is_set():
            return Died(cell=self._cell_at_death(), exit=self.session.ended.status if self.session.ended else None)
        await self._read_last_counters()
        asked = self.session.client.asked_to_exit if self.session.client else None
        if asked is not None:  # comes before an error that a later, quick cell may have raised
            ending = Died(cell=asked, exit=None, asked_to_exit=True)
        if self.request.hasty:
            self._kill(TerminationReason.SHUTDOWN)
            await self.session.wait_dead(10.0)
        elif not await self.session.shut_down():
            self.warnings.append(
                "the kernel did not end within 3 s of the shutdown request (an exit hook, or a child it waits for), and was killed"
            )
            self._kill(TerminationReason.SHUTDOWN)
            await self.session.wait_dead(10.0)
        elif self.session.ended and self.session.ended.status and self.session.ended.status.signal is not None:
            self.warnings.append(f"the kernel crashed in an exit hook, after all cells had run: {self.session.ended.status}")
        return ending

    async def _read_last_counters(self) -> None:
        if self.session.meter is not None:
            self.ledger.counters = self.session.meter.counters()
        with contextlib.suppress(OSError):
            self.open_files = len(os.listdir(f"/proc/{self.session.pid}/fd"))

    # --- signals, limits ----------------------------------------------------------------------------------------

    def _cancelled(self) -> None:
        """Stop as soon as possible: it is recorded; kill, and let the run wind up."""
        self.stopping.set()
        self._kill(TerminationReason.CANCELLED)

    def _limit_from_watchdog(self, name: LimitName, used: float) -> None:
        """On the watchdog's thread, after it had the tree killed."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._limit_reached, name, used)

    def _limit_reached(self, name: LimitName, used: float | None) -> None:
        if self.limit is None:
            self.limit = (name, self.current)
            allowed = self.request.limits.of(name) or 0
            self.sink(events.LimitReached(time=self.now(), limit=name, used=used, allowed=allowed))

    def _end_for(self, name: LimitName, reason: TerminationReason, used: float | None) -> None:
        self._limit_reached(name, used)
        self.stopping.set()
        self._kill(reason)

    def _kill(self, reason: TerminationReason) -> None:
        if not self.session.died.is_set():
            if not self._killing:
                self._killing = True
                self.sink(events.Killed(time=self.now(), reason=reason))
            self.session.kill(reason)

    async def _sample_forever(self) -> None:
        """Ten times a second: usage for timeline and progress, and the limits that only a look can hold."""
        looks = 0
        while not self.session.died.is_set():
            try:
                self._sample()
            except Exception as error:  # noqa: BLE001 - one look that fails must not end all looks: limits hang on them
                self._warn_once(f"usage could not be read: {type(error).__name__}: {error}")
            looks += 1
            if looks % PEERS_EVERY == 0:
                self.session.look_for_peers()
            await asyncio.sleep(SAMPLE_SECONDS)

    def _sample(self) -> None:
        assert self.session.meter is not None
        reading = self.session.meter.read()
        self.ledger.sample(self.now(), reading, self.current)
        for index, size in self._pending_output.items():
            self.sink(events.OutputReceived(time=self.now(), index=index, size=size))
        self._pending_output.clear()
        self.sink(
            events.UsageSampled(
                time=self.now(),
                index=self.current,
                memory=reading.memory,
                cpu_seconds=reading.cpu_seconds,
                processes=reading.tasks,
            )
        )
        limits = self.request.limits
        self._warn_near(LimitName.MEMORY, reading.memory, limits.memory)
        if limits.cpu_time is not None and reading.cpu_seconds is not None and reading.cpu_seconds > limits.cpu_time:
            self._end_for(LimitName.CPU_TIME, TerminationReason.CPU_TIME, reading.cpu_seconds)
        self._look_for_flood()

    def _warn_once(self, message: str) -> None:
        if message not in self.warnings:
            self.warnings.append(message)

    def _warn_near(self, name: LimitName, used: float | None, allowed: float | None) -> None:
        if used is not None and allowed and used > 0.9 * allowed and name not in self._near:
            self._near.add(name)
            self.sink(events.LimitNear(time=self.now(), limit=name, used=used, allowed=allowed))

    def written(self) -> int | None:
        """Bytes or characters the running cell has put out, whether they were sent or not."""
        client = self.session.client
        if client is None:
            return None
        inside = 0
        provisioner = self.session.provisioner
        if self.session.fitted and provisioner and provisioner.channels:
            inside = sum(provisioner.channels.page.counts())
            record = self.ledger.records.get(self.current) if self.current is not None else None
            if record is None or record.started is None or inside > MOST_BYTES_PER_SECOND * (self.now() - record.started + 1):
                inside = 0  # nothing writes so fast: the page was written by somebody else
        return max(client.accounts.received, inside)

    def _look_for_flood(self) -> None:
        client = self.session.client
        written = self.written()
        if client is None or written is None or self.current is None:
            return
        caps = [(LimitName.CELL_OUTPUT, client.cell_cap), (LimitName.OUTPUT, client.total_cap)]
        name, cap = min(((n, c) for n, c in caps if c is not None), key=lambda pair: pair[1], default=(None, None))
        if name is not None and cap is not None and written > FLOOD_FACTOR * cap:
            self._end_for(name, TerminationReason.OUTPUT, written)

    # --- the start ----------------------------------------------------------------------------------------------

    async def _start(self) -> Ending | None:
        """Bring the kernel up; an ending when it did not come."""
        request = self.request
        self.sink(events.SandboxBuilt(time=self.now(), enforcement=request.plan.enforcement))
        begun = time.monotonic()
        try:
            early = request.early
            self.session.open_sandbox(early.sandbox_for(request.plan) if early else None)
            launched = early.outcome() if early else None
            await self.session.start(kernel_name=request.kernel_name, cwd=str(request.cwd), env=request.env, launched=launched)
            self.sink(events.KernelStarted(time=self.now(), pid=self.session.pid or 0))
            info = await self._connect()
        except KernelStartError as error:
            return self._start_failed(str(error), time.monotonic() - begun)
        if info is None:
            return Cancelled(signal=self.signals[0] if self.signals else signal.SIGTERM, cell=None)
        self.sink(events.KernelReady(time=self.now()))
        if self.session.client is not None:
            self.session.client.info = info
        self._welcome(info)
        return None

    async def _connect(self) -> dict[str, Any] | None:
        """The kernel's info; ``None`` when we were cancelled meanwhile."""
        from safe_exec.kernel.client import TrialClient  # nbclient is imported while the kernel starts

        client = TrialClient(
            self.request.node,
            self.session.manager,
            died=self.session.died,
            on_output=self._on_output,
            allow_errors=self.request.allow_errors,
        )
        client.reset_execution_trackers()
        client.total_cap = self.request.limits.output
        client.heard = self.request.heard
        connect = asyncio.create_task(self.session.connect(client, self.request.limits.start_timeout))
        # Whoever discards us does not ask how the connection went.
        connect.add_done_callback(lambda task: task.cancelled() or task.exception())
        stop = asyncio.create_task(self.stopping.wait())
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

    def _start_failed(self, reason: str, waited: float) -> Ending:
        ended = self.session.ended
        if not self.session.died.is_set():
            self._kill(TerminationReason.START_TIMEOUT)
        return StartFailed(reason=reason, exit=ended.status if ended else None, waited=waited)

    # --- the cells ----------------------------------------------------------------------------------------------

    async def _run_cells(self) -> Ending:
        client = self.session.client
        assert client is not None
        for index, cell in enumerate(self.request.node.cells):
            if cell.cell_type != "code" or (self.request.cells is not None and index not in self.request.cells):
                continue
            if not cell.source.strip() or "skip-execution" in cell.metadata.get("tags", []):
                self.ledger.skip(index)
                continue
            await self._run_cell(client, index, cell)
        client.set_widgets_metadata()
        self.current = None
        if self.session.died.is_set():
            await self._stop_for_death(None)
        worker = self._worker_killed()
        return worker or Passed()

    def _worker_killed(self) -> Ending | None:
        """All cells ran, and yet the system killed a process of the sandbox for memory: the limit struck."""
        if self.session.meter is not None:
            self.ledger.counters = self.session.meter.counters()
        if self.ledger.counters.oom_kills and not self.session.died.is_set():
            return LimitHit(limit=LimitName.MEMORY, cell=self.ledger.cell_of_first_oom)
        return None

    async def _run_cell(self, client: TrialClient, index: int, cell: Any) -> None:
        """Run one cell under its limits; raises Stop when the run ends with it."""
        if self.stopping.is_set():
            await self.session.wait_dead(10.0)
            await self._stop_for_death(None)
        self.current = index
        limits = self.request.cell_limits(cell)
        client.begin_cell(limits.cell_output)
        self._begin(index, cell)
        if self.session.died.is_set():
            await self._stop_for_death(index)
        execution = asyncio.create_task(client.async_execute_cell(cell, index, execution_count=client.code_cells_executed + 1))
        await self._until_done(execution, limits)
        if not execution.done():
            await self._over_time(execution, index, limits)
        await self._judge(execution, index)

    async def _until_done(self, execution: asyncio.Task[Any], limits: Limits) -> None:
        stop = asyncio.create_task(self.stopping.wait())
        await asyncio.wait({execution, stop}, timeout=self._time_left(limits), return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if self.stopping.is_set() and not execution.done():
            await self.session.wait_dead(10.0)
            await asyncio.wait({execution}, timeout=5.0)

    def _time_left(self, limits: Limits) -> float | None:
        """Seconds until the first of both wall times is over."""
        left = [] if limits.cell_timeout is None else [limits.cell_timeout]
        if self.request.limits.timeout is not None:
            left.append(max(0.0, self.request.limits.timeout - self.now()))
        return min(left) if left else None

    async def _over_time(self, execution: asyncio.Task[Any], index: int, limits: Limits) -> None:
        """Look, interrupt, wait a grace time, then kill; raises Stop unless we were stopped for another reason."""
        if self.stopping.is_set():
            return
        whole = self.request.limits.timeout is not None and self.now() >= self.request.limits.timeout
        allowed = self.request.limits.timeout if whole else limits.cell_timeout
        name = LimitName.TIMEOUT if whole else LimitName.CELL_TIMEOUT
        self._limit_reached(name, self.now() if whole else allowed)
        await self._look(index)
        answered = await self._interrupt(execution, index, limits.interrupt_grace)
        if self.signals:
            return
        self._kill(TerminationReason.NOTEBOOK_TIMEOUT if whole else TerminationReason.CELL_TIMEOUT)
        await self.session.wait_dead(10.0)
        await asyncio.wait({execution}, timeout=5.0)
        error = self._retrieve(execution)
        self._recover(index)
        self._end(index, CellStatus.KILLED)
        raise Stop(TimedOut(cell=index, whole=whole, allowed=allowed or 0.0, answered=answered, error=error))

    async def _look(self, index: int) -> None:
        """What is it doing? Asked before the interrupt changes it."""
        self.session.take_facts()
        self.cell_active = self.session.at_work(self._number(index))
        subject = self.session.subject(self._number(index))
        if subject is not None and not self.session.died.is_set():
            self.looked = await look(subject)

    async def _interrupt(self, execution: asyncio.Task[Any], index: int, grace: float) -> bool:
        """Interrupt; whether the cell came to its end within the grace time."""
        if self.looked is not None and self.looked.state == "T":
            return False  # a stopped process takes no signal but SIGKILL and SIGCONT
        self.sink(events.Interrupted(time=self.now(), index=index))
        self.session.interrupt()
        await asyncio.wait({execution}, timeout=grace)
        return execution.done() and not self.session.died.is_set()

    def _retrieve(self, execution: asyncio.Task[Any]) -> CellError | None:
        """The error with which an interrupted cell answered; takes the task's exception so that nobody else reports it."""
        if execution.done() and not execution.cancelled():
            execution.exception()
        else:
            execution.cancel()
        return self._error_of(self.current)

    async def _judge(self, execution: asyncio.Task[Any], index: int) -> None:
        """What became of a cell that is done, one way or another."""
        client = self.session.client
        assert client is not None
        if self.session.died.is_set() or not execution.done():
            failure = execution.exception() if execution.done() and not execution.cancelled() else None
            if failure is not None or not execution.done():
                execution.cancel()
                await self._stop_for_death(index)
        failure = execution.exception()
        reply = client.replies.get(index, {})
        if failure is None:
            self._end(index, CellStatus.PASSED if reply.get("status", "ok") != "error" else CellStatus.FAILED)
            return
        error = self._error_of(index)
        if error is None:
            raise failure
        self._end(index, CellStatus.FAILED)
        raise Stop(CellFailed(cell=index, error=error))

    def _error_of(self, index: int | None) -> CellError | None:
        client = self.session.client
        reply = client.replies.get(index, {}) if client and index is not None else {}
        if reply.get("status") != "error":
            return None
        traceback = tuple(str(line) for line in reply.get("traceback") or ())
        return CellError(ename=str(reply.get("ename", "")), evalue=str(reply.get("evalue", "")), traceback=traceback)

    async def _stop_for_death(self, index: int | None) -> None:
        """The kernel is dead: keep its last words and raise the ending."""
        await self.session.wait_dead(5.0)
        self.session.take_facts()
        if index is not None:
            self._recover(index)
            self._end(index, CellStatus.KILLED)
        ended = self.session.ended
        reason = ended.reason if ended else None
        if reason in (TerminationReason.OUTPUT, TerminationReason.PROCESSES, TerminationReason.DISK):
            # The cell that struck it may have ended while the kill was under way.
            limit, cell = self.limit or (LimitName(reason.value), index)
            self.current = cell
            raise Stop(LimitHit(limit=limit, cell=cell))
        cell = index if index is not None else self._cell_at_death()
        raise Stop(Died(cell=self._cell_by_page(cell), exit=ended.status if ended else None))

    def _cell_by_page(self, cell: int | None) -> int | None:
        """The cell that the kernel's own page says ran when it died, where that is an earlier one: it was said to be done too early."""
        found = self.session.running_by_page()
        if found is None or cell is None or found >= cell:
            return cell
        code_index = self.ledger.code_index(found) + 1
        self.warnings.append(f"code cell {code_index} was said to be done while the kernel was still at work on it")
        self.current = found
        return found

    def _cell_at_death(self) -> int | None:
        """The cell to name when the kernel died with no cell running: the last that ran."""
        return self.ledger.last_run

    # --- one cell's bookkeeping -----------------------------------------------------------------------------------

    def _begin(self, index: int, cell: Any) -> None:
        self.ledger.begin(index, self.now(), self._reading_at_start())
        code_index = self.ledger.code_index(index)
        self.sink(events.CellStarted(time=self.now(), index=index, code_index=code_index, source=cell.source))

    def _reading_at_start(self) -> Reading | None:
        """The figures at the start of a cell: those at the end of the one before, when that was just now."""
        if self._last_reading is not None and time.monotonic() - self._last_reading[0] < FRESH_SECONDS:
            return self._last_reading[1]
        return self.session.meter.read() if self.session.meter else None

    def _end(self, index: int, status: CellStatus) -> None:
        client = self.session.client
        record = self.ledger.end(index, self.now(), status, **self._reading_at_end(index))
        if client and client.accounts.truncated:
            self.warnings.append(f"the output of code cell {record.code_index + 1} was cut at its limit")
        if client and client.disbelieved:
            what = " and ".join(sorted(client.disbelieved))
            self.warnings.append(
                f"code cell {record.code_index + 1} was said to be done ({what}) while the kernel was still at work on it: not believed"
            )
        self.sink(
            events.CellFinished(
                time=self.now(),
                index=index,
                code_index=record.code_index,
                status=status,
                seconds=record.seconds,
                cpu_seconds=record.cpu_seconds,
                memory_peak=record.memory_peak,
                memory_kept=record.memory_kept,
            )
        )

    def _reading_at_end(self, index: int) -> dict[str, Any]:  # noqa: ARG002 - for whoever reads the figures of one cell
        """The figures at the end of a cell; what a dead kernel no longer gives is taken from its last report."""
        client, meter, ended = self.session.client, self.session.meter, self.session.ended
        self._last_reading = (time.monotonic(), meter.read()) if meter and ended is None else None
        return {
            "reading": self._last_reading[1] if self._last_reading else None,
            "oom_kills": ended.counters.oom_kills if ended else meter.oom_kills() if meter else None,
            "output_bytes": max(client.accounts.received, self.written() or 0) if client else None,
            "truncated": client.accounts.truncated if client else False,
        }

    def _recover(self, index: int) -> None:
        """Put what the dead kernel left in shared memory into its cell."""
        client, provisioner = self.session.client, self.session.provisioner
        if client is None or provisioner is None or provisioner.channels is None or not self.session.fitted:
            return
        number = self._number(index)
        if number and self.request.node.cells[index].execution_count is None:
            # It had begun; the message that says its number did not make it.
            self.request.node.cells[index].execution_count = client.code_cells_executed
        if number and client.running is not None and client.running[2] == index:
            client.recover(provisioner.channels.page, number, self.session.residue())

    def _number(self, index: int) -> int:
        """The number inside of a cell that was sent; 0 while it has not begun there."""
        client = self.session.client
        if client is None or client.running is None or client.running[2] != index:
            return 0
        return self.session.number_of(client.running[0])

    def number_now(self) -> int:
        """The number inside of the current cell, 0 for none."""
        return self._number(self.current) if self.current is not None else 0

    def _on_output(self, index: int, size: int) -> None:
        self._pending_output[index] = self._pending_output.get(index, 0) + size


async def run_trial(request: TrialRequest) -> TrialResult:
    """Run one trial. Raises SandboxError and EnforcementError only before anything has run."""
    return await Trial(request).run()
