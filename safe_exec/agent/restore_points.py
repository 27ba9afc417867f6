"""Leaves a sleeping copy of an interactive kernel behind before each cell, which can take over.

A *snapshot* is a fork of the kernel's main thread, made between two cells. It sleeps until the
runner wakes it, after the kernel has died, or closes its channel. On waking, it unwinds the stack
to the kernel's start, makes new sockets, threads and streams around the same shell, and goes on as
the kernel (``restoring.py``).

Only one thread survives a fork, and open files are shared. So there is no snapshot of a state that
depends on others (``branching.py``): the runner is told why.
"""

import asyncio
import ctypes
import functools
import inspect
import json
import mmap
import os
import signal
import socket
import struct
import sys
import threading
import time

from .branching import (
    HARMLESS,
    RENEWED_THREADS,
    UNFORKABLE,
    descriptors,
    has_children,
    has_interpreters,
    has_timer,
    library,
    shared_mappings,
)
from .forks import fork_quietly
from .restoring import Woken

SO_PASSCRED = 16
PR_SET_PDEATHSIG = 1
# The system's OOM killer takes a process with this score first (proc_pid_oom_score_adj(5)).
FIRST_TO_DIE = 1000
MESSAGE_BYTES = 4096
# Snapshots are given up when they cost more than this share of the cells' time.
MOST_SHARE = 0.05
# Not counted of each snapshot: nobody notices a shorter pause between two cells. Otherwise a few
# trivial cells would end the snapshots.
UNNOTICED_SECONDS = 0.1
# Snapshots may take this long before any cell has taken time.
FIRST_SECONDS = 1.0
# To copy a page that is changed while a snapshot shares it (docs/interactive.md).
COPY_SECONDS_PER_BYTE = 1.75 / (1 << 30)
LONGEST_NAME = 60
COPIED = struct.Struct("<Q")
SUSPENDED = "snapshots took more than 5 % of the cells' time"


def patch_restore_points(inside):
    """Take a snapshot before each cell, if the runner asked for that."""
    if not inside.config.get("restorable"):
        return
    from ipykernel.ipkernel import IPythonKernel

    execute = IPythonKernel.do_execute
    snapshots = inside.restore_points = RestorePoints(inside)

    # Not a coroutine, so that no frame of ours lies on the stack while a cell runs.
    @functools.wraps(execute)
    def do_execute_after_snapshot(kernel, *args, **kwargs):
        code = args[0] if args else kwargs.get("code")
        silent = args[1] if len(args) > 1 else kwargs.get("silent", False)
        stored = args[2] if len(args) > 2 else kwargs.get("store_history", True)
        snapshots.before_cell(kernel, code if stored and not silent else None)
        coroutine = execute(kernel, *args, **kwargs)
        snapshots.started = time.monotonic()
        return coroutine

    finish_metadata = IPythonKernel.finish_metadata

    @functools.wraps(finish_metadata)
    def finish_metadata_timed(kernel, *args, **kwargs):
        snapshots.end_cell()
        return finish_metadata(kernel, *args, **kwargs)

    # Since Python 3.12.
    mark = getattr(inspect, "markcoroutinefunction", lambda function: function)
    IPythonKernel.do_execute = mark(do_execute_after_snapshot)
    IPythonKernel.finish_metadata = finish_metadata_timed
    inside.instrumented.append("restore_points")


class Cost:
    """The processor time that snapshots have taken, and the time of cells. In seconds."""

    # Processor time: on a busy machine the cells take longer, too.
    def __init__(self):
        self.snapshots = 0.0
        self.cells = 0.0
        self.children = 0.0

    def add_child(self, seconds):
        """Count the time of a child in the snapshot that is being taken."""
        self.children += seconds

    def add(self, seconds):
        """Count the time of one snapshot; a short one is not noticed."""
        seconds += self.children
        self.children = 0.0
        self.snapshots += max(0.0, seconds - UNNOTICED_SECONDS)

    def is_too_high(self):
        """Tell whether snapshots have taken too large a share of the cells' time."""
        return self.snapshots > MOST_SHARE * self.cells + FIRST_SECONDS


