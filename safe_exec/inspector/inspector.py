"""Reads the native stack of one thread with pystack, and prints it as JSON.

The keeper holds the dying kernel meanwhile (keeper/crash_output.py). pystack reads the memory of
another process and unwinds its C stack. A corrupted heap may lead it anywhere, so it gets a process
of its own, which the runner kills when its time is up.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from safe_exec.inspector.libraries import Libraries
from safe_exec.inspector.merge import EVAL, IGNORED, PLAIN, CodeFrame, Entry, merge

# The number of innermost frames that are read; a stack overflow has tens of thousands.
MOST_FRAMES = 100
# The number of innermost frames whose function names are checked: they matter most.
MOST_CALLERS = 12
MOST_LOCALS = 50
# The runner masks secrets before it cuts values further: half a secret would not be recognised.
LONGEST_VALUE = 4096
ADDRESS_SPACE_BYTES = 2 << 30
# The system's trampoline that returns from a signal handler, below the interrupted function.
TRAMPOLINES = ("__restore_rt", "__kernel_rt_sigreturn")
UNKNOWN = "???"


def main() -> None:
    """Print the innermost frame, then all frames, as one line of JSON each.

    A line is ``{"frames": [...]}``, innermost first, or ``{"error": text}``. The arguments are the
    process id, the thread id, the address at which the thread was stopped, its stack pointer, and 1
    if local variables are wanted.
    """
    pid, task, instruction, stack_pointer, with_locals = map(int, sys.argv[-5:])
    # Debug information of any size is read on behalf of the kernel.
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES))
    result: dict[str, Any]
    try:
        libraries = Libraries(pid)
        # First what is known without unwinding: of a stack overflow it may be all.
        address = instruction
        if not libraries.locate(instruction):
            # Code that called a bad address has just pushed the address to return to.
            address = return_address(pid, stack_pointer) - 1
        place = libraries.locate(address)
        innermost = [{"function": libraries.function_at(address), **place}] if place else []
        write_line({"frames": innermost})
        thread = read_thread(pid, task, with_locals=bool(with_locals))
        frames = frames_of(thread, instruction, libraries)
        # Nothing can be unwound from a bad address.
        has_native = bool(frames) and "file" not in frames[0]
        result = {"frames": frames if has_native else [*innermost, *frames]}
    except Exception as error:  # noqa: BLE001 - pystack raises RuntimeError and many others
        result = {"error": str(error) or type(error).__name__}
    write_line(result)


def write_line(result: dict[str, Any]) -> None:
    """Write a result at once: this process may be killed at any moment."""
    sys.stdout.write(json.dumps(result) + "\n")
    sys.stdout.flush()


def return_address(pid: int, stack_pointer: int) -> int:
    """Return the word at a stack pointer; 0 if it cannot be read."""
    with (
        contextlib.suppress(OSError, OverflowError),
        open(f"/proc/{pid}/mem", "rb", buffering=0) as file,
    ):
        return int.from_bytes(os.pread(file.fileno(), 8, stack_pointer), sys.byteorder)
    return 0


class ThreadStacks(NamedTuple):
    """The stacks of one thread as pystack gives them.

    ``native`` is outermost first, ``python`` innermost first.
    """

    native: Sequence[Any]
    python: Sequence[Any]
    version: tuple[int, int] | None


def read_thread(pid: int, task: int, *, with_locals: bool) -> ThreadStacks:
    """Return the stacks of a thread. Raises LookupError, and pystack's errors."""
    from pystack.engine import NativeReportingMode, StackMethod, get_process_threads

    # Inside a pid namespace the interpreter knows its threads by other numbers. pystack would look
    # for these outside when it unwinds (1.7), and fail. So it gets no method to find the
    # interpreter by, and unwinds the threads that the system lists.
    inner = inner_task(pid, task)
    native_method = StackMethod.AUTO
    if inner != task:
        native_method = object.__new__(StackMethod)
        native_method._value_ = 0
    # Threads that native code started are unknown to the interpreter. Unwinding all threads takes
    # longer.
    modes = (NativeReportingMode.PYTHON, NativeReportingMode.ALL)
    for mode in modes if inner == task else modes[1:]:
        threads = get_process_threads(
            pid, native_mode=mode, locals=with_locals, method=native_method
        )
        thread = next((thread for thread in threads if thread.tid == task), None)
        if thread is None or not thread.native_frames:
            continue
        if inner != task:
            native_frames = thread.native_frames
            threads = get_process_threads(pid, locals=with_locals)
            thread = next((thread for thread in threads if thread.tid == inner), thread)
            thread.native_frames = native_frames
        return ThreadStacks(
            native=thread.native_frames,
            python=list(thread.frames)[::-1],
            version=thread.python_version,
        )
    raise LookupError("the stack of the thread that faulted could not be unwound")


def inner_task(pid: int, task: int) -> int:
    """Return a thread's id inside its own pid namespace."""
    with open(f"/proc/{pid}/task/{task}/status") as file:
        numbers = next((line.split()[1:] for line in file if line.startswith("NSpid:")), [])
    return int(numbers[-1]) if numbers else task


def frames_of(thread: ThreadStacks, instruction: int, libraries: Libraries) -> list[dict[str, Any]]:
    """Return a thread's frames, the one that faulted first, then its callers."""
    from pystack.types import NativeFrame, frame_type

    kinds = {NativeFrame.FrameType.EVAL: EVAL, NativeFrame.FrameType.IGNORE: IGNORED}
    entries = [
        Entry(
            kind=kinds.get(frame_type(frame, thread.version), PLAIN),
            frame={
                "function": None if frame.symbol == UNKNOWN else frame.symbol,
                "address": frame.address,
            },
        )
        for frame in from_fault(thread.native, instruction)
    ]
    python = [
        CodeFrame(is_entry=bool(frame.is_entry), frame=described(frame)) for frame in thread.python
    ]
    merged = merge(entries, python)[:MOST_FRAMES]
    frames = [_with_library(frame, libraries) for frame in merged]
    # The innermost frame was interrupted; all others are in a call.
    for frame, raw in list(zip(frames, merged, strict=True))[1:MOST_CALLERS]:
        if "address" not in raw:
            break
        with contextlib.suppress(OSError):
            frame["function"] = libraries.caller_at(raw["address"]) or frame["function"]
    return frames


def _with_library(frame: dict[str, Any], libraries: Libraries) -> dict[str, Any]:
    if "address" not in frame:
        return frame
    place = libraries.locate(frame["address"])
    # Generated code has no library; an unwinder may give it the name of some absolute symbol.
    return {"function": frame["function"] if place else None, **place}


def from_fault(frames: Sequence[Any], instruction: int) -> Iterator[Any]:
    """Yield native frames, innermost first, without those of the signal handler.

    pystack lists the outermost frame first. Nothing is yielded if the interrupted frame is not
    found.
    """
    at = max((i for i, f in enumerate(frames) if f.address == instruction), default=None)
    if at is None:
        at = max((i - 1 for i, f in enumerate(frames) if f.symbol in TRAMPOLINES), default=-1)
    yield from reversed(frames[: at + 1])


def described(frame: Any) -> dict[str, Any]:
    """Return a Python frame of pystack as plain values."""
    variables = {**frame.arguments, **frame.locals}
    return {
        "function": frame.code.scope,
        "file": frame.code.filename,
        "line": frame.code.location.lineno,
        "locals": {
            name: value[:LONGEST_VALUE] for name, value in sorted(variables.items())[:MOST_LOCALS]
        },
    }


if __name__ == "__main__":
    main()
