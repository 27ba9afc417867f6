"""Leaves a sleeping copy of the kernel before each cell (``--keep-going``).

If the cell then kills the kernel, the runner wakes the copy, which becomes the kernel and runs the
cells below (``revival.py``): what ran before the failure need not run again. The copy is made by
two forks, so that the notebook finds no child that it did not make; its parent is the keeper, which
reads its wait status as it read the first kernel's. It runs no code of the notebook while it
sleeps, and ends when the runner closes its channel.

A state that does not survive a fork is not copied (``branching.py``), and a copy is not woken if
the cell has changed files: then the runner starts again from the beginning. The notebook's folder
is looked at, and /dev/shm once a cell has imported what uses it. Elsewhere other programs write
too, so an audit hook notes what the cell opens for writing, and whether it starts programs.
"""

import asyncio
import json
import mmap
import os
import select
import signal
import socket
import sys
import time

from .branching import BYTECODE, RENEWED_THREADS, files_in, inherited_state, why_not_branchable
from .forks import GIVEN_UP, detach, fork_quietly, leave_loop, tell
from .revival import revive

MESSAGE_BYTES = 160_000
# The descriptors that come with the message that wakes a copy, in this order.
DESCRIPTORS = ("page", "facts", "stderr", "fault")
SETUP_SECONDS = 2.0
# Copies take at most this share of the time since the first cell, and these seconds. A copy takes
# milliseconds, with many gigabytes of memory a few hundred.
SHARE_OF_TIME, FIRST_SECONDS = 0.03, 1.0


# More files take too long to look at before each cell.
MOST_FILES = 3000
LONGEST_CHANGE = 200
# Events of changes of files and of programs that are started (the table of audit events in Python's
# documentation). The path comes first.
CHANGES = frozenset(
    (
        *("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink"),
        *("os.chmod", "os.utime", "os.system", "os.fork", "os.forkpty", "os.posix_spawn"),
        *("subprocess.Popen", "sqlite3.connect", "open", "import"),
    )
)
USES_SHM, SHM = "multiprocessing.shared_memory", "/dev/shm"
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
HARMLESS = ("/dev/", "/proc/")


def patch_snapshots(inside):
    """Leave a copy of the kernel before each cell, if the runner asked for that."""
    if not inside.config.get("snapshots"):
        return
    from ipykernel.ipkernel import IPythonKernel

    do_execute = IPythonKernel.do_execute
    snapshots = Snapshots(inside)

    def hook(event, args):
        if event in CHANGES and inside.in_cell and not inside.child:
            snapshots.note(event, args)

    sys.addaudithook(hook)

    # No coroutine, as in ``cells.py``: while a cell runs no frame of ours lies on the stack.
    def do_execute_after_snapshot(kernel, *args, **kwargs):
        snapshots.before_cell(kernel)
        return do_execute(kernel, *args, **kwargs)

    IPythonKernel.do_execute = do_execute_after_snapshot
    inside.instrumented.append("snapshots")


def thread_ids():
    """Return the ids of all threads that a fork would lose, except those that come back."""
    ids = set()
    for task in os.listdir("/proc/self/task"):
        try:
            with open("/proc/self/task/{}/comm".format(task)) as file:
                if file.read().strip() not in RENEWED_THREADS:
                    ids.add(int(task))
        except OSError:
            # It has just ended.
            continue
    return ids


