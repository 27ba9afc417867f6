"""Runs the trials of a culprit search in forks of one live kernel.

The kernel's main thread forks once, before any cell. This fork is the *root*, which has no other
thread. The root sleeps until the runner asks it to run some cells. It then forks a process that
runs them as ipykernel would, and reports how that process ended. Before a cell, such a process may
leave a *snapshot* behind: a sleeping fork that takes requests like the root, and continues from its
own state. So cells that ran before a snapshot need not run again.

Root and snapshots run no code of the notebook. They end when the runner closes its end of their
channel. No snapshot is taken of a state that does not survive a fork (``branching.py``).
"""

import asyncio
import json
import mmap
import os
import random
import select
import signal
import socket
import struct
import sys
import time
import warnings

from .branching import files_in, inherited_state, threads, why_not_branchable

# The names that the runner sends a source under are numbers; a message holds one source at most.
MESSAGE_BYTES = 160_000
LONGEST_TEXT = 2000
LINE = struct.Struct("<Q")
# The exit status of a process that cannot go on; it tells the reason in a message.
GIVEN_UP = 70


def patch_forks(inside):
    """Make the kernel serve forks at its first execute request, if the runner asked for forks."""
    if not inside.config.get("forks"):
        return
    from ipykernel.ipkernel import IPythonKernel

    execute = IPythonKernel.do_execute
    served = []

    # It is a coroutine function as the original is, in versions that look for that.
    async def do_execute_or_serve(kernel, *args, **kwargs):
        if not served:
            served.append(True)
            serve_forks(inside, kernel, execute)
        return await execute(kernel, *args, **kwargs)

    IPythonKernel.do_execute = do_execute_or_serve
    inside.instrumented.append("forks")


def serve_forks(inside, kernel, execute):
    """Fork the root and wait until it ends."""
    try:
        _, descriptors, _, _ = socket.recv_fds(inside.facts, 100, 1)
    except OSError:
        # The runner sent no channel.
        return
    channel = socket.socket(fileno=descriptors[0])
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    pid = fork_quietly()
    if pid:
        channel.close()
        os.waitpid(pid, 0)
        return
    code = GIVEN_UP
    try:
        leave_loop(loop, task)
        code = Server(inside, kernel, execute, channel).serve(channel)
    finally:
        os._exit(code)


def fork_quietly():
    """Fork without Python's warning about threads, and without reseeding ``random``."""
    # `random` seeds itself anew in each child (random.py, since Python 3.7).
    state = random.getstate()
    with warnings.catch_warnings():
        # Since Python 3.12: other threads are running. They are the kernel's, and stay behind.
        warnings.simplefilter("ignore")
        pid = os.fork()
    if not pid:
        random.setstate(state)
    return pid


def leave_loop(loop, task):
    """Detach a forked child from the event loop that was running when it was forked."""
    # Python 3.14 refuses to run a task while another one of the thread is recorded as running.
    asyncio._set_running_loop(loop)
    try:
        asyncio.tasks._leave_task(loop, task)
    finally:
        asyncio._set_running_loop(None)


def tell(channel, **fields):
    """Send a message to the runner. Raises OSError if the notebook closed the channel."""
    channel.send(json.dumps(fields).encode("utf-8", "replace"))


