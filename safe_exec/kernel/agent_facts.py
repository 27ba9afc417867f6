"""Facts that the agent sends from inside the kernel. All of them are claims.

``own_actions``, ``census_facts`` and ``cell_code`` read the larger kinds.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from safe_exec.kernel.cell_code import CellCode, source_of
from safe_exec.kernel.census_facts import CensusFacts
from safe_exec.kernel.message_validation import bounded_size
from safe_exec.kernel.own_actions import OwnActions
from safe_exec.model.evidence import Frame, Raised

if TYPE_CHECKING:
    from safe_exec.kernel.client import TrialClient
    from safe_exec.kernel.restore_points import RestorePoints

# Any code in the kernel can write to the facts socket. So invalid facts are ignored, the first of
# several contradicting facts counts, and every list is bounded.

MOST_HOSTS = 50
# Facts per turn of the event loop. A kernel that sends them faster than we read must not starve
# everything else.
MOST_FACTS = 500
LONGEST_TEXT = 1000
MOST_ROWS = 50
MOST_ERRORS = 6
MOST_SHOWN = 10
MOST_PATHS = 60
MOST_COMMANDS = 20
FACT_BYTES = 1 << 16
# The largest size of a pipe (pipe(7), pipe-max-size).
PIPE_BYTES = 1 << 20

# Frames as the agent sends them: function, line, file, the agent's number of the cell.
Rows = list[tuple[str, int, str, int]]


class ReportedErrors(Struct, frozen=True, kw_only=True):
    """The exceptions that a cell ended with; ``search`` is PATH at the end of the cell."""

    errors: tuple[Raised, ...] = ()
    cwd: str | None = None
    sys_path: tuple[str, ...] = ()
    search: str = ""


class FailedCommand(Struct, frozen=True, kw_only=True):
    """A shell command of a cell that failed.

    ``status`` is its exit status, or -N for signal N. ``cell`` is the index of the cell.
    """

    text: str
    status: int
    cell: int | None
    line: int | None


class AgentFacts:
    """The facts received so far. ``client`` tells which requests were sent."""

    def __init__(self) -> None:
        self.client: TrialClient | None = None
        self.hello: dict[str, Any] = {}
        self.hosts: list[str] = []
        self.exit_caller: Rows = []
        self.errors: dict[int, tuple[int, Rows]] = {}
        self.shown_errors: dict[int, tuple[int, Rows]] = {}
        self.exit_requests: dict[int, tuple[int, Rows]] = {}
        self.own_actions = OwnActions()
        self.failed_commands: list[FailedCommand] = []
        self.failed_command_count = 0
        self.census = CensusFacts()
        # Why memray could not record allocations.
        self.recording_error: str | None = None
        # The errno with which rows of coverage could not be written.
        self.coverage_errno: int | None = None
        self.raised: dict[int, deque[ReportedErrors]] = {}
        self.armed = True
        self._cells: dict[int, str] = {}
        self._numbers: dict[str, int] = {}
        # The indexes of cells that the kernel ran before it was copied.
        self._origin_cells: dict[int, int] = {}
        self.code = CellCode(self.index_of)
        self._pipes: dict[str, int] = {}
        self.restore_points: RestorePoints | None = None

    def begin_again(self, lost_number: int) -> None:
        """Forget what a dead kernel said of its process, and what its last cell did.

        ``lost_number`` is the agent's number of that cell.
        """
        self.exit_caller = []
        self.armed = True
        self.census = CensusFacts()
        self.own_actions.forget(lost_number)
        self.close()

    def follow(self, origin: AgentFacts, cell: int) -> None:
        """Know what the kernel told before it was copied: its cells, and actions on itself.

        It was copied before the cell with the index ``cell``, whose number is given again.
        """
        for number in {*origin._origin_cells, *origin._cells}:
            index = origin.index_of(number)
            if index is not None and index < cell:
                self._origin_cells[number] = index
        self.code.follow(origin.code, self._origin_cells.keys())
        self.own_actions, self.hosts = origin.own_actions, list(origin.hosts)

    def take(self, facts: socket.socket) -> bool:
        """Receive the facts that have arrived; false at the end of the socket."""
        for _ in range(MOST_FACTS):
            try:
                data, fds, _, _ = socket.recv_fds(facts, FACT_BYTES, 4)
            except (BlockingIOError, OSError):
                return True
            if not data and not fds:
                return False
            self._handle_datagram(data, fds)
        return True

    def _handle_datagram(self, data: bytes, fds: list[int]) -> None:
        keep = False
        with contextlib.suppress(
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            ArithmeticError,
            RecursionError,
            OSError,
        ):
            fact = json.loads(data)
            if "restore_point" in fact:
                if self.restore_points is not None:
                    self.restore_points.take(fact, fds)
            elif "pipe" in fact and len(fds) == 1 and self._is_new_pipe(str(fact["pipe"]), fds[0]):
                self._pipes[fact["pipe"]] = fds[0]
                keep = True
            else:
                self._note(fact)
        # A datagram may carry descriptors that we did not ask for.
        if not keep:
            for fd in fds:
                os.close(fd)

    def _is_new_pipe(self, name: str, fd: int) -> bool:
        """Whether a descriptor is a pipe, and the first of its name."""
        # ipykernel makes each pipe once, before any cell runs.
        return (
            name in ("stdout", "stderr")
            and name not in self._pipes
            and stat.S_ISFIFO(os.fstat(fd).st_mode)
        )

    def _note(self, fact: dict[str, Any]) -> None:
        # Keep the first one: our agent sends each fact once, so a repeated one is forged.
        if "msg_id" in fact:
            self._note_cell(int(fact["cell"]), str(fact["msg_id"]))
        elif "file" in fact:
            self.code.add(_text(fact["file"]), source_of(fact))
        elif "line" in fact and int(fact["cell"]) in self._cells:
            self._note_line(fact, int(fact["cell"]), int(fact["line"]))
        elif "raised" in fact and int(fact["cell"]) in self._cells:
            self.raised.setdefault(int(fact["cell"]), deque(maxlen=MOST_SHOWN)).append(
                reported_errors(fact)
            )
        elif "oversize" in fact and self.client is not None:
            self.client.cut_display(bounded_size(fact["oversize"]))
        elif "hello" in fact and not self.hello:
            self.hello = fact
        else:
            self._note_process(fact)

    def _note_process(self, fact: dict[str, Any]) -> None:
        """Store a fact about the process. ``armed`` means that its fault handler is in place."""
        if "remote" in fact:
            self.add_hosts([_text(fact["remote"])])
        elif "exit_caller" in fact:
            self.exit_caller = _rows(fact["exit_caller"])
        elif "action" in fact:
            self.own_actions.take(fact, _rows(fact["rows"]))
        elif "tracing" in fact:
            self.own_actions.take_tracing(fact)
        elif "failed_command" in fact:
            self._note_failed_command(fact)
        elif "recording_failed" in fact:
            self.recording_error = str(fact["recording_failed"])[:LONGEST_TEXT]
        elif "coverage_failed" in fact:
            self.coverage_errno = int(fact["coverage_failed"])
        elif "census" in fact:
            self.census.take(fact)
        elif "armed" in fact:
            self.armed = bool(fact["armed"])

    def _note_failed_command(self, fact: dict[str, Any]) -> None:
        command = FailedCommand(
            text=_text(fact["failed_command"]),
            status=int(fact["status"]),
            cell=self.index_of(int(fact["cell"])),
            line=int(fact["place"]) or None,
        )
        self.failed_command_count += 1
        if len(self.failed_commands) < MOST_COMMANDS:
            self.failed_commands.append(command)

    def _note_line(self, fact: dict[str, Any], number: int, line: int) -> None:
        """Store a line of a cell with its stack."""
        # The last raised error is the one that ended the cell. Of other facts the first counts.
        if "error" in fact:
            self.errors[number] = (line, _rows(fact["error"]))
        elif "shown" in fact:
            self.shown_errors.setdefault(number, (line, _rows(fact["shown"])))
        elif "asked_to_exit" in fact:
            self.exit_requests.setdefault(number, (line, _rows(fact["asked_to_exit"])))

    def _note_cell(self, number: int, msg_id: str) -> None:
        """Store which request a cell number answers."""
        # Only a request that was sent is accepted, and each only once. Otherwise notebook code
        # could assign its lines to another cell.
        if (
            self.client is not None
            and msg_id in self.client.cells_by_request
            and msg_id not in self._numbers
            and number not in self._cells
            and number not in self._origin_cells
        ):
            self._cells[number] = msg_id
            self._numbers[msg_id] = number

    def add_hosts(self, names: Iterable[str]) -> None:
        """Add hosts that the kernel has connected to."""
        self.hosts += list(names)[: MOST_HOSTS - len(self.hosts)]

    # --- cells: the agent's numbers, request ids, indexes in the notebook -------------------------

    def index_of(self, number: int) -> int | None:
        """Return the notebook's cell index for the agent's number of a cell."""
        if number in self._origin_cells:
            return self._origin_cells[number]
        msg_id = self._cells.get(number)
        return self.client.cells_by_request.get(msg_id) if self.client and msg_id else None

    def number_of(self, msg_id: str) -> int:
        """Return the agent's number of the cell for a request; 0 if it has not begun."""
        return self._numbers.get(msg_id, 0)

    def frames(self, rows: Rows) -> tuple[Frame, ...]:
        """Convert the agent's rows to frames with notebook cell indexes."""
        return tuple(
            Frame(
                function=function,
                line=line or None,
                file=file,
                cell=self.index_of(number) if number else None,
            )
            for function, line, file, number in rows
        )

    # --- the pipes behind descriptors 1 and 2 -----------------------------------------------------

    def residue(self, recorded_bytes: Callable[[str], int]) -> dict[str, str]:
        """Return, by stream, the output of a dead kernel's C code that is still in the pipes.

        ``recorded_bytes`` returns the number of a stream's bytes that are in the outputs already.
        """
        # ipykernel reads these pipes in a thread of the same process, so its death leaves the last
        # writes of C code behind. The agent sent us a copy of each read end.
        texts: dict[str, str] = {}
        for name, fd in self._pipes.items():
            data = _read_waiting(fd)[recorded_bytes(name) :]
            if data:
                texts[name] = data.decode("utf-8", "replace")
        return texts

    def close(self) -> None:
        """Close the descriptors of the pipes."""
        for fd in self._pipes.values():
            os.close(fd)
        self._pipes.clear()


