"""Gives threads an alternate signal stack, so that an overflow of their stack is still reported.

faulthandler creates its own stack with sigaltstack(2), but only for the thread that enables it. In
any other thread it runs on the thread's stack. If that is full, the system cannot call the handler
and kills the process without a report. So each thread of ``threading``, which executors and pools
use too, gets an alternate stack when it starts. The memory stays untouched until a handler runs.
The cost is therefore address space but no memory, and two system calls at the start and two at the
end of a thread.
"""

import ctypes
import functools
import mmap
import threading

# The registers alone can take 11 KiB (AMX); faulthandler in Python 3.14 walks the C stack as well.
STACK_BYTES = 64 * 1024
# No alternate stack is set (sigaltstack(2)).
SS_DISABLE = 2
MAP_FAILED = ctypes.c_void_p(-1).value


class StackT(ctypes.Structure):
    """stack_t of sigaltstack(2)."""

    _fields_ = (("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


class SignalStacks:
    """Alternate stacks: created on demand, reused, and never unmapped.

    A daemon thread may still use its stack while the interpreter is being finalized.
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
        """Give the calling thread an alternate signal stack unless it has one.

        It has one if a library set it, or if another greenlet of the same thread was here before.
        """
        address = self.spare.pop() if self.spare else self.make()
        if address is None:
            return
        previous = StackT()
        self.change(StackT(address, 0, STACK_BYTES), previous)
        if not previous.flags & SS_DISABLE:
            self.change(previous, None)
            self.spare.append(address)

    def take(self):
        """Take the ending thread's stack back for reuse.

        A stack that a library has set stays in place.
        """
        previous = StackT()
        self.change(self.nothing, previous)
        if previous.address in self.addresses:
            self.spare.append(previous.address)
        elif not previous.flags & SS_DISABLE:
            self.change(previous, None)

    def make(self):
        """Allocate a stack.

        Returns ``None`` if memory is short, so that the thread can still start.
        """
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
    """Give each new thread of ``threading`` an alternate signal stack."""
    # The two patched methods are the first and the last that a thread calls itself. A wrapper
    # around the function that the thread runs would be visible in its stack.
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