class Server:
    """The state of the root, which every fork inherits: sources, kernel, own descriptors."""

    def __init__(self, inside, kernel, execute, channel):
        self.inside, self.kernel, self.execute = inside, kernel, execute
        self.sources = {}
        self.may_raise = set()
        # Folders whose files a run must not change, and what to leave out of them.
        self.watched, self.unwatched = (), ()
        self.files = None
        self.loop = None
        # The line of the running statement, in memory that outlives the process that runs it.
        self.line = mmap.mmap(-1, LINE.size)
        inside.in_cell = False
        inside.at = self.note_line
        detach(channel)
        silence(kernel)
        self.own = inherited_state(channel.fileno())

    def note_line(self, line):
        """Record the line of the statement that is about to run."""
        LINE.pack_into(self.line, 0, line)

    def serve(self, channel):
        """Handle the runner's messages until it closes the channel; return the exit status.

        Cells run in forks, and a fork exits without returning from this call.
        """
        while True:
            data = channel.recv(MESSAGE_BYTES)
            if not data:
                return 0
            message = json.loads(data)
            if "source" in message:
                self.sources[message["cell"]] = message["source"]
                if message["may_raise"]:
                    self.may_raise.add(message["cell"])
            elif "watch" in message:
                self.watched, self.unwatched = message["watch"], tuple(message["except"])
                self.files = files_in(self.watched, self.unwatched)
                tell(channel, ready=True, files=self.files is not None)
            elif not self.run_in_fork(channel, message):
                return 0

    def run_in_fork(self, channel, message):
        """Run cells in a fork and report its ending to the runner; false if the runner has gone."""
        self.note_line(0)
        pid = fork_quietly()
        if not pid:
            try:
                self.run(channel, message["cells"], message["keep"])
            finally:
                os._exit(GIVEN_UP)
        try:
            late = await_end(pid, channel, message["seconds"])
        finally:
            kill_group(pid)
        try:
            status = os.waitpid(pid, 0)[1]
        except ChildProcessError:
            # The notebook ignores SIGCHLD, so the system has taken the status.
            status = None
        if late is None:
            return False
        changed = files_in(self.watched, self.unwatched) != self.files
        line = LINE.unpack_from(self.line)[0]
        tell(channel, status=status, late=late, changed=changed, line=line)
        return True

    def run(self, channel, cells, keep):
        """Run cells, then exit.

        ``keep`` lists the positions of the cells before which a snapshot is left behind.
        """
        os.setsid()
        self.loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self.loop)
        keeps = True
        try:
            for position, cell in enumerate(cells):
                if keeps and position in keep:
                    keeps = self.leave_snapshot(channel, position)
                tell(channel, begins=cell)
                reply = self.loop.run_until_complete(
                    self.execute(self.kernel, self.sources[cell], False, True, {}, False)
                )
                if getattr(self.kernel.shell, "exit_now", False):
                    tell(channel, odd="it asked to exit")
                    break
                if reply["status"] != "ok" and cell not in self.may_raise:
                    error = [str(reply.get(n, ""))[:LONGEST_TEXT] for n in ("ename", "evalue")]
                    tell(channel, error=error)
                    break
            else:
                tell(channel, passed=True)
        except BaseException as error:
            # Whatever leaves a cell in another way is not for a fork to judge.
            tell(channel, odd=f"{type(error).__name__}: {error}"[:LONGEST_TEXT])
        os._exit(0)

    def leave_snapshot(self, channel, position):
        """Leave a sleeping fork of this process behind; false if its state cannot be forked."""
        reason = why_not_branchable(self.own, self.loop, channel.fileno())
        if reason:
            tell(channel, unbranchable=reason)
            return False
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = fork_quietly()
        if not pid:
            self.sleep(ours, theirs, channel)
        # The notebook must not find a child that it did not make: this one has ended.
        os.waitpid(pid, 0)
        theirs.close()
        # Threads of libraries that prepare for a fork end while it is made (OpenBLAS).
        if threads() > 1:
            ours.close()
            tell(channel, unbranchable="threads")
            return False
        text = json.dumps({"snapshot": position}).encode()
        socket.send_fds(channel, [text], [ours.fileno()])
        ours.close()
        return True

    def sleep(self, ours, theirs, channel):
        """Turn this fork into a snapshot. Never returns.

        A second fork makes the snapshot a process that is not a child of the one that runs cells.
        """
        code = GIVEN_UP
        try:
            if fork_quietly():
                os._exit(0)
            # Leave the group that is killed when the run ends.
            os.setsid()
            ours.close()
            channel.close()
            self.loop = None
            self.own = inherited_state(theirs.fileno())
            code = self.serve(theirs)
        finally:
            os._exit(code)


def await_end(pid, channel, seconds):
    """Wait until a child ends and return false.

    Returns true if ``seconds`` pass first, and ``None`` if the runner has gone.
    """
    deadline = time.monotonic() + seconds
    pidfd = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        poll.register(channel, select.POLLIN)
        while True:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return True
            ready = {fd for fd, _ in poll.poll(1000 * remaining)}
            if pidfd in ready:
                return False
            # Nothing is asked while a run is under way: the runner has closed its end.
            if channel.fileno() in ready:
                return None
    finally:
        os.close(pidfd)


def kill_group(pid):
    """Kill a process and the group that it leads; if it has ended, kill the rest of its group."""
    for kill in (os.killpg, os.kill):
        try:
            kill(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            # No group yet or no longer.
            pass


def detach(channel):
    """Replace every descriptor of the kernel by /dev/null, except for the channel."""
    # Replaced and not closed: objects that will be collected close these numbers, which must not
    # belong to the notebook's files then. And the kernel's end would not be noticed while a copy of
    # its sockets is open.
    null = os.open(os.devnull, os.O_RDWR)
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        if fd in (null, channel.fileno()):
            continue
        try:
            os.dup2(null, fd, inheritable=os.get_inheritable(fd))
        except OSError:
            # This is the descriptor by which the directory itself is read.
            continue
    os.close(null)


def silence(kernel):
    """Drop all output and messages: a fork lacks the threads that would send them."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.write = len
            stream.flush = nothing
    kernel.session.send = nothing
    history = getattr(kernel.shell, "history_manager", None)
    if history is not None:
        # IPython takes a database that it cannot write any more for a corrupt one, and moves the
        # user's file away.
        history.enabled = False
        history.hist_file = ":memory:"
    sys.__stderr__ = sys.__stdout__ = open(os.devnull, "w")


def nothing(*_args, **_kwargs):
    """Do nothing."""