class RestorePoints:
    """Takes the snapshots of one kernel, and decides which states have none."""

    def __init__(self, inside):
        self.inside = inside
        self.cost = Cost()
        self.started = None
        self.suspended = False
        # How much of the memory that the last snapshot shared was copied; written by the snapshot.
        self.copied = mmap.mmap(-1, COPIED.size)
        self.begin()

    def begin(self):
        """Forget what belongs to the kernel: a new one is about to start."""
        self.own = None
        self.own_threads = ()
        # Threads that outlived a fork.
        self.foreign = set()

    def end_cell(self):
        """Count the time of the cell that ends."""
        if self.started is not None and not self.inside.child:
            self.cost.cells += time.monotonic() - self.started
            self.started = None

    def before_cell(self, kernel, code):
        """Leave a snapshot behind, or tell the runner why there is none.

        ``code`` is the cell's text, ``None`` if it does not count. Raises Woken in the snapshot
        that takes over.
        """
        if self.inside.child or self.suspended:
            return
        if self.own is None:
            self.note_own_state()
        begin = time.thread_time()
        reason = self.why_none()
        if not reason:
            reason = self.leave(kernel, code)
        if reason:
            self.tell_none(reason)
        (copied,) = COPIED.unpack_from(self.copied)
        COPIED.pack_into(self.copied, 0, 0)
        self.cost.add(time.thread_time() - begin + copied * COPY_SECONDS_PER_BYTE)
        if self.cost.is_too_high():
            self.suspended = True
            self.tell_none(SUSPENDED, suspended=True)

    def tell_none(self, reason, **fields):
        """Tell the runner that there is no snapshot from before the next cell."""
        self.inside.fact(restore_point=None, why=reason, before=self.inside.page.cell + 1, **fields)

    def note_own_state(self):
        """Record what belongs to the kernel: a notebook has not run yet."""
        self.own = descriptors()
        self.own_mappings = shared_mappings()
        self.own_threads = set(os.listdir("/proc/self/task"))

    def why_none(self):
        """Return why the kernel should not be forked now, in a few words; empty if it may be."""
        loop = asyncio.get_running_loop()
        checks = (
            lambda: next((name for name in UNFORKABLE if name in sys.modules), ""),
            library,
            lambda: "threads" if self.foreign & set(os.listdir("/proc/self/task")) else "",
            lambda: "child processes" if has_children() else "",
            lambda: "a timer" if has_timer() else "",
            lambda: "asyncio tasks" if has_tasks(loop) else "",
            lambda: "sub-interpreters" if has_interpreters() else "",
            self.open_files,
            lambda: "shared memory" if shared_mappings() - self.own_mappings else "",
        )
        for check in checks:
            reason = check()
            if reason:
                return reason
        return ""

    def open_files(self):
        """Return the kind of a descriptor that the notebook opened; empty if there is none."""
        history = history_file(self.inside.shell)
        for fd in sorted(descriptors() - self.own):
            try:
                target = os.readlink("/proc/self/fd/{}".format(fd))
            except OSError:
                # Another thread has just closed it.
                continue
            if target in HARMLESS or is_of_kernel(target, history):
                continue
            if target[:1] == "/":
                return "an open file ({})".format(os.path.basename(target)[:LONGEST_NAME])
            return "an open " + target.partition(":")[0]
        return ""

    def other_threads(self):
        """Return the threads that neither ipykernel nor we have made."""
        # IPython ends the thread that saves its history before a fork, and starts another one.
        ours = {
            str(thread.native_id)
            for thread in threading.enumerate()
            if type(thread).__name__ == "HistorySavingThread"
        }
        others = set()
        for task in set(os.listdir("/proc/self/task")) - self.own_threads - ours:
            try:
                with open("/proc/self/task/{}/comm".format(task)) as file:
                    if file.read().strip() not in RENEWED_THREADS:
                        others.add(task)
            except OSError:
                # It has just ended.
                continue
        return others

    def leave(self, kernel, code):
        """Fork a snapshot; return why there is none, empty if there is one."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            # The runner learns from it which process it is, by its own numbers (unix(7)).
            ours.setsockopt(socket.SOL_SOCKET, SO_PASSCRED, 1)
            # A forked process is not in a loop, for asyncio.
            task = asyncio.current_task()
            try:
                pid = fork_quietly()
            except OSError as error:
                return "fork: {}".format(os.strerror(error.errno))
            if not pid:
                self.become(kernel, code, task, ours, theirs)
            # The notebook must not find a child that it did not make: this one has ended.
            self.cost.add_child(await_end(pid))
            # Threads of libraries that prepare for a fork end while it is made (OpenBLAS).
            self.foreign = self.other_threads()
            if self.foreign:
                return "threads"
            ours.send(b"go")
            text = json.dumps({"restore_point": True, "before": self.inside.page.cell + 1})
            socket.send_fds(self.inside.facts, [text.encode()], [ours.fileno()])
        except OSError as error:
            # The runner takes no more facts: it must not take an older snapshot for this one, and
            # compares the number of the cell.
            return "its channel: {}".format(os.strerror(error.errno))
        finally:
            ours.close()
            theirs.close()
        return ""

    def become(self, kernel, code, task, ours, theirs):
        """Go on as a snapshot, by a second fork. Raises Woken if it is to be the kernel."""
        try:
            if fork_quietly():
                os._exit(0)
            ours.close()
            # The stack that is unwound on waking closes the other one.
            channel = theirs.dup()
            # Signals are sent to the kernel's group and session.
            os.setsid()
            asleep = Asleep(self, kernel, channel)
            asleep.prepare()
            message = asleep.sleep()
        except BaseException:
            os._exit(1)
        raise Woken(asleep, message, code, task)


class Asleep:
    """A snapshot, from its fork until it is woken."""

    def __init__(self, snapshots, kernel, channel):
        self.snapshots, self.kernel, self.channel = snapshots, kernel, channel
        self.inside = snapshots.inside
        self.mask = ()
        # Descriptors that belonged to the kernel it was forked from, now of /dev/null.
        self.released = set()

    def prepare(self):
        """Depend on nothing of the kernel any more."""
        self.mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        # Sent once the process between it and us is gone: our parent is the one that reaps us.
        if not self.channel.recv(MESSAGE_BYTES):
            os._exit(0)
        ctypes.PyDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        self.score = read_number("/proc/self/oom_score_adj")
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write(str(FIRST_TO_DIE))
        self.release()
        self.channel.send(json.dumps({"asleep": os.getpid()}).encode())

    def release(self):
        """Replace the kernel's descriptors by /dev/null."""
        # Replaced and not closed: objects of the kernel close these numbers when they are collected.
        inside = self.inside
        exempt = {self.channel.fileno(), inside.facts.fileno(), inside.fault_fd}
        for stream in (sys.stdout, sys.stderr):
            exempt.add(getattr(stream, "_original_stdstream_copy", 2))
        history = history_file(inside.shell)
        null = os.open(os.devnull, os.O_RDWR)
        for fd in descriptors() - {null} - exempt:
            try:
                target = os.readlink("/proc/self/fd/{}".format(fd))
                if fd in self.snapshots.own or is_of_kernel(target, history):
                    os.dup2(null, fd, inheritable=os.get_inheritable(fd))
                    self.released.add(fd)
            except OSError:
                # The one by which the directory was read.
                continue
        os.close(null)

    def sleep(self):
        """Return the message that wakes this snapshot; exit if its channel ends."""
        try:
            data = self.channel.recv(MESSAGE_BYTES)
        except ConnectionResetError:
            # The runner closed it before it had read our message.
            data = b""
        if not data:
            COPIED.pack_into(self.snapshots.copied, 0, private_bytes())
            os._exit(0)
        # It is the kernel from here on, whose score may be lowered to what it was.
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write(str(self.score))
        return json.loads(data)


