"""One kernel from start to end: its sandbox, provisioner, manager and client.

It knows cells by index only, and no causes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from safe_exec.agent import layout
from safe_exec.errors import KernelStartError, SandboxError
from safe_exec.keeper import procfs
from safe_exec.keeper.protocol import CleanupResult
from safe_exec.kernel import fault_report, file_locks, processes
from safe_exec.kernel.activity import ObservedKernel
from safe_exec.kernel.agent_facts import AgentFacts
from safe_exec.kernel.allocation_file import AllocationFile
from safe_exec.kernel.channel import Channel
from safe_exec.kernel.children import ChildHistory
from safe_exec.kernel.connection import Connection
from safe_exec.kernel.handshake import Handshake
from safe_exec.kernel.input_answers import InputAnswers
from safe_exec.kernel.late_text import LateText
from safe_exec.kernel.launch import LaunchedKernel, has_pystack
from safe_exec.kernel.manager import Manager
from safe_exec.kernel.native_stack import NativeReading
from safe_exec.kernel.native_watch import NativeStackWatch
from safe_exec.kernel.peers import PeerWatch
from safe_exec.kernel.process_changes import ProcessChanges
from safe_exec.kernel.provisioner import SandboxProvisioner
from safe_exec.kernel.restore_points import RestorePoints
from safe_exec.kernel.shared_page import Note, Page, Text
from safe_exec.model.ending import TerminationReason
from safe_exec.model.evidence import Frame, ProcessCount
from safe_exec.model.limits import LimitName, Limits, Wall
from safe_exec.model.observed import ObservedLock
from safe_exec.sandbox.plan import SpawnPlan
from safe_exec.sandbox.sandbox import KernelExit, Sandbox
from safe_exec.sandbox.usage.meter import Meter
from safe_exec.sandbox.usage.volumes import Volumes

if TYPE_CHECKING:
    from safe_exec.kernel.client import TrialClient
    from safe_exec.kernel.coverage_file import CoverageFile
    from safe_exec.kernel.fork_channel import RootHandover
    from safe_exec.kernel.snapshots import KernelSnapshots

# Time for exit hooks between the shutdown request and the kill.
SHUTDOWN_SECONDS = 3.0

READY_RETRY_SECONDS = 0.25
MESSAGE_SLACK = 3 << 20

# Connected in this order: the subscription must be in place before the first reply.
CHANNELS = {"iopub": "SUB", "shell": "DEALER", "control": "DEALER"}
# Only an interactive kernel can ask a person for input, and `--stdin` answers for one.
STDIN = {"stdin": "DEALER"}
# A kernel that closes its sockets while we connect is probably ending; wait this long for its
# status.
END_SECONDS = 1.0
FAULT_CHARACTERS = 1 << 20
TMP, SHM = "/tmp", "/dev/shm"  # noqa: S108 - measured, not used


class SessionRequest(Struct, frozen=True, kw_only=True):
    """The kernel to start, its place and its limits.

    ``on_limit`` is called on a watchdog's thread. ``answers`` reply to `input()`; without them a
    headless kernel declines to ask. With ``reads_native`` the native stack is read at a fatal
    fault, with ``with_locals`` its variables too. ``allocations`` is set only in a trial that looks
    for the holders of memory, ``forks`` only for a kernel that answers the culprit search in forks.
    ``snapshots`` receives the copies of a kernel that leaves some.
    An interactive kernel has the ``key`` of its client's connection file, and the client's
    ``arguments`` after its command. With ``restorable`` a copy of it can take over after its death.
    """

    kernel_name: str
    cwd: str
    env: Mapping[str, str]
    limits: Limits
    plan: SpawnPlan
    run_id: str
    on_limit: Callable[[LimitName, float], None]
    strict_shell: bool = False
    answers: InputAnswers | None = None
    reads_native: bool = False
    with_locals: bool = False
    allocations: AllocationFile | None = None
    coverage: CoverageFile | None = None
    forks: RootHandover | None = None
    snapshots: KernelSnapshots | None = None
    key: str | None = None
    arguments: tuple[str, ...] = ()
    restorable: bool = False


ClientFactory = Callable[[Manager, asyncio.Event], "TrialClient"]
"""Makes the notebook client, from the manager and the event of the kernel's death."""


def _places_to_write(request: SessionRequest, sandbox: Sandbox) -> tuple[str, ...]:
    facts = sandbox.isolation
    home = facts.home if facts is not None else request.env.get("HOME")
    return (os.path.realpath(request.cwd), TMP, SHM, *((home,) if home and home != "/" else ()))


