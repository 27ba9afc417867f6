"""The keeper: a small process that owns one sandbox. Standard library only.

Theory of operation. The runner starts one keeper per kernel, in a session of its own, and talks to it in JSON lines
over a socket pair. The keeper

1. makes the control groups and writes their limits, having been told first what to remove again,
2. forks; the child joins the groups, takes its rlimits, and only then executes the kernel: there is no moment in
   which kernel code runs without its limits,
3. is the child subreaper of all that comes from it: a daemon that forks twice to get away becomes our child,
4. holds the raw wait status. The runner hears of the death at once (SIGCHLD through a wake-up descriptor), with the
   counters of the control groups read before anything is removed,
5. records why *we* kill before any signal is sent; the first reason stays,
6. on the end of the socket, be it a request or the death of the runner, kills the tree, removes control groups and
   the runtime directory, and leaves.

What a dying kernel says is taken in by ``lastwords``. Signals meant for the runner (Ctrl-C on a terminal, a SIGTERM to the whole session
at shutdown) are noted and not obeyed: the keeper leaves last.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import time
from pathlib import Path
from typing import Any

from safe_exec.keeper import bwrap, cgroupfs, child, file_tree, mounts, procfs
from safe_exec.keeper.child import Refused
from safe_exec.keeper.crash_output import LastWords

PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15
PR_SET_CHILD_SUBREAPER = 36
KILL_SECONDS = 5.0
NEAR = 0.85
"""From this share of the memory limit on, stacks are asked for: the kernel may be killed without a word at any moment."""
STACK_STEP = 0.04
FASTEST_BYTES_PER_MS = 5 << 20
"""No allocation fills memory faster (5 GB/s): so long memory cannot have come near its limit, and need not be looked at."""
LOOK_MS = (2, 100)
NAMED = 5
"""Files that are named one by one."""
OOM_SHARE = 300
"""Thousandths of the memory that ran out, which count as if the sandbox used them when the system chooses what to kill."""
NOTED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


class Keeper:
    """One sandbox: its kernel, its control groups, its runtime directory."""

    def __init__(self, control: socket.socket, *, directory: str | None) -> None:
        self.control = control
        self.directory = directory
        self.note: str | None = None
        self.inbox = b""
        self.given: list[int] = []
        self.plan: dict[str, Any] = {}
        self.pid = 0
        self.exited = False
        self.caught: int | None = None
        self.reason: str | None = None
        self.words = LastWords(lambda text: self.say("fault", text=text))
        self.signals: list[int] = []
        self.asked_at = 0.0
        self.made: list[str] = []
        self.orphaned = True
        self.inner: bwrap.Enclosed | None = None
        self.disk: dict[str, Any] | None = None
        self.meanwhile = file_tree.Meanwhile()
        self.wake_r, self.wake_w = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    # --- talking ------------------------------------------------------------------------------------------------

    def say(self, event: str, *, descriptors: tuple[int, ...] = (), **facts: Any) -> None:
        """Send one line to the runner; a runner that is gone is noticed elsewhere, by the end of the socket."""
        line = json.dumps({"event": event, "at": time.monotonic(), **facts}).encode() + b"\n"
        with contextlib.suppress(OSError):
            sent = socket.send_fds(self.control, [line], descriptors) if descriptors else 0
            self.control.sendall(line[sent:])

    def hear(self) -> list[dict[str, Any]] | None:
        """The requests that have come in; ``None`` at the end of the socket."""
        try:
            data, fds, _, _ = socket.recv_fds(self.control, 1 << 20, 16)
        except ConnectionError:
            return None
        for fd in fds:
            os.set_inheritable(fd, False)
        self.given.extend(fds)
        if not data:
            return None
        *lines, self.inbox = (self.inbox + data).split(b"\n")
        return [json.loads(line) for line in lines]

    # --- the sandbox --------------------------------------------------------------------------------------------

    def build(self) -> None:
        """Make the control groups and write their limits; each write that fails is an error with its path."""
        if (way := self.plan["cgroup_hand_on"]) is not None:
            cgroupfs.hand_on(way["group"], way["leaf"], way["controllers"])
        for path in self.plan["cgroup_dirs"]:
            os.mkdir(path)
            self.made.append(path)
        for path, value in self.plan["cgroup_writes"]:
            cgroupfs.write(path, value)
        for path, value in self.plan["cgroup_writes_where_present"]:
            if os.path.exists(path):
                cgroupfs.write(path, value)

    def spawn(self) -> None:
        """Fork the kernel into the sandbox."""
        stderr, fault = self.words.open(self.plan["dump_signal"])
        error_r, error_w = os.pipe2(os.O_CLOEXEC)
        self.plan["keeper"] = os.getpid()
        self.give_away()
        self.prepare_disk()
        self.inner = bwrap.Enclosed() if self.plan.get("enclosure") else None
        pid = os.fork()
        if pid == 0:
            given = {
                **dict(zip(self.plan["pass_names"], self.plan["pass_fds"], strict=True)),
                "fault": fault.fileno(),
            }
            _become_child(self.plan, self.inner, stderr, given, error_w)
        os.close(stderr)
        os.close(error_w)
        fault.close()
        for fd in self.plan["pass_fds"]:
            os.close(fd)
        if self.inner is not None:
            self.inner.started(pid)
        with os.fdopen(error_r, "rb") as pipe:
            trouble = pipe.read()  # ends when the child executes: the descriptor closes with it
        if trouble:
            stage, _, message = trouble.decode("utf-8", "replace").partition(" ")
            raise Refused(stage, message)
        self.pid = pid if self.inner is None else self.let_in(self.inner)
        self.say(
            "spawned", pid=self.pid, descriptors=() if self.inner is None else (self.inner.sockets,)
        )
        if self.inner is not None:
            os.close(self.inner.sockets)

    def let_in(self, inner: bwrap.Enclosed) -> int:
        """Put the kernel's process, which waits inside bubblewrap, into its control groups and let it go on."""
        try:
            pid = inner.meet()
            for path in self.plan["cgroup_joins"]:
                cgroupfs.write(path, str(pid))
            inner.go()
        except Refused as refused:
            self.words.read_stderr()
            words = self.words.tail.decode("utf-8", "replace").strip().splitlines()
            raise Refused(refused.stage, ": ".join([refused.message, *words[-1:]])) from None
        return pid

    def give_away(self) -> None:
        """The directory of the sockets and the connection file, to the other user that the kernel will be."""
        owner = self.plan.get("owner")
        if owner is None or self.directory is None:
            return
        for path in (self.directory, *(entry.path for entry in os.scandir(self.directory))):
            os.chown(path, owner, owner, follow_symlinks=False)

    def prepare_disk(self) -> None:
        """The file system of limited size that a run writes to; in a mount namespace that is ours, so that it goes with us.

        A trial of a search has a view of its own, and makes it in there: nothing of it comes back.
        """
        disk = (self.plan.get("enclosure") or {}).get("disk")
        if disk is None or self.plan["mounts"]:
            return
        os.mkdir(disk["base"])
        mounts.enter_own()
        self.disk = disk
        self.meanwhile = bwrap.make_disk(disk)

    # --- the loop -----------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until the runner says finish or is gone.

        What is no source any more is not waited on, whoever read its end: poll(2) returns at once for a descriptor that is closed.
        """
        poller = select.poll()
        waited: set[int] = set()
        while True:
            sources = {self.control.fileno(), self.wake_r, *self.words.sources(), *self.news()}
            for fd in waited - sources:
                poller.unregister(fd)
            for fd in sources - waited:
                poller.register(fd, select.POLLIN)
            waited = sources
            for fd, _ in poller.poll(self.look_at_memory()):
                if fd == self.control.fileno() and self.serve() is False:
                    return
                if fd == self.wake_r:
                    self.wake()
                elif fd in self.words.sources():
                    self.words.read(fd, self.alive)
                elif fd in self.news():
                    self.hear_of_end()

    def news(self) -> tuple[int, ...]:
        """Where the init inside bubblewrap will say how the kernel ended."""
        awaited = self.inner is not None and self.pid and not self.exited and not self.inner.over
        return (self.inner.status.fileno(),) if self.inner is not None and awaited else ()

    @property
    def alive(self) -> int | None:
        """The kernel's process, while it has not ended; 0 before it has begun."""
        return None if self.exited else self.pid

    def hear_of_end(self) -> None:
        """What the init inside bubblewrap says of the kernel's end."""
        assert self.inner is not None
        ending = self.inner.ending()
        if ending is not None and not self.exited:
            self.caught = ending["caught"]
            self.report_exit(ending["status"], ending["cpu"], ending["maxrss"])

    def serve(self) -> bool:
        """Do what the runner asks; ``False`` when it asks us to leave, or is gone."""
        requests = self.hear()
        if requests is None:
            return False
        for request in requests:
            op = request["op"]
            if op == "spawn":
                self.start(request)
            elif op == "signal" and self.pid and not self.exited:
                send = procfs.signal_group if request["group"] else procfs.signal_one
                send(self.pid, request["signum"])
            elif op == "kill":
                self.kill(request["reason"])
            elif op == "note":
                self.note = request["path"]
            elif op == "entrust":
                self.plan["orphans"] = request["orphans"]
            elif op == "finish":
                self.orphaned = False
                return False
        return True

    def start(self, plan: dict[str, Any]) -> None:
        """Build and spawn; what fails is told to the runner, which ends us."""
        self.plan = {**plan, "pass_fds": self.given}
        try:
            self.build()
            self.spawn()
        except Refused as refused:
            self.say("failed", message=refused.message, command=refused.stage == "command")
        except (OSError, ValueError) as error:
            self.say("failed", message=str(error), command=False)

    def kill(self, reason: str) -> None:
        """Record why, then kill the whole tree. A kernel that was dead before keeps its own ending."""
        if self.reason is None and not self.exited:
            self.reason = reason
            if reason in self.plan.get("stack_before", ()):
                self.take_stack()
        self.kill_tree()

    def look_at_memory(self) -> int | None:
        """Milliseconds until memory should be looked at again. Near the limit a stack is asked for at each further step.

        A kernel that the system kills for memory says nothing any more, and its sampling thread sees loops only at their
        ends; this stack, taken by C code inside the page fault's return, is where the memory went.
        """
        path, limit = self.plan.get("memory_file"), self.plan.get("memory_limit")
        if not path or not limit or self.exited or not self.pid:
            return None
        text = cgroupfs.read(path)
        share = int(text) / limit if text and text.strip().isdigit() else 0.0
        if share >= NEAR and share >= self.asked_at + STACK_STEP:
            self.asked_at = share
            self.ask_for_stack()
        elif share < NEAR:
            self.asked_at = 0.0
        least, most = LOOK_MS
        return int(max(least, min(most, (NEAR - share) * limit / FASTEST_BYTES_PER_MS)))

    def ask_for_stack(self) -> bool:
        """Send the signal at which the inside dumps its stack, if it catches it by now; uncaught it would kill."""
        number = self.plan["dump_signal"]
        if not number or self.exited or not procfs.catches(self.pid, number):
            return False
        procfs.signal_all([self.pid], number)
        return True

    def take_stack(self) -> None:
        """Ask for a last stack and take it; the main thread allocates nothing while it writes."""
        if self.ask_for_stack():
            self.words.wait_for_stack(self.pid)

    def kill_tree(self) -> list[int]:
        """Kill all in the sandbox; the pids that would not die."""
        for path in self.plan.get("kill_files", ()):
            with contextlib.suppress(OSError):
                cgroupfs.write(path, "1")
        return procfs.kill_descendants(
            os.getpid(), deadline=time.monotonic() + KILL_SECONDS, reap=self.reap
        )

    def wake(self) -> None:
        """Signals came: children to reap, or one meant for the runner, to be noted."""
        with contextlib.suppress(BlockingIOError):
            for number in os.read(self.wake_r, 4096):
                if number != signal.SIGCHLD:
                    self.signals.append(number)
                    self.say("signal", signum=number)
        self.reap()

    def reap(self) -> bool:
        """Collect dead children, adopted ones too; whether any child is left, dead or alive."""
        self.look_at_handlers()
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            if self.inner is None and pid == self.pid:
                self.report_exit(status, usage.ru_utime + usage.ru_stime, usage.ru_maxrss)
            elif self.inner is not None and pid == self.inner.bubblewrap and self.pid:
                self.hear_of_end()
                if not self.exited:  # the init was killed: nobody read the kernel's status
                    self.report_exit(None, None, None)

    def look_at_handlers(self) -> None:
        """Note which signals a kernel that has just ended still caught: once it is reaped nobody can tell."""
        if self.inner is not None or not self.pid or self.exited:
            return
        with contextlib.suppress(ChildProcessError):
            if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                self.caught = procfs.caught_signals(self.pid)

    def report_exit(self, status: int | None, cpu: float | None, maxrss: int | None) -> None:
        """Tell the runner of the kernel's death with all that will not be there later."""
        self.exited = True
        self.words.read_rest()
        self.say(
            "exited",
            status=status,
            reason=self.reason,
            cpu=cpu,
            maxrss=None if maxrss is None else maxrss * 1024,
            counters={path: cgroupfs.read(path) for path in self.plan["counter_files"]},
            fault=self.words.fault_text.decode("utf-8", "replace"),
            fault_seen=self.words.seen,
            caught=self.caught,
            stderr=self.words.tail.decode("utf-8", "replace"),
            bursts=[(at, data.decode("utf-8", "replace")) for at, data in self.words.bursts],
            oomd=cgroupfs.oomd_killed(self.plan["cgroup_dirs"]),
            disk_free=self.disk_free(),
        )

    # --- the end ------------------------------------------------------------------------------------------------

    def disk_free(self) -> int | None:
        """What is left of the file system of limited size; nobody else can see it."""
        if self.disk is None:
            return None
        with contextlib.suppress(OSError):
            found = os.statvfs(self.disk["base"])
            return 0 if found.f_files and not found.f_favail else found.f_bavail * found.f_frsize
        return None

    def list_discarded(self) -> None:
        """Tell the runner which files go with the sandbox. All in it is dead, and nothing of it has been removed.

        Nobody asks that of a trial of a search, or when the runner is gone.
        """
        inner = self.inner.discarded if self.inner is not None else []
        if not self.pid or self.orphaned or self.plan["mounts"]:
            return
        from safe_exec.keeper import discarded_files  # the keeper starts faster without

        listing = discarded_files.Listing(
            mode_tells=discarded_files.umask() & discarded_files.PRIVATE != discarded_files.PRIVATE
        )
        for place, fd in zip(
            (self.plan.get("enclosure") or {}).get("discarded", ()), inner, strict=False
        ):
            with contextlib.suppress(OSError):  # a root that even we may not read
                listing.add(place["name"], place["kind"], fd, skip=place["skip"])
        for place in self.plan.get("discarded", ()):
            disk = self.disk if place["kind"] == discarded_files.FOLDER else None
            path = place["path"] if disk is None else bwrap.changed_files(disk["base"])
            with contextlib.suppress(OSError):
                fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    is_old = None if disk is None else self.meanwhile.is_as_copied
                    listing.add(place["name"], place["kind"], fd, skip=place["skip"], is_old=is_old)
                finally:
                    os.close(fd)
        self.say("discarded", **listing.as_message())

    def take_disk_back(self) -> None:
        """What the run wrote into its copy of the folder, if it is to come back; then the file system goes."""
        if self.disk is None:
            return
        if self.disk["write_back"] and self.pid and not self.orphaned:
            try:
                kept = file_tree.take_back(
                    Path(self.disk["base"]) / "folder", Path(self.disk["folder"]), self.meanwhile
                )
                if kept:
                    more = f" and {len(kept) - NAMED} more" if len(kept) > NAMED else ""
                    what = "changed outside while the notebook ran, and left as it is there"
                    self.say("trouble", message=f"{what}: {', '.join(kept[:NAMED])}{more}")
            except OSError as error:
                self.say("trouble", message=f"the folder could not be written back: {error}")
        if not bwrap.unmount(self.disk["base"]):
            self.directory = None  # better left lying than emptied through a mount

    def leave(self) -> None:
        """Kill what lives, remove what we made, tell what could not be."""
        if self.reason is None and not self.exited:
            self.reason = "shutdown"
        alive = self.kill_tree()
        self.list_discarded()
        for fd in self.inner.discarded if self.inner is not None else ():
            os.close(fd)
        self.take_disk_back()
        left = [path for path in reversed(self.made) if not cgroupfs.remove(path)]
        directories = [self.directory] if self.directory is not None else []
        directories += [
            *self.plan.get("directories", ()),
            *(self.plan.get("orphans", ()) if self.orphaned else ()),
        ]
        left += [path for path in directories if not file_tree.remove_tree(path)]
        if not left and not alive and self.note is not None:
            with contextlib.suppress(OSError):
                os.unlink(self.note)
        self.say("left", alive=alive, left=left)


