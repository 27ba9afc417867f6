"""Parses faulthandler's output into threads and frames. Pure; imports model and fault_site.

Format: Python's documentation of faulthandler, and what 3.9 to 3.14 print (3.14 adds a name to the
thread line).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from msgspec import Struct

from safe_exec.keeper.protocol import FaultingThread
from safe_exec.kernel.fault_site import read_site
from safe_exec.model.evidence import FaultReport, Frame
from safe_exec.model.patterns import lazy_pattern

if TYPE_CHECKING:
    from safe_exec.kernel.cell_code import CellCode

_THREAD = lazy_pattern(
    r"^(Current thread|Thread) 0x([0-9a-fA-F]+)(?: \[.*\])? \(most recent call first\):"
)
# The heading of the main thread's stack alone, which it writes on request.
_OWN_STACK = "Stack (most recent call first):"
_FRAME = lazy_pattern(r'^  File "(.*)", line (\d+|\?\?\?) in (.*)$')
_TITLE = lazy_pattern(r"^Fatal Python error: (.*)$", re.MULTILINE)
# Our own wrappers around ipykernel's functions. Their frames appear between a cell and a cell that
# it runs.
_OURS = lazy_pattern(r"/safe_exec/agent/\w+\.py$")
# faulthandler cuts off file names at this length.
LONGEST = 500


class Thread(Struct, frozen=True, kw_only=True):
    """One thread of a dump, with its frames, the innermost first.

    ``current`` is true for the thread that faulted or wrote the dump. ``ident`` is ``None`` for the
    main thread's dump of its own stack.
    """

    ident: int | None
    current: bool
    frames: tuple[Frame, ...]


def parse_threads(text: str, cells: CellCode) -> tuple[Thread, ...]:
    """Parse all threads of the dumps in ``text``; ``cells`` maps frames to cells."""
    threads: list[tuple[int | None, bool, list[Frame]]] = []
    # The last line may be cut off within a name. Use complete lines only.
    for line in text[: text.rfind("\n") + 1].split("\n"):
        if match := _THREAD.match(line):
            threads.append((int(match[2], 16), match[1] == "Current thread", []))
        elif line == _OWN_STACK:
            threads.append((None, True, []))
        elif (match := _FRAME.match(line)) and threads:
            number = None if match[2] == "???" else int(match[2])
            cell, line_in_cell = cells.locate(match[3], number, match[1])
            threads[-1][2].append(
                Frame(function=match[3], line=line_in_cell, file=match[1], cell=cell)
            )
    return tuple(Thread(ident=i, current=c, frames=notebook_part(tuple(f))) for i, c, f in threads)


def escaped(name: str) -> str:
    """Return a file name as faulthandler writes it (_Py_DumpASCII, at most 500 characters)."""
    short = "".join(
        c if " " <= c <= "~" else c.encode("ascii", "backslashreplace").decode()
        for c in name[:LONGEST]
    )
    return short + ("..." if len(name) > LONGEST else "")


def notebook_part(frames: tuple[Frame, ...]) -> tuple[Frame, ...]:
    """Return a stack up to its outermost frame of notebook code."""
    # The frames of IPython further out are the same in every stack. A stack without notebook code
    # stays whole.
    outermost = max(
        (n for n, frame in enumerate(frames) if frame.cell is not None), default=len(frames) - 1
    )
    return tuple(frame for frame in frames[: outermost + 1] if not _OURS.search(frame.file or ""))


def main_stack(text: str, cells: CellCode, main: int | None) -> tuple[Frame, ...]:
    """Return the main thread's frames in a dump; empty if the dump lacks it."""
    threads = parse_threads(text, cells)
    return next(
        (t.frames for t in threads if t.ident in {main, None}),
        threads[-1].frames if threads and main is None else (),
    )


def other_stacks(text: str, cells: CellCode, main: int | None) -> tuple[tuple[Frame, ...], ...]:
    """Return the frames of all threads but the main one, each once."""
    threads = parse_threads(text, cells)
    stacks = {t.ident: t.frames for t in threads if t.ident not in {main, None} and t.frames}
    return tuple(stacks.values())


def dumps(text: str, cells: CellCode, main: int | None) -> tuple[tuple[Frame, ...], ...]:
    """Return the main thread's frames in each of several dumps, oldest first."""
    threads = parse_threads(text, cells)
    return tuple(t.frames for t in threads if t.ident in {main, None} and t.frames)


def innermost_line(stack: Iterable[Frame], cell: int) -> int | None:
    """Return the innermost line of a cell in a stack.

    ``None`` if the stack has no frame of the cell.
    """
    return next((frame.line for frame in stack if frame.cell == cell and frame.line), None)


def most_typical(stacks: Sequence[tuple[Frame, ...]], cell: int) -> tuple[Frame, ...]:
    """Return the last stack, or one at the same line whose innermost cell is the most frequent."""
    # Between two calls of the function that fills the memory, a dump can catch the caller. So take
    # the cell that most dumps were in; of two equally frequent cells, the one deeper in the stack.
    line = innermost_line(stacks[-1], cell)
    alike = [stack for stack in stacks if innermost_line(stack, cell) == line]
    matching = [
        next((frame.cell for frame in stack if frame.cell is not None), None) for stack in alike
    ]
    often = Counter(matching)
    return max(
        zip(alike, matching, range(len(alike)), strict=True),
        key=lambda row: (often[row[1]], row[1] != cell, row[2]),
    )[0]


def fatal_part(text: str) -> str:
    """Return the text from the last fatal error on."""
    # Requested dumps use the same descriptor and come before the fatal report.
    at = text.rfind("Fatal Python error: ")
    return text[at:] if at >= 0 else ""


def parse_fault(  # noqa: PLR0917 - the text, its key, and the figures that belong to it
    text: str,
    cells: CellCode,
    main: int | None,
    stack_bytes: int | None,
    stack_limit: int | None,
    thread: FaultingThread | None = None,
) -> FaultReport | None:
    """Parse the report of a fatal signal; ``None`` if there is none.

    ``thread`` holds the registers of the faulting thread, as the keeper read them.
    """
    part = fatal_part(text)
    if not part:
        return None
    title = _TITLE.match(part)
    threads = parse_threads(part, cells)
    current = next((t for t in threads if t.current), None)
    return FaultReport(
        title=title[1] if title else "",
        stack=current.frames if current else (),
        main=None if current is None or main is None else current.ident == main,
        stack_bytes=stack_bytes,
        stack_limit=stack_limit,
        site=read_site(
            thread,
            current.ident if current is not None else None,
            # "Floating point exception" before Python 3.13, "Floating-point exception" since.
            arithmetic=title is not None and title[1].startswith("Floating"),
        ),
    )
