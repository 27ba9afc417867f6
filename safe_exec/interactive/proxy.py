"""The proxy between Jupyter clients and a sandboxed kernel; it explains the kernel's death.

Requests go to the kernel in order of arrival; the proxy remembers those without a reply. A cell
counts as running from the moment its request is passed on (or the previous cell is done) until its
reply and its ``idle`` have arrived. May import everything in this package.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Callable
from enum import StrEnum
from typing import Any

from msgspec import Struct

from safe_exec.interactive.diagnosis import (
    LOST,
    RESTORED,
    Diagnosis,
    idle_death,
    idle_restoration,
    not_restored,
    session_note,
    snapshots_suspended,
)
from safe_exec.interactive.front import ConnectionFile, Front
from safe_exec.interactive.inner import Inner, start_error
from safe_exec.interactive.recording import Recording
from safe_exec.interactive.sockets import MOST_QUEUED, Peer
from safe_exec.interactive.wire import Message, NotAMessage
from safe_exec.model.ending import Died, Ending, TimedOut
from safe_exec.model.verdict import Status, Verdict

# Requests that may wait for a reply. Further ones stay in the clients' sockets.
MOST_WAITING = 10_000

# ipykernel's own poller looks for its parent once per second too.
PARENT_SECONDS = 1.0
FLUSH_SECONDS = 2.0

# After its last message the process waits this long before it exits. Clients that poll, such as
# `jupyter console` (every 50 ms), stop reading once the process is gone.
LINGER_SECONDS = 0.25

# While the kernel waits to send, a subscriber that takes nothing for this long is disconnected.
# Otherwise one suspended browser tab would stop the kernel for all clients.
STALL_SECONDS = 2.0
STALL_LOOK_SECONDS = 0.05


class OnDeath(StrEnum):
    """The action of the proxy after it has explained a death."""

    EXIT = "exit"
    RESTART = "restart"


class Waiting(Struct, kw_only=True):
    """A request without a reply yet. ``cell`` is the cell's index, for ``execute_request`` only.

    If ``is_held``, ``reply`` and ``idle`` are kept back until the cell's diagnosis is ready.
    ``has_failed`` tells that the cell has sent an error, ``is_lost`` that its kernel has died.
    """

    channel: str
    client: bytes
    kind: str
    header: bytes
    identities: list[bytes]
    cell: int | None = None
    counts: bool = True
    reply: Message | None = None
    idle: list[bytes] | None = None
    content: dict[str, Any] | None = None
    execution_count: int | None = None
    cell_done: asyncio.Event | None = None
    is_held: bool = False
    has_failed: bool = False
    is_lost: bool = False


class Proxy:
    """The proxy of ``safe-exec kernel``. Call ``run()`` once; it returns the exit code."""

    def __init__(
        self,
        file: ConnectionFile,
        *,
        make_inner: Callable[[Callable[[str, Message], None]], Inner],
        diagnose: Callable[[Inner, Any], Diagnosis],
        recording: Recording | None,
        on_death: OnDeath,
        restores: bool = False,
        notes: list[str],
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        self._file = file
        self._make_inner, self._diagnose = make_inner, diagnose
        self._recording, self._on_death, self._restores = recording, on_death, restores
        self._waiting: dict[str, Waiting] = {}
        self._cells: list[str] = []
        self._notes = notes
        self._on_ready = on_ready
        self._tasks: set[asyncio.Task[Any]] = set()
        self._inner: Inner | None = None
        self._is_ready = False
        self._asked_to_end = False
        self._stop = asyncio.Event()
        self._stalled = self._linger = self._restarted = self._is_restored = False
        self._code: int | None = None
        self._front: Front | None = None

    @property
    def front(self) -> Front:
        """The public sockets; they exist once the first kernel is up."""
        assert self._front is not None
        return self._front

    @property
    def inner(self) -> Inner:
        """The current kernel."""
        assert self._inner is not None
        return self._inner

    # --- the whole --------------------------------------------------------------------------------

    async def run(self) -> int:
        """Serve until the kernel ends for good or a signal stops us; return the exit code.

        Raises UsageError if a public address is taken.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._stop.set)
        loop.add_signal_handler(signal.SIGINT, self._interrupt)
        self._spawn(self._watch_parent())
        try:
            while self._code is None:
                await self._live()
            # The diagnosis is still in our queues; leaving now would lose it.
            if self._front is not None:
                await self._front.flush(FLUSH_SECONDS)
                if self._linger:
                    await asyncio.sleep(LINGER_SECONDS)
        finally:
            for task in self._tasks:
                task.cancel()
            if self._inner is not None:
                self._inner.close()
            if self._front is not None:
                self._front.close()
        return self._code

    async def _live(self) -> None:
        """Run one kernel from its start, or from its restoration, to its death."""
        if not self._is_restored and not await self._start():
            self._code = 0
            return
        self._is_restored = False
        assert self._inner is not None
        self._inner.attach()
        self._is_ready = True
        if self._restarted:
            # `jupyter console` waits for this after "restarting", and JupyterLab shows it.
            self.front.announce("status", {"execution_state": "idle"})
        self.front.resume()
        self._on_ready()
        died = asyncio.ensure_future(self._inner.session.died.wait())
        if not await self._unless_stopped(died):
            self._code = 0
            return
        # The kernel's last output can still be in its sockets. It belongs before the diagnosis.
        await self._inner.drained()
        self._is_ready = False
        await self._explain_end(self._inner)

    async def _start(self) -> bool:
        """Start a kernel; false if a signal told us to stop first."""
        self._inner = self._make_inner(self._from_kernel)
        self._inner.hold = self._holds
        starting = asyncio.ensure_future(self._inner.start())
        if not await self._unless_stopped(starting):
            return False
        ending = starting.result()
        if ending is not None:
            raise start_error(ending)
        if self._restores:
            self._watch_snapshots(self._inner)
        if self._front is None:
            # A client that gets a late answer to its heartbeat takes the kernel for dead. So listen
            # only once all imports are done and the kernel is up.
            self._front = Front(self._file, on_message=self._from_client, paused=self._is_paused)
        return True

    def _watch_snapshots(self, inner: Inner) -> None:
        """Say in the next cell when the kernel takes no more snapshots."""
        snapshots = inner.session.restore_points
        if snapshots is None:
            self._notes.append(snapshots_suspended("only Python kernels on Linux support it"))
        else:
            snapshots.on_suspended = lambda reason: self._notes.append(snapshots_suspended(reason))

    async def _unless_stopped(self, task: asyncio.Future[Any]) -> bool:
        """Wait for a task; false if a signal told us to stop first."""
        stop = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
            return task.done()
        finally:
            stop.cancel()
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task

    def stop(self) -> None:
        """End the kernel and ``run()``, with exit code 0."""
        self._stop.set()

    def _spawn(self, work: Any) -> asyncio.Task[Any]:
        # The event loop itself holds tasks weakly (asyncio.create_task).
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _watch_parent(self) -> None:
        """Stop when our parent process ends, as ipykernel does."""
        # A server that was killed sends no shutdown request. JPY_PARENT_PID names another process
        # if a wrapper script started us; that one's end cannot be told from getppid().
        parent = os.environ.get("JPY_PARENT_PID", "")
        if not parent.isdigit() or int(parent) != os.getppid():
            return
        # After the parent's death, getppid() returns the process that adopted us.
        while os.getppid() == int(parent):  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(PARENT_SECONDS)
        self._stop.set()

    def _interrupt(self) -> None:
        # With interrupt_mode "signal" clients send SIGINT to the kernel's process, and that is us.
        if self._is_ready:
            self.inner.session.interrupt()

    # --- from clients -----------------------------------------------------------------------------

    def _is_paused(self, channel: str) -> bool:
        """Whether requests must wait, until the kernel has started or has taken earlier ones."""
        # Control is never paused for a busy kernel: interrupts and shutdown must get through.
        if not self._is_ready or self._inner is None:
            return True
        return channel == "shell" and (self._inner.congested or len(self._waiting) >= MOST_WAITING)

    def _from_client(self, channel: str, peer: Peer, message: Message) -> None:
        if channel == "stdin":
            self.inner.waits_for_input = False
        else:
            self._note_request(channel, peer, message)
        if message.kind == "shutdown_request":
            # From now on the kernel's end is no death to explain.
            self._asked_to_end = True
            self.inner.session.sandbox.ask_to_end()
        self.inner.send(channel, peer.name, message.frames)
        if message.kind == "execute_request" and channel == "shell":
            self._begin_next()

    def _note_request(self, channel: str, peer: Peer, message: Message) -> None:
        waiting = Waiting(
            channel=channel,
            client=peer.name,
            kind=message.kind,
            header=message.header_frame,
            identities=message.frames[: message.start - 1],
        )
        if message.kind == "execute_request" and channel == "shell":
            try:
                content = message.content()
            except NotAMessage:
                content = {}
            self._add_cell(message, content, waiting)
        if message.kind.endswith("_request"):
            self._waiting[message.id] = waiting

    def _add_cell(self, message: Message, content: dict[str, Any], waiting: Waiting) -> None:
        source = content.get("code")
        cell_id = _cell_id(message)
        waiting.counts = content.get("silent") is not True
        waiting.cell = self.inner.add_cell(
            source if isinstance(source, str) else "", cell_id, message.id
        )
        waiting.cell_done = asyncio.Event()
        self._cells.append(message.id)

    def _begin_next(self) -> None:
        """Start to record the first queued cell, unless one is running."""
        if self._cells and self.inner.state.current is None:
            msg_id = self._cells[0]
            waiting = self._waiting[msg_id]
            assert waiting.cell is not None
            self.inner.begin(waiting.cell, msg_id)
            if self._recording is not None and waiting.counts:
                node = self.inner.state.request.node.cells[waiting.cell]
                self._recording.add(node.source, node.get("id"))
            if self._notes and waiting.counts:
                text = "".join(self._notes)
                self.front.announce("stream", {"name": "stderr", "text": text}, waiting.header)
                self._notes = []
            if self.inner.limits.cell_timeout is not None:
                self._spawn(self._watch_time(msg_id, waiting))

    # --- from the kernel --------------------------------------------------------------------------

    def _holds(self) -> bool:
        """Whether a subscriber's queue is full; if so, start to wait for room in it."""
        if self.front.queued <= MOST_QUEUED:
            return False
        if not self._stalled:
            self._stalled = True
            self._spawn(self._wait_for_room())
        return True

    async def _wait_for_room(self) -> None:
        # Resume at half the bound, so that kernel and clients do not switch at every message.
        loop = asyncio.get_running_loop()
        least, since = self.front.queued, loop.time()
        while (queued := self.front.queued) > MOST_QUEUED // 2:
            if queued < least:
                least, since = queued, loop.time()
            if loop.time() - since > STALL_SECONDS:
                self.front.drop_slowest()
                least, since = self.front.queued, loop.time()
            await asyncio.sleep(0.001 if queued < MOST_QUEUED else STALL_LOOK_SECONDS / 10)
        self._stalled = False
        if self._is_ready:
            self.inner.resume()

    def _from_kernel(self, channel: str, message: Message) -> None:
        if channel == "iopub":
            self._from_iopub(message)
            return
        # Without an identity before the delimiter there is no client to send it to.
        if message.start < 2:  # noqa: PLR2004
            return
        client, frames = message.frames[0], message.frames[1:]
        waiting = self._waiting.get(message.parent_id)
        if channel == "stdin":
            self.inner.waits_for_input = True
        elif waiting is not None and waiting.cell is not None:
            if message.kind == "execute_reply":
                waiting.reply = message
                self._note_reply(message.parent_id, waiting, message)
                return
        elif waiting is not None:
            del self._waiting[message.parent_id]
        self.front.reply(channel, client, frames)

    def _note_reply(self, msg_id: str, waiting: Waiting, message: Message) -> None:
        assert waiting.cell is not None
        with contextlib.suppress(NotAMessage):
            waiting.content = self.inner.note_reply(waiting.cell, message)
        if not waiting.is_held:
            self.front.reply(waiting.channel, waiting.client, message.frames[1:])
        self._finish_if_done(msg_id, waiting)

    def _from_iopub(self, message: Message) -> None:
        waiting = self._waiting.get(message.parent_id)
        if waiting is None or waiting.cell is None:
            self.front.publish(message.frames)
            return
        if waiting.cell != self.inner.state.current:
            self._advance_to(message.parent_id)
        if message.kind == "status":
            self._from_status(message, waiting)
            return
        if waiting.cell != self.inner.state.current:
            self.front.publish(message.frames)
            return
        waiting.has_failed |= message.kind == "error"
        if message.kind == "execute_input":
            with contextlib.suppress(NotAMessage):
                count = message.content().get("execution_count")
                waiting.execution_count = count if isinstance(count, int) else None
                node = self.inner.state.request.node.cells[waiting.cell]
                node.execution_count = waiting.execution_count
        frames = self.inner.admit(message)
        if frames is not None:
            self.front.publish(frames)
        elif (mark := self.inner.cut_mark()) is not None:
            self.front.announce("stream", {"name": "stderr", "text": mark}, waiting.header)

    def _advance_to(self, msg_id: str) -> None:
        """Record the end of the current cell if the kernel has begun the next one."""
        # Replies and output come over two sockets. The output of a queued cell can arrive before the
        # reply to the cell ahead of it, whose ``idle`` then has arrived: one socket keeps its order.
        if len(self._cells) < 2 or self._cells[1] != msg_id:  # noqa: PLR2004 - a current and a next one
            return
        waiting = self._waiting[self._cells[0]]
        if waiting.idle is None or waiting.is_held or waiting.cell != self.inner.state.current:
            return
        assert waiting.cell is not None
        del self._cells[0]
        self.inner.end(waiting.cell, failed=waiting.has_failed, counts=waiting.counts)
        self._begin_next()

    def _from_status(self, message: Message, waiting: Waiting) -> None:
        state: Any = None
        with contextlib.suppress(NotAMessage):
            state = message.content().get("execution_state")
        if state == "idle":
            waiting.idle = message.frames
        if state != "idle" or not waiting.is_held:
            self.front.publish(message.frames)
        if state == "idle":
            self._finish_if_done(message.parent_id, waiting)

    def _finish_if_done(self, msg_id: str, waiting: Waiting) -> None:
        """End a cell once both its reply and its ``idle`` have arrived."""
        # Reply and ``idle`` come over two sockets, so their order is not defined.
        if waiting.reply is None or waiting.idle is None:
            return
        assert waiting.cell_done is not None
        waiting.cell_done.set()
        if not waiting.is_held:
            self._finish(msg_id, waiting)

    def _finish(self, msg_id: str, waiting: Waiting) -> None:
        assert waiting.cell is not None
        del self._waiting[msg_id]
        status = (waiting.content or {}).get("status")
        # A cell whose accounts ended before its reply is no longer in the list.
        if msg_id in self._cells:
            self._cells.remove(msg_id)
            # ipykernel aborts queued cells after an error: such a cell never ran.
            if status == "aborted" and waiting.counts and self.inner.state.current == waiting.cell:
                if self._recording is not None:
                    self._recording.drop_last()
                waiting.counts = False
            if self.inner.state.current == waiting.cell:
                failed = status == "error" or waiting.has_failed
                self.inner.end(waiting.cell, failed=failed, counts=waiting.counts)
            else:
                self.inner.discount(waiting.cell)
        self._begin_next()
        if not self._is_paused("shell"):
            self.front.resume()

    # --- the end of a cell's time -----------------------------------------------------------------

    async def _watch_time(self, msg_id: str, waiting: Waiting) -> None:
        """Interrupt a cell when its time is up."""
        # The time a person takes to answer input() does not count.
        inner, cell_done = self.inner, waiting.cell_done
        assert cell_done is not None and waiting.cell is not None
        remaining = inner.limits.cell_timeout or 0.0
        while remaining > 0 or inner.waits_for_input:
            step = min(max(remaining, 0.05), 0.5)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(step):
                    await cell_done.wait()
            if cell_done.is_set() or inner.session.died.is_set() or waiting.is_lost:
                return
            if not inner.waits_for_input:
                remaining -= step
        # The client must see the diagnosis before the reply to the interrupted cell: hold that one.
        waiting.is_held = True
        finished = self._spawn(cell_done.wait())
        ending = await inner.over_time(waiting.cell, finished)
        if not ending.answered:
            # The kernel ignored the interrupt and was killed; `_explain_end` explains its death.
            return
        diagnosis = self._diagnose(inner, await inner.observe(ending))
        inner.forget_timeout()
        self._send_diagnosis(msg_id, waiting, diagnosis)

    def _send_diagnosis(self, msg_id: str, waiting: Waiting, diagnosis: Diagnosis) -> None:
        """Publish the diagnosis of an interrupted cell, then its held reply and ``idle``."""
        assert waiting.cell is not None and waiting.reply is not None and waiting.idle is not None
        error = self._publish_error(waiting, diagnosis, survived=True)
        content = {**(waiting.content or {}), **error, "status": "error"}
        # The reply's content changes, so it needs a new signature.
        frames = self.front.author.resigned(waiting.reply, content)
        self.front.reply(waiting.channel, waiting.client, frames[1:])
        self.front.publish(waiting.idle)
        self._finish(msg_id, waiting)

    def _publish_error(
        self,
        waiting: Waiting,
        diagnosis: Diagnosis,
        *,
        survived: bool,
        notes: tuple[str, ...] = (),
    ) -> dict[str, Any]:
        assert waiting.cell is not None
        source = self.inner.state.request.node.cells[waiting.cell].source
        node = self.inner.state.request.node
        path = None
        if self._recording is not None:
            path = self._recording.write_notebook(diagnosis.verdict, node, survived=survived)
        error = diagnosis.error(source, [*notes, *session_note(path)])
        self.front.announce("error", error, waiting.header)
        return error

    # --- the end of a kernel ----------------------------------------------------------------------

    async def _explain_end(self, inner: Inner) -> None:
        """Explain a kernel's end, answer its clients, then exit or restart."""
        if self._asked_to_end:
            inner.close()
            self._code = 0
            return
        self._skip_ended_cells(inner)
        for request in self._waiting.values():
            request.is_lost = True
        msg_id = self._cells[0] if self._cells else None
        waiting = self._waiting.get(msg_id) if msg_id is not None else None
        diagnosis = await self._last_word(inner, waiting)
        self._answer_pending_requests(waiting)
        if self._is_restored:
            self._go_on(inner, diagnosis, is_shown=waiting is not None)
            return
        inner.close()
        status = diagnosis.verdict.status
        self._linger = waiting is not None
        if self._on_death is OnDeath.EXIT:
            self._code = diagnosis.verdict.exit_code if status is not Status.PASSED else 0
            return
        self._notes = [LOST] if waiting is not None else [_idle_death(diagnosis.verdict), LOST]
        if self._recording is not None:
            self._recording.restarted()
        self._restarted = True
        self.front.announce("status", {"execution_state": "restarting"})

    def _go_on(self, inner: Inner, diagnosis: Diagnosis, *, is_shown: bool) -> None:
        """Go on with the restored kernel."""
        inner.forget_lost_cells()
        if not is_shown:
            self._notes += [_idle_death(diagnosis.verdict), idle_restoration()]
        if self._recording is not None:
            self._recording.drop_last()

    async def _restore(self, inner: Inner, diagnosis: Diagnosis) -> tuple[str, ...]:
        """Restore the state from before the last cell if possible; return notes for the user."""
        # exit() is no death, and after it nobody wants to go on.
        if not self._restores or inner.session.restore_points is None:
            return ()
        if diagnosis.verdict.status is Status.PASSED or inner.client.asked_to_exit is not None:
            return ()
        failure = await inner.restore()
        self._is_restored = not failure
        return (not_restored(failure),) if failure else (RESTORED,)

    def _skip_ended_cells(self, inner: Inner) -> None:
        """Answer queued cells that ended before the one in which the kernel died."""
        # A dying kernel loses what its threads had not sent yet: the reply or the ``idle`` of quick
        # cells. The shared page still has the request that it worked on last.
        inner.session.take_facts()
        page_cell = inner.session.running_by_page()
        while len(self._cells) > 1:
            msg_id = self._cells[0]
            waiting = self._waiting[msg_id]
            is_behind = page_cell is not None and (waiting.cell or 0) < page_cell
            is_over = waiting.reply is not None or waiting.idle is not None or is_behind
            if waiting.is_held or not is_over:
                return
            if waiting.reply is None:
                self._reply(waiting, "execute_reply", _lost_reply(waiting))
            if waiting.idle is None:
                self.front.announce("status", {"execution_state": "idle"}, waiting.header)
            self._finish(msg_id, waiting)

    async def _last_word(self, inner: Inner, waiting: Waiting | None) -> Diagnosis:
        index = inner.state.current
        ending: Ending = await inner.ending_by_death(index)
        timed_out = waiting is not None and waiting.is_held
        if timed_out and waiting is not None and waiting.cell is not None:
            ending = TimedOut(
                cell=waiting.cell,
                whole_notebook=False,
                allowed=inner.limits.cell_timeout or 0.0,
                answered=None if inner.session.kill_reason is None else False,
            )
        # exit() stops the kernel's loop 0.1 s after the reply. The request can come from an earlier
        # cell than the last one.
        exiting_cell = inner.client.asked_to_exit
        if exiting_cell is not None and waiting is None:
            ending = Died(cell=exiting_cell, exit=None, asked_to_exit=True)
        diagnosis = self._diagnose(inner, await inner.observe(ending))
        recovered = inner.recovered
        notes = await self._restore(inner, diagnosis)
        if waiting is not None:
            # Output that was journaled in the shared page but never sent comes first.
            for message in recovered:
                self.front.announce(message["msg_type"], message["content"], waiting.header)
            error = self._publish_error(waiting, diagnosis, survived=False, notes=notes)
            content = diagnosis.reply(error, waiting.execution_count)
            if waiting.reply is None or waiting.is_held:
                self._reply(waiting, "execute_reply", content)
            self.front.announce("status", {"execution_state": "idle"}, waiting.header)
        elif self._recording is not None:
            # No cell can show it. The next kernel of this client says it in its first cell.
            node = inner.state.request.node
            is_shown = self._is_restored or self._on_death is OnDeath.RESTART
            self._recording.write_notebook(
                diagnosis.verdict, node, survived=False, is_shown=is_shown
            )
        return diagnosis

    def _answer_pending_requests(self, first: Waiting | None) -> None:
        """Answer every other request that the dead kernel left open."""
        # Otherwise clients such as nbclient wait for a reply without end.
        for waiting in self._waiting.values():
            if waiting is first:
                continue
            kind = waiting.kind.removesuffix("_request") + "_reply"
            if waiting.idle is not None:
                # The cell ended before the kernel died; only its reply was lost.
                self._reply(waiting, kind, _lost_reply(waiting))
                continue
            if waiting.cell is not None:
                content: dict[str, Any] = {"status": "aborted", "execution_count": None}
            else:
                content = {"status": "error", "ename": "KernelDied", "evalue": "the kernel ended"}
                content["traceback"] = []
            self._reply(waiting, kind, content)
            self.front.announce("status", {"execution_state": "idle"}, waiting.header)
        self._waiting.clear()
        self._cells.clear()

    def _reply(self, waiting: Waiting, kind: str, content: dict[str, Any]) -> None:
        frames = self.front.author.frames(kind, content, waiting.header)
        self.front.reply(waiting.channel, waiting.client, [*waiting.identities, *frames])


def _idle_death(verdict: Verdict) -> str:
    cause = verdict.cause.summary if verdict.cause is not None else "for an unknown reason"
    return idle_death(cause)


def _lost_reply(waiting: Waiting) -> dict[str, Any]:
    """Return a reply for a cell that ended without one; its output shows whether it failed."""
    content: dict[str, Any] = {"execution_count": waiting.execution_count}
    if waiting.has_failed:
        return content | {"status": "error", "ename": "", "evalue": "", "traceback": []}
    return content | {"status": "ok", "user_expressions": {}, "payload": []}


def _cell_id(message: Message) -> str | None:
    """Return the cell's id in the client's document; JupyterLab and VS Code send it as metadata."""
    try:
        metadata = json.loads(message.frames[message.start + 3])
    except (ValueError, RecursionError):
        return None
    cell_id = metadata.get("cellId") if isinstance(metadata, dict) else None
    return cell_id if isinstance(cell_id, str) and 0 < len(cell_id) <= 64 else None  # noqa: PLR2004
