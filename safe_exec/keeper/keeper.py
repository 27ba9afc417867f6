"""The keeper: a small process that owns one sandbox. Standard library only.

Theory of operation. The runner starts one keeper for each kernel, in a session of its own, and
exchanges messages with it over a socket pair (``protocol``). The keeper

1. makes the cgroups and writes their limits, after the runner has told it which file to remove
   last,
2. forks. The child joins the cgroups, takes its rlimits, and only then executes the kernel: no
   kernel code ever runs without its limits,
3. is the child subreaper of everything that the kernel starts, so that a daemon that forks twice to
   escape becomes the keeper's child,
4. reads the raw wait status. It reports the death at once (SIGCHLD through a wake-up descriptor),
   with the counters of the cgroups from before anything is removed,
5. records the reason of a kill before it sends any signal; the first reason stays,
6. at the end of the socket, whether the runner asked for it or died, kills the process tree,
   removes the cgroups and the runtime directory, and exits.

``crash_output`` reads the output of a dying kernel. The keeper notes signals that are meant for the
runner (Ctrl-C in a terminal, a SIGTERM to the whole session at shutdown), but does not obey them:
it has to outlive the runner.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import select
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from safe_exec.keeper import bwrap, cgroupfs, child, file_tree, mounts, procfs, protocol
from safe_exec.keeper.bwrap import Bubblewrap, ChildEnds
from safe_exec.keeper.child import SetupFailed
from safe_exec.keeper.crash_output import CrashOutput
from safe_exec.keeper.protocol import CgroupSetup, FaultingThread, LimitedDisk, Spawn

TYPE_CHECKING = False
if TYPE_CHECKING:
    from safe_exec.keeper.takeover import Takeover

PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15
PR_SET_CHILD_SUBREAPER = 36
PR_SET_PTRACER = 0x59616D61
KILL_SECONDS = 5.0
# Stacks are dumped from this share of the memory limit on.
NEAR = 0.85
STACK_STEP = 0.04
# The share of the memory limit that a sleeping copy of the kernel may have for itself near it.
COPY_SHARE = 1 / 32
# It is looked at again when the memory has grown by this share.
COPY_STEP = 0.01
# No allocation fills memory faster than 5 GB/s, which bounds how soon memory can reach its limit.
FASTEST_BYTES_PER_MS = 5 << 20
MEMORY_CHECK_MS = (2, 100)
# Files that a warning names one by one.
MOST_NAMED = 5
# Thousandths of the available memory by which the OOM killer overrates the sandbox.
OOM_SHARE = 300
NOTED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
RECEIVE_BYTES = 1 << 20
# The most descriptors in one piece of the control socket.
MOST_DESCRIPTORS = 16


class Keeper:
    """One sandbox: its kernel, its cgroups, its runtime directory."""

    def __init__(self, control: socket.socket, *, directory: str | None) -> None:
        self.control = control
        self.directory = directory
        self.note: str | None = None
        self.lines = protocol.LineBuffer()
        self.kernel_fds: list[int] = []
        self.plan: Spawn | None = None
        self.pid = 0
        self.exited = False
        # A sleeping copy of the kernel, and the reasons of kills that it outlives.
        self.spared: int | None = None
        self.spared_reasons: tuple[str, ...] = ()
        self.caught_signals: int | None = None
        self.orphans_peak = 0
        self.reason: str | None = None
        self.crash_output = CrashOutput(self.send_fault, self.send_dying)
        self.dumped_share = self.checked_share = 0.0
        self.made_cgroups: list[str] = []
        self.orphaned = True
        self.bubblewrap: Bubblewrap | None = None
        # Whether the kernel's wait status comes to us, and not to the init inside bubblewrap.
        self.is_parent = True
        # Spares a sleeping copy of the kernel, once there is one.
        self.takeover: Takeover | None = None
        self.disk: LimitedDisk | None = None
        self.concurrent_changes = file_tree.ConcurrentChanges()
        self.wake_r, self.wake_w = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    @property
    def cgroup(self) -> CgroupSetup:
        """The cgroups of the plan; none before there is a plan."""
        return CgroupSetup() if self.plan is None else self.plan.cgroup

    # --- messages -------------------------------------------------------------------------------

    def send(self, message: protocol.ToRunner, *, descriptors: tuple[int, ...] = ()) -> None:
        """Send a message, with descriptors if there are any."""
        line = protocol.encode(message)
        # A dead runner is noticed by the end of the socket, not here.
        with contextlib.suppress(OSError):
            count = socket.send_fds(self.control, [line], descriptors) if descriptors else 0
            self.control.sendall(line[count:])

    def send_fault(self, text: str) -> None:
        """Forward a piece of a fault report."""
        self.send(protocol.Fault(text=text, at=time.monotonic()))

    def send_dying(self, thread: FaultingThread) -> None:
        """Report that a fatal fault has begun, and that the keeper holds the process."""
        self.send(
            protocol.Dying(
                task=thread.task,
                instruction=thread.instruction,
                stack_pointer=thread.stack_pointer,
            )
        )

    def receive(self) -> list[protocol.ToKeeper] | None:
        """Return the requests that have arrived, ``None`` at the end of the socket."""
        try:
            data, fds, _, _ = socket.recv_fds(self.control, RECEIVE_BYTES, MOST_DESCRIPTORS)
        except ConnectionError:
            return None
        for fd in fds:
            os.set_inheritable(fd, False)
        self.kernel_fds.extend(fds)
        if not data:
            return None
        return [protocol.decode(line, protocol.TO_KEEPER) for line in self.lines.feed(data)]

    # --- the sandbox ----------------------------------------------------------------------------

    def make_cgroups(self) -> None:
        """Make the cgroups and write their limits. Raises OSError that names the file."""
        if (delegation := self.cgroup.delegation) is not None:
            cgroupfs.delegate_controllers(delegation.group, delegation.leaf, delegation.controllers)
        for path in self.cgroup.dirs:
            os.mkdir(path)
            self.made_cgroups.append(path)
        for path, value in self.cgroup.writes:
            cgroupfs.write(path, value)
        for path, value in self.cgroup.optional_writes:
            if os.path.exists(path):
                cgroupfs.write(path, value)

    def spawn(self, plan: Spawn) -> None:
        """Fork the kernel into the sandbox. Raises SetupFailed, OSError and ValueError."""
        stderr, fault = self.crash_output.open(plan.dump_signal, restorable=plan.restorable)
        error_r, error_w = os.pipe2(os.O_CLOEXEC)
        self.chown_runtime_dir(plan.owner)
        self.prepare_disk(plan)
        if plan.bwrap is not None:
            self.bubblewrap = Bubblewrap(plan.bwrap, restorable=plan.restorable)
            self.is_parent = False
        descriptors = dict(zip(plan.descriptor_names, self.kernel_fds, strict=True))
        keeper_pid = os.getpid()
        pid = os.fork()
        if pid == 0:
            descriptors["fault"] = fault.fileno()
            ends = ChildEnds(stderr=stderr, error=error_w, kernel=descriptors)
            _run_child(plan, self.bubblewrap, keeper_pid, ends)
        os.close(stderr)
        os.close(error_w)
        fault.close()
        for fd in self.kernel_fds:
            os.close(fd)
        if self.bubblewrap is not None:
            self.bubblewrap.started(pid)
        with os.fdopen(error_r, "rb") as pipe:
            # The descriptor is closed on execution, so this ends when the child executes.
            error = pipe.read()
        if error:
            stage, _, message = error.decode("utf-8", "replace").partition(" ")
            raise SetupFailed(stage, message)
        if self.bubblewrap is None:
            self.pid = pid
            self.send(protocol.Spawned(pid=pid))
        else:
            self.pid = self.join_cgroups(self.bubblewrap)
            sockets = self.bubblewrap.sockets
            self.send(protocol.Spawned(pid=self.pid), descriptors=(sockets,))
            os.close(sockets)

    def join_cgroups(self, bubblewrap: Bubblewrap) -> int:
        """Move the kernel's process, which waits inside bubblewrap, to its cgroups.

        Return its pid.
        """
        try:
            pid = bubblewrap.await_kernel()
            for path in self.cgroup.joins:
                cgroupfs.write(path, str(pid))
            bubblewrap.release()
        except SetupFailed as failure:
            # bubblewrap states its own error on stderr.
            self.crash_output.read_stderr()
            output = self.crash_output.tail.decode("utf-8", "replace").strip().splitlines()
            message = ": ".join([failure.message, *output[-1:]])
            raise SetupFailed(failure.stage, message) from None
        return pid

    def chown_runtime_dir(self, owner: int | None) -> None:
        """Make the kernel's user the owner of the sockets' directory and of the connection file."""
        if owner is None or self.directory is None:
            return
        for path in (self.directory, *(entry.path for entry in os.scandir(self.directory))):
            os.chown(path, owner, owner, follow_symlinks=False)

    def prepare_disk(self, plan: Spawn) -> None:
        """Mount the file system of limited size in the keeper's own mount namespace.

        The mount ends with the keeper.
        """
        disk = plan.bwrap.disk if plan.bwrap is not None else None
        # A trial of a culprit search has mounts of its own. It makes the disk inside them, and none
        # of its files come back.
        if disk is None or plan.mounts:
            return
        os.mkdir(disk.base)
        mounts.enter_own()
        self.disk = disk
        self.concurrent_changes = bwrap.make_disk(disk)

    # --- the loop -------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until the runner sends Finish or dies."""
        poller = select.poll()
        registered: set[int] = set()
        while True:
            sources = {
                self.control.fileno(),
                self.wake_r,
                *self.crash_output.sources(),
                *self.status_sources(),
            }
            # Whoever read the end of a source closed it, and poll(2) returns at once for a closed
            # descriptor: the keeper would spin.
            for fd in registered - sources:
                poller.unregister(fd)
            for fd in sources - registered:
                poller.register(fd, select.POLLIN)
            registered = sources
            for fd, _ in poller.poll(self.next_check_ms()):
                if fd == self.control.fileno() and not self.serve():
                    return
                if fd == self.wake_r:
                    self.handle_signals()
                elif fd in self.crash_output.sources():
                    self.crash_output.read(fd, self.living_pid)
                elif fd in self.status_sources():
                    self.read_kernel_ending()

    def next_check_ms(self) -> int | None:
        """Carry out the actions that are due, and return the milliseconds until the next one."""
        memory_check = self.check_memory()
        remaining = self.crash_output.hold_remaining()
        if remaining is None:
            return memory_check
        if remaining == 0.0:
            self.crash_output.release()
            return 0
        hold_end = math.ceil(remaining * 1000)
        return hold_end if memory_check is None else min(hold_end, memory_check)

    def status_sources(self) -> tuple[int, ...]:
        """Return the socket of the init inside bubblewrap, which reports the kernel's end."""
        if self.bubblewrap is None or self.is_parent or self.bubblewrap.is_closed:
            return ()
        if not self.pid or self.exited:
            return ()
        return (self.bubblewrap.status.fileno(),)

    @property
    def living_pid(self) -> int | None:
        """The kernel's process id: 0 before its start, ``None`` after its end."""
        return None if self.exited else self.pid

    def read_kernel_ending(self) -> None:
        """Receive the kernel's ending from the init inside bubblewrap, if it has arrived."""
        assert self.bubblewrap is not None
        ending = self.bubblewrap.kernel_ending()
        if ending is not None and not self.exited:
            self.caught_signals = ending.caught_signals
            self.orphans_peak = max(self.orphans_peak, ending.orphans_peak)
            self.report_exit(ending.status, ending.cpu_seconds, ending.resident_peak)

    def serve(self) -> bool:
        """Carry out the runner's requests; false if the keeper is to exit."""
        requests = self.receive()
        if requests is None:
            return False
        for request in requests:
            if isinstance(request, protocol.Finish):
                self.orphaned = False
                return False
            self.carry_out(request)
        return True

    def carry_out(self, request: protocol.ToKeeper) -> None:  # noqa: C901 - one case a message
        """Carry out one request."""
        if isinstance(request, Spawn):
            self.start(request)
        elif isinstance(request, protocol.SendSignal):
            if self.pid and not self.exited:
                send = procfs.signal_group if request.group else procfs.signal_one
                send(self.pid, request.number)
        elif isinstance(request, protocol.Kill):
            self.kill(request.reason)
        elif isinstance(request, protocol.Note):
            self.note = request.path
        elif isinstance(request, protocol.HoldAtFault):
            self.crash_output.hold_seconds = request.seconds
        elif isinstance(request, protocol.ReadOn):
            self.crash_output.release()
        elif isinstance(request, protocol.Spare):
            self.spared, self.spared_reasons = request.pid, request.reasons
            self.checked_share = 0.0
        elif isinstance(request, protocol.Continue):
            self.continue_with(request.pid)
        elif isinstance(request, protocol.SpareSnapshot | protocol.TakeOver):
            self.serve_snapshot(request)
        elif isinstance(request, protocol.AddCleanup) and self.plan is not None:
            self.plan = self.plan._replace(cleanup_if_runner_dies=request.cleanup_if_runner_dies)

    def serve_snapshot(self, request: protocol.SpareSnapshot | protocol.TakeOver) -> None:
        """Carry out a request about a snapshot of the kernel."""
        # Seldom needed: without it the keeper starts faster.
        from safe_exec.keeper.takeover import Takeover

        if self.takeover is None:
            self.takeover = Takeover(os.getpid(), self.reap)
        if isinstance(request, protocol.SpareSnapshot):
            self.takeover.snapshot = request.pid
        else:
            failure = self.take_over(request.pid)
            self.send(protocol.TookOver(pid=request.pid, failure=failure))

    def start(self, plan: Spawn) -> None:
        """Build the sandbox and start the kernel, or report the step that failed.

        After a failure the runner ends this keeper.
        """
        self.plan = plan
        try:
            self.make_cgroups()
            self.spawn(plan)
        except SetupFailed as failure:
            command_failed = failure.stage == "command"
            self.send(protocol.Failed(message=failure.message, command_failed=command_failed))
        except (OSError, ValueError) as error:
            self.send(protocol.Failed(message=str(error), command_failed=False))

    def continue_with(self, pid: int) -> None:
        """Make a sleeping copy of the dead kernel the kernel; kill everything else."""
        self.spared = pid
        self.kill_tree(spared=pid)
        self.spared = None
        copy = procfs.stat(pid)
        # Only of a child does the system tell how it ended.
        if (
            self.plan is None
            or not self.exited
            or copy is None
            or copy.state in "ZX"
            or pid not in procfs.children(os.getpid())
        ):
            self.send(protocol.Continued(pid=None))
            return
        self.crash_output.close()
        self.crash_output = CrashOutput(self.send_fault, self.send_dying)
        stderr, fault = self.crash_output.open(self.plan.dump_signal)
        self.pid, self.exited, self.reason, self.caught_signals = pid, False, None, None
        self.dumped_share = self.checked_share = 0.0
        self.send(protocol.Continued(pid=pid), descriptors=(stderr, fault.fileno()))
        os.close(stderr)
        fault.close()

    def kill(self, reason: str) -> None:
        """Record the reason, then kill the process tree.

        If the kernel is dead already, no reason is recorded.
        """
        if self.reason is None and not self.exited:
            self.reason = reason
            if self.plan is not None and reason in self.plan.stack_before:
                self.dump_stack()
        if self.takeover is None or not self.takeover.kill_all_but_snapshot():
            self.kill_tree(spared=self.spared if reason in self.spared_reasons else None)

    def take_over(self, pid: int) -> str:
        """Make a snapshot the kernel; return why it cannot be, empty if it is."""
        if not self.exited or self.takeover is None:
            return "the kernel has not ended"
        # Whatever the dead kernel left running belongs to the cell that is lost.
        self.takeover.snapshot = pid
        if not self.takeover.kill_all_but_snapshot():
            return "it has ended"
        self.takeover.snapshot = 0
        process, number = procfs.stat(pid), procfs.innermost_pid(pid)
        parent = process.ppid if process is not None else 0
        self.is_parent = parent == os.getpid()
        if not self.is_parent:
            if self.bubblewrap is None or parent != self.bubblewrap.init_pid or number is None:
                return "its end could not be read"
            try:
                self.bubblewrap.follow(pid, number)
            except OSError as error:
                return f"the sandbox's init: {error.strerror}"
        self.pid = pid
        self.exited = False
        self.reason = self.caught_signals = None
        self.dumped_share = self.checked_share = 0.0
        self.crash_output.begin_again()
        return ""

    def check_memory(self) -> int | None:
        """Dump a stack at each step near the memory limit.

        Return the milliseconds until the next check.
        """
        path, limit = self.cgroup.memory_file, self.cgroup.memory_limit
        if not path or not limit or self.exited or not self.pid:
            return None
        text = cgroupfs.read(path)
        share = int(text) / limit if text and text.strip().isdigit() else 0.0
        # A kernel that the OOM killer ends cannot report anything, and its sampling thread sees a
        # loop only between two of its steps. C code writes this stack on the return from a page
        # fault, so it shows where the memory went.
        if share >= NEAR:
            self.drop_copy(share, limit)
        if self.takeover is not None and share >= NEAR:
            self.takeover.give_up_for_memory(share, limit)
        if share >= NEAR and share >= self.dumped_share + STACK_STEP:
            self.dumped_share = share
            self.request_stack()
        elif share < NEAR:
            self.dumped_share = self.checked_share = 0.0
        shortest, longest = MEMORY_CHECK_MS
        until_near = (NEAR - share) * limit / FASTEST_BYTES_PER_MS
        return int(max(shortest, min(longest, until_near)))

    def drop_copy(self, share: float, limit: int) -> None:
        """Kill the sleeping copy if its own memory could decide whether the kernel has enough."""
        # Pages that both still share count once. The others were the kernel's before a cell changed
        # or freed them, and only the copy keeps them. What they grow by, the memory grows by too.
        if self.spared is None or share < self.checked_share + COPY_STEP:
            return
        self.checked_share = share
        own, kernel = procfs.private_bytes(self.spared), procfs.status_bytes(self.pid, "VmRSS")
        # All pages are the copy's own once the kernel has ended.
        if kernel is not None and (own is None or own > limit * COPY_SHARE):
            procfs.signal_one(self.spared, signal.SIGKILL)
            self.spared = None

    def request_stack(self) -> bool:
        """Send the signal at which the main thread dumps its stack.

        False if nothing handles it.
        """
        number = self.plan.dump_signal if self.plan is not None else None
        # Without a handler the signal would kill the kernel. Where the main thread blocks it, another
        # thread would write its own stack.
        if not number or self.exited or not procfs.catches(self.pid, number):
            return False
        if procfs.blocks(self.pid, self.pid, number):
            return False
        procfs.signal_all([self.pid], number)
        return True

    def dump_stack(self) -> None:
        """Request the main thread's stack and read it. Writing it takes no memory in the kernel."""
        if self.request_stack():
            self.crash_output.wait_for_stack(self.pid)

    def kill_tree(self, *, spared: int | None = None) -> list[int]:
        """Kill every process in the sandbox but one; return the pids that did not die."""
        for path in self.cgroup.kill_files if spared is None else ():
            with contextlib.suppress(OSError):
                cgroupfs.write(path, "1")
        return procfs.kill_descendants(
            os.getpid(),
            deadline=time.monotonic() + KILL_SECONDS,
            reap=self.reap,
            spared=spared,
        )

    def handle_signals(self) -> None:
        """Reap dead children, and forward signals that were meant for the runner."""
        with contextlib.suppress(BlockingIOError):
            for number in os.read(self.wake_r, 4096):
                if number != signal.SIGCHLD:
                    self.send(protocol.SignalReceived(number=number))
        self.reap()

    def reap(self) -> bool:
        """Reap dead children, adopted ones too; return true if at least one child remains."""
        self.note_signal_handlers()
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            if self.is_parent and pid == self.pid and not self.exited:
                self.report_exit(status, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)
            elif not self.is_parent and self.bubblewrap is not None and pid == self.bubblewrap.pid:
                if not self.pid:
                    continue
                self.read_kernel_ending()
                # If the init was killed, nobody read the kernel's status.
                if not self.exited:
                    self.report_exit(None, None, None)
            else:
                self.orphans_peak = max(self.orphans_peak, usage.ru_maxrss * 1024)

    def note_signal_handlers(self) -> None:
        """Record which signals the kernel caught at its end, while its zombie still shows them."""
        if not self.is_parent or not self.pid or self.exited:
            return
        with contextlib.suppress(ChildProcessError):
            if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                self.caught_signals = procfs.caught_signals(self.pid)

    def report_exit(
        self, status: int | None, cpu_seconds: float | None, resident_peak: int | None
    ) -> None:
        """Report the kernel's death, with everything that cannot be read later."""
        self.exited = True
        self.crash_output.read_rest()
        output = self.crash_output
        self.send(
            protocol.Exited(
                at=time.monotonic(),
                status=status,
                reason=self.reason,
                cpu_seconds=cpu_seconds,
                resident_peak=resident_peak,
                orphans_peak=self.orphans_peak or None,
                counters={path: cgroupfs.read(path) for path in self.cgroup.counter_files},
                fault_text=output.fault_text.decode("utf-8", "replace"),
                fault=output.process_at_fault,
                caught_signals=self.caught_signals,
                stderr=output.tail.decode("utf-8", "replace"),
                bursts=tuple((at, data.decode("utf-8", "replace")) for at, data in output.bursts),
                oomd_killed=cgroupfs.oomd_killed(self.cgroup.dirs),
                disk_free=self.disk_free(),
            )
        )

    # --- the end --------------------------------------------------------------------------------

    def disk_free(self) -> int | None:
        """Return the free bytes of the limited disk, 0 if it has no inodes left."""
        if self.disk is None:
            return None
        # Only this process sees the mount, so the runner cannot ask for itself.
        with contextlib.suppress(OSError):
            stats = os.statvfs(self.disk.base)
            return 0 if stats.f_files and not stats.f_favail else stats.f_bavail * stats.f_frsize
        return None

    def list_discarded(self) -> None:
        """Tell the runner which files disappear with the sandbox."""
        # All processes of the sandbox must be dead, and its file systems must still exist. Nobody
        # asks this about a trial of a culprit search, or after the runner's death.
        if self.plan is None or not self.pid or self.orphaned or self.plan.mounts:
            return
        # Seldom needed: without it the keeper starts faster.
        from safe_exec.keeper import discarded_files, kept_files

        mode_tells = discarded_files.umask() & discarded_files.PRIVATE != discarded_files.PRIVATE
        listing = discarded_files.Listing(mode_tells=mode_tells)
        keeps = bool(self.plan.keep_patterns)
        copier = kept_files.KeptFiles(self.plan.keep_patterns, self.plan.keep_folder)
        for place, fd in self.places_in_bubblewrap(self.plan):
            # Not even root may read every root directory (FUSE).
            with contextlib.suppress(OSError):
                listing.add(place.name, place.kind, fd, skip=place.skip)
        for place in self.plan.discarded:
            disk = self.disk if place.kind == protocol.FOLDER else None
            path = place.path if disk is None else bwrap.changed_files(disk.base)
            with contextlib.suppress(OSError):
                fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    is_old = None if disk is None else self.concurrent_changes.is_as_copied
                    is_kept = copier.take if keeps and disk is not None else None
                    listing.add(
                        place.name,
                        place.kind,
                        fd,
                        skip=place.skip,
                        is_old=is_old,
                        is_kept=is_kept,
                    )
                finally:
                    os.close(fd)
        for failure in copier.failures[:MOST_NAMED]:
            self.send(protocol.Trouble(message=f"could not be kept: {failure}"))
        files = tuple(copier.files[: kept_files.MOST_NAMED])
        self.send(listing.as_message()._replace(kept_files=files))

    def places_in_bubblewrap(self, plan: Spawn) -> Iterator[tuple[protocol.DiscardedPlace, int]]:
        """Yield the places that exist only inside bubblewrap, each with a descriptor of it."""
        if plan.bwrap is not None and self.bubblewrap is not None:
            # If the init died early, it has sent fewer descriptors than there are places.
            yield from zip(plan.bwrap.discarded, self.bubblewrap.discarded, strict=False)

    def write_disk_back(self) -> None:
        """Write the run's changes back to the folder if the plan says so, then unmount the disk."""
        disk = self.disk
        if disk is None:
            return
        if disk.write_back and self.pid and not self.orphaned:
            try:
                disputed = file_tree.write_back(
                    Path(disk.base) / "folder", Path(disk.folder), self.concurrent_changes
                )
                if disputed:
                    unnamed = len(disputed) - MOST_NAMED
                    names = ", ".join(disputed[:MOST_NAMED]) + (
                        f" and {unnamed} more" if unnamed > 0 else ""
                    )
                    message = (
                        f"changed outside while the notebook ran, and left as it is there: {names}"
                    )
                    self.send(protocol.Trouble(message=message))
            except OSError as error:
                message = f"the folder could not be written back: {error}"
                self.send(protocol.Trouble(message=message))
        if not bwrap.unmount(disk.base):
            # Removing the directory now would delete files through the mount.
            self.directory = None

    def report_failure(self, error: Exception) -> None:
        """Tell the runner that the keeper failed, before it kills the kernel."""
        # Otherwise its death by SIGKILL would look like the notebook's own.
        if self.reason is None and not self.exited:
            self.reason = "internal"
        message = f"the keeper failed: {type(error).__name__}: {error}"
        self.send(protocol.Trouble(message=message))

    def shutdown(self) -> None:
        """Kill all processes, remove all files and cgroups, and report those that remain."""
        if self.reason is None and not self.exited:
            self.reason = "shutdown"
        surviving_pids = self.kill_tree()
        self.list_discarded()
        for fd in self.bubblewrap.discarded if self.bubblewrap is not None else ():
            os.close(fd)
        self.write_disk_back()
        remaining = [path for path in reversed(self.made_cgroups) if not cgroupfs.remove(path)]
        directories = [self.directory] if self.directory is not None else []
        if self.plan is not None:
            directories += [
                *self.plan.directories,
                *(self.plan.cleanup_if_runner_dies if self.orphaned else ()),
            ]
        remaining += [path for path in directories if not file_tree.remove_tree(path)]
        if not remaining and not surviving_pids and self.note is not None:
            with contextlib.suppress(OSError):
                os.unlink(self.note)
        self.send(
            protocol.CleanupResult(
                surviving_pids=tuple(surviving_pids), remaining_paths=tuple(remaining)
            )
        )