def await_end(pid):
    """Wait for the end of a child; return its processor time in seconds, 0 if it is unknown."""
    try:
        usage = os.wait4(pid, 0)[2]
    except ChildProcessError:
        # The notebook ignores SIGCHLD, so the system has taken the status, after the end.
        return 0.0
    return usage.ru_utime + usage.ru_stime


def history_file(shell):
    """Return the path of IPython's history database, empty if there is none."""
    manager = getattr(shell, "history_manager", None)
    path = str(getattr(manager, "hist_file", "") or "")
    return os.path.realpath(path) if path and path != ":memory:" else ""


def is_of_kernel(target, history):
    """Tell whether an open file belongs to libzmq or to IPython's history database."""
    # ipykernel makes a zmq socket in each thread whose output it sends, which has one of these.
    if target == "anon_inode:[eventfd]":
        return True
    # SQLite opens the folder, too, to write its entries to the disk.
    return bool(history) and (target.startswith(history) or target == os.path.dirname(history))


def has_tasks(loop):
    """Tell whether the notebook left tasks or timers in the event loop."""
    current = asyncio.current_task()
    for task in asyncio.all_tasks(loop):
        code = getattr(task.get_coro(), "cr_code", None)
        if task is not current and (code is None or not is_own_code(code.co_filename)):
            return True
    return False


def is_own_code(path):
    """Tell whether a file belongs to ipykernel or to its event loop."""
    return os.path.basename(os.path.dirname(path)) in ("ipykernel", "tornado", "eventloop")


def private_bytes():
    """Return the memory that only this process has, in bytes; 0 if the system does not tell."""
    total = 0
    try:
        with open("/proc/self/smaps_rollup") as file:
            for line in file:
                if line.startswith("Private_Dirty:"):
                    total += int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        return 0
    return total


def read_number(path):
    """Return the number in a file of /proc."""
    with open(path) as file:
        return int(file.read())