def _become_child(
    plan: dict[str, Any],
    inner: bwrap.Enclosed | None,
    stderr_fd: int,
    given: dict[str, int],
    error_fd: int,
) -> None:
    """In the child: enter the sandbox and execute the kernel, or bubblewrap with the kernel to be. Never returns.

    ``given`` are the descriptors for the kernel, by name.
    """
    parent = plan["keeper"]
    try:
        os.setsid()
        _go_first()
        # Mounts first: the system's memory for them (hundreds, with a /tmp of its own) is ours, not the notebook's.
        _enter_mounts(plan)
        for path in plan["cgroup_joins"] if inner is None else ():
            cgroupfs.write(path, "0")
        _die_with(parent)
        if inner is not None:
            inner.become_bubblewrap(plan, stderr_fd, given, error_fd)
        child.place_descriptors(plan, stderr_fd, given)
    except BaseException as error:  # noqa: BLE001 - told to the keeper; nothing may run on in this process
        child.tell(error_fd, "sandbox", error)
    child.run(plan, parent, error_fd)


def _enter_mounts(plan: dict[str, Any]) -> None:
    if not plan["mounts"]:
        return
    mounts.enter(plan["mounts"], user_namespace=plan["user_namespace"])
    disk = (plan.get("enclosure") or {}).get("disk")
    if disk is not None:
        os.mkdir(disk["base"])
        bwrap.make_disk(disk)