class Snapshots:
    """The copies that one kernel leaves behind."""

    def __init__(self, inside):
        self.inside = inside
        self.is_ready = self.is_given_up = False
        self.channel = None
        # The state before the first cell: all others belong to the notebook.
        self.own, self.threads = None, frozenset()
        # Threads of the notebook that have outlived a fork.
        self.lasting = frozenset()
        self.watched, self.unwatched = (), ()
        self.streams = ()
        # Read by the copy: the kernel has ended by then.
        self.changed = mmap.mmap(-1, mmap.PAGESIZE)
        self.began = 0.0
        self.seconds = 0.0

    def before_cell(self, kernel):
        """Leave a copy behind, unless its state does not survive a fork."""
        if self.is_given_up or self.inside.child or os.getpid() != self.inside.page.pid:
            return
        start = time.monotonic()
        try:
            if not self.is_ready:
                self.set_up(kernel)
            if self.is_due(start):
                reason = self.leave(kernel)
                if reason:
                    tell(self.channel, unbranchable=reason)
        except Exception as error:
            # The run goes on; only a failure is followed by a run from the start.
            self.give_up("{}: {}".format(type(error).__name__, error)[:200])
        self.seconds += time.monotonic() - start

    def note(self, event, args):
        """Record that the running cell changes something outside of the watched folders."""
        try:
            is_harmless = self.is_harmless(event, args)
        except Exception:
            # Strange arguments are the notebook's to fail with.
            is_harmless = False
        if not is_harmless and not self.changed[0]:
            text = " ".join([event, *map(str, args[:1])])[:LONGEST_CHANGE]
            data = text.encode("utf-8", "replace")[:LONGEST_CHANGE]
            self.changed[: len(data)] = data

    def is_harmless(self, event, args):
        """Tell whether an event changes nothing, or only what is looked at anyway."""
        path = args[0] if args else None
        if event == "import":
            return path != USES_SHM
        if event == "open" and (isinstance(path, int) or not args[2] & WRITES):
            return True
        if event in ("subprocess.Popen", "os.system") or not isinstance(path, (bytes, str)):
            return False
        if looks_for_temporary_directory(sys._getframe(1)):
            return True
        place = os.path.realpath(os.fsdecode(path))
        return BYTECODE in place or place.startswith((*self.watched, *self.unwatched, *HARMLESS))

    def set_up(self, kernel):
        """Receive the channel to the runner, and record the kernel's own state."""
        self.inside.facts.setblocking(True)
        self.inside.facts.settimeout(SETUP_SECONDS)
        try:
            _, descriptors, _, _ = socket.recv_fds(self.inside.facts, 100, 1)
        finally:
            self.inside.facts.setblocking(False)
        self.channel = socket.socket(fileno=descriptors[0])
        self.channel.settimeout(SETUP_SECONDS)
        settings = json.loads(self.channel.recv(MESSAGE_BYTES))
        self.watched, self.unwatched = settings["watch"], tuple(settings["except"])
        self.own = inherited_state(self.channel.fileno())
        self.own.descriptors.add(self.channel.fileno())
        self.threads = thread_ids()
        self.streams = own_streams()
        self.began = time.monotonic()
        self.is_ready = True

    def give_up(self, reason):
        """Leave no more copies."""
        self.is_given_up = True
        if self.channel is not None:
            try:
                tell(self.channel, unbranchable=reason)
            except OSError:
                # The runner has closed the channel, and asks for no copy any more.
                pass

    def is_due(self, moment):
        """Tell whether copies have taken little enough of the time so far."""
        return self.seconds <= FIRST_SECONDS + SHARE_OF_TIME * (moment - self.began)

    def leave(self, kernel):
        """Leave a copy behind; return why there is none, or ""."""
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        if self.lasting & thread_ids():
            return "threads"
        reason = why_not_branchable(self.own, loop, self.channel.fileno(), is_kernels=is_kernels)
        if reason:
            return reason
        files = self.files()
        if files is None:
            return "too many files to watch"
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(SETUP_SECONDS)
        try:
            pid = fork_quietly()
            if not pid:
                self.sleep(kernel, (loop, task), files, theirs)
            theirs.close()
            if not await_child(pid):
                # A handler of a library hangs in it (pthread_atfork(3)).
                self.is_given_up = True
                return "a library that cannot be forked"
            # Threads of libraries that prepare for a fork end while it is made (OpenBLAS).
            self.lasting = thread_ids() - self.threads
            if self.lasting:
                return "threads"
            sleeping = json.loads(ours.recv(MESSAGE_BYTES))
            text = json.dumps({"snapshot": request_of(kernel), "pid": sleeping["pid"]}).encode()
            socket.send_fds(self.channel, [text], [ours.fileno()])
            # Until then the copy before this one is the newest, and must know what changed since.
            self.changed[:] = bytes(len(self.changed))
        finally:
            ours.close()
        return ""

    def files(self):
        """Return the files that a cell must not change; ``None`` if there are too many."""
        folders = [*self.watched, *([SHM] if USES_SHM in sys.modules else [])]
        return files_in(folders, self.unwatched, MOST_FILES)

    def sleep(self, kernel, running, files, channel):
        """Become a copy by a second fork, and wait for the runner."""
        code = GIVEN_UP
        try:
            if fork_quietly():
                os._exit(0)
            # Out of the group that an interrupt of the kernel reaches.
            os.setsid()
            leave_loop(*running)
            detach(channel)
            tell(channel, pid=os.getpid())
            data, descriptors, _, _ = socket.recv_fds(channel, MESSAGE_BYTES, len(DESCRIPTORS))
            if not data:
                os._exit(0)
            changed = self.changed[:].rstrip(b"\0").decode("utf-8", "replace")
            if not changed and self.files() != files:
                changed = "in the notebook's folder"
            if changed:
                tell(channel, changed=changed)
                os._exit(0)
            self.is_ready = False
            message = json.loads(data)
            message.update(zip(DESCRIPTORS, descriptors))
            code = revive(self.inside, kernel, self.streams, message, channel)
        except BaseException as error:
            tell(channel, failed="{}: {}".format(type(error).__name__, error)[:500])
        finally:
            os._exit(code)


def looks_for_temporary_directory(frame):
    """Tell whether ``tempfile`` tries where it may write; it removes that file at once."""
    while frame is not None:
        if frame.f_code.co_name == "_get_default_tempdir":
            return True
        frame = frame.f_back
    return False


def await_child(pid):
    """Wait for the end of a child, so that the notebook finds none; false if it hangs."""
    in_time = True
    try:
        pidfd = os.pidfd_open(pid)
        try:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            in_time = bool(poll.poll(1000 * SETUP_SECONDS))
            if not in_time:
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        finally:
            os.close(pidfd)
    except (ChildProcessError, ProcessLookupError):
        # The notebook ignores SIGCHLD, so the system has taken the status.
        pass
    return in_time


def own_streams():
    """Return ipykernel's streams, which the notebook may replace later."""
    return tuple(stream for stream in (sys.stdout, sys.stderr) if hasattr(stream, "pub_thread"))


def is_kernels(thing):
    """Tell whether a task or a timer of the event loop is the kernel's own."""
    coroutine = thing.get_coro() if hasattr(thing, "get_coro") else None
    code = getattr(coroutine, "cr_code", None) or getattr(coroutine, "gi_code", None)
    if code is None:
        function = getattr(thing, "_callback", None)
        function = getattr(function, "func", function)
        code = getattr(function, "__code__", None) or getattr(
            getattr(function, "__func__", None), "__code__", None
        )
    parts = code.co_filename.split(os.sep) if code is not None else ()
    return bool({"ipykernel", "tornado", "zmq"} & set(parts))


def request_of(kernel):
    """Return the id of the request that the kernel is about to answer."""
    parent = kernel.get_parent("shell") if hasattr(kernel, "get_parent") else kernel._parent_header
    return parent.get("header", {}).get("msg_id")
