"""The wording of native stacks."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator

from safe_exec.model.evidence import NativeFrame
from safe_exec.model.patterns import lazy_pattern
from safe_exec.model.verdict import CrashCell, Verdict
from safe_exec.reports.text import common

_MOST_CALLERS = 3
_MOST_LOCALS = 12
_VALUE_WIDTH = 60
_NAME_WIDTH = 80

# The functions by which a library ends its process say nothing about the fault that it found.
_ENDS = lazy_pattern(
    r"__pthread_kill_\w+|pthread_kill\w*|raise|gsignal|__GI_raise|abort|__GI_abort|__libc_message\w*"
    r"|malloc_printerr|__assert_fail\w*|__fortify_fail\w*|__stack_chk_fail\w*|__chk_fail"
    r"|__gnu_cxx::__verbose_terminate_handler.*|std::terminate.*|fatal_error\w*|_?Py_Fatal\w*"
)
_PACKAGE = lazy_pattern(r"/(?:site|dist)-packages/([^/]+)/")
# The platform in the name of an extension module: `_ctypes.cpython-311-x86_64-linux-gnu.so`.
_PLATFORM = lazy_pattern(r"\.(?:cpython-\S+|abi3)\.so$")


def summary(verdict: Verdict) -> str:
    """Return the function that faulted, with its library and callers, on one line.

    "" if unknown.
    """
    frames = _c_frames(verdict.crash_cell)
    if not frames:
        return ""
    callers = list(dict.fromkeys(f.function for f in frames[1:] if f.function is not None))
    callers = [name for name in callers if name != frames[0].function][:_MOST_CALLERS]
    called_by = f"called by {', '.join(map(_call, callers))}" if callers else ""
    return common.SEPARATOR.join(part for part in (c_function(frames[0]), called_by) if part)


def _c_frames(crash: CrashCell | None) -> list[NativeFrame]:
    """Return the C functions that the innermost Python code called, the most suspicious first."""
    if crash is None:
        return []
    frames: list[NativeFrame] = []
    for frame in crash.native:
        if frame.python is not None:
            break
        frames.append(frame)
    ends = [n for n, f in enumerate(frames) if f.function and _ENDS.fullmatch(f.function)]
    if not ends:
        return frames
    outside = frames[ends[-1] + 1 :]
    # Stripped libraries do not name their own functions that end the process. One without any name
    # is to blame all the same, and not its caller.
    first = next(
        (
            n
            for n, frame in enumerate(outside)
            if frame.function and frame.library == outside[0].library
        ),
        0,
    )
    return outside[first:] or frames


def c_function(frame: NativeFrame) -> str:
    """Describe a C function: ``free() in libc.so.6 2.36``, or its offset if it has no name."""
    function = _call(frame.function) if frame.function is not None else "a function without a name"
    if frame.library is None:
        return function
    offset = "" if frame.function is not None or frame.offset is None else f" (+{frame.offset:#x})"
    return f"{function} in {library(frame)}{offset}"


def library(frame: NativeFrame) -> str:
    """Return a short name of a frame's library with its version: ``numpy 2.4.6``."""
    path = frame.library or ""
    package = _PACKAGE.search(path)
    name = (
        package[1].removesuffix(".libs") if package else _PLATFORM.sub("", posixpath.basename(path))
    )
    return " ".join(common.single_line(part) for part in (name, frame.version) if part)


def _call(name: str) -> str:
    """Return a function's name as a call; a C++ name has its parameters already."""
    name = common.clip(common.single_line(name), _NAME_WIDTH)
    return name if name.endswith((")", "…")) else f"{name}()"


def stack_lines(verdict: Verdict) -> list[str]:
    """Return one line for each frame of the native stack, innermost first."""
    crash = verdict.crash_cell
    return [frame_line(frame, verdict) for frame in crash.native] if crash is not None else []


def frame_line(frame: NativeFrame, verdict: Verdict) -> str:
    """Return one frame: of C, or of Python with its local variables."""
    if frame.python is None:
        return c_function(frame)
    variables = ", ".join(_variables(frame))
    return common.frame_line(frame.python, verdict) + (f" · {variables}" if variables else "")


def _variables(frame: NativeFrame) -> Iterator[str]:
    for name, value in list(frame.locals.items())[:_MOST_LOCALS]:
        yield f"{common.single_line(name)} = {common.clip(common.single_line(value), _VALUE_WIDTH)}"


def locals_lines(verdict: Verdict, most: int) -> list[str]:
    """Return the local variables of the innermost Python frames, one line for each frame."""
    crash = verdict.crash_cell
    frames = [f for f in crash.native if f.python and f.locals] if crash is not None else []
    return [f"{_call(f.function or '')}: {', '.join(_variables(f))}" for f in frames[:most]]


def gap(verdict: Verdict) -> str:
    """Return why the native stack is missing or incomplete; "" if it is complete."""
    crash = verdict.crash_cell
    if crash is None or crash.native_error is None:
        return ""
    extent = "only the innermost frame is known" if crash.native else "not known"
    return f"{extent}: {common.single_line(crash.native_error)}"