def _rows(value: Any) -> Rows:
    return [(_text(f), int(n or 0), _text(p), int(c)) for f, n, p, c in value[:MOST_ROWS]]


def reported_errors(fact: dict[str, Any]) -> ReportedErrors:
    """Return the exceptions that a cell ended with, as claimed by the kernel.

    Raises TypeError, KeyError and similar for an invalid fact.
    """
    return ReportedErrors(
        errors=tuple(_raised(row, fact) for row in fact["raised"][:MOST_ERRORS]),
        cwd=_text(fact["cwd"]) if fact.get("cwd") else None,
        sys_path=tuple(_text(part) for part in fact["sys_path"][: MOST_PATHS + 1]),
        search=str(fact["search"])[: 8 * LONGEST_TEXT],
    )


def _raised(row: dict[str, Any], fact: dict[str, Any]) -> Raised:
    # An exception may lack a file name or a host. The agent then reports the last file that was
    # opened, or the last address that was connected to.
    kind, files, host = (
        _text(row["type"]),
        [_text(name) for name in row.get("files") or ()][:2],
        None,
    )
    dialled = _text(fact.get("dialled") or "")
    if not files and fact.get("database") and "OperationalError" in kind:
        # SQLite's error messages do not name the file.
        files = [_text(fact["database"])]
    elif not files and "errno" in row and dialled:
        files, host = ([dialled], None) if dialled.startswith("/") else ([], dialled)
    number, port = row.get("errno"), fact.get("dialled_port")
    return Raised(
        type=kind,
        number=number if isinstance(number, int) else None,
        files=tuple(files),
        host=host,
        port=port if host and isinstance(port, int) else None,
        module=_text(row["module"]) if row.get("module") else None,
        variable=_text(row["variable"]) if row.get("variable") else None,
        writes=bool(row["writes"]) if row.get("writes") is not None else None,
        remote=bool(row.get("remote")),
    )


def _text(value: Any) -> str:
    return str(value)[:LONGEST_TEXT]


def _read_waiting(fd: int) -> bytes:
    """Return the bytes that wait in a pipe, at most as many as the largest pipe holds."""
    # Another process may empty the pipe between a poll and a read, and the read would then block
    # for ever. O_NONBLOCK is a property of the open file, which the kernel's processes share, so we
    # must not set it. splice(2) has a flag for this one call instead.
    ours_r, ours_w = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    data = b""
    try:
        while len(data) < PIPE_BYTES and (
            size := os.splice(fd, ours_w, 1 << 16, flags=os.SPLICE_F_NONBLOCK)
        ):
            data += os.read(ours_r, size)
    except OSError:
        pass
    finally:
        os.close(ours_r)
        os.close(ours_w)
    return data
