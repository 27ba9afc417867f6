"""One sandboxed kernel behind the proxy: a trial that gets its cells one at a time from clients.

Each request adds a cell to the trial's notebook. Frames pass through unchanged; the running cell's
figures are recorded as in ``run``, so the same rules can diagnose a death. May import trial and
kernel.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace
from nbformat.notebooknode import NotebookNode

from safe_exec.errors import KernelStartError, SafeExecError, SandboxError
from safe_exec.interactive.wire import Message, NotAMessage, parse
from safe_exec.kernel.channel import stream_content
from safe_exec.kernel.client import LAST_TEXT_CHARACTERS, TrialClient
from safe_exec.kernel.connection import Connection
from safe_exec.kernel.session import SessionRequest
from safe_exec.model.ending import Ending, InternalError, StartFailed, TerminationReason, TimedOut
from safe_exec.model.limits import LimitName, Limits
from safe_exec.model.verdict import CellRecord, CellStatus
from safe_exec.trial.cell_loop import CellLoop
from safe_exec.trial.evidence import collect_evidence, trial_result
from safe_exec.trial.request import TrialRequest, TrialResult
from safe_exec.trial.run import Trial
from safe_exec.units import format_size

if TYPE_CHECKING:
    from safe_exec.sandbox.usage.meter import Reading
    from safe_exec.trial.sampler import Sampler
    from safe_exec.trial.state import TrialState

# Reading all figures takes a third of a millisecond. Cells that follow each other faster than this
# share one reading; between two cells of a person there is always time for it.
LOOK_SECONDS = 0.05

# Kernel output that may wait here for clients; the rest waits in the kernel's own socket.
WAITING_BYTES = 4 << 20

# Cells that end sooner are not sampled.
SAMPLE_AFTER_SECONDS = 0.1

# The end of a cell's text, for the rules that read a last message.
MOST_TEXT_CHARACTERS = 64 << 10

# Recent cells whose source is kept; older ones keep only their figures, so that a session that runs
# for weeks does not grow.
KEPT_CELLS = 1000

# Larger replies (big user_expressions or payloads) are passed on without being parsed.
LARGEST_REPLY_READ = 1 << 20
OUTPUTS = ("stream", "display_data", "execute_result", "update_display_data", "error")

# After a death: how long the kernel's sockets are read at most, and the silence that ends it.
CLOSED_SECONDS = 2.0
QUIET_SECONDS = 0.01


class SessionCells(CellLoop):
    """Records the cells that arrive one by one.

    Quick cells share one reading of the resource use.
    """

    def __init__(self, state: TrialState) -> None:
        super().__init__(state)
        self._looked = 0.0

    def _is_due(self) -> bool:
        return time.monotonic() - self._looked >= LOOK_SECONDS

    def begin(self, index: int) -> None:
        """Record the start of a cell."""
        if self._is_due():
            self.session.volumes.begin()
        self.metrics.begin(index, self.state.now(), self._reading_at_start())

    def _reading_at_start(self) -> Reading | None:
        # The reading at the end of the previous cell also serves as the start of this one. Usage
        # between the two, say by a background thread, counts for this cell.
        return self._last_reading[1] if self._last_reading else super()._reading_at_start()

    def _reading_at_end(self, index: int) -> dict[str, Any]:
        if self.session.ended is not None or self._is_due():
            self._looked = time.monotonic()
            return super()._reading_at_end(index)
        # Counters that need file reads stay unknown here. A death always gets its own reading, so
        # no evidence is lost.
        client = self.session.client
        return {
            "reading": self._last_reading[1] if self._last_reading else None,
            "oom_kills": None,
            "output_bytes": client.accounts.received,
            "truncated": client.accounts.truncated,
        }


class Inner(Trial):
    """One kernel. ``on_message`` gets its messages; ``session.died`` is set when it ends."""

    def __init__(
        self,
        request: TrialRequest,
        *,
        key: bytes,
        arguments: tuple[str, ...],
        on_message: Callable[[str, Message], None],
    ) -> None:
        super().__init__(request)
        self._key, self._arguments = key.decode("utf-8", "replace"), arguments
        self._on_message = on_message
        self._cells = SessionCells(self.state)
        self._links: dict[str, Connection] = {}
        self._sampling: asyncio.Task[None] | None = None
        self._stored = 0
        self._code_cells = 0
        self._cut = False
        self.waits_for_input = False
        self.recovered: list[dict[str, Any]] = []

    # --- start ------------------------------------------------------------------------------------

    def session_request(self) -> SessionRequest:
        """Return the request for a kernel with the client's key and arguments."""
        return replace(super().session_request(), key=self._key, arguments=self._arguments)

    async def start(self) -> Ending | None:
        """Start the kernel and connect; return an ending if it does not start.

        Raises SandboxError.
        """
        self.state.loop = asyncio.get_running_loop()
        return await self._start()

    def attach(self) -> None:
        """Start to pass on the kernel's messages."""
        self._links = self.session.connections()
        # Output that the kernel journaled but never sent goes to `recovered`; the proxy publishes
        # it before the diagnosis.
        self.client.on_message = lambda _index, message: self.recovered.append(message)
        for name, link in self._links.items():
            link.reader.most_waiting = WAITING_BYTES
            link.on_arrival = lambda name=name: self._take(name)  # type: ignore[misc]
            self._take(name)

    @property
    def client(self) -> TrialClient:
        """The client that accounts for the running cell's output."""
        return self.session.client

    @property
    def limits(self) -> Limits:
        """The limits of the session."""
        return self.state.request.limits

    # --- messages ---------------------------------------------------------------------------------

    def send(self, channel: str, client: bytes, frames: list[bytes]) -> bool:
        """Pass on a client's message; false if the kernel's socket has no room."""
        # The client's identity goes along as an extra frame. ROUTER returns it with the reply, and
        # it leads input requests to the client that sent the cell.
        link = self._links.get(channel)
        return link is not None and link.send([client, *frames])

    @property
    def congested(self) -> bool:
        """Whether the kernel takes requests more slowly than they arrive."""
        return any(link.unsent for link in self._links.values())

    def resume(self) -> None:
        """Read the kernel's messages that had to wait for room in the clients' queues."""
        for name in self._links:
            self._take(name)

    # True while clients have no room; iopub then waits in the kernel's own socket, which in the end
    # blocks the cell that floods it.
    hold: Callable[[], bool] = staticmethod(lambda: False)

    def _take(self, name: str) -> None:
        link = self._links[name]
        while not (name == "iopub" and self.hold()):
            received = link.take()
            if received is None:
                return
            # The reader discards messages beyond its bound; the cell's output gets a mark instead.
            if received.dropped:
                self.client.cut_display(received.dropped)
                continue
            try:
                self._on_message(name, parse(received.parts))
            except NotAMessage as error:
                self.client._complain(str(error))  # noqa: SLF001 - one count of invalid messages

    # --- cells ------------------------------------------------------------------------------------

    def add_cell(self, source: str, cell_id: str | None, msg_id: str) -> int:
        """Append the cell of a request to the trial's notebook and return its index."""
        cells, records = self.state.request.node.cells, self.state.metrics.records
        index = len(cells)
        code_index, self._code_cells = self._code_cells, self._code_cells + 1
        cells.append(
            NotebookNode(
                cell_type="code",
                source=source,
                metadata=NotebookNode(),
                outputs=[],
                execution_count=None,
                **({"id": cell_id} if cell_id else {}),
            )
        )
        # Known from now on: the agent names the request that it works on, and a queued cell can crash
        # before its accounts begin.
        self.client.cells_by_request[msg_id] = index
        records[index] = CellRecord(
            index=index, code_index=code_index, id=cell_id, status=CellStatus.NOT_RUN
        )
        return index

    def begin(self, index: int, msg_id: str) -> None:
        """Start to record the resource use and the output of a cell."""
        client, cell = self.client, self.state.request.node.cells[index]
        self.state.current = index
        client.running = (msg_id, cell, index)
        client.begin_cell(self.limits.cell_output)
        client.clear_before_next_output = False
        self._stored, self._cut, self.waits_for_input = 0, False, False
        self._cells.begin(index)
        self.session.history.begin_cell()
        self._sampling = asyncio.get_running_loop().create_task(self._sample())

    async def _sample(self) -> None:
        await asyncio.sleep(SAMPLE_AFTER_SECONDS)
        sampler: Sampler = self._sampler
        await sampler.run()

    def end(self, index: int, *, failed: bool, counts: bool) -> None:
        """Record the end of a cell; take it out of the numbering unless it ``counts``."""
        self._stop_sampling()
        self._cells._end(index, CellStatus.FAILED if failed else CellStatus.PASSED)  # noqa: SLF001
        self.state.current = None
        # Only the last output is ever read again, as the last message before a later death.
        node = self.state.request.node
        cell = node.cells[index]
        cell.outputs = [_tail(output) for output in cell.outputs[-1:]]
        if not counts:
            self.discount(index)
        if index >= KEPT_CELLS:
            old = node.cells[index - KEPT_CELLS]
            old.source, old.outputs = "", []

    def discount(self, index: int) -> None:
        """Remove a silent or an aborted cell from the numbering of code cells."""
        # Its place in the list stays, since later cells are known by their index.
        self.state.request.node.cells[index].cell_type = "raw"
        self.state.metrics.skip(index)
        self._code_cells -= 1

    def _stop_sampling(self) -> None:
        if self._sampling is not None:
            self._sampling.cancel()
            self._sampling = None

    # --- accounts of output -----------------------------------------------------------------------

    def admit(self, message: Message) -> list[bytes] | None:
        """Count an iopub message of the running cell.

        Returns its frames, or ``None`` if the cell has exceeded its output limit.
        """
        accounts, kind = self.client.accounts, message.kind
        if kind not in OUTPUTS:
            return message.frames
        size = message.size
        accounts.messages += 1
        accounts.received += size
        accounts.last = time.monotonic()
        assert self.state.current is not None
        self._sampler.note_output(self.state.current, size)
        # A message id is the kernel's claim, of any length.
        accounts.iopub_ids.append(message.id[:200])
        if kind == "stream":
            self._note_text(message)
        elif kind == "error":
            with contextlib.suppress(NotAMessage):
                self._note_error(message.content())
        # Errors pass even beyond the cap: they say why the cell failed.
        cap = self.limits.cell_output
        if cap is None or kind == "error" or self._stored + size <= cap:
            self._stored += size
            return message.frames
        accounts.truncated = True
        return None

    def cut_mark(self) -> str | None:
        """Return the text that replaces the omitted output.

        Returns ``None`` after the first call for a cell.
        """
        if self._cut:
            return None
        self._cut = self.client.accounts.marked = True
        cap = format_size(self.limits.cell_output or 0)
        return f"\n[safe-exec: output cut here; limit for this cell {cap}]\n"

    def _note_text(self, message: Message) -> None:
        # The page journals each write by its position in the text. The count of characters that
        # arrived tells which journaled ones a dead kernel never sent.
        content = stream_content(message.content_frame)
        if content is None:
            return
        name, text = content["name"], content["text"]
        accounts = self.client.accounts
        accounts.texts.append((accounts.last or 0.0, name, text[-LAST_TEXT_CHARACTERS:]))
        # A forked child writes to the same stream, but its text is not in the parent's journal.
        if not self.client._of_a_child({"header": {"msg_id": message.id}}):  # noqa: SLF001
            accounts.characters[name] += len(text)
        cell = self.state.request.node.cells[self.state.current or 0]
        last = cell.outputs[-1] if cell.outputs else None
        if last is not None and last.get("name") == name:
            last.text = (last.text + text)[-MOST_TEXT_CHARACTERS:]
        else:
            # Alternating stdout and stderr make one output each; keep the last ones.
            if len(cell.outputs) > 20:  # noqa: PLR2004
                del cell.outputs[0]
            cell.outputs.append(
                NotebookNode(output_type="stream", name=name, text=text[-MOST_TEXT_CHARACTERS:])
            )

    def _note_error(self, content: dict[str, Any]) -> None:
        cell = self.state.request.node.cells[self.state.current or 0]
        traceback = [str(line)[:4096] for line in content.get("traceback") or ()][-50:]
        cell.outputs.append(
            NotebookNode(
                output_type="error",
                ename=str(content.get("ename"))[:200],
                evalue=str(content.get("evalue"))[:4096],
                traceback=traceback,
            )
        )

    def note_reply(self, index: int, message: Message) -> dict[str, Any] | None:
        """Keep the reply to a cell as evidence and return its content.

        ``None`` if it is too large.
        """
        if len(message.content_frame) > LARGEST_REPLY_READ:
            return None
        content = message.content()
        # Evidence needs the last reply alone; a session must not keep all of them.
        self.client.replies = {index: content}
        # exit() stops the kernel 0.1 s after its reply, when the next cell may already run.
        self.client._detect_exit_request(content, index)  # noqa: SLF001
        return content

    # --- the end of a cell's time -----------------------------------------------------------------

    async def over_time(self, index: int, cell_task: asyncio.Task[Any]) -> TimedOut:
        """Observe and interrupt the cell; kill the kernel if it ignores that for the grace time."""
        limits = self.limits
        self.state.limit_reached(LimitName.CELL_TIMEOUT, limits.cell_timeout)
        # Observe first: after the interrupt nothing shows any more where the cell hung.
        await self._cells._observe_activity(index)  # noqa: SLF001
        answered = await self._cells._interrupt(  # noqa: SLF001
            cell_task, index, limits.interrupt_grace
        )
        if not answered:
            self.state.kill(TerminationReason.CELL_TIMEOUT)
        else:
            # The rules need the interrupted cell's figures: its output and its processor time.
            self._stop_sampling()
            self._cells._end(index, CellStatus.KILLED)  # noqa: SLF001
        return TimedOut(
            cell=index,
            whole_notebook=False,
            allowed=limits.cell_timeout or 0.0,
            answered=answered,
            error=self._cells._error_of(index) if answered else None,  # noqa: SLF001
        )

    def forget_timeout(self) -> None:
        """Clear the timeout of a cell whose kernel lives on; later endings have other causes."""
        self.state.limit = self.state.observation = self.state.observed_at = self.state.printed = (
            None
        )

    # --- death ------------------------------------------------------------------------------------

    async def drained(self) -> None:
        """Read a dead kernel's sockets until they end or fall silent."""
        # A child that the kernel left behind can hold the sockets open, so their end may never
        # come: a short silence is enough.
        deadline = time.monotonic() + CLOSED_SECONDS
        count, since = -1, time.monotonic()
        while time.monotonic() < min(deadline, since + QUIET_SECONDS):
            for name in self._links:
                self._take(name)
            if all(link.exhausted for link in self._links.values()):
                return
            if count != self.client.accounts.messages:
                count, since = self.client.accounts.messages, time.monotonic()
            await asyncio.sleep(0.001)

    async def ending_by_death(self, index: int | None) -> Ending:
        """Return the ending of a dead kernel; its last unsent output is then in ``recovered``."""
        self._stop_sampling()
        return await self._cells.ending_by_death(index)

    async def observe(self, ending: Ending) -> TrialResult:
        """Collect the evidence of a dead kernel or of a timed-out cell."""
        if self.state.current is not None:
            self.state.metrics.abandon(self.state.current)
        self.session.take_facts()
        evidence, location = collect_evidence(self.state, ending)
        return trial_result(self.state, ending, evidence, location)

    async def restore(self) -> str:
        """Go on with the state from before the last cell, after the kernel's death.

        Return why that is not possible, empty if it is.
        """
        number = self.session.note()
        failure = "the kernel has run no cell"
        if number is not None:
            timeout = self.limits.start_timeout
            failure = await self.session.restore(number.cell, timeout)
        if not failure:
            self.client.asked_to_exit = None
            self.recovered = []
            self.waits_for_input = False
        return failure

    def forget_lost_cells(self) -> None:
        """Take the cell out of the session in which the kernel died, and those not begun."""
        running, cells = self.state.current, self.state.request.node.cells
        lost_index = self.state.metrics.last_run if running is None else running
        self.state.begin_again()
        for index, record in self.state.metrics.records.items():
            if cells[index].cell_type == "code" and (
                index == lost_index or record.status is CellStatus.NOT_RUN
            ):
                self.discount(index)

    def close(self) -> None:
        """Kill all processes and remove the sandbox. Can be called again."""
        self._stop_sampling()
        super().close()


def start_error(ending: Ending) -> SafeExecError:
    """Return the error for a kernel that did not start, in one line."""
    if isinstance(ending, StartFailed):
        return KernelStartError(ending.reason)
    return SandboxError(ending.message if isinstance(ending, InternalError) else repr(ending))


def _tail(output: Any) -> Any:
    """Shorten a text output to its last characters; no rule reads more of an earlier cell."""
    if output.get("output_type") == "stream":
        output.text = output.text[-LAST_TEXT_CHARACTERS:]
    return output
