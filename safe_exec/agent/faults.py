"""Records where a kernel dies: the stack at a fatal signal, the line before risky calls."""

import _thread
import contextlib
import ctypes
import faulthandler
import os
import signal
import sys

from .attributes import note_file
from .layout import DUMP_ALL_SIGNAL, DUMP_SIGNAL
from .own_actions import EVENTS

# Calls that may end the process, which then writes nothing more.
LAST_CALLS = frozenset(("os.kill", "os.killpg", "signal.pthread_kill", "os.exec"))
LOCAL = ("127.", "::1", "localhost", "0.0.0.0", "::ffff:127.", "::")


def arm(inside):
    """Make faulthandler write stacks to our own descriptor.

    It writes them at fatal signals and at the dump signals.
    """
    enable = faulthandler.enable
    enable(file=inside.fault_fd, all_threads=True)
    register_dumps(inside)

    def enable_here(*_args, **_kwargs):
        enable(file=inside.fault_fd, all_threads=True)

    # A notebook that enables faulthandler itself would send the stack into the pipe that dies with
    # the process.
    inside.keep_enabled = enable_here
    faulthandler.enable = enable_here
    os.register_at_fork(after_in_child=inside.forked)


def register_dumps(inside):
    """Have faulthandler write stacks to our own descriptor when a dump signal arrives."""
    # A thread that runs on, because the main thread has released the interpreter lock, changes the
    # frames that a dump of all threads reads: of 280 kernels near their memory limit, three ended
    # with SIGSEGV in it.
    faulthandler.register(DUMP_SIGNAL, file=inside.fault_fd, all_threads=False, chain=False)
    faulthandler.register(DUMP_ALL_SIGNAL, file=inside.fault_fd, all_threads=True, chain=False)


def watch_handler(inside):
    """Report that another handler has replaced faulthandler's handler for SIGSEGV.

    Then no stack is written at a crash. A notebook may disable faulthandler, and libraries (JVM, R)
    install handlers of their own.
    """
    sigaction, current = (
        ctypes.PyDLL(None).sigaction,
        (ctypes.c_void_p * 32)(),
    )  # the handler comes first; sigaction(2)
    sigaction(int(signal.SIGSEGV), None, current)
    armed, is_armed = current[0], True

    def check():
        nonlocal is_armed
        sigaction(int(signal.SIGSEGV), None, current)
        if (current[0] == armed) is not is_armed:
            is_armed = not is_armed
            inside.fact(armed=is_armed)

    inside.check_handler = check


def watch(inside):
    """Record the line before calls that may not return, and report connections."""
    real_exit, real_closerange, real_raise = os._exit, os.closerange, signal.raise_signal
    noted = {
        "os.kill",
        "os.killpg",
        "signal.pthread_kill",
        "os.system",
        "subprocess.Popen",
        "os.fork",
        "os.forkpty",
    }
    noted |= {"os.posix_spawn", "os.spawn", "os.exec"}
    files = {"open", "os.mkdir", "sqlite3.connect", "socket.getaddrinfo"}

    def _exit(status):
        if not inside.child and os.getpid() == inside.page.pid:
            rows = inside.frames(sys._getframe(1))
            inside.here(sys._current_frames().get(inside.main))
            inside.fact(exit_caller=rows, status=status if isinstance(status, int) else None)
            inside.coverage.save()
        real_exit(status)

    def closerange(fd_low, fd_high, /):
        # The call closes libzmq's descriptors too: one of its threads aborts the process now, or
        # the main thread a little later.
        if not inside.child and inside.in_cell and _thread.get_ident() == inside.main:
            inside.here(sys._getframe(1))
        real_closerange(fd_low, fd_high)

    def raise_signal(signalnum, /):
        if not inside.child and inside.in_cell and _thread.get_ident() == inside.main:
            inside.here(sys._getframe(1))
        inside.actions.note_raise(signalnum, sys._getframe(1))
        if not inside.child:
            inside.coverage.save()
        real_raise(signalnum)

    pairs = (
        (os, real_exit, _exit),
        (os, real_closerange, closerange),
        (signal, real_raise, raise_signal),
    )
    for module, real, ours in pairs:
        # To be found by pickle under its old name, it has to stand where the name says.
        ours.__doc__, ours.__module__, ours.__qualname__ = (
            real.__doc__,
            real.__module__,
            real.__qualname__,
        )
        setattr(module, real.__name__, ours)
        setattr(sys.modules[real.__module__], real.__name__, ours)

    bodies, actions = inside.bodies, inside.actions

    def hook(event, args):
        if event in ("exec", "compile"):
            if (
                bodies.active
                and inside.in_cell
                and not inside.child
                and _thread.get_ident() == inside.main
            ):
                note = bodies.note_exec if event == "exec" else bodies.note_compile
                # Code that we compile here is not the notebook's.
                bodies.active = False
                with contextlib.suppress(
                    Exception
                ):  # where memory or the stack run out, the notebook meets its own error
                    note(*args)
                    bodies.active = True
        elif event in noted or event in EVENTS:
            frame = sys._getframe(1)
            if (
                event in noted
                and not inside.child
                and inside.in_cell
                and _thread.get_ident() == inside.main
            ):
                inside.here(frame)
            if event in LAST_CALLS and not inside.child and args[-1] != 0:
                inside.coverage.save()
            if event in EVENTS:
                with contextlib.suppress(
                    Exception
                ):  # strange arguments are the notebook's to fail with
                    actions.note(event, args, frame)
        elif event in files:
            note_file(inside, event, args)
        elif event == "socket.connect":
            note_file(inside, event, args)
            if not inside.child:
                connected(inside, args[1])

    sys.addaudithook(hook)


def connected(inside, address):
    """Report a connection to another host."""
    host = address[0] if isinstance(address, tuple) else None
    if (
        isinstance(host, str)
        and not host.startswith(LOCAL)
        and host not in inside.hosts
        and len(inside.hosts) < 50
    ):
        inside.hosts.add(host)
        inside.fact(remote=host[:200])
