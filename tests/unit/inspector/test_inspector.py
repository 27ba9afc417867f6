"""The inspector's view of pystack's records."""

from __future__ import annotations

import os
import threading
from types import SimpleNamespace
from typing import Any

from safe_exec.inspector.inspector import from_fault, inner_task, return_address


def frames(*pairs: tuple[str, int]) -> list[Any]:
    return [SimpleNamespace(symbol=symbol, address=address) for symbol, address in pairs]


STACK = (("main", 1), ("free", 2), ("fault", 3), ("fault (inlined)", 3))


def test_the_handler_is_left_out() -> None:
    handler = (("__restore_rt", 4), ("write", 5))
    stack = frames(*STACK, *handler)
    names = [frame.symbol for frame in from_fault(stack, 3)]
    assert names == ["fault (inlined)", "fault", "free", "main"]
    # Without the address of the fault the trampoline marks its end.
    assert [frame.symbol for frame in from_fault(stack, 99)] == names
    assert list(from_fault(frames(*STACK), 99)) == []


def test_outside_a_namespace_a_thread_has_one_number() -> None:
    task = threading.get_native_id()
    assert inner_task(os.getpid(), task) == task


def test_no_word_at_a_bad_stack_pointer() -> None:
    assert return_address(os.getpid(), 0) == 0
    assert return_address(os.getpid(), 2**64 - 1) == 0
