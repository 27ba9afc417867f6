"""Turns a snapshot into the kernel: new sockets, threads and streams around the same shell."""

import _thread
import asyncio
import atexit
import ctypes
import faulthandler
import gc
import json
import logging
import os
import signal
import struct
import sys
import threading
import warnings

from . import layout
from .layout import DUMP_ALL_SIGNAL, DUMP_SIGNAL
from .sampler import sample_forever

PR_SET_PTRACER = 0x59616D61
LONGEST_TEXT = 500


class Woken(SystemExit):
    """Unwinds the stack of a snapshot that takes over, up to the kernel's start.

    A SystemExit, since asyncio passes on no other exception of a task. ``take_over`` runs the
    kernel until its end.
    """

    def __init__(self, asleep, message, code, task):
        super().__init__(0)
        self.asleep, self.message, self.code, self.task = asleep, message, code, task

    def take_over(self):
        """Run the restored kernel, and those that are restored after it, until the end."""
        woken = self
        while woken is not None:
            woken = run_restored(woken)


def run_restored(woken):
    """Run one restored kernel until it ends; return the next one if a snapshot of it was woken."""
    channel = woken.asleep.channel
    try:
        app = Restoring(woken).restore()
    except BaseException as error:
        text = "{}: {}".format(type(error).__name__, error)[:LONGEST_TEXT]
        channel.send(json.dumps({"failed": text}).encode())
        os._exit(1)
    # It is held by the task that it unwound, with all frames of that.
    woken.task._log_traceback = False
    woken.task = woken.__traceback__ = None
    channel.send(b'{"restored": true}')
    channel.close()
    try:
        app.start()
    except Woken as next_one:
        return next_one
    return None


