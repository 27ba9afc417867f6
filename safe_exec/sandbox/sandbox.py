"""The runner's end of a keeper: starts it, spawns the kernel, reports its death at once."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from msgspec import Struct, field

from safe_exec.errors import KernelStartError, SandboxError
from safe_exec.keeper import procfs, protocol
from safe_exec.keeper.child import KernelCommand, Walls
from safe_exec.keeper.protocol import (
    BwrapSetup,
    CleanupResult,
    Discarded,
    DiscardedPlace,
    FaultingThread,
    Spawn,
)
from safe_exec.model.ending import ExitStatus, TerminationReason
from safe_exec.model.evidence import IsolationFacts
from safe_exec.platforms import refuse_elsewhere
from safe_exec.sandbox import stale_runs
from safe_exec.sandbox.keeper_process import KeeperProcess
from safe_exec.sandbox.plan import Delegation, SpawnPlan
from safe_exec.sandbox.usage.meter import Counters, parse_counters

# No method waits longer than its docstring says, and no thread is started. Watch ``fileno()`` in an
# event loop or with poll(2).

START_SECONDS = 20.0
# For these reasons the keeper requests the kernel's stack before it kills it. The kernel does not
# crash in these cases, so no other evidence would show the line that it was executing.
STACK_BEFORE = (
    TerminationReason.MEMORY,
    TerminationReason.CPU_TIME,
    TerminationReason.OUTPUT,
    TerminationReason.PROCESSES,
    TerminationReason.DISK,
)
SHUTDOWN_SECONDS = 15.0
RECEIVE_BYTES = 1 << 20
HIGHEST_SIGNAL = 64


class WallSetup(Struct, frozen=True, kw_only=True):
    """The keeper's part of the walls around one kernel.

    ``owner`` is the other user that the kernel runs as; it gets the runtime directory.
    ``discarded`` are directories outside whose files disappear with the sandbox.
    """

    bwrap: BwrapSetup | None = None
    walls: Walls | None = None
    owner: int | None = None
    discarded: tuple[DiscardedPlace, ...] = ()


# A kill for one of these reasons ends the kernel, and a copy of it may go on with the next cell.
SPARED = (TerminationReason.CELL_TIMEOUT.value, TerminationReason.MEMORY.value)
CONTINUED_DESCRIPTORS = 2


class KernelExit(Struct, frozen=True, kw_only=True):
    """The end of the kernel process, as the keeper observed it.

    ``status`` is ``None`` if the keeper was killed before it could read it. ``at`` and ``fault_at``
    (when the fault handler began to report) are monotonic times. ``cpu_seconds`` covers the kernel
    process and the children it waited for; ``resident_peak`` is the largest resident memory of one
    of them, in bytes; ``orphans_peak`` that of an adopted process. ``bursts`` are the last pieces of text on stderr, each with its time.
    """

    status: ExitStatus | None
    reason: TerminationReason | None = None
    at: float = 0.0
    cpu_seconds: float | None = None
    resident_peak: int | None = None
    orphans_peak: int | None = None
    counters: Counters = field(default_factory=Counters)
    fault: str = ""
    stack_bytes: int | None = None
    stack_limit: int | None = None
    fault_at: float | None = None
    faulting_thread: FaultingThread | None = None
    caught_signals: frozenset[int] | None = None
    stderr: str = ""
    bursts: tuple[tuple[float, str], ...] = ()
    oomd: bool | None = None
    disk_free: int | None = None


class Sandbox:
    """One keeper and its kernel.

    ``sockets`` is a descriptor of the directory of the kernel's sockets if it has no path outside
    the sandbox. The caller that spawns a kernel behind walls sets ``isolation``.
    """

    def __init__(
        self,
        run_id: str,
        *,
        directory: Path | None = None,
        delegation: Delegation | None = None,
        keeper: KeeperProcess | None = None,
    ) -> None:
        """Start the keeper in the background, or use a given one.

        The keeper makes and removes ``directory``. ``delegation`` contains the command that starts
        it.
        """
        refuse_elsewhere()
        self.run_id = run_id
        self.directory = directory
        self._note = stale_runs.note_path(run_id)
        self._lines = protocol.LineBuffer()
        if keeper is None:
            keeper = KeeperProcess(
                run_id,
                directory=str(directory or ""),
                launcher=delegation.launcher if delegation is not None else (),
                environment=delegation.environment if delegation is not None else {},
            )
        self._control, self._keeper = keeper.control, keeper
        self._undo: Mapping[str, object] = {}
        self.keeper_pid: int | None = None
        self.kernel_pid: int | None = None
        self.sockets: int | None = None
        self.exit: KernelExit | None = None
        self.cleanup: CleanupResult | None = None
        self.isolation: IsolationFacts | None = None
        self.discarded = Discarded()
        self.signals_to_keeper: list[int] = []
        self.troubles: list[str] = []
        self.fault_text = ""
        self.fault_at = 0.0
        self._failure: protocol.Failed | None = None
        self._continued: list[protocol.Continued] = []
        # The counters of the groups at the death of the last kernel, and of the one before it.
        self._counters = self.counters_before = Counters()
        self._descriptors: list[int] = []
        self._command = ""
        self._is_keeper_gone = False
        self._decision_lock = threading.Lock()
        self._is_ending = False
        self._takeovers: list[protocol.TookOver] = []
        self.kill_reason: TerminationReason | None = None
        # Called before the counters of an ending are compared.
        self.on_ending: Callable[[], None] = lambda: None
        self.on_exit: Callable[[KernelExit], None] | None = None
        self.on_dying: Callable[[protocol.Dying], None] | None = None

    def fileno(self) -> int:
        """Return the descriptor of the keeper's socket; it is readable if messages arrived."""
        return self._control.fileno()

    # --- building -------------------------------------------------------------------------------

    def spawn(
        self,
        plan: SpawnPlan,
        *,
        argv: Sequence[str],
        env: Mapping[str, str],
        cwd: str,
        pass_fds: Mapping[str, int],
        dump_signal: int | None = None,
        tracer: int | None = None,
        walls: WallSetup | None = None,
        discarded: Sequence[DiscardedPlace] = (),
        restorable: bool = False,
    ) -> None:
        """Ask the keeper to spawn the kernel; ``await_kernel`` waits for it.

        ``{name}`` in ``argv`` becomes the descriptor number of that name in ``pass_fds``, as the
        kernel sees it. Descendants of ``tracer`` may trace the kernel. ``discarded`` are places, in
        addition to those of the ``walls``, whose files are listed before they disappear. With
        ``restorable`` a copy of the kernel may take over after its death. Raises SandboxError if the
        keeper did not start.
        """
        self.wait_ready()
        self._write_note(plan)
        walls = walls or WallSetup()
        self._command = argv[0]
        request = Spawn(
            command=KernelCommand(
                argv=tuple(argv),
                env=dict(env),
                cwd=cwd,
                rlimits=plan.rlimits,
                open_files_soft=plan.open_files_soft,
                walls=walls.walls,
            ),
            descriptor_names=tuple(pass_fds),
            dump_signal=dump_signal,
            tracer=tracer,
            stack_before=tuple(reason.value for reason in STACK_BEFORE),
            cgroup=plan.cgroup_setup(),
            mounts=tuple(dict(mount) for mount in plan.mounts),
            user_namespace=plan.user_namespace,
            bwrap=walls.bwrap,
            owner=walls.owner,
            discarded=(*walls.discarded, *discarded),
            directories=plan.directories,
            cleanup_if_runner_dies=plan.cleanup_if_runner_dies,
            keep_patterns=plan.keep_patterns,
            keep_folder=""
            if walls.bwrap is None or walls.bwrap.disk is None
            else walls.bwrap.disk.folder,
            restorable=restorable,
        )
        self._send(request, descriptors=tuple(pass_fds.values()))

    def await_kernel(self) -> int:
        """Wait until the kernel has been executed; return its process id.

        Raises KernelStartError if the command cannot be executed, and SandboxError if a part of the
        sandbox cannot be made. Then the keeper has ended and everything is removed.
        """
        self._wait_for(
            lambda: self.kernel_pid is not None or self._failure is not None,
            "the kernel was not started",
        )
        if self._failure is not None or self.kernel_pid is None:
            message = self._failure.message if self._failure is not None else "the keeper ended"
            self.shutdown()
            if self._failure is not None and self._failure.command_failed:
                raise KernelStartError(
                    f"the kernel's command cannot be executed: {message} ({self._command})"
                )
            raise SandboxError(f"the sandbox cannot be built: {message}")
        return self.kernel_pid

    def wait_ready(self) -> None:
        """Wait until the keeper runs and has made its directory. Raises SandboxError."""
        self._wait_for(lambda: self.keeper_pid is not None, "the keeper did not start")

    def add_cleanup(self, directories: Sequence[str]) -> None:
        """Remove these directories, instead of those of the plan, if the runner dies."""
        if self._undo and directories:
            self._undo = {**self._undo, "orphans": list(directories)}
            stale_runs.renew_note(self._note, self._undo)
            self._send(protocol.AddCleanup(cleanup_if_runner_dies=tuple(directories)))

    def hold_at_fault(self, seconds: float, on_dying: Callable[[protocol.Dying], None]) -> None:
        """Tell the keeper to stop a kernel that reports a fatal fault, so that it can be examined.

        ``on_dying`` is called when it is stopped. ``read_on`` lets it die, or the keeper does after
        ``seconds``.
        """
        self.on_dying = on_dying
        self._send(protocol.HoldAtFault(seconds=seconds))

    def spare(self, pid: int | None) -> None:
        """Let a sleeping copy of the kernel outlive the kernel where a run may go on after it."""
        self._send(protocol.Spare(pid=pid, reasons=SPARED))

    def continue_with(self, pid: int) -> tuple[int, int] | None:
        """Make a sleeping copy of the dead kernel the kernel, and kill everything else.

        Returns descriptors for it: its stderr, and the socket of its fault handler. ``None`` if it
        does not live any more, or the keeper does not. Then the sandbox is of no further use.
        """
        self._continued, self._descriptors = [], []
        self._send(protocol.Continue(pid=pid))
        try:
            self._wait_for(lambda: bool(self._continued), "the copy was not taken on")
        except SandboxError:
            return None
        if self._continued[0].pid != pid or len(self._descriptors) != CONTINUED_DESCRIPTORS:
            return None
        stderr, fault = self._descriptors
        self.counters_before = self._counters
        self.kernel_pid, self.exit, self.kill_reason = pid, None, None
        self.fault_text, self._is_ending = "", False
        self.on_exit = self.on_dying = None
        return stderr, fault

    def read_on(self) -> None:
        """Let a held kernel write its report and die."""
        self._send(protocol.ReadOn())

    def spare_snapshot(self, pid: int) -> None:
        """Have the keeper spare a snapshot of the kernel when it kills the kernel; 0 for none."""
        self._send(protocol.SpareSnapshot(pid=pid))

    def take_over(self, pid: int) -> str:
        """Make a snapshot the kernel, after the kernel's death; all other processes are killed.

        Return why that is not possible, empty if it is. Raises SandboxError if the keeper ends.
        """
        answers = self._takeovers
        answers.clear()
        self._send(protocol.TakeOver(pid=pid))
        self._wait_for(lambda: bool(answers), "the keeper does not answer")
        return answers[0].failure

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
            "orphans": list(plan.cleanup_if_runner_dies),
        }
        # Announce the note before writing it: the keeper then removes it whenever we are killed.
        self._send(protocol.Note(path=str(self._note)))
        stale_runs.write_note(self._note, self._undo)

    # --- messages -------------------------------------------------------------------------------

    def _send(self, message: protocol.ToKeeper, *, descriptors: tuple[int, ...] = ()) -> None:
        line = protocol.encode(message)
        # A dead keeper is noticed by the end of its socket, so ignore EPIPE here.
        with contextlib.suppress(OSError):
            count = socket.send_fds(self._control, [line], descriptors) if descriptors else 0
            self._control.sendall(line[count:])

    def process_messages(self) -> None:
        """Process the keeper's messages; call it when ``fileno()`` is readable."""
        try:
            data, fds = _receive(self._control)
        except BlockingIOError:
            return
        except ConnectionError:
            data, fds = b"", []
        if len(fds) == CONTINUED_DESCRIPTORS:
            self._descriptors = fds
        else:
            # Otherwise only ``Spawned`` carries one, and only from inside bubblewrap.
            self.sockets = next(iter(fds), self.sockets)
        if not data:
            self._keeper_gone()
            return
        try:
            for line in self._lines.feed(data):
                self._process(protocol.decode(line, protocol.TO_RUNNER))
        except protocol.ProtocolError as error:
            # This keeper cannot be trusted any more. Its death kills the kernel (parent-death
            # signal), and ``shutdown`` removes the rest.
            self.troubles.append(f"the keeper sent a message that cannot be read: {error}")
            self._keeper.kill()
            self._set_exit(
                KernelExit(status=None, reason=TerminationReason.INTERNAL, at=time.monotonic())
            )
            self._keeper_gone()

    def _process(self, message: protocol.ToRunner) -> None:  # noqa: C901 - one case a message
        match message:
            case protocol.Ready():
                self.keeper_pid = message.pid
                self._keeper.attach_pid(message.pid)
            case protocol.Spawned():
                self.kernel_pid = message.pid
            case protocol.Failed() | protocol.TookOver():
                self._process_answer(message)
            case protocol.SignalReceived():
                self.signals_to_keeper.append(message.number)
            case protocol.Fault() | protocol.Dying():
                self._process_fault(message)
            case protocol.Continued():
                self._continued = [message]
            case protocol.Exited():
                self._counters = parse_counters(message.counters)
                self.on_ending()
                self._set_exit(_kernel_exit(message, self._counters.since(self.counters_before)))
            case protocol.Trouble():
                self.troubles.append(message.message)
            case protocol.Discarded():
                self.discarded = message
            case protocol.CleanupResult():
                self.cleanup = message

    def _process_answer(self, message: protocol.Failed | protocol.TookOver) -> None:
        if isinstance(message, protocol.Failed):
            self._failure = message
            return
        self._takeovers.append(message)
        if not message.failure:
            # Now, and not when it is waited for: the end of the new kernel may come right after.
            self.kernel_pid, self.exit, self.fault_text = message.pid, None, ""
            self.counters_before = self._counters
            with self._decision_lock:
                self.kill_reason = None

    def _process_fault(self, message: protocol.Fault | protocol.Dying) -> None:
        if isinstance(message, protocol.Fault):
            self.fault_text += message.text
            self.fault_at = message.at
        elif self.on_dying is not None:
            self.on_dying(message)

    def _set_exit(self, kernel_exit: KernelExit) -> None:
        if self.exit is None:
            self.exit = kernel_exit
            if self.on_exit is not None:
                self.on_exit(kernel_exit)

    def _keeper_gone(self) -> None:
        # A keeper that ends without a message was killed, and its parent-death signal killed the
        # kernel with it.
        self._is_keeper_gone = True
        if self.cleanup is None and self.kernel_pid is not None:
            self._set_exit(KernelExit(status=None, at=time.monotonic()))

    def _wait_for(
        self, condition: Callable[[], bool], message: str, seconds: float = START_SECONDS
    ) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            remaining = deadline - time.monotonic()
            if self._is_keeper_gone or remaining <= 0:
                raise SandboxError(f"{message}; its own error message, if any, stands above")
            if select.select([self._control], [], [], remaining)[0]:
                self.process_messages()

    # --- ending ---------------------------------------------------------------------------------

    def signal(self, signum: int, *, group: bool = False) -> None:
        """Send a signal to the kernel process alone, or to its whole process group."""
        self._send(protocol.SendSignal(number=int(signum), group=group))

    def kill(self, reason: TerminationReason) -> bool:
        """Kill the process tree, from any thread; false if the kernel was asked to end before."""
        # The first reason stays, and the keeper records it before it sends the signal. After the
        # request to end, a kill is part of the shutdown and has no reason of its own. The lock is
        # needed since the watchdog's thread may decide to kill in the moment in which the event
        # loop asks the kernel to end.
        with self._decision_lock:
            in_time = not self._is_ending
            if in_time and self.kill_reason is None:
                self.kill_reason = reason
            self._send(protocol.Kill((reason if in_time else TerminationReason.SHUTDOWN).value))
        return in_time

    def ask_to_end(self) -> bool:
        """Record that the kernel will be asked to end; false if it is already being killed."""
        with self._decision_lock:
            self._is_ending = self.kill_reason is None
        return self._is_ending

    def shutdown(self) -> CleanupResult:
        """Kill all processes, remove all files, end the keeper. Can be called again.

        After SHUTDOWN_SECONDS it kills the keeper and cleans up itself.
        """
        self._send(protocol.Finish())
        # A killed keeper sends no result. Then the runner cleans up in its place.
        with contextlib.suppress(SandboxError):
            self._wait_for(lambda: self.cleanup is not None, "", SHUTDOWN_SECONDS)
        if self.cleanup is None:
            self._keeper.kill()
            self.cleanup = self._clean_up()
        self._keeper.wait()
        self._control.close()
        if self.sockets is not None:
            os.close(self.sockets)
            self.sockets = None
        return self.cleanup

    def _clean_up(self) -> CleanupResult:
        if not self._undo:
            return CleanupResult()
        self._keeper.wait()
        remaining = stale_runs.clean(self._undo, orphaned=False)
        if not remaining:
            self._note.unlink(missing_ok=True)
        return CleanupResult(remaining_paths=tuple(remaining))