class KernelSession:
    """A kernel process inside its sandbox, as ``open_session`` starts it.

    ``connect()`` waits until it answers. ``close()`` removes everything that the session made.
    ``page`` is the page that the agent writes, ``None`` for other kernels.
    """

    def __init__(
        self,
        request: SessionRequest,
        sandbox: Sandbox,
        *,
        manager: Any,
        provisioner: SandboxProvisioner,
        make_client: ClientFactory,
        forwarder_prefix: str | None,
        launched: LaunchedKernel | None = None,
    ) -> None:
        # Both are known once the kernel has been executed.
        assert sandbox.kernel_pid is not None and sandbox.keeper_pid is not None
        self.pid, self.keeper_pid = sandbox.kernel_pid, sandbox.keeper_pid
        self._request, self.limits, self.plan = request, request.limits, request.plan
        self.allocations, self.answers = request.allocations, request.answers
        self.sandbox, self.manager, self.provisioner = sandbox, manager, provisioner
        # Whether our agent runs in the kernel.
        self.instrumented = provisioner.instrumented
        self.agent_channels = provisioner.channels
        self.page: Page | None = (
            self.agent_channels.page
            if self.agent_channels is not None and self.instrumented
            else None
        )
        # The prefix of the forwarder's sockets, for a kernel on TCP behind a network of its own.
        self._forwarder_prefix = forwarder_prefix
        # Reads the native stack of a dying kernel, if it is asked for.
        self._native = (
            NativeStackWatch(sandbox, self.pid, with_locals=request.with_locals)
            if request.reads_native
            else None
        )
        self._answering: asyncio.Task[None] | None = None
        self.agent_facts = AgentFacts()
        self.launched = launched
        self.restore_points: RestorePoints | None = None
        self.history = ChildHistory()
        # Observes changes of the process since it first answered.
        self.changes: ProcessChanges | None = None
        self.died = asyncio.Event()
        self.died_at: float | None = None
        self.cleanup = CleanupResult()
        self._channels: dict[str, Channel] = {}
        self._closed = False
        # Behind a wall there are no other hosts.
        self._peers = (
            PeerWatch(self.keeper_pid, self.pid, instrumented=self.instrumented)
            if Wall.NETWORK not in self.plan.walls
            else None
        )
        # Meter and watchdog share one process tree, so that /proc is read once.
        watchdog = provisioner.watchdog
        tree = watchdog.tree if watchdog is not None else None
        judge = watchdog.judge if watchdog is not None else None
        self._tree = tree
        self.meter = Meter(
            self.plan, self.keeper_pid, self.pid, tree, judge, origin=sandbox.counters_before
        )
        if request.restorable and self.page is not None:
            self.restore_points = RestorePoints(sandbox.spare_snapshot, self._snapshot_lost)
            self.agent_facts.restore_points = self.restore_points
            self.restore_points.memory_limit = self.limits.memory
            # A snapshot that the system killed for memory must not count as the kernel's.
            sandbox.on_ending = self.restore_points.look
            if watchdog is not None:
                watchdog.makes_room = self.restore_points.makes_room
        self._watch()
        if self.instrumented and self.agent_channels is not None:
            if self.allocations is not None:
                self.allocations.send(self.agent_channels.facts)
            if request.forks is not None:
                request.forks.send(self.agent_channels.facts)
            if request.snapshots is not None:
                request.snapshots.begin(self.agent_channels.facts, self._spare)
        self.volumes = Volumes(self.pid, _places_to_write(request, sandbox))
        self.client = make_client(manager, self.died)
        self.agent_facts.client = self.client
        self.late_text = LateText(self.client)

    def _watch(self) -> None:
        """Watch, on the event loop, for the kernel's death and for the agent's facts."""
        loop = asyncio.get_running_loop()
        self.sandbox.on_exit = self._on_exit
        if self._native is not None:
            self._native.start()
        if self.sandbox.exit is not None:
            self._on_exit(self.sandbox.exit)
        loop.add_reader(self.sandbox.fileno(), self._pump)
        if self.instrumented and self.agent_channels is not None:
            loop.add_reader(self.agent_channels.facts.fileno(), self.take_facts)

    def _spare(self, pid: int | None) -> None:
        """Let a copy of the kernel live, and leave it out of all figures."""
        self.sandbox.spare(pid)
        self.meter.leave_out(pid)
        if self._tree is not None:
            self._tree.left_out = pid

    def _pump(self) -> None:
        self.sandbox.process_messages()
        # No fault handler writes this much, but notebook code can write to the descriptor too.
        if len(self.sandbox.fault_text) > FAULT_CHARACTERS:
            self.sandbox.fault_text = self.sandbox.fault_text[-FAULT_CHARACTERS // 2 :]
        if self.sandbox.exit is not None and self.sandbox.exit.status is None:
            # The keeper has ended. A socket at its end stays readable and would wake the loop
            # forever.
            with contextlib.suppress(ValueError, OSError):
                asyncio.get_running_loop().remove_reader(self.sandbox.fileno())

    def _on_exit(self, ended: KernelExit) -> None:
        self.died_at = ended.at
        self.died.set()

    def _snapshot_lost(self) -> None:
        """Account for a snapshot that ended by itself; the system may have taken its memory."""
        if self.meter.oom_kills():
            self.sandbox.counters_before = self.sandbox.counters_before.plus_kill()
            self.meter.discount(self.sandbox.counters_before)

    async def restore(self, number: int, seconds: float | None) -> str:
        """Go on with the snapshot from before a cell, after the kernel has died.

        ``number`` is the agent's number of the cell. Return why that is not possible, empty if it
        is. Everything else that ran in the sandbox is killed.
        """
        if self.restore_points is None:
            return "this kernel has no snapshots"
        snapshot = await self.restore_points.asleep(number)
        if isinstance(snapshot, str):
            return snapshot
        assert snapshot.pid is not None
        try:
            failure = self.sandbox.take_over(snapshot.pid)
            if failure:
                return f"the snapshot cannot take over: {failure}"
            self._begin_again(snapshot.pid, number)
            tracer = os.getpid() if self.reads_native and has_pystack() else None
            failure = await self.restore_points.wake(snapshot, tracer=tracer)
            if failure:
                return failure
            await self.connect(seconds)
        except (KernelStartError, SandboxError) as error:
            return str(error)
        return ""

    def _begin_again(self, pid: int, lost_number: int) -> None:
        """Forget everything about the process of the dead kernel."""
        self.pid = pid
        if self._native is not None:
            self._native.cancel()
            self._native = NativeStackWatch(
                self.sandbox, pid, with_locals=self._request.with_locals
            )
            self._native.start()
        for channel in self._channels.values():
            channel.stop()
        self._channels = {}
        self.agent_facts.begin_again(lost_number)
        self.history = ChildHistory()
        if self._peers is not None:
            self._peers = PeerWatch(self.keeper_pid, pid, instrumented=self.instrumented)
        self.died.clear()
        self.died_at = None
        self.provisioner.begin_again()
        watchdog = self.provisioner.watchdog
        if watchdog is not None and self.restore_points is not None:
            watchdog.makes_room = self.restore_points.makes_room
        tree = watchdog.tree if watchdog is not None else None
        judge = watchdog.judge if watchdog is not None else None
        self.meter.close()
        self._tree = tree
        self.meter = Meter(
            self.plan, self.keeper_pid, pid, tree, judge, origin=self.sandbox.counters_before
        )

    @property
    def reads_native(self) -> bool:
        """Whether the native stack is read at a fatal fault."""
        return self._native is not None

    @property
    def native(self) -> NativeReading | None:
        """The native stack at a fatal fault; ``None`` if there was none, or it is not read."""
        return None if self._native is None else self._native.reading

    @property
    def is_dying(self) -> bool:
        """Whether a fatal fault was reported, at which the process may be held."""
        return self._native is not None and self._native.is_held

    @property
    def ended(self) -> KernelExit | None:
        """The exit of the kernel process, ``None`` while it lives."""
        return self.sandbox.exit

    async def connect(self, seconds: float | None) -> dict[str, Any]:
        """Connect and wait until the kernel answers on shell and iopub; return its kernel_info.

        Raises KernelStartError if it ends, or does not answer within ``seconds``.
        """
        # A reply on shell is not enough: without the subscription to iopub the output of the first
        # cell would be lost.
        client = self.client
        client.note = self.note
        client.km = self.manager
        # Messages carry the pid that the kernel sees in its own pid namespace.
        client.kernel_pid = procfs.innermost_pid(self.pid)
        deadline = None if seconds is None else time.monotonic() + seconds
        kc = self.manager.client()
        kc.allow_stdin = self.answers is not None
        handshake = Handshake(
            self.manager,
            self.sandbox,
            self.died,
            limits=self.limits,
            forwarder_prefix=self._forwarder_prefix,
        )
        has_stdin = self._request.key is not None or self.answers is not None
        await handshake.open_channels(kc, self._channels, has_stdin=has_stdin, deadline=deadline)
        if self.answers is not None:
            answering = self.answers.serve(self._channels["stdin"])
            self._answering = asyncio.create_task(answering)
        kc.iopub_channel.on_oversize = client.cut_display
        kc.iopub_channel.overheard = self.late_text.take
        client.kc = kc
        info = await handshake.first_answer(kc, deadline)
        self.changes = ProcessChanges(self.pid, self.changes)
        return info

    def connections(self) -> dict[str, Connection]:
        """Return the connections of the channels, for a caller that passes frames on unchanged."""
        return {name: channel.connection for name, channel in self._channels.items()}

    # --- facts ------------------------------------------------------------------------------------

    def take_facts(self) -> None:
        """Receive the facts that the agent has sent."""
        channels = self.agent_channels
        if channels is not None and not self.agent_facts.take(channels.facts):
            # The kernel has closed its end. The socket stays readable and would wake the loop
            # forever.
            with contextlib.suppress(ValueError, OSError):
                asyncio.get_running_loop().remove_reader(channels.facts.fileno())

    def residue(self) -> dict[str, str]:
        """Return the output of C code that was in the pipes of descriptors 1 and 2 at the death."""
        page = self.page
        return self.agent_facts.residue(page.unread if page is not None else lambda _name: 0)

    def journal_stderr(self, number: int) -> str:
        """Return a cell's stderr from the agent's journal, including text that was not sent yet."""
        # ipykernel sends text every 0.2 s, so a thread's last words may not have been sent.
        page = self.page
        records = page.journal(number) if page is not None and number else ()
        return "".join(
            record.text
            for record in records
            if isinstance(record, Text) and record.stream == "stderr"
        )

    def malformed(self) -> tuple[int, str]:
        """Return the number of invalid messages and the problem with the first."""
        client = self.client
        sources = [(c.refused, c.first_refused) for c in self._channels.values()]
        sources.append((client.malformed, client.first_malformed))
        return sum(count for count, _ in sources), next(
            (first for count, first in sources if count), ""
        )

    def note(self) -> Note | None:
        """Return the agent's note of the current or last cell; ``None`` if there is none."""
        # Other kernels have no agent, and an ipykernel with its own shell class may not be patched.
        page = self.page
        if page is None or "cells" not in self.agent_facts.hello.get("instrumented", ()):
            return None
        note = page.note()
        return note if note.cell else None

    def running_by_page(self) -> int | None:
        """Return the index of the cell that the kernel is executing."""
        note = self.note()
        return None if note is None or note.finished else self.agent_facts.index_of(note.cell)

    def at_work(self, number: int) -> bool | None:
        """Whether the agent has reported a cell's start and not its end.

        ``None`` without an agent.
        """
        page = self.page
        return None if page is None else number != 0 and not page.note().finished

    def subject(self, number: int) -> ObservedKernel:
        """Return this kernel as ``activity.observe`` needs it."""
        sandbox = self.sandbox
        read_length = len(sandbox.fault_text)

        def dumped() -> tuple[tuple[Frame, ...], tuple[tuple[Frame, ...], ...]]:
            fresh = sandbox.fault_text[read_length:]
            cells, main = self.agent_facts.code, self.agent_facts.hello.get("main")
            return fault_report.main_stack(fresh, cells, main), fault_report.other_stacks(
                fresh, cells, main
            )

        return ObservedKernel(
            pid=self.pid,
            keeper=self.keeper_pid,
            page=self.page,
            number=number,
            dump=self.dump if self.agent_facts.hello else None,
            dumped=dumped,
            ended=self.history.ended,
            known_children=self.history.known,
            frames=self.agent_facts.frames,
        )

    def dump(self, of_all: bool) -> None:
        """Ask the fault handler for the main thread's stack, or for those of all threads."""
        number = int(layout.DUMP_ALL_SIGNAL if of_all else layout.DUMP_SIGNAL)
        # Without a handler the signal would kill the kernel. Where the main thread blocks it, another
        # thread would write its own stack.
        if procfs.catches(self.pid, number) and not procfs.blocks(self.pid, self.pid, number):
            self.sandbox.signal(number)

    # --- end --------------------------------------------------------------------------------------

    def interrupt(self) -> None:
        """Interrupt the running cell by message or signal, as its kernelspec says."""
        # Like Jupyter's local provisioner, signal the whole process group. During system(3) the
        # kernel ignores SIGINT until the child has ended, and `%%bash` reports a child that lives
        # on as one that cannot be stopped.
        if self.manager.kernel_spec.interrupt_mode == "message":
            assert self.client.kc is not None
            self.client.kc.control_channel.send(self.manager.session.msg("interrupt_request", {}))
        else:
            self.sandbox.signal(signal.SIGINT, group=True)

    def ignores_interrupt(self) -> bool:
        """Whether the kernel process ignores SIGINT now."""
        return bool(procfs.ignores(self.pid, signal.SIGINT))

    def kill(self, reason: TerminationReason) -> None:
        """Kill the process tree and record the reason."""
        self.sandbox.kill(reason)

    @property
    def kill_reason(self) -> TerminationReason | None:
        """The reason for which we decided to kill the kernel, which may still be alive."""
        return self.sandbox.kill_reason

    def named_lock(self, text: str, source: str) -> ObservedLock | None:
        """Return the lock that an error of a cell is about, with its holder."""
        members = processes.members(self.pid, self.keeper_pid)
        others = [pid for pid in members if pid != self.pid]
        return file_locks.named_lock(text, source, self.pid, others)

    def process_count(self) -> ProcessCount | None:
        """Return the number of tasks and their limit, if Linux enforces one."""
        return self.meter.process_count(self.limits.processes)

    def check_limits(self) -> None:
        """Check memory, processes and processor time now, if a watchdog enforces them."""
        if self.provisioner.watchdog is not None:
            self.provisioner.watchdog.check()

    async def may_be_asked_to_end(self) -> bool:
        """Whether the kernel lives and has exceeded no limit, so that it can be shut down."""
        if self.provisioner.watches:
            await asyncio.to_thread(self.provisioner.check_last)
        # The kernel may be dead without a message from the keeper so far. /proc shows it at once,
        # and such a death must not count as the answer to our request.
        main = procfs.stat(self.pid)
        if self.died.is_set() or main is None or main.state in "ZX":
            return False
        return self.sandbox.ask_to_end()

    async def shut_down(self) -> bool:
        """Ask the kernel to end; false if it still runs after SHUTDOWN_SECONDS."""
        if self.died.is_set():
            return True
        msg = self.manager.session.msg("shutdown_request", content={"restart": False})
        assert self.client.kc is not None
        self.client.kc.control_channel.send(msg)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.died.wait(), SHUTDOWN_SECONDS)
        return self.died.is_set()

    def note_process(self) -> None:
        """Record the kernel's children, limits and program."""
        # After its end /proc shows none of them.
        if not self.died.is_set():
            self.history.note(self.pid)
            if self.changes is not None:
                self.changes.note()

    def find_peers(self) -> None:
        """Record other hosts that the sandbox's sockets are connected to."""
        if self._peers is not None:
            peers = self._peers.peers()
            self.agent_facts.add_hosts(sorted(peers - set(self.agent_facts.hosts)))

    async def wait_dead(self, seconds: float) -> bool:
        """Wait for the kernel process to end; false after ``seconds``."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.died.wait(), seconds)
        return self.died.is_set()

    def _stop_measuring(self) -> None:
        self.provisioner.stop_watching()
        self.volumes.close()
        self.meter.close()

    def close(self, *, keep_sandbox: bool = False) -> None:
        """End all processes and remove all files; ``cleanup`` lists those that remain.

        Can be called again. With ``keep_sandbox`` the caller goes on with it, by a copy of the
        kernel.
        """
        if self._closed:
            return
        self._closed = True
        if self._native is not None:
            self._native.cancel()
        if self._answering is not None:
            self._answering.cancel()
        loop = asyncio.get_running_loop()
        # First the watchdogs: they could misread the dying processes.
        self._stop_measuring()
        for channel in self._channels.values():
            channel.stop()
        self.client.kc = None
        if self.restore_points is not None:
            self.restore_points.close()
        with contextlib.suppress(ValueError, OSError):
            loop.remove_reader(self.sandbox.fileno())
        if self._request.snapshots is not None:
            self._request.snapshots.close()
        if not keep_sandbox:
            self.cleanup = self.sandbox.shutdown()
        channels = self.agent_channels
        if channels is not None:
            with contextlib.suppress(ValueError, OSError):
                loop.remove_reader(channels.facts.fileno())
            channels.close()
        self.agent_facts.close()


def was_polite(number: int | None) -> bool:
    """Whether a signal is a polite request to end: SIGTERM, SIGHUP or SIGINT."""
    return number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