class Restoring:
    """One restoration."""

    def __init__(self, woken):
        self.asleep, self.message, self.code = woken.asleep, woken.message, woken.code
        self.inside, self.old = self.asleep.inside, self.asleep.kernel
        self.shell = self.old.shell
        self.app = self.old.parent
        self.streams = (sys.stdout, sys.stderr)

    def restore(self):
        """Make everything new that a fork does not have; return the application to start."""
        self.restore_process()
        self.close_loops()
        self.restore_sockets()
        self.restore_streams()
        self.restore_kernel()
        self.restore_history()
        self.restore_agent()
        self.close_released()
        return self.app

    def close_loops(self):
        """Close the event loops of before: they own descriptors that are no longer theirs."""
        app = self.app
        threads = (
            getattr(app, "control_thread", None),
            getattr(app, "iopub_thread", None),
            getattr(app, "shell_channel_thread", None),
        )
        loops = [getattr(thread, "io_loop", None) for thread in threads]
        for loop in [getattr(app, "io_loop", None), *loops]:
            loop = getattr(loop, "asyncio_loop", None)
            if loop is not None:
                loop._selector.close()
                loop._ssock.close()
                loop._csock.close()
        asyncio.set_event_loop(asyncio.new_event_loop())

    def restore_process(self):
        """Restore the settings of the process that a fork loses."""
        # Before any thread is made, which inherits it.
        signal.pthread_sigmask(signal.SIG_SETMASK, self.asleep.mask)
        signal.set_wakeup_fd(-1)
        tracer = self.message.get("tracer")
        if tracer:
            ctypes.PyDLL(None).prctl(PR_SET_PTRACER, ctypes.c_ulong(tracer))

    def restore_sockets(self):
        """Listen on the addresses of before, in a context of its own."""
        app = self.app
        atexit.unregister(app.close)
        logger = logging.getLogger("tornado")
        handlers = list(logger.handlers)
        app.poller = app.context = None
        app.init_poller()
        app.session.pid = os.getpid()
        app.init_sockets()
        # It adds a handler each time.
        logger.handlers[:] = handlers
        app.init_heartbeat()
        app.displayhook.pub_socket = app.iopub_socket

    def restore_streams(self):
        """Set up the same stream objects again: loggers and others of the notebook hold them."""
        from ipykernel.iostream import OutStream

        app = self.app
        for name, stream in zip(("stdout", "stderr"), self.streams):
            if not isinstance(stream, OutStream):
                raise TypeError("sys.{} was replaced".format(name))
            copy = getattr(stream, "_original_stdstream_copy", None)
            if copy is not None:
                os.dup2(copy, stream._original_stdstream_fd)
            echo, local, isatty = stream.echo, stream._local, stream._isatty
            # The poll object closes its descriptor when it is replaced.
            stream.__dict__.pop("_unread", None)
            # It looks for the descriptor of the stream that it replaces.
            setattr(sys, name, getattr(sys, "__{}__".format(name)))
            stream.__init__(
                app.session, app.iopub_thread, name, watchfd=copy is not None, isatty=isatty
            )
            setattr(sys, name, stream)
            stream._local = local
            if echo is not None:
                stream.echo = echo
            elif copy is not None:
                os.close(copy)

    def restore_kernel(self):
        """Make a kernel object around the same shell."""
        app, old = self.app, self.old
        type(old).clear_instance()
        app.init_kernel()
        kernel = app.kernel
        self.shell.kernel = kernel
        for handlers in ("shell_handlers", "control_handlers"):
            current = getattr(kernel, handlers)
            for name, handler in getattr(old, handlers).items():
                current.setdefault(name, handler)
        for comm in getattr(getattr(kernel, "comm_manager", None), "comms", {}).values():
            if getattr(comm, "kernel", None) is old:
                comm.kernel = kernel

    def restore_history(self):
        """Go on in a session of its own in IPython's database, behind the lost cell."""
        shell, manager = self.shell, self.shell.history_manager
        if manager is not None:
            manager.db_input_cache_lock = threading.Lock()
            manager.db_output_cache_lock = threading.Lock()
            if manager.enabled and str(manager.hist_file) != ":memory:":
                # The kernel that died has written these, and its connection must not be closed
                # here: SQLite's locks belong to the process that took them (sqlite.org, "How To
                # Corrupt An SQLite Database File"). Its finalizer keeps the connection.
                manager.db_input_cache, manager.db_output_cache = [], []
                manager.init_db()
                manager.new_session()
                if getattr(manager, "save_thread", None) is not None:
                    manager.save_thread = type(manager.save_thread)(manager)
                    manager.save_thread.start()
        if self.code is not None:
            # The cell that was running has its number and its place in the history.
            if manager is not None:
                manager.input_hist_parsed.append(self.code)
                manager.input_hist_raw.append(self.code)
            shell.execution_count += 1

    def restore_agent(self):
        """Report again to the page and the sockets that the runner reads."""
        inside = self.inside
        inside.child = inside.in_cell = False
        inside.main = _thread.get_ident()
        if inside.is_not_forked is not None:
            inside.is_not_forked[0] = 1
        restore_page(inside.page)
        census = inside.census
        census.lock, census.active = _thread.allocate_lock(), False
        reopen(census, "statm", "/proc/self/statm")
        reopen(census.residency, "fd", "/proc/self/pagemap")
        inside.keep_enabled()
        faulthandler.register(DUMP_SIGNAL, file=inside.fault_fd, all_threads=False, chain=False)
        faulthandler.register(DUMP_ALL_SIGNAL, file=inside.fault_fd, all_threads=True, chain=False)
        inside.restore_points.begin()
        inside.restore_points.started = None
        _thread.start_new_thread(sample_forever, (inside,))

    def close_released(self):
        """Close the descriptors of before that nothing owns any more."""
        with warnings.catch_warnings():
            # Sockets and loops of before.
            warnings.simplefilter("ignore")
            self.old = self.asleep.kernel = None
            gc.collect()
        for fd in self.asleep.released:
            try:
                if fd > 2 and os.readlink("/proc/self/fd/{}".format(fd)) == os.devnull:
                    os.close(fd)
            except OSError:
                # Its owner has closed it.
                continue


def restore_page(page):
    """Go on behind the number of the lost cell, in a new segment of the journal."""
    page.pid = os.getpid()
    _, segment, cell, line, _, _, *_ = layout.HEADER.unpack_from(page.memory, 0)
    page.cell = cell
    page.segment = segment ^ 1
    base = layout.PAGE_BYTES + page.segment * layout.SEGMENT_BYTES
    page.end = base + layout.SEGMENT_BYTES
    page.memory[base : page.end] = bytes(layout.SEGMENT_BYTES)
    page.memory.seek(base + 4)
    page.start, page.last = 0, None
    struct.pack_into("<I", page.memory, base, 4)
    page.fd_bytes[:] = [[0, 0], [0, 0]]
    page.counts[:] = 0, 0
    page.head(line | layout.FINISHED)


def reopen(holder, name, path):
    """Open a file of /proc again, which is that of another process since the fork."""
    number = getattr(holder, name)
    if number is not None:
        os.close(number)
        setattr(holder, name, os.open(path, os.O_RDONLY | os.O_CLOEXEC))