def _go_first() -> None:
    """Where a limit above ours, or the machine, runs out: have the system kill the kernel, and not the runner, which is to tell of it.

    It kills what uses most, so a batch in a container would go for one of its notebooks (proc_pid_oom_score_adj(5)). All of the sandbox
    inherits this; among themselves nothing changes. It could be more, but then a small kernel would die for any large stranger. To
    raise it takes no privilege; where /proc is read-only it stays what it was.
    """
    with contextlib.suppress(OSError, ValueError):
        wish = Path("/proc/self/oom_score_adj")
        wish.write_text(str(min(1000, int(wish.read_text()) + OOM_SHARE)))


def _die_with(parent: int) -> None:
    """Be killed with the keeper. After any change of credentials: they take the wish for a signal away (prctl(2))."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the keeper died before the line above: nobody would end us
        os._exit(1)


def main(control_fd: int, directory: str, run_id: str) -> None:
    """Run the keeper on the socket that the runner left at ``control_fd``.

    ``directory`` (empty: none) is made here and not by the runner: whenever the runner is killed, either there is nothing yet or there is
    a keeper that removes it. By the name of the run it is known to those who look at the list of processes.
    """
    os.set_inheritable(
        control_fd, False
    )  # else the kernel would hold it too, and could speak in our name
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    prctl(PR_SET_NAME, f"se-{run_id}".encode())
    keeper = Keeper(socket.socket(fileno=control_fd), directory=directory or None)
    keeper.control.setblocking(True)
    signal.set_wakeup_fd(keeper.wake_w, warn_on_full_buffer=False)
    for number in (*NOTED_SIGNALS, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    try:
        if keeper.directory is not None:
            os.mkdir(keeper.directory, 0o700)
        keeper.say("ready", pid=os.getpid())
        keeper.run()
    finally:
        keeper.leave()