def _run_child(
    plan: Spawn,
    bubblewrap: Bubblewrap | None,
    keeper_pid: int,
    ends: ChildEnds,
) -> None:
    """Enter the sandbox, in the child, and execute the kernel or bubblewrap.

    Never returns.
    """
    command = plan.command
    try:
        os.setsid()
        _raise_oom_score()
        # Mounts come before the cgroups: Linux charges hundreds of them (with a /tmp of its own) to
        # whoever makes them, and they are ours, not the notebook's.
        _enter_mounts(plan)
        for path in plan.cgroup.joins if bubblewrap is None else ():
            cgroupfs.write(path, "0")
        _die_with_keeper(keeper_pid)
        if plan.tracer is not None:
            _allow_tracer(plan.tracer)
        if bubblewrap is not None:
            bubblewrap.execute(command, ends)
        argv, _ = child.place_descriptors(command.argv, ends.stderr, ends.kernel)
        command = command.with_argv(argv)
    except BaseException as error:  # noqa: BLE001 - reported to the keeper
        child.report_failure(ends.error, "sandbox", error)
    child.run(command, keeper_pid, ends.error)


def _allow_tracer(pid: int) -> None:
    """Let a process and its descendants read the memory of this one, even under Yama."""
    # Under Yama a process is traced by its ancestors only (ptrace_scope 1), unless it names
    # another. The relation survives execve(2), but a fork has none: inside bubblewrap the owner of
    # its user namespace may trace (Documentation/admin-guide/LSM/Yama.rst, user_namespaces(7)).
    # Without Yama this call fails, and nothing is needed.
    ctypes.CDLL(None).prctl(PR_SET_PTRACER, pid)