def _kernel_exit(message: protocol.Exited, counters: Counters) -> KernelExit:
    fault = message.fault
    return KernelExit(
        status=None if message.status is None else ExitStatus(message.status),
        reason=TerminationReason(message.reason) if message.reason else None,
        at=message.at,
        cpu_seconds=message.cpu_seconds,
        resident_peak=message.resident_peak,
        orphans_peak=message.orphans_peak,
        counters=counters,
        fault=message.fault_text,
        stack_bytes=fault.stack_bytes if fault is not None else None,
        stack_limit=fault.stack_limit if fault is not None else None,
        fault_at=fault.at if fault is not None else None,
        faulting_thread=fault.thread if fault is not None else None,
        caught_signals=_signals(message.caught_signals),
        stderr=message.stderr,
        bursts=message.bursts,
        oomd=message.oomd_killed,
        disk_free=message.disk_free,
    )


def _signals(mask: int | None) -> frozenset[int] | None:
    """Return the signal numbers of a mask as in /proc."""
    # Bit N-1 stands for signal N (proc(5), SigCgt).
    if mask is None:
        return None
    return frozenset(n for n in range(1, HIGHEST_SIGNAL + 1) if mask >> (n - 1) & 1)


def _receive(control: socket.socket) -> tuple[bytes, list[int]]:
    """Return the bytes in the socket and at most two descriptors.

    Raises BlockingIOError if empty.
    """
    # Before Python 3.12 socket.recv_fds ignores its flags, so it would block.
    room = socket.CMSG_SPACE(CONTINUED_DESCRIPTORS * struct.calcsize("i"))
    flags = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
    data, ancillary, _, _ = control.recvmsg(RECEIVE_BYTES, room, flags)
    rights = b"".join(
        packed
        for level, kind, packed in ancillary
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
    )
    complete = len(rights) - len(rights) % struct.calcsize("i")
    return data, [fd for (fd,) in struct.iter_unpack("i", rights[:complete])]
