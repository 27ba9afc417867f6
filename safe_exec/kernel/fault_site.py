"""Derives the location of a fault from registers, and whether the stack overflowed. Pure."""

from __future__ import annotations

from safe_exec.keeper.protocol import FaultingThread
from safe_exec.model.evidence import FaultSite

# A call writes 8 bytes below the stack pointer, and code may use the 128 bytes below it without
# moving it (red zone of the x86-64 ABI).
BELOW_POINTER = 256
PAGE = 4096
NEAR_BYTES = 64 * 1024


def read_site(
    thread: FaultingThread | None, ident: int | None, *, arithmetic: bool = False
) -> FaultSite | None:
    """Return the location of a fault, ``None`` if the keeper could not read the thread.

    ``ident`` is the faulting thread's identifier in the fault report. ``arithmetic`` is true for
    SIGFPE.
    """
    if thread is None:
        return None
    stack = thread.stack
    return FaultSite(
        faulted=thread.faulted or (arithmetic and thread.divides),
        main=thread.main,
        address=thread.address,
        stack_pointer=thread.stack_pointer,
        stack_bytes=None if stack is None else stack[1] - stack[0],
        overflow=_overflowed(thread, ident),
        library=thread.library,
        library_offset=thread.library_offset,
    )


def _overflowed(thread: FaultingThread, ident: int | None) -> bool:
    """Whether the failing access was just past the end of the thread's own stack."""
    # A stack grows downwards. The failing access is near the stack pointer or, for a large frame,
    # between the pointer and the end of the stack. An overflow of a few frames may also stop in a
    # guard that is part of the stack's own mapping (glibc 2.42 on Linux 6.13, MADV_GUARD_INSTALL).
    address, pointer, stack = thread.address, thread.stack_pointer, thread.stack
    if address is None or stack is None or address < pointer - BELOW_POINTER:
        return False
    low, high = stack
    # Stacks of two threads can be adjacent, so make sure that it is the thread's own. The
    # identifier of a glibc thread is the address of its descriptor, at the upper end of its own
    # stack.
    own = thread.stack_is_main if thread.main else ident is not None and low <= ident < high
    guarded = thread.address_access is not None and thread.address_access.startswith("---")
    if address < low and pointer < low + PAGE:
        return bool(own or guarded)
    in_guard = low <= address < high and "rw" in (thread.address_access or "")
    return bool(in_guard and not thread.main and abs(address - pointer) <= NEAR_BYTES)
