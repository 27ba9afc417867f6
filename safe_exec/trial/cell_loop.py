"""Runs the cells one after the other, each under its limits.

May import state, kernel, model, events.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from safe_exec.kernel.activity import observe
from safe_exec.model import events
from safe_exec.model.ending import (
    CellError,
    CellFailed,
    Died,
    Ending,
    InternalError,
    LimitHit,
    Passed,
    TerminationReason,
    TimedOut,
)
from safe_exec.model.limits import LimitName, Limits
from safe_exec.model.verdict import CellStatus
from safe_exec.sandbox.priority import PriorityGuard
from safe_exec.sandbox.usage.meter import Reading
from safe_exec.trial.errors import error_of
from safe_exec.trial.printed import printed_traceback, stderr_tail
from safe_exec.trial.state import TrialState

if TYPE_CHECKING:
    from safe_exec.kernel.client import TrialClient
    from safe_exec.kernel.session import KernelSession
    from safe_exec.trial.request import HangRecognition

# The reading at the end of a cell also serves as the one at the start of the next.
FRESH_SECONDS = 0.005
# How often a kernel that ignored an interrupt is looked at again.
DEAF_SECONDS = 0.05
# When a cell that may hang in a known way is first looked at, and how long after each look again.
FIRST_LOOK_SECONDS = 0.3
LOOK_SECONDS = 0.5
LEAST_PAUSE_SECONDS = 0.05
# The pause after a look that showed something else, as a share of the cell's time so far.
LOOK_SHARE = 0.1


# The texts of `SystemExit` for `sys.exit()`, `sys.exit(0)` and `sys.exit(None)`.
SUCCESSFUL_EXITS = ("", "0", "None")


class Stop(Exception):  # noqa: N818 - no error: it leaves the run of cells
    """Raised to leave the loop over the cells; carries the ending."""

    def __init__(self, ending: Ending) -> None:
        super().__init__(repr(ending))
        self.ending = ending


class CellEnd(Struct, frozen=True, kw_only=True):
    """The end of a cell that is not recorded yet.

    ``figures`` are arguments of ``MetricsRecorder.end``. ``disbelieved`` are the messages that
    claimed the cell's end too early.
    """

    index: int
    status: CellStatus
    moment: float
    figures: dict[str, Any]
    disbelieved: frozenset[str]


class CellLoop:
    """Runs the cells of one trial in its kernel.

    While the kernel runs a cell, this class finishes the bookkeeping of the previous one. Whatever
    decides whether the next cell may run, and every figure of the cell that has ended, is taken
    before the next cell is sent.
    """

    def __init__(self, state: TrialState) -> None:
        self.state = state
        self.request, self.metrics = state.request, state.metrics
        self._last_reading: tuple[float, Reading] | None = None
        self._unrecorded: CellEnd | None = None
        self._stop: asyncio.Task[Any] | None = None

    @property
    def session(self) -> KernelSession:
        """The session of the kernel, which has been started."""
        return self.state.session

    async def run(self) -> Ending:
        """Run all cells. Raises Stop if a cell ends the run."""
        client = self.session.client
        # One task for all cells: each waits for its end and for this.
        self._stop = asyncio.create_task(self.state.stopping.wait())
        client.listen()
        try:
            for index, cell in enumerate(self.request.node.cells):
                if cell.cell_type != "code" or (
                    self.request.cells is not None and index not in self.request.cells
                ):
                    continue
                if self.request.is_wanted is not None and not await self.request.is_wanted(index):
                    continue
                if self._is_skipped(index, cell):
                    self.metrics.skip(index)
                    continue
                await self._run_cell(client, index, cell)
        finally:
            self._record_last_end()
            client.stop_listening()
            self._stop.cancel()
        # nbclient stores the widgets' state only when it is asked.
        client.set_widgets_metadata()
        self.state.current = None
        if self.session.died.is_set():
            await self._stop_for_death(None)
        # A killed worker need not raise an error in the notebook.
        worker = self._worker_killed()
        return worker or Passed()

    def _is_skipped(self, index: int, cell: Any) -> bool:
        tagged = "skip-execution" in cell.metadata.get("tags", [])
        return tagged or index in self.request.skipped or not cell.source.strip()

    def _worker_killed(self) -> Ending | None:
        """Return an ending if all cells ran but a child process was killed for memory."""
        self.metrics.counters = self.session.meter.counters()
        if self.metrics.counters.oom_kills and not self.session.died.is_set():
            return LimitHit(limit=LimitName.MEMORY, cell=self.metrics.cell_of_first_oom)
        return None

    async def _run_cell(self, client: TrialClient, index: int, cell: Any) -> None:
        """Run one cell under its limits. Raises Stop if the cell ends the run."""
        # A limit may strike between two cells.
        if self.state.stopping.is_set() or self.session.kill_reason is not None:
            self._record_last_end()
            await self.session.wait_dead(10.0)
            await self._stop_for_death(None)
        self.state.current = index
        # A cell's metadata may set its own time limit.
        limits = self.request.cell_limits(cell)
        client.begin_cell(limits.cell_output)
        self.session.volumes.begin()
        self.session.history.begin_cell()
        if self.session.changes is not None:
            self.session.changes.note_now_and_then()
        reading, moment = self._reading_at_start(), self.state.now()
        if self.session.died.is_set():
            self._record_start(index, cell, moment, reading)
            await self._stop_for_death(index)
        execution = client.send_cell(cell, index)
        # From here on the kernel is at work.
        self._record_start(index, cell, moment, reading)
        recognised = await self._until_done(execution, index, limits)
        if not execution.done():
            await self._over_time(execution, index, limits, recognised=recognised)
        await self._judge(execution, index)

    async def _until_done(self, execution: asyncio.Future[Any], index: int, limits: Limits) -> bool:
        """Wait for the cell's end or its time limit; tell whether a known hang was recognised."""
        deadline = self._deadline(limits, index)
        hang = self.request.hang
        recognised = (
            await self._recognise(hang, execution, index, deadline)
            if hang is not None and hang.cell == index
            else False
        )
        if not recognised and not execution.done():
            await self._wait(execution, self._seconds_left(deadline))
        if self.state.stopping.is_set() and not execution.done():
            await self.session.wait_dead(10.0)
            await asyncio.wait({execution}, timeout=5.0)
        return recognised and not execution.done()

    async def _wait(self, execution: asyncio.Future[Any], seconds: float | None) -> None:
        """Wait until the cell or the run ends, at most ``seconds``."""
        assert self._stop is not None
        await asyncio.wait(
            {execution, self._stop}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED
        )

    def _seconds_left(self, deadline: float | None) -> float | None:
        """Return the seconds until a deadline, ``None`` without one."""
        return None if deadline is None else max(0.0, deadline - self.state.now())

    async def _recognise(
        self,
        hang: HangRecognition,
        execution: asyncio.Future[Any],
        index: int,
        deadline: float | None,
    ) -> bool:
        """Observe the cell regularly; tell whether it has shown the known hang for long enough."""
        since: float | None = None
        began = time.monotonic()
        pause = FIRST_LOOK_SECONDS
        while True:
            # A cell that starts to hang late is looked at more and more rarely.
            await self._wait(execution, pause)
            seconds_left = self._seconds_left(deadline)
            ended = execution.done() or self.state.stopping.is_set()
            if (
                ended
                or self.session.kill_reason is not None
                or (seconds_left is not None and seconds_left <= pause)
            ):
                return False
            start_time = time.monotonic()
            guard = PriorityGuard(self.session.keeper_pid)
            if guard.crowd() is not None:
                # The look would last until after the deadline.
                guard.hold_back()
                since, pause = None, LOOK_SECONDS
                continue
            await self._observe_activity(index)
            observation = self.state.observation
            if observation is None or not hang.is_known(observation, self.request.node):
                since = None
                pause = max(LOOK_SECONDS, (start_time - began) * LOOK_SHARE)
            else:
                since = start_time if since is None else since
                moment = time.monotonic()
                if moment - since >= hang.seconds:
                    return not execution.done() and not hang.goes_on(observation)
                # The last look ends when the picture has lasted for long enough.
                last_pause = hang.seconds - (moment - since) - (moment - start_time)
                pause = min(LOOK_SECONDS, max(LEAST_PAUSE_SECONDS, last_pause))
            self.state.forget_observation()

    def _deadline(self, limits: Limits, index: int) -> float | None:
        """Return when the time of the cell or of the notebook is up, on the clock of the trial."""
        moments = [self._cell_deadline(limits, index), self.request.limits.timeout]
        return min((moment for moment in moments if moment is not None), default=None)

    def _cell_deadline(self, limits: Limits, index: int) -> float | None:
        began = self.metrics.records[index].started
        if limits.cell_timeout is None or began is None:
            return None
        return began + limits.cell_timeout

    def _notebook_ends_first(self, limits: Limits, index: int) -> bool:
        """Whether the notebook's time is up before the cell's."""
        # Not by the clock: a timer may fire a moment early.
        cell, notebook = self._cell_deadline(limits, index), self.request.limits.timeout
        return notebook is not None and (cell is None or notebook <= cell)

    async def _over_time(
        self, execution: asyncio.Future[Any], index: int, limits: Limits, *, recognised: bool
    ) -> None:
        """Observe and interrupt the kernel, wait for the grace time, then kill the kernel.

        Raises Stop unless the run is ending for another reason.
        """
        if self.state.stopping.is_set():
            return
        # The kernel was killed for another limit before the time was up.
        if self.session.kill_reason is not None:
            await self.session.wait_dead(10.0)
            return
        # A recognised hang is one that ran past its cell's time, however little time the search had.
        whole_notebook = not recognised and self._notebook_ends_first(limits, index)
        allowed = self.request.limits.timeout if whole_notebook else limits.cell_timeout
        name = LimitName.TIMEOUT if whole_notebook else LimitName.CELL_TIMEOUT
        self.state.limit_reached(name, self.state.now() if whole_notebook else allowed)
        answered = None
        # A hang that was recognised has just been observed.
        if not recognised and self._make_room():
            # The interrupt would change the state that is to be observed.
            await self._observe_activity(index)
            answered = await self._interrupt(execution, index, limits.interrupt_grace)
        if self.state.signals:
            return
        self.state.kill(
            TerminationReason.NOTEBOOK_TIMEOUT if whole_notebook else TerminationReason.CELL_TIMEOUT
        )
        await self.session.wait_dead(10.0)
        await asyncio.wait({execution}, timeout=5.0)
        error = self._retrieve(execution)
        self._recover(index)
        self._end(index, CellStatus.KILLED)
        raise Stop(
            TimedOut(
                cell=index,
                whole_notebook=whole_notebook,
                allowed=allowed or 0.0,
                answered=answered,
                error=error,
                recognised=recognised,
            )
        )

    def _make_room(self) -> bool:
        """Hold busy processes of the notebook back; tell whether that leaves us processor time."""
        # An observation among a hundred busy sessions took 15 s, and answering the interrupt six.
        guard = PriorityGuard(self.session.keeper_pid)
        guard.hold_back()
        self.state.crowd_at_timeout = guard.crowd()
        return self.state.crowd_at_timeout is None

    async def _observe_activity(self, index: int) -> None:
        """Observe the kernel's activity before the interrupt changes it."""
        self.state.tasks_at_timeout = self.session.process_count()
        kills = self.session.meter.oom_kills()
        if kills is not None:
            self.state.oom_kills_in_time = max(0, kills - self.metrics.oom_before)
        self.session.take_facts()
        self.state.cell_active = self.session.at_work(self.state.number(index))
        subject = self.session.subject(self.state.number(index))
        if not self.session.died.is_set():
            self.session.note_process()
            self.state.observed_at = time.monotonic()
            self.state.observation = await observe(subject)
            # An interrupt has workers and threads print tracebacks that say nothing about the hang.
            cells = enumerate(self.request.node.cells[: index + 1])
            late = dict(self.session.late_text.by_cell)
            late[index] = late.get(index, "") + self.session.journal_stderr(
                self.state.number(index)
            )
            self.state.printed = printed_traceback(cells, late)
            self.state.stderr_in_time = stderr_tail(self.request.node.cells[index], late[index])

    async def _interrupt(
        self, execution: asyncio.Future[Any], index: int, grace: float
    ) -> bool | None:
        """Interrupt the kernel; tell whether the cell ended within the grace time.

        Returns ``None`` if the kernel itself ended.
        """
        if self.state.observation is not None and self.state.observation.state == "T":
            # A stopped process takes no signal but SIGKILL and SIGCONT.
            return False
        self.state.sink(events.Interrupted(time=self.state.now(), index=index))
        deadline = time.monotonic() + grace
        ignored = self.session.ignores_interrupt()
        self.session.interrupt()
        while (remaining := deadline - time.monotonic()) > 0 and not execution.done():
            await asyncio.wait(
                {execution}, timeout=min(remaining, DEAF_SECONDS) if ignored else remaining
            )
            if ignored and not execution.done() and not self.session.ignores_interrupt():
                # The first interrupt ended the child of a system(3), and the kernel itself ignored
                # it.
                ignored = False
                self.session.interrupt()
        return None if self.session.died.is_set() else execution.done()

    def _retrieve(self, execution: asyncio.Future[Any]) -> CellError | None:
        """Return the error in the reply of an interrupted cell."""
        # This also retrieves the exception, so that asyncio does not report it as unhandled.
        if execution.done() and not execution.cancelled():
            execution.exception()
        else:
            execution.cancel()
        client, index = self.session.client, self.state.current
        # An error that only the outputs show tells nothing of the interrupt.
        return self._error_of(index) if index is not None and index in client.replies else None

    async def _judge(self, execution: asyncio.Future[Any], index: int) -> None:
        """Record the result of a cell that has ended or whose kernel has died."""
        await self._enforce_limits(execution, index)
        # A reply that arrived before the death still counts.
        if self.session.died.is_set() or not execution.done():
            failure = (
                execution.exception() if execution.done() and not execution.cancelled() else None
            )
            if failure is not None or not execution.done():
                execution.cancel()
                await self._stop_for_death(index)
        # nbclient raises for an error unless errors are allowed.
        failure = execution.exception()
        error = self._error_of(index)
        if failure is not None and error is None:
            raise failure
        if error is not None:
            self._measure_volumes()
        if error is not None and self._is_early_end(index, error):
            self._end_early(index)
        self._unrecorded = self._note_end(
            index, CellStatus.PASSED if error is None else CellStatus.FAILED
        )
        # nbclient itself raises for a marked cell: it knows only its own tag.
        may_raise = index in self.request.may_raise
        if (
            error is not None
            and not may_raise
            and (failure is not None or not self._may_raise(index, error.ename))
        ):
            raise Stop(CellFailed(cell=index, error=error))

    async def _enforce_limits(self, execution: asyncio.Future[Any], index: int) -> None:
        """Stop if the cell exceeded a limit, even if it ended before the kill."""
        self.session.check_limits()
        self._last_reading = self._read()
        if self._last_reading is not None:
            self.state.check_cpu_time(self._last_reading[1].cpu_seconds)
        if self.session.kill_reason is not None:
            if execution.done() and not execution.cancelled():
                execution.exception()
            execution.cancel()
            await self._stop_for_death(index)

    def _error_of(self, index: int | None) -> CellError | None:
        """Return the error of a finished cell, from its reply or from its outputs."""
        client = self.session.client
        if index is None:
            return None
        cell_error = error_of(
            client.replies.get(index, {}), self.request.node.cells[index].get("outputs", ())
        )
        if cell_error is not None and cell_error.debugger:
            self.state.warn_once(
                f"code cell {self.metrics.code_index(index) + 1}: after the error a debugger "
                "waited for input"
                " (%pdb on, or post_mortem()); there is nobody to type it"
            )
        return cell_error.error if cell_error is not None else None

    def _is_early_end(self, index: int, error: CellError) -> bool:
        """Whether the cell ended the notebook by ``sys.exit()`` with a status of success."""
        return (
            self.request.exit_is_success
            and error.ename == "SystemExit"
            and error.evalue in SUCCESSFUL_EXITS
            and not self._may_raise(index, error.ename)
        )

    def _end_early(self, index: int) -> None:
        """Record the cell as passed and the cells below it as skipped; raises Stop."""
        self._end(index, CellStatus.PASSED)
        below = [other for other in self.metrics.records if other > index]
        for other in below:
            self.metrics.skip(other)
        skipped = "no code cell is below it"
        if below:
            skipped = f"{len(below)} code cell{'s' * (len(below) > 1)} below it did not run"
        self.state.warnings.append(
            f"code cell {self.metrics.code_index(index) + 1} ended the notebook with "
            f"sys.exit(); {skipped}"
        )
        raise Stop(Passed())

    def _may_raise(self, index: int, ename: str) -> bool:
        """Tell whether the run continues after an error of the cell, by nbclient's rules."""
        client = self.session.client
        tags = self.request.node.cells[index].metadata.get("tags", [])
        allowed = (
            client.allow_errors or ename in client.allow_error_names or "raises-exception" in tags
        )
        return bool(allowed and not client.force_raise_errors)

    async def _stop_for_death(self, index: int | None) -> None:
        """Raise Stop with the ending of a kernel that is dead or about to be killed."""
        raise Stop(await self.ending_by_death(index))

    async def ending_by_death(self, index: int | None) -> Ending:
        """Return the ending of a kernel that is dead or about to be; save its last output.

        ``index`` is the running cell, ``None`` if it had already ended.
        """
        await self.session.wait_dead(5.0)
        self._measure_volumes()
        self.session.take_facts()
        if index is not None:
            self._recover(index)
            self._end(index, CellStatus.KILLED)
        # The keeper's report has the wait status and the reason of our own kill.
        ended = self.session.ended
        reason = ended.reason if ended else None
        if reason is TerminationReason.INTERNAL:
            # The kernel died of a failure of the keeper, not of anything that the notebook did.
            return InternalError(message=self._keeper_failure(), cell=index)
        if reason in (
            TerminationReason.OUTPUT,
            TerminationReason.PROCESSES,
            TerminationReason.DISK,
        ):
            # The cell that struck it may have ended while the kill was under way.
            limit, cell = self.state.limit or (LimitName(reason.value), index)
            # The limit was found in the last look, after the last cell.
            if cell is None:
                cell = self.metrics.last_run
            self.state.current = cell
            return LimitHit(limit=limit, cell=cell)
        status = ended.status if ended else None
        exiting_cell = self.session.client.asked_to_exit
        # A kernel that exit() ends may still take the request of the next cell, and dies in it. If
        # it finished that one, the cell in which it died is where the notebook ended.
        if (
            exiting_cell is not None
            and status is not None
            and status.exit_code == 0
            and self._is_next(exiting_cell, index)
        ):
            return Died(cell=exiting_cell, exit=status, asked_to_exit=True)
        cell = index if index is not None else self.metrics.last_run
        return Died(cell=self._cell_by_page(cell), exit=status)

    def _keeper_failure(self) -> str:
        troubles = self.session.sandbox.troubles
        return troubles[-1] if troubles else "the keeper failed"

    def _is_next(self, cell: int, index: int | None) -> bool:
        """Whether no cell after ``cell`` has started, except ``index``."""
        records = self.metrics.records.items()
        next_cells = [i for i, record in records if i > cell and record.started is not None]
        return next_cells == [] or (index is not None and next_cells == [index])

    def _cell_by_page(self, cell: int | None) -> int | None:
        """Return the cell that was running at the death according to the kernel's shared page."""
        # The running cell is an earlier one if a forged or premature message declared it finished.
        page_cell = self.session.running_by_page()
        if page_cell is None or cell is None or page_cell >= cell:
            return cell
        code_index = self.metrics.code_index(page_cell) + 1
        self.state.warnings.append(
            f"code cell {code_index} was said to be done while the kernel was still at work on it"
        )
        self.state.current = page_cell
        return page_cell

    def _measure_volumes(self) -> None:
        """Measure the free space before anything is removed."""
        self.session.volumes.measure()

    # --- one cell's bookkeeping -------------------------------------------------------------------

    def _record_start(self, index: int, cell: Any, moment: float, reading: Reading | None) -> None:
        """Record the end of the previous cell, and the start of this one."""
        self._record_last_end()
        self.metrics.begin(index, moment, reading)
        code_index = self.metrics.code_index(index)
        self.state.sink(
            events.CellStarted(time=moment, index=index, code_index=code_index, source=cell.source)
        )

    def _reading_at_start(self) -> Reading | None:
        """Return the figures at the start of a cell.

        Those of the previous cell's end are used if they were just taken.
        """
        if (
            self._last_reading is not None
            and time.monotonic() - self._last_reading[0] < FRESH_SECONDS
        ):
            return self._last_reading[1]
        return self._read()[1]

    def _read(self) -> tuple[float, Reading]:
        """Take a reading and return it with its time."""
        return time.monotonic(), self.session.meter.read()

    def _end(self, index: int, status: CellStatus) -> None:
        """Record the end of a cell at once, because no other cell follows."""
        self._record_last_end()
        self._unrecorded = self._note_end(index, status)
        self._record_last_end()

    def _note_end(self, index: int, status: CellStatus) -> CellEnd:
        """Take the figures of a cell that has ended, before the next cell changes them."""
        client = self.session.client
        return CellEnd(
            index=index,
            status=status,
            moment=self.state.now(),
            figures=self._reading_at_end(index),
            disbelieved=frozenset(client.disbelieved),
        )

    def _record_last_end(self) -> None:
        """Record the last cell that has ended, unless that was done before."""
        end, self._unrecorded = self._unrecorded, None
        if end is None:
            return
        record = self.metrics.end(end.index, end.moment, end.status, **end.figures)
        if end.figures["truncated"]:
            self.state.warnings.append(
                f"the output of code cell {record.code_index + 1} was cut at its limit"
            )
        if end.disbelieved:
            claims = " and ".join(sorted(end.disbelieved))
            self.state.warnings.append(
                f"code cell {record.code_index + 1} was said to be done ({claims}) while the "
                "kernel was still at work on it: not believed"
            )
        self.state.sink(
            events.CellFinished(
                time=end.moment,
                index=end.index,
                code_index=record.code_index,
                status=end.status,
                seconds=record.seconds,
                cpu_seconds=record.cpu_seconds,
                memory_peak=record.memory_peak,
                memory_kept=record.memory_kept,
            )
        )

    def _reading_at_end(self, index: int) -> dict[str, Any]:  # noqa: ARG002
        """Return the figures at the end of a cell.

        A dead kernel's come from the keeper's last report.
        """
        client, meter, ended = self.session.client, self.session.meter, self.session.ended
        if ended is not None:
            self._last_reading = None
        elif (
            self._last_reading is None or time.monotonic() - self._last_reading[0] >= FRESH_SECONDS
        ):
            self._last_reading = self._read()
        return {
            "reading": self._last_reading[1] if self._last_reading else None,
            "oom_kills": ended.counters.oom_kills if ended else meter.oom_kills(),
            "output_bytes": max(client.accounts.received, self.state.written()),
            "truncated": client.accounts.truncated,
        }

    def _recover(self, index: int) -> None:
        """Restore the output that a dead kernel left in shared memory."""
        client, page = self.session.client, self.session.page
        if page is None:
            return
        number = self.state.number(index)
        if number and self.request.node.cells[index].execution_count is None:
            # The cell had begun; the message with its number did not arrive.
            self.request.node.cells[index].execution_count = client.code_cells_executed
        if number and client.running is not None and client.running[2] == index:
            client.recover(page, number, self.session.residue())
