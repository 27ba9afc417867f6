"""Room for the fault handler in threads, so that one that has overflowed its stack still gets reported.

faulthandler gives itself a stack of its own with sigaltstack(2), but only in the thread that enables it.
In any other thread it runs on the thread's stack; when that is full the system cannot call the handler,
and kills the process without a report. So each thread of ``threading`` (executors and pools are made of
them) gets an alternate stack when it starts. Nothing is written there before a handler runs, so it costs
address space but no memory, and two system calls at the start and two at the end of a thread.
"""

import ctypes
import functools
import mmap
import threading

# The registers alone can take 11 KiB (AMX); faulthandler in Python 3.14 walks the C stack as well.
STACK_BYTES = 64 * 1024
SS_DISABLE = 2
MAP_FAILED = ctypes.c_void_p(-1).value


class StackT(ctypes.Structure):
    """stack_t of sigaltstack(2)."""

    _fields_ = (("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


class SignalStacks:
    """Alternate stacks: made when there is none to spare, used again, and never unmapped.

    A daemon thread may still have its stack in use when the interpreter takes its modules apart.
    """

    def __init__(self):
        # PyDLL keeps the interpreter lock: with CDLL a thread that starts would have to wait for it
        # again and again.
        libc = ctypes.PyDLL(None)
        self.map, self.change = libc.mmap, libc.sigaltstack
        self.map.restype = ctypes.c_void_p
        self.map.argtypes = (
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_long,
        )
        self.change.argtypes = (ctypes.POINTER(StackT), ctypes.POINTER(StackT))
        self.nothing = StackT(None, SS_DISABLE, 0)
        self.spare = []
        self.addresses = set()

    def give(self):
        """Give the calling thread one; one that it has stays: greenlets share a thread, and libraries bring their own."""
        address = self.spare.pop() if self.spare else self.make()
        if address is None:
            return
        previous = StackT()
        self.change(StackT(address, 0, STACK_BYTES), previous)
        if not previous.flags & SS_DISABLE:
            self.change(previous, None)
            self.spare.append(address)

    def take(self):
        """Take it back at the end of the thread; one that is not ours stays."""
        previous = StackT()
        self.change(self.nothing, previous)
        if previous.address in self.addresses:
            self.spare.append(previous.address)
        elif not previous.flags & SS_DISABLE:
            self.change(previous, None)

    def make(self):
        """Memory for one more; ``None`` where there is none, which is no reason for a thread not to start."""
        address = self.map(
            None,
            STACK_BYTES,
            mmap.PROT_READ | mmap.PROT_WRITE,
            mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS,
            -1,
            0,
        )
        if address == MAP_FAILED:
            return None
        self.addresses.add(address)
        return address


def patch_threads(inside):
    """Give each new thread of ``threading`` an alternate signal stack.

    The two methods are the first and the last that a thread calls itself; a wrapper around the function
    that it runs would be seen in its stack.
    """
    Thread, stacks = threading.Thread, SignalStacks()
    begin, end = Thread._set_native_id, Thread._delete
    # A thread that native code started comes along too, but never ends as one of these does.
    foreign = (threading._MainThread, threading._DummyThread)

    @functools.wraps(begin)
    def set_native_id(thread):
        begin(thread)
        if not isinstance(thread, foreign):
            stacks.give()

    @functools.wraps(end)
    def delete(thread):
        if not isinstance(thread, foreign):
            stacks.take()
        end(thread)

    Thread._set_native_id, Thread._delete = set_native_id, delete
    inside.instrumented.append("threads")
