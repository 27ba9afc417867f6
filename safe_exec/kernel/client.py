"""An nbclient that notices a kernel's death at once, keeps its last output and bounds memory."""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionComplete, CellExecutionError, DeadKernelError

from safe_exec.kernel.execution import Execution, sent_at
from safe_exec.kernel.message_validation import checked, mended_reply
from safe_exec.kernel.outputs import bounded, join, joins, output_node, remark, size_of
from safe_exec.kernel.shared_page import Message, Note, Page, Text

# nbclient handles requests, replies, outputs, displays and widgets. Three things differ here: a
# death is an event, where nbclient polls once per second; outputs are counted and cut at their
# caps; and output that a dead kernel had written but not sent is added to the cell afterwards. The
# trial handles timeouts (``trial/cell_loop.py``), so nbclient's own are off.

# The ends of the last texts are kept with their times. After a death they may tell the cause.
LAST_TEXTS = 32
LAST_TEXT_CHARACTERS = 4096
# From this number of outputs on, further text of the same stream is joined to the last one.
MERGE_AFTER = 200

OUTPUTS = ("stream", "display_data", "execute_result", "error")
KEPT = (*OUTPUTS, "clear_output", "comm_open", "comm_msg", "comm_close")
# Bytes that an output costs in addition to its content, so that empty outputs are bounded too.
OVERHEAD = 200

# After a death: the silence that ends reading, and the longest time to read.
QUIET_SECONDS = 0.01
LOOK_AGAIN_SECONDS = 0.001
DRAIN_SECONDS = 2.0
LONGEST_ID = 200
# An idle kernel begins a cell within this time.
BEGIN_SECONDS = 0.25
LOOK_SECONDS = 0.02


class OutputAccounting:
    """The output of one cell: bytes stored, its output limits, and bytes received."""

    def __init__(self) -> None:
        self.stored = 0
        self.received = 0
        self.messages = 0
        self.truncated = False
        self.marked = False
        self.last: float | None = None
        self.characters = {"stdout": 0, "stderr": 0}
        self.iopub_ids: deque[str] = deque(maxlen=5000)
        self.texts: deque[tuple[float, str, str]] = deque(maxlen=LAST_TEXTS)


