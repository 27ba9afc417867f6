"""The runner's end of a keeper: start it, tell it what to spawn, hear of the death the moment it happens.

May import model, errors, plan, leftovers, meter. Nothing here waits longer than it says, and no thread is started: ``fileno()``
goes into an event loop or a poll.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct, field

from safe_exec.errors import KernelStartError, SandboxError
from safe_exec.keeper import procfs
from safe_exec.model.ending import ExitStatus, TerminationReason
from safe_exec.model.evidence import IsolationFacts
from safe_exec.platforms import refuse_elsewhere
from safe_exec.sandbox import stale_runs
from safe_exec.sandbox.keeper_process import Born
from safe_exec.sandbox.plan import HandOn, SpawnPlan
from safe_exec.sandbox.usage.meter import Counters, parse_counters

START_SECONDS = 20.0
STACK_BEFORE = (
    TerminationReason.MEMORY,
    TerminationReason.CPU_TIME,
    TerminationReason.OUTPUT,
    TerminationReason.PROCESSES,
    TerminationReason.DISK,
)
"""Kills by which the kernel is asked for its stack first: it is well, and only we know that it is over."""
LEAVE_SECONDS = 15.0
NO_WALLS: Mapping[str, object] = {"enclosure": None, "walls": {}, "owner": None, "discarded": []}


class KernelExit(Struct, frozen=True, kw_only=True):
    """The end of the kernel process as the keeper saw it. ``cpu_seconds`` is the kernel process and children it waited for.

    ``status`` is ``None`` where the keeper was killed and nobody could read it. ``fault_at`` is when
    its fault handler began to report. ``bursts`` are the ends of what it wrote to its stderr, each with
    the time of its last piece.
    """

    status: ExitStatus | None
    reason: TerminationReason | None = None
    at: float = 0.0
    cpu_seconds: float | None = None
    counters: Counters = field(default_factory=Counters)
    fault: str = ""
    stack_bytes: int | None = None
    stack_limit: int | None = None
    fault_at: float | None = None
    fault_site: Mapping[str, object] = field(default_factory=dict)
    caught_signals: frozenset[int] | None = None
    stderr: str = ""
    bursts: tuple[tuple[float, str], ...] = ()
    oomd: bool | None = None
    disk_free: int | None = None


class DiscardedFiles(Struct, frozen=True, kw_only=True):
    """Files that went with the sandbox: one by its path in a place (``/tmp``), or all that lay in one directory there."""

    place: str
    name: str
    files: int
    bytes: int


class Discarded(Struct, frozen=True, kw_only=True):
    """The largest of the files that went with the sandbox. ``files`` is the number of all; ``is_complete``: none was left uncounted."""

    groups: tuple[DiscardedFiles, ...] = ()
    files: int = 0
    is_complete: bool = True


class Departure(Struct, frozen=True, kw_only=True):
    """What could not be removed: processes that would not die, paths that would not go."""

    alive: tuple[int, ...] = ()
    left: tuple[str, ...] = ()


class Sandbox:
    """One keeper and what it keeps. ``sockets`` is the directory of the kernel's, where no path out here leads to it.

    ``isolation`` is set by whoever has a kernel spawned behind walls.
    """

    def __init__(
        self,
        run_id: str,
        *,
        directory: Path | None = None,
        hand_on: HandOn | None = None,
        born: Born | None = None,
    ) -> None:
        """Start the keeper at once, or take one that was: its interpreter starts while the runner does other things.

        ``directory`` is made by the keeper, and removed by it. ``hand_on`` of the plan may say by what the keeper must be born.
        """
        refuse_elsewhere()
        self.run_id = run_id
        self.directory = directory
        self._note = stale_runs.note_path(run_id)
        self._inbox = b""
        if born is None:
            command, more = (hand_on.born, hand_on.environment) if hand_on is not None else ((), {})
            born = Born(run_id, directory=str(directory or ""), born=command, environment=more)
        self._control, self._process = born.control, born
        self._undo: Mapping[str, object] = {}
        self.keeper_pid: int | None = None
        self.kernel_pid: int | None = None
        self.sockets: int | None = None
        self.exit: KernelExit | None = None
        self.departure: Departure | None = None
        self.isolation: IsolationFacts | None = None
        self.discarded: Discarded = Discarded()
        self.signals_to_keeper: list[int] = []
        self.troubles: list[str] = []
        self.fault_text = ""
        self.fault_at = 0.0
        self._trouble: str | None = None
        self._command_failed = False
        self._command = ""
        self._lost = False
        self._deciding = threading.Lock()
        self._asked_to_end = False
        self.condemned: TerminationReason | None = None
        self.on_exit: Callable[[KernelExit], None] | None = None

    def fileno(self) -> int:
        """For an event loop: readable when the keeper has something to say."""
        return self._control.fileno()

    # --- building -----------------------------------------------------------------------------------------------

    def spawn(
        self,
        plan: SpawnPlan,
        *,
        argv: Sequence[str],
        env: Mapping[str, str],
        cwd: str,
        pass_fds: Mapping[str, int],
        dump_signal: int | None = None,
        walls: Mapping[str, object] | None = None,
        discarded: Sequence[Mapping[str, object]] = (),
    ) -> None:
        """Have the kernel born inside; ``await_kernel`` says what came of it. ``pass_fds`` stand as ``{name}`` in ``argv``.

        ``discarded`` are places whose files are to be listed before they go, besides those of the ``walls``.
        Raises SandboxError where there is no keeper.
        """
        self.wait_ready()
        self._write_note(plan)
        request = plan.as_request() | {
            "op": "spawn",
            "argv": list(argv),
            "env": dict(env),
            "cwd": cwd,
            "pass_fds": [],
            "pass_names": list(pass_fds),
            "dump_signal": dump_signal,
            "stack_before": [reason.value for reason in STACK_BEFORE],
            **(walls or NO_WALLS),
        }
        request["discarded"] = [*(walls or NO_WALLS)["discarded"], *discarded]  # type: ignore[misc]
        self._send_descriptors(list(pass_fds.values()))
        self._command = argv[0]
        self._say(request)

    def await_kernel(self) -> int:
        """Wait until the kernel that was asked for is born; its process id.

        Raises SandboxError, naming what could not be made, and KernelStartError for a command that cannot be executed; the
        keeper is gone then and everything removed.
        """
        self._wait_for(
            lambda: self.kernel_pid is not None or self._trouble is not None,
            "the kernel was not started",
        )
        if self._trouble is not None or self.kernel_pid is None:
            trouble = self._trouble or "the keeper ended"
            self.leave()
            if self._command_failed:
                raise KernelStartError(
                    f"the kernel's command cannot be executed: {trouble} ({self._command})"
                )
            raise SandboxError(f"the sandbox cannot be built: {trouble}")
        return self.kernel_pid

    def wait_ready(self) -> None:
        """Wait until the keeper stands and has made its directory. Raises SandboxError."""
        self._wait_for(lambda: self.keeper_pid is not None, "the keeper did not start")

    def _send_descriptors(self, fds: list[int]) -> None:
        socket.send_fds(self._control, [b'{"op":"descriptors"}\n'], fds)

    def entrust(self, orphans: Sequence[str]) -> None:
        """Directories to be removed should we be killed, which were not known yet when the kernel was spawned."""
        if self._undo and orphans:
            self._undo = {**self._undo, "orphans": list(orphans)}
            stale_runs.renew_note(self._note, self._undo)
            self._say({"op": "entrust", "orphans": list(orphans)})

    def _write_note(self, plan: SpawnPlan) -> None:
        assert self.keeper_pid is not None
        keeper, owner = procfs.stat(self.keeper_pid), procfs.stat(os.getpid())
        self._undo = {
            "keeper": self.keeper_pid,
            "keeper_started": keeper.started if keeper else 0,
            "owner": os.getpid(),
            "owner_started": owner.started if owner else 0,
            "cgroup_dirs": list(plan.cgroup.dirs),
            "directories": [*([str(self.directory)] if self.directory else []), *plan.directories],
            "orphans": list(plan.orphans),
        }
        self._say(
            {"op": "note", "path": str(self._note)}
        )  # first: whenever we are killed, there is somebody who removes it
        stale_runs.write_note(self._note, self._undo)

    # --- talking ------------------------------------------------------------------------------------------------

    def _say(self, request: Mapping[str, object]) -> None:
        with contextlib.suppress(OSError):
            self._control.sendall(json.dumps(request).encode() + b"\n")

    def pump(self) -> None:
        """Take in what the keeper has said; call it when ``fileno()`` is readable."""
        try:
            data, fds = _received(self._control)
        except BlockingIOError:
            return
        except ConnectionError:
            data, fds = b"", []
        self.sockets = next(iter(fds), self.sockets)
        if not data:
            self._keeper_gone()
            return
        *lines, self._inbox = (self._inbox + data).split(b"\n")
        for line in lines:
            self._take(json.loads(line))

    def _take(self, said: dict[str, object]) -> None:
        event = said["event"]
        if event == "ready":
            self.keeper_pid = int(str(said["pid"]))
            self._process.is_known_as(self.keeper_pid)
        elif event == "spawned":
            self.kernel_pid = int(str(said["pid"]))
        elif event == "failed":
            self._trouble = str(said["message"])
            self._command_failed = bool(said["command"])
        elif event == "signal":
            self.signals_to_keeper.append(int(str(said["signum"])))
        elif event == "fault":
            self.fault_text += str(said["text"])
            self.fault_at = float(str(said["at"]))
        elif event == "exited":
            self._set_exit(_kernel_exit(said))
        elif event == "trouble":
            self.troubles.append(str(said["message"]))
        elif event == "discarded":
            self.discarded = _discarded(said)
        elif event == "left":
            self.departure = Departure(alive=tuple(said["alive"]), left=tuple(said["left"]))  # type: ignore[arg-type]

    def _set_exit(self, exit_: KernelExit) -> None:
        if self.exit is None:
            self.exit = exit_
            if self.on_exit is not None:
                self.on_exit(exit_)

    def _keeper_gone(self) -> None:
        """The keeper ended without a word: somebody killed it, and the kernel with it by its parent-death signal."""
        self._lost = True
        if self.departure is None and self.kernel_pid is not None:
            self._set_exit(KernelExit(status=None, at=time.monotonic()))

    def _wait_for(
        self, done: Callable[[], bool], message: str, seconds: float = START_SECONDS
    ) -> None:
        deadline = time.monotonic() + seconds
        while not done():
            left = deadline - time.monotonic()
            if self._lost or left <= 0:
                raise SandboxError(f"{message}; its own error message, if any, stands above")
            if select.select([self._control], [], [], left)[0]:
                self.pump()

    # --- ending -------------------------------------------------------------------------------------------------

    def signal(self, signum: int, *, group: bool = False) -> None:
        """Send a signal to the kernel process alone, or to its whole process group."""
        self._say({"op": "signal", "signum": signum, "group": group})

    def kill(self, reason: TerminationReason) -> bool:
        """Have the whole tree killed; the reason is recorded before the signal is sent, the first one stays.

        ``condemned`` is that reason from now on, whatever the kernel does until the signal reaches it. Whether this was before it
        was asked to end: later it is part of the shutdown, and no reason. May be called from any thread.
        """
        with self._deciding:
            in_time = not self._asked_to_end
            if in_time and self.condemned is None:
                self.condemned = reason
            self._say(
                {"op": "kill", "reason": (reason if in_time else TerminationReason.SHUTDOWN).value}
            )
        return in_time

    def ask_to_end(self) -> bool:
        """Say that the kernel is about to be asked to end; ``False`` where we have decided to kill it before."""
        with self._deciding:
            self._asked_to_end = self.condemned is None
        return self._asked_to_end

    def leave(self) -> Departure:
        """Kill what lives, remove everything, end the keeper; what could not be removed. May be called again."""
        self._say({"op": "finish"})
        with contextlib.suppress(SandboxError):
            self._wait_for(lambda: self.departure is not None, "", LEAVE_SECONDS)
        if self.departure is None:
            self._process.kill()
            self.departure = self._clean_up_ourselves()
        self._process.wait()
        self._control.close()
        if self.sockets is not None:
            os.close(self.sockets)
            self.sockets = None
        return self.departure

    def _clean_up_ourselves(self) -> Departure:
        if not self._undo:
            return Departure()
        self._process.wait()
        left = stale_runs.clean(self._undo, orphaned=False)
        if not left:
            self._note.unlink(missing_ok=True)
        return Departure(left=tuple(left))


def _discarded(said: dict[str, object]) -> Discarded:
    groups: list[dict[str, object]] = said["groups"]  # type: ignore[assignment]
    return Discarded(
        groups=tuple(
            DiscardedFiles(
                place=str(group["place"]),
                name=str(group["name"]),
                files=int(str(group["files"])),
                bytes=int(str(group["bytes"])),
            )
            for group in groups
        ),
        files=int(str(said["files"])),
        is_complete=bool(said["complete"]),
    )


def _kernel_exit(said: dict[str, object]) -> KernelExit:
    seen: dict[str, Any] = said["fault_seen"]  # type: ignore[assignment]
    return KernelExit(
        status=ExitStatus(int(str(said["status"]))) if said["status"] is not None else None,
        reason=TerminationReason(str(said["reason"])) if said["reason"] else None,
        at=float(str(said["at"])),
        cpu_seconds=float(str(said["cpu"])) if said["cpu"] is not None else None,
        counters=parse_counters(said["counters"]),  # type: ignore[arg-type]
        fault=str(said["fault"]),
        stack_bytes=seen.get("stack"),
        stack_limit=seen.get("stack_limit"),
        fault_at=seen.get("at"),
        fault_site=seen.get("site") or {},
        caught_signals=_signals(said["caught"]),
        stderr=str(said["stderr"]),
        bursts=tuple((float(at), str(text)) for at, text in said["bursts"]),  # type: ignore[attr-defined]
        oomd=said["oomd"],  # type: ignore[arg-type]
        disk_free=said["disk_free"],  # type: ignore[arg-type]
    )


def _signals(mask: object) -> frozenset[int] | None:
    """The numbers in a set of signals as /proc tells it: bit N-1 for signal N."""
    return (
        frozenset(n for n in range(1, 65) if mask >> (n - 1) & 1) if isinstance(mask, int) else None
    )


def _received(control: socket.socket) -> tuple[bytes, list[int]]:
    """What stands in the socket and a descriptor that came along, never waiting: ``socket.recv_fds`` drops its flags before Python 3.12."""
    room = socket.CMSG_SPACE(struct.calcsize("i"))
    data, ancillary, _, _ = control.recvmsg(
        1 << 20, room, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
    )
    rights = b"".join(
        said
        for level, kind, said in ancillary
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
    )
    whole = len(rights) - len(rights) % struct.calcsize("i")
    return data, [fd for (fd,) in struct.iter_unpack("i", rights[:whole])]