def _enter_mounts(plan: Spawn) -> None:
    if not plan.mounts:
        return
    mounts.enter(plan.mounts, user_namespace=plan.user_namespace)
    if plan.bwrap is not None and plan.bwrap.disk is not None:
        os.mkdir(plan.bwrap.disk.base)
        bwrap.make_disk(plan.bwrap.disk)


def _raise_oom_score() -> None:
    """Make the kernel a likelier victim of the OOM killer than the runner."""
    # The OOM killer takes the largest process, and a runner of many notebooks is larger than one of
    # its kernels (proc_pid_oom_score_adj(5)). All processes of the sandbox inherit the score, so
    # their order among each other stays. A higher score would sacrifice a small kernel for any
    # large stranger. Raising it takes no privilege; with a read-only /proc it stays as it was.
    with contextlib.suppress(OSError, ValueError):
        score = Path("/proc/self/oom_score_adj")
        score.write_text(str(min(1000, int(score.read_text()) + OOM_SHARE)))


def _die_with_keeper(keeper_pid: int) -> None:
    """Have Linux kill this process when the keeper dies."""
    # A change of credentials clears the parent-death signal (prctl(2)), so set it afterwards.
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # The keeper may have died before the line above; then no signal will come.
    if os.getppid() != keeper_pid:
        os._exit(1)


def main(control_fd: int, directory: str, run_id: str) -> None:
    """Run the keeper on the socket that the runner passed as ``control_fd``.

    ``directory`` (empty for none) is made and removed by the keeper. ``run_id`` names the process
    in lists of processes.
    """
    # The kernel must not inherit the socket: it could send messages in our name.
    os.set_inheritable(control_fd, False)
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    prctl(PR_SET_NAME, f"se-{run_id}".encode())
    keeper = Keeper(socket.socket(fileno=control_fd), directory=directory or None)
    keeper.control.setblocking(True)
    signal.set_wakeup_fd(keeper.wake_w, warn_on_full_buffer=False)
    for number in (*NOTED_SIGNALS, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    try:
        # The runner does not make the directory itself: if it is killed at any moment, either there
        # is no directory yet, or there is a keeper that removes it.
        if keeper.directory is not None:
            os.mkdir(keeper.directory, 0o700)
        keeper.send(protocol.Ready(pid=os.getpid()))
        keeper.run()
    except Exception as error:
        keeper.report_failure(error)
        raise
    finally:
        keeper.shutdown()
