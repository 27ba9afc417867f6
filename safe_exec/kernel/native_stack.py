"""Reads the native stack of a dying kernel, by a process of its own (``inspector``).

pystack is an extra: without it a crash has no native stack.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from safe_exec.keeper.protocol import Dying
from safe_exec.kernel.cell_code import CellCode
from safe_exec.model.evidence import FaultReport, Frame, NativeFrame
from safe_exec.model.patterns import lazy_pattern
from safe_exec.reports.masking import MASK, is_secret_name

# The time for everything: starting the process, reading the stack.
BUDGET_SECONDS = 2.0
TOO_SLOW = f"reading it took more than {BUDGET_SECONDS:g} s"
OWN_END = "the interpreter ended the process itself, and its fault handler was off by then"
NOT_READ = "it is read in runs only, not in interactive kernels and trials of a search"
NOT_HELD = "the process had ended before its stack could be read"
MISSING = "pystack is not installed (pip install 'safe-exec[native]')"
BOOT = (
    "import sys; sys.path.append(sys.argv[1]); from safe_exec.inspector.inspector import main; "
    "main()"
)
# Debug information must not be fetched from a server (DEBUGINFOD_URLS), so the environment is bare.
ENVIRONMENT = ("PATH", "LANG", "LC_ALL")
LONGEST_ERROR = 300
# The inspector prints the innermost frame, then all frames.
LINES = 2
LONGEST_LINE = 4 << 20
# The interpreter and its own extension modules have the interpreter's version.
_FATAL_FUNCTION = lazy_pattern(r"([A-Za-z_]\w*): ")
_PYTHON = lazy_pattern(r"/lib-dynload/[^/]+$|/(?:lib)?python3[^/]*$")


class NativeReading(Struct, frozen=True, kw_only=True):
    """The inspector's output: frames as plain values, and the error if some are missing."""

    frames: tuple[dict[str, Any], ...] = ()
    error: str | None = None


async def read(pid: int, dying: Dying, *, with_locals: bool) -> NativeReading:
    """Read the native stack of the faulting thread in a held process, in at most BUDGET_SECONDS."""
    root = str(Path(__file__).parents[2])
    arguments = map(str, (pid, *dying, int(with_locals)))
    started = time.monotonic()
    try:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-c", BOOT, root, *arguments),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
            # Ctrl-C is meant for the runner.
            start_new_session=True,
            limit=LONGEST_LINE,
        )
    except OSError as error:
        return NativeReading(error=f"the process that reads it could not be started: {error}")
    assert process.stdout is not None
    lines: list[bytes] = []
    is_late = False
    try:
        async with asyncio.timeout(BUDGET_SECONDS - (time.monotonic() - started)):
            while line := await process.stdout.readline():
                lines.append(line)
            await process.wait()
    except TimeoutError:
        is_late = True
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    await process.wait()
    return parse(lines, TOO_SLOW if is_late else f"its reader ended with {process.returncode}")


def parse(lines: list[bytes], failure: str) -> NativeReading:
    """Parse the inspector's two lines; ``failure`` is the reason if there are fewer."""
    frames: tuple[dict[str, Any], ...] = ()
    documents = [json.loads(line) for line in lines if line.endswith(b"\n")]
    for document in documents:
        # An error leaves the innermost frame known.
        frames = tuple(document.get("frames") or frames)
        if error := document.get("error"):
            failure = " ".join(str(error).split())[:LONGEST_ERROR]
    has_all = len(documents) == LINES and "frames" in documents[-1]
    return NativeReading(frames=frames, error=None if has_all else failure)


def with_innermost(fault: FaultReport, *, was_to_be_read: bool = True) -> FaultReport:
    """Add the innermost C function or its library if the native stack is missing or incomplete."""
    if fault.native:
        return fault
    # Python turns its fault handler off before it aborts (Py_FatalError), so nothing holds the
    # process. Its message begins with the function that called for the end.
    if match := _FATAL_FUNCTION.match(fault.title):
        return replace(fault, native=(NativeFrame(function=match[1]),), native_error=OWN_END)
    library = fault.site.library if fault.site is not None else None
    return replace(
        fault,
        # Read from the saved registers. Its offset counts in the file, not in memory.
        native=() if library is None else (NativeFrame(function=None, library=library),),
        native_error=fault.native_error or (NOT_HELD if was_to_be_read else NOT_READ),
    )


def native_frames(
    reading: NativeReading, cells: CellCode, python: str | None
) -> tuple[NativeFrame, ...]:
    """Return the frames of a reading, innermost first, up to the outermost code of a cell.

    ``cells`` maps Python frames to cells, ``python`` is the version of the kernel's Python.
    """
    frames = [_native_frame(frame, cells, python) for frame in reading.frames]
    outermost = max(
        (n for n, f in enumerate(frames) if f.python is not None and f.python.cell is not None),
        default=len(frames) - 1,
    )
    return tuple(frames[: outermost + 1])


def _native_frame(frame: dict[str, Any], cells: CellCode, python: str | None) -> NativeFrame:
    if "file" in frame:
        cell, line = cells.locate(frame["function"], frame["line"], frame["file"])
        code = Frame(function=frame["function"], line=line, file=frame["file"], cell=cell)
        variables = {
            name: MASK if is_secret_name(name) else value for name, value in frame["locals"].items()
        }
        return NativeFrame(function=frame["function"], python=code, locals=variables)
    library = frame.get("library")
    own = python if library is not None and _PYTHON.search(library) else None
    return NativeFrame(
        function=frame["function"],
        library=library,
        version=frame.get("version") or own,
        offset=frame.get("offset"),
    )