class TrialClient(NotebookClient):  # type: ignore[misc]
    """Runs the cells of one notebook in one sandboxed kernel."""

    def __init__(
        self,
        nb: Any,
        km: Any,
        *,
        died: asyncio.Event,
        on_output: Callable[[int, int], None],
        **kw: Any,
    ) -> None:
        super().__init__(nb, km, timeout=None, **kw)
        self.died = died
        self.on_output = on_output
        self.cell_cap: int | None = None
        self.total_cap: int | None = None
        self.total_stored = 0
        self.accounts = OutputAccounting()
        self.asked_to_exit: int | None = None
        self.running: tuple[str, Any, int] | None = None
        self.replies: dict[int, dict[str, Any]] = {}
        self.cells_by_request: dict[str, int] = {}
        self.kernel_pid: int | None = None
        self.info: dict[str, Any] = {}
        self.malformed = 0
        self.first_malformed = ""
        self.note: Callable[[], Note | None] = lambda: None
        self.previous_cell: int | None = None
        self.disbelieved: set[str] = set()
        self.residue: dict[str, str] = {}
        self.on_message: Callable[[int, dict[str, Any]], None] = lambda _index, _message: None
        self._execution: Execution | None = None
        self._may_raise = False
        self._death_watch: asyncio.Task[None] | None = None

    # --- death ------------------------------------------------------------------------------------

    async def _fail_after_death(self) -> None:
        """Wait for the kernel's death, read its last messages, then end the wait for a reply."""
        # nbclient polls once per second and cancels the output task without draining iopub, which
        # loses the last outputs of the dying cell.
        await self.died.wait()
        await self._drained()
        if self._execution is not None:
            self._fail(self._execution, DeadKernelError("Kernel died"))

    async def _drained(self) -> None:
        """Wait until the socket has ended or has been silent for a moment."""
        # A forked child may hold the socket open, so its end may never come.
        deadline = time.monotonic() + DRAIN_SECONDS
        count, since = self.accounts.messages, time.monotonic()
        while not self.kc.iopub_channel.is_exhausted() and time.monotonic() < min(
            deadline, since + QUIET_SECONDS
        ):
            await asyncio.sleep(LOOK_AGAIN_SECONDS)
            if count != self.accounts.messages:
                count, since = self.accounts.messages, time.monotonic()

    # --- one cell ---------------------------------------------------------------------------------

    def begin_cell(self, cell_cap: int | None) -> None:
        """Start to count the output of a cell, which is cut at ``cell_cap`` bytes."""
        self.accounts = OutputAccounting()
        self.cell_cap = cell_cap
        self.disbelieved = set()
        note = self.note()
        self.previous_cell = note.cell if note else None

    def listen(self) -> None:
        """Process the kernel's messages from now on, until ``stop_listening``."""
        # As callbacks: a task, an event and two turns of the loop for each message would cost more
        # than the message.
        self.kc.shell_channel.consume(self._take_reply)
        self.kc.iopub_channel.consume(self._take_output)
        self._death_watch = asyncio.create_task(self._fail_after_death())

    def stop_listening(self) -> None:
        """Stop watching for the kernel's death. Can be called again."""
        if self._death_watch is not None:
            self._death_watch.cancel()

    def send_cell(self, cell: Any, index: int) -> asyncio.Future[None]:
        """Send a cell, as nbclient's ``async_execute_cell`` does.

        The future is done when the reply and the end of the output have arrived. It fails with
        CellExecutionError for an error that is not allowed, with DeadKernelError after a death.
        """
        self._may_raise = not self.force_raise_errors and (
            self.allow_errors or "raises-exception" in cell.metadata.get("tags", [])
        )
        content = {
            "code": cell.source,
            "silent": False,
            "store_history": True,
            "user_expressions": {},
            "allow_stdin": self.kc.allow_stdin,
            "stop_on_error": not self._may_raise,
        }
        msg_id = self.kc.shell_channel.request("execute_request", content)
        self.code_cells_executed += 1
        cell["metadata"]["execution"] = {}
        cell.outputs = []
        self.clear_before_next_output = False
        self.running = (msg_id, cell, index)
        self.cells_by_request[msg_id] = index
        self._execution = execution = Execution(
            msg_id=msg_id, cell=cell, index=index, count=self.code_cells_executed
        )
        return execution.future

    def is_awaited(self, msg_id: object) -> bool:
        """Whether the output of this request still belongs to its cell."""
        execution = self._execution
        return execution is not None and not execution.is_idle and msg_id == execution.msg_id

    def _take_output(self, message: dict[str, Any]) -> None:
        execution = self._execution
        if (
            execution is None
            or execution.is_idle
            or message["parent_header"].get("msg_id") != execution.msg_id
        ):
            return
        try:
            self.process_message(message, execution.cell, execution.index)
        except CellExecutionComplete:
            execution.is_idle = True
            if execution.is_accepted:
                self._complete(execution)

    def _take_reply(self, message: dict[str, Any]) -> None:
        execution = self._execution
        if execution is None or execution.is_accepted or not _is_reply(message, execution.msg_id):
            return
        if execution.reply is None:
            execution.begins_until = time.monotonic() + BEGIN_SECONDS
        # The last one counts: the agent's note comes before the true one.
        execution.reply = message
        try:
            self._confirm_reply(execution)
        except Exception as error:  # noqa: BLE001 - the trial reports it
            self._fail(execution, error)

    def _confirm_reply(self, execution: Execution) -> None:
        """Accept the last reply once the agent has noted the end of the cell.

        Until then the cell runs, and its timeout counts.
        """
        # Code in the kernel knows the key and can send a signed reply before its cell has ended.
        # The agent notes the end of a cell before the kernel replies. A kernel with its own shell
        # class may run a cell without our agent seeing it. So accept a reply to a cell that has not
        # begun after a moment.
        execution.stop_timer()
        if self._at_work("its reply") or (
            not self._begun() and time.monotonic() < execution.begins_until
        ):
            execution.call_later(LOOK_SECONDS, self._confirm_reply)
            return
        reply = execution.reply
        assert reply is not None
        execution.is_accepted = True
        reply["content"] = mended_reply(reply["content"])
        execution.cell["metadata"]["execution"]["shell.execute_reply"] = sent_at(reply)
        if execution.is_idle:
            self._complete(execution)
        else:
            execution.call_later(self.iopub_timeout, self._give_up_output)

    def _give_up_output(self, execution: Execution) -> None:
        self.log.warning("Timeout waiting for IOPub output")
        self._complete(execution)

    def _complete(self, execution: Execution) -> None:
        """End a cell whose reply has arrived, by nbclient's rules."""
        execution.stop_timer()
        self._execution = None
        cell, index, reply = execution.cell, execution.index, execution.reply
        assert reply is not None
        content = reply["content"]
        cell["execution_count"] = execution.count
        self.replies[index] = content
        self._detect_exit_request(content, index)
        if execution.future.done():
            return
        if (
            content["status"] != "error"
            or self._may_raise
            or (not self.force_raise_errors and content["ename"] in self.allow_error_names)
        ):
            execution.future.set_result(None)
        else:
            error = CellExecutionError.from_cell_and_msg(cell, content)
            execution.future.set_exception(error)

    def _fail(self, execution: Execution, error: Exception) -> None:
        execution.stop_timer()
        self._execution = None
        if not execution.future.done():
            execution.future.set_exception(error)

    def _begun(self) -> bool:
        note = self.note()
        return note is None or self.previous_cell is None or note.cell != self.previous_cell

    def _at_work(self, claim: str) -> bool:
        """Whether the agent reports that the cell still runs, although a message claims its end.

        If so, records the claim as not believed.
        """
        note = self.note()
        if note is None or note.finished:
            return False
        self.disbelieved.add(claim)
        return True

    def _detect_exit_request(self, content: dict[str, Any], cell_index: int) -> None:
        """Record that the cell asked the frontend to end the kernel."""
        # ``exit()`` in IPython replies "ok" with this payload, and the kernel's loop stops 0.1 s
        # later. ``exit(True)`` keeps the kernel.
        for payload in content.get("payload") or ():
            asks = (
                isinstance(payload, dict)
                and payload.get("source") == "ask_exit"
                and payload.get("keepkernel") is not True
            )
            if asks and self.asked_to_exit is None:
                self.asked_to_exit = cell_index

    # --- output -----------------------------------------------------------------------------------

    def process_message(self, msg: dict[str, Any], cell: Any, cell_index: int) -> Any:
        """Process one message for the running cell."""
        # An invalid message is skipped and counted: it must not end the run with an internal error.
        try:
            return self._process(msg, cell, cell_index)
        except CellExecutionComplete:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a kernel sends
            self._complain(f"{msg.get('msg_type')}: {error}")
            return None

    def _complain(self, problem: str) -> None:
        self.malformed += 1
        self.first_malformed = self.first_malformed or problem[:300]

    def _process(self, msg: dict[str, Any], cell: Any, cell_index: int) -> Any:
        """Count a message, cut output beyond the caps, then let nbclient process it."""
        accounts = self.accounts
        accounts.messages += 1
        kind = msg["msg_type"]
        content = msg["content"]
        problems = checked(kind, content)
        if problems:
            self._complain(f"{kind}: {problems[0]}")
        if kind in ("status", "execute_input"):
            self._note_progress(kind, msg, content, cell)
            return None
        size = size_of(kind, content)
        accounts.received += size
        accounts.last = time.monotonic()
        self._remember(kind, msg, content)
        self.on_output(cell_index, size)
        if kind == "clear_output":
            return self._clear(msg, cell, cell_index)
        if self.clear_before_next_output and kind in OUTPUTS:
            # Clear even if the new output does not fit, as the notebook asked for.
            self._clear_now(cell, cell_index)
        # An error is never cut away: it tells why the cell failed. A very large traceback is
        # shortened.
        if kind == "error":
            if self.cell_cap is not None and size > self.cell_cap:
                content["traceback"] = bounded(content.get("traceback") or [])
        elif not self._admit(kind, content, size, cell):
            return None
        output = super().process_message(msg, cell, cell_index)
        self.on_message(cell_index, msg)
        return output

    def _note_progress(
        self, kind: str, msg: dict[str, Any], content: dict[str, Any], cell: Any
    ) -> None:
        """Store the times and the number of a cell, as nbclient does.

        Raises CellExecutionComplete at its end.
        """
        times = cell["metadata"]["execution"]
        if "execution_count" in content:
            cell["execution_count"] = content["execution_count"]
        if kind == "execute_input":
            times["iopub.execute_input"] = sent_at(msg)
            return
        state = content["execution_state"]
        if state == "idle":
            if self._at_work("idle"):
                return
            times["iopub.status.idle"] = sent_at(msg)
            raise CellExecutionComplete
        if state == "busy":
            times["iopub.status.busy"] = sent_at(msg)

    def _remember(self, kind: str, msg: dict[str, Any], content: dict[str, Any]) -> None:
        """Record the text and displays that arrived, for ``recover`` after a death."""
        # The agent's journal counts the kernel's own characters, so a forked child's text must not
        # count here.
        if kind == "stream":
            name = content.get("name")
            self.accounts.texts.append(
                (time.monotonic(), str(name), str(content.get("text", ""))[-LAST_TEXT_CHARACTERS:])
            )
            if name in self.accounts.characters and not self._of_a_child(msg):
                self.accounts.characters[name] += len(content.get("text", ""))
        else:
            self.accounts.iopub_ids.append(str(msg["header"]["msg_id"])[:LONGEST_ID])

    def _of_a_child(self, msg: dict[str, Any]) -> bool:
        """Whether a forked child sent a message."""
        # jupyter_client puts the sender's process id into the message id.
        _, _, suffix = str(msg["header"].get("msg_id", "")).partition("_")
        pid = suffix.partition("_")[0]
        return self.kernel_pid is not None and pid.isdigit() and int(pid) != self.kernel_pid

    def _clear(self, msg: dict[str, Any], cell: Any, cell_index: int) -> Any:
        result = super().process_message(msg, cell, cell_index)
        if not cell.outputs:
            self._release_stored()
        return result

    def _clear_now(self, cell: Any, cell_index: int) -> None:
        """Carry out an earlier ``clear_output(wait=True)`` at the next output, as nbclient does."""
        cell.outputs[:] = []
        self.clear_display_id_mapping(cell_index)
        self.clear_before_next_output = False
        self._release_stored()

    def _release_stored(self) -> None:
        self.total_stored -= self.accounts.stored
        self.accounts.stored = 0
        self.accounts.marked = False

    def _admit(self, kind: str, content: dict[str, Any], size: int, cell: Any) -> bool:
        """Whether to store an output; text is shortened to the remaining bytes, with a mark."""
        remaining = self._left()
        if remaining is None or size + OVERHEAD <= remaining:
            self._store(size + OVERHEAD)
            return True
        self.accounts.truncated = True
        if kind.startswith("comm") or self.accounts.marked:
            return False
        self.accounts.marked = True
        if kind == "stream":
            content["text"] = (
                content["text"]
                .encode("utf-8", "replace")[: max(0, remaining)]
                .decode("utf-8", "ignore")
                + self._mark()
            )
        else:
            cell.outputs.append(remark(self._mark().lstrip()))
            return False
        self._store(max(0, remaining))
        return True

    def _left(self) -> int | None:
        caps = []
        if self.cell_cap is not None:
            caps.append(self.cell_cap - self.accounts.stored)
        if self.total_cap is not None:
            caps.append(self.total_cap - self.total_stored)
        return min(caps) if caps else None

    def _store(self, size: int) -> None:
        self.accounts.stored += size
        self.total_stored += size

    def _mark(self) -> str:
        from safe_exec.units import format_size

        cell = self.cell_cap is not None and self.cell_cap - self.accounts.stored <= (
            self._left() or 0
        )
        cap = self.cell_cap if cell else self.total_cap
        place = "this cell" if cell else "the notebook"
        return f"\n[safe-exec: output cut here; limit for {place} {format_size(cap or 0)}]\n"

    def cut_display(self, size: int) -> None:
        """Mark, in the running cell, a message that was too large to send or to read."""
        if self.running is not None and not self.accounts.marked:
            self.accounts.truncated = self.accounts.marked = True
            self.running[1].outputs.append(remark(self._mark().lstrip()))
        # A single large message must not look like a flood, so it counts as at most a cell's cap.
        self.accounts.received += size if self.cell_cap is None else min(size, self.cell_cap)

    def output(
        self, outs: list[Any], msg: dict[str, Any], display_id: str | None, cell_index: int
    ) -> Any:
        """Add an output as nbclient does, but join stream pieces and skip a second validation."""
        # A stream in very many pieces is joined. And ``checked`` has validated the content already:
        # nbformat's schema check would double the time that an output takes.
        if self.output_hook_stack[msg["parent_header"].get("msg_id")]:
            return super().output(outs, msg, display_id, cell_index)
        node = output_node(msg["msg_type"], msg["content"])
        if node is None:
            return None
        if len(outs) >= MERGE_AFTER and joins(outs[-1], node):
            join(outs[-1], node.text)
            return outs[-1]
        if display_id:
            self._display_id_map.setdefault(display_id, {}).setdefault(cell_index, []).append(
                len(outs)
            )
        outs.append(node)
        return node

    # --- after a death ----------------------------------------------------------------------------

    def recover(self, page: Page, number: int, residue: dict[str, str]) -> int:
        """Add to the running cell the output that a dead kernel had written but not sent.

        Returns how much was added: characters plus displays. ``number`` is the agent's number of
        the cell; ``residue`` is the text left in the pipes of descriptors 1 and 2, by stream.
        """
        # ipykernel sends prints every 0.2 s, and SIGKILL loses the buffered ones.
        if self.running is None:
            return 0
        recovered = 0
        for record in page.journal(number):
            if isinstance(record, Text):
                recovered += self._recover_text(record.stream, record.text[self._already(record) :])
            else:
                recovered += self._recover_message(record)
        self.residue = residue
        for name, text in residue.items():
            recovered += self._recover_text(name, text)
        return recovered

    def _already(self, record: Text) -> int:
        """Return how many characters of a text in the journal have arrived in messages."""
        # The journal numbers the characters of each stream, and the wire delivers them in order.
        return max(0, self.accounts.characters[record.stream] - record.start)

    def _recover_text(self, name: str, text: str) -> int:
        if text:
            message = {"msg_type": "stream", "content": {"name": name, "text": text}}
            self._feed(message)
        return len(text)

    def _recover_message(self, record: Message) -> int:
        # The message may have arrived after all: its id tells.
        message = _parse(record.frames)
        if (
            message is None
            or message["msg_type"] not in KEPT
            or str(message["header"]["msg_id"])[:LONGEST_ID] in self.accounts.iopub_ids
        ):
            return 0
        try:
            self._feed(message)
        except Exception:  # noqa: BLE001 - hostile data must not change the ending
            return 0
        return 1

    def _feed(self, message: dict[str, Any]) -> None:
        assert self.running is not None
        msg_id, cell, index = self.running
        header = message.get("header") or {"msg_id": "", "msg_type": message["msg_type"]}
        header["msg_type"] = message["msg_type"]
        full = {
            "metadata": {"safe_exec_late": True},
            "buffers": [],
            **message,
            "header": header,
            "parent_header": {"msg_id": msg_id},
        }
        self.process_message(full, cell, index)


def _is_reply(message: dict[str, Any], msg_id: str) -> bool:
    return bool(
        message["msg_type"] == "execute_reply" and message["parent_header"].get("msg_id") == msg_id
    )


def _parse(frames: tuple[bytes, ...]) -> dict[str, Any] | None:
    """Return a message from its frames: topic, delimiter, signature, four parts of JSON."""
    try:
        at = frames.index(b"<IDS|MSG>")
        header, _, metadata, content = (json.loads(part) for part in frames[at + 2 : at + 6])
        metadata["safe_exec_late"] = True
        str(header["msg_id"]), dict(content)
        parsed = {
            "msg_type": header["msg_type"],
            "header": header,
            "metadata": metadata,
            "content": content,
        }
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return parsed
