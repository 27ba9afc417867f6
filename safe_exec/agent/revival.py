"""Makes a kernel again of a forked copy of one, which has only its main thread.

The copy keeps everything that cells have made: variables, modules, output streams. New are the
sockets, the threads that serve them, the event loop, and the agent's channels to the runner.
"""

import _thread
import asyncio
import atexit
import ctypes
import faulthandler
import fcntl
import os
import resource
import signal
import socket
import threading

from .faults import register_dumps
from .forks import tell
from .sampler import sample_forever

PR_SET_PDEATHSIG = 1
PR_SET_PTRACER = 0x59616D61
# The agent's descriptors are among the last of those that the process may have.
HIGHEST, ROOM = 65536, 40


def revive(inside, kernel, streams, message, channel):
    """Run as the kernel until the runner asks it to end; return an exit status.

    ``message`` names the address of the sockets and the descriptors that the runner has sent.
    """
    bind_to_keeper(message["keeper"], message["tracer"])
    for number in (1, 2):
        os.dup2(message["stderr"], number)
    os.close(message["stderr"])
    renew_agent(inside, message["page"], message["facts"], message["fault"])
    asyncio.set_event_loop(asyncio.new_event_loop())
    renew_kernel(kernel, streams, message["address"])
    inside.say_hello()
    _thread.start_new_thread(sample_forever, (inside,))
    tell(channel, woken=True)
    channel.close()
    kernel.io_loop.start()
    # As Python ends a process, except that what lies below us on the stack is not left.
    threading._shutdown()
    atexit._run_exitfuncs()
    return 0


def bind_to_keeper(keeper, tracer):
    """Die with the keeper, and let the runner read the native stack of a crash.

    A fork inherits neither (prctl(2)).
    """
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
    # It may have ended before the call.
    if os.getppid() != keeper:
        os._exit(1)
    if tracer:
        prctl(PR_SET_PTRACER, ctypes.c_ulong(tracer))


def move_up(fd):
    """Return a duplicate of a descriptor with a number that programs hardly ever close."""
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, max(3, min(most, HIGHEST) - ROOM))
    finally:
        os.close(fd)


def renew_agent(inside, page_fd, facts_fd, fault_fd):
    """Connect the agent to the runner again, as in the kernel that was copied."""
    inside.facts.close()
    os.close(inside.fault_fd)
    inside.fault_fd = move_up(fault_fd)
    inside.page.move_to(page_fd)
    os.close(page_fd)
    inside.facts = socket.socket(fileno=move_up(facts_fd))
    inside.facts.setblocking(False)
    inside.child = inside.in_cell = False
    inside.request = None
    inside.running.clear()
    inside.main = _thread.get_ident()
    inside.hosts.clear()
    inside.census.reopen()
    if inside.is_not_forked is not None:
        inside.is_not_forked[0] = 1
    faulthandler.enable()
    register_dumps(inside)


def renew_kernel(kernel, streams, address):
    """Give the kernel new sockets at ``address``, and the threads that serve them."""
    from zmq.eventloop.zmqstream import ZMQStream

    app, session = kernel.parent, kernel.session
    # It sends nothing from a fork.
    session.pid = os.getpid()
    app.context, app.ip = None, address
    atexit.unregister(app.close)
    app.init_sockets()
    app.init_heartbeat()
    for stream in streams:
        # In place: loggers and the notebook's own objects hold these very streams.
        echo = stream.echo
        stream.__init__(session, app.iopub_thread, stream.name)
        stream.echo = echo
    shell_thread = getattr(app, "shell_channel_thread", None)
    control_loop = app.control_thread.io_loop
    if shell_thread is None:
        kernel.shell_stream = ZMQStream(app.shell_socket)
    else:
        kernel.shell_stream = ZMQStream(app.shell_socket, shell_thread.io_loop)
        shell_thread.shell_stream = kernel.shell_stream
        kernel.shell_channel_thread = shell_thread
    kernel.control_stream = ZMQStream(app.control_socket, control_loop)
    kernel.debugpy_stream = ZMQStream(app.debugpy_socket, control_loop)
    app.control_thread.start()
    if shell_thread is not None:
        shell_thread.start()
    for name in ("debug_shell_socket", "control_thread", "iopub_thread", "iopub_socket"):
        setattr(kernel, name, getattr(app, name))
    kernel.stdin_socket = app.stdin_socket
    for publisher in (app.displayhook, kernel.shell.displayhook, kernel.shell.display_pub):
        publisher.pub_socket = app.iopub_socket
    history = getattr(kernel.shell, "history_manager", None)
    if history is not None:
        # The thread that saves it has stayed behind, and its database with it.
        history.enabled = False
    # The request that was running when the kernel was copied is not answered here.
    kernel._main_asyncio_lock = asyncio.Lock()
    kernel._aborting = False
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    kernel.start()
    app.io_loop = kernel.io_loop
