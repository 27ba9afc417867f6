"""From the registers at a fatal signal to the place of the fault: did the thread leave its stack? Pure; imports model only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safe_exec.model.evidence import FaultSite

BELOW_POINTER = 256
"""A call writes 8 bytes below the stack pointer; code may use 128 there without moving it (x86-64 ABI, red zone)."""
PAGE = 4096
NEAR_BYTES = 64 * 1024


def read_site(seen: Mapping[str, Any], ident: int | None) -> FaultSite | None:
    """The place of the fault as the keeper saw it (keeper/signal_frame.py); ``None`` where it could not look.

    ``ident`` is the faulting thread's identifier by the fault report. For a thread that glibc made it is
    the address of its descriptor, which lies at the upper end of its own stack.
    """
    if not seen:
        return None
    stack = seen["stack"]
    return FaultSite(
        faulted=bool(seen["faulted"]),
        main=bool(seen["main"]),
        address=seen["address"],
        stack_pointer=seen["stack_pointer"],
        stack_bytes=None if stack is None else stack[1] - stack[0],
        overflow=_overflowed(seen, ident),
        library=seen["library"],
        library_offset=seen["library_offset"],
    )


def _overflowed(seen: Mapping[str, Any], ident: int | None) -> bool:
    """Whether the access that failed was one to the thread's stack, past its end.

    A stack grows downwards. The failing access is near the stack pointer or, for a large frame, between
    the pointer and the end of the stack. An overflow of a few frames may also stop in a guard that is
    part of the stack's own mapping (glibc 2.42 on Linux 6.13, MADV_GUARD_INSTALL).
    """
    address, pointer, stack = seen["address"], seen["stack_pointer"], seen["stack"]
    if address is None or stack is None or address < pointer - BELOW_POINTER:
        return False
    low, high = stack
    own = seen["stack_is_main"] if seen["main"] else ident is not None and low <= ident < high
    guarded = seen["address_access"] is not None and seen["address_access"].startswith("---")
    if address < low and pointer < low + PAGE:
        return bool(own or guarded)
    in_guard = low <= address < high and "rw" in (seen["address_access"] or "")
    return bool(in_guard and not seen["main"] and abs(address - pointer) <= NEAR_BYTES)
