"""Finds the location in a cell at which a trial ended, from the most exact source there is.

The sources, in this order: the traceback of an error; the stack of a fatal signal; the stack that
was requested when the time was up; the last stack dump near a limit; a sample of the main thread;
the last recorded statement; and a cell that has only one line. May import kernel, state and model.
"""

from __future__ import annotations

import ast
import re
import time
from typing import TYPE_CHECKING

from msgspec.structs import replace

from safe_exec.kernel.fault_report import (
    dumps,
    fatal_part,
    innermost_line,
    main_stack,
    most_typical,
)
from safe_exec.model.ending import CellError, CellFailed, Died, Ending, StartFailed, TimedOut
from safe_exec.model.evidence import CellLocation, FaultReport, Frame
from safe_exec.model.patterns import lazy_pattern
from safe_exec.trial.printed import without_colours
from safe_exec.trial.scripts import header_line, script_line

if TYPE_CHECKING:
    from safe_exec.trial.state import TrialState

RECENT_CHARACTERS = 65536
# A stack from at most this many seconds before the end still tells where the end was.
DUMP_AGE = 1.0
_CELL_LINE = lazy_pattern(
    r"(?:Cell |<ipython-)?[Ii]n(?:put)?[ -]*\[?(\d+)[\]-][^\n]*?, line:? ?(\d+)"
)
_ARROW = lazy_pattern(r"^-+> (\d+) ", re.MULTILINE)
_MAGIC = lazy_pattern(r"^([ \t]*)[%!].*$", re.MULTILINE)
_DEBUGGER_CALL = lazy_pattern(r"\b(?:set_trace|breakpoint)\(")
_SYNTAX_LINE = lazy_pattern(
    r"\(<?[^()\n]*>?, line (\d+)\)\s*$|^ *File \"?<tokenize>\"?(?::|, line )(\d+)", re.MULTILINE
)


def crash_site(state: TrialState, ending: Ending, fault: FaultReport | None) -> CellLocation | None:
    """Return the location in the current cell at which the trial ended, if it is known."""
    if isinstance(ending, Died) and ending.asked_to_exit:
        return _of_exit_request(state, ending.cell)
    if state.current is None or isinstance(ending, StartFailed):
        return None
    index = state.current
    for location in (
        _of_error(state, index, ending.error) if isinstance(ending, CellFailed) else None,
        _of_fault(state, index, fault),
        _of_look(state, index) if isinstance(ending, TimedOut) else None,
        _of_error(state, index, None) if isinstance(ending, TimedOut) else None,
        # It answered the interrupt.
        _of_last_dump(state, index),
        _of_page(state, index),
    ):
        if location is not None:
            return _past_loop_header(location, state.request.node.cells[index].source)
    return _of_single_line(state, index)


def _past_loop_header(location: CellLocation, source: str) -> CellLocation:
    """Move a location from the first line of an endless loop to the only line of its body."""
    # Python switches threads and handles signals at a loop's backward jump. Since Python 3.11 this
    # jump has the line number of `while`. An observer outside therefore finds the loop at that
    # line, even though `while True` itself does nothing.
    body = (
        body_of_endless_loop(source, location.line)
        if location.source in ("dump", "sample")
        else None
    )
    if body is None:
        return location
    innermost = next(
        (
            number
            for number, frame in enumerate(location.stack)
            if frame.cell == location.cell and frame.line
        ),
        None,
    )
    stack = tuple(
        replace(frame, line=body) if number == innermost else frame
        for number, frame in enumerate(location.stack)
    )
    return replace(location, line=body, stack=stack)


def body_of_endless_loop(source: str, line: int) -> int | None:
    """Return the only body line of an endless ``while`` loop that starts at ``line``."""
    try:
        tree = ast.parse(_MAGIC.sub(r"\1pass", source))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        # The cell is of another language.
        return None
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.While)
            and node.lineno == line
            and isinstance(node.test, ast.Constant)
        ):
            first, last = node.body[0].lineno, node.body[-1].end_lineno
            return first if first == last != line else None
    return None


def _of_exit_request(state: TrialState, index: int | None) -> CellLocation | None:
    """Locate the call of ``exit()`` or ``quit()``."""
    facts = state.session.agent_facts
    for number, (line, rows) in facts.exit_requests.items():
        if line and index is not None and facts.index_of(number) == index:
            return CellLocation(
                cell=index, line=line, source="exit request", stack=facts.frames(rows)
            )
    return None if index is None else _only_line(state, index)


def _of_error(state: TrialState, index: int, error: CellError | None) -> CellLocation | None:
    facts, number = state.session.agent_facts, state.number_now()
    traceback_rows = facts.errors.get(number) or facts.shown_errors.get(number)
    if traceback_rows is not None:
        line, rows = traceback_rows
        location = CellLocation(cell=index, line=line, source="traceback", stack=facts.frames(rows))
        return _further_in(state, location, error)
    client = state.session.client
    reply = client.replies.get(index, {})
    count = state.request.node.cells[index].get("execution_count")
    in_text = line_in_traceback([str(part) for part in reply.get("traceback") or ()], count)
    return None if in_text is None else CellLocation(cell=index, line=in_text, source="traceback")


def _further_in(state: TrialState, location: CellLocation, error: CellError | None) -> CellLocation:
    """Refine the location of an error that a script or a debugger hides, if the line is known.

    A ``CalledProcessError`` is located in the script that the child ran, and an error of a debugger
    at the call that started it.
    """
    source = state.request.node.cells[location.cell].source
    if (
        error is not None
        and error.ename == "CalledProcessError"
        and location.line == header_line(source.splitlines())
    ):
        line = script_line(source, recent_text(state))
        if line is not None:
            frame = Frame(function="<module>", line=line, file="<stdin>", cell=location.cell)
            return replace(location, line=line, stack=(frame, *location.stack))
    if error is not None and error.in_debugger:
        return replace(
            location,
            line=line_of_debugger_call(source, location.line),
            stack=_with_debugger_call(state, location.stack),
        )
    return location


def _with_debugger_call(state: TrialState, stack: tuple[Frame, ...]) -> tuple[Frame, ...]:
    """Move the notebook's innermost frame to the line of the call that started the debugger."""
    at = next((n for n, frame in enumerate(stack) if frame.cell is not None), None)
    if at is None:
        return stack
    frame = stack[at]
    if frame.cell is None or frame.line is None:
        return stack
    source = str(state.request.node.cells[frame.cell].source)
    line = line_of_debugger_call(source, frame.line)
    row = replace(frame, line=line, source_line=source.splitlines()[line - 1])
    return (*stack[:at], row, *stack[at + 1 :])


def line_of_debugger_call(source: str, line: int) -> int:
    """Return the line of the call that started a debugger.

    The debugger stops at the line after the call, and fails there.
    """
    lines = source.splitlines()[:line]
    calls = [
        number
        for number, text in enumerate(lines, 1)
        if _DEBUGGER_CALL.search(text.partition("#")[0])
    ]
    return calls[-1] if calls else line


def line_in_traceback(traceback: list[str], count: int | None) -> int | None:
    """Return the last line of cell ``In [count]`` in a rendered traceback."""
    # If the traceback names no such line, the line that its arrow points to is used.
    text = without_colours("\n".join(traceback))
    lines = [
        int(line)
        for number, line in _CELL_LINE.findall(text)
        if count is None or int(number) == count
    ]
    if lines:
        return lines[-1]
    match = _SYNTAX_LINE.search(text) or _ARROW.search(text)
    return int(match[match.lastindex or 0]) if match else None


def _of_fault(state: TrialState, index: int, fault: FaultReport | None) -> CellLocation | None:
    ended = state.session.ended
    if fault is None or ended is None:
        return None
    session = state.session
    text = fatal_part(ended.fault) or fatal_part(recent_text(state))
    stack = (
        fault.stack
        if fault.main
        else main_stack(text, session.agent_facts.code, session.agent_facts.hello.get("main"))
    )
    line = innermost_line(stack, index)
    return (
        None if line is None else CellLocation(cell=index, line=line, source="fault", stack=stack)
    )


def _of_look(state: TrialState, index: int) -> CellLocation | None:
    stack = state.observation.stack if state.observation else ()
    line = innermost_line(stack, index)
    return None if line is None else CellLocation(cell=index, line=line, source="dump", stack=stack)


def _of_last_dump(state: TrialState, index: int) -> CellLocation | None:
    """Locate the end by the last stack dump that the keeper requested. Dumps are exact."""
    # The dump must belong to this cell, and be newer than the last statement that was recorded.
    session, sandbox, page = state.session, state.session.sandbox, state.session.page
    if not sandbox.fault_text or page is None:
        return None
    note = page.note()
    if (
        note.cell != state.number_now()
        or sandbox.fault_at < note.time
        or (session.died_at or 0) - sandbox.fault_at > DUMP_AGE
    ):
        return None
    stacks = dumps(
        sandbox.fault_text, session.agent_facts.code, session.agent_facts.hello.get("main")
    )
    stack = most_typical(stacks, index) if stacks else ()
    line = innermost_line(stack, index)
    age = max(0.0, (session.died_at or sandbox.fault_at) - sandbox.fault_at)
    return (
        None
        if line is None
        else CellLocation(cell=index, line=line, source="dump", stack=stack, age=age)
    )


def _of_page(state: TrialState, index: int) -> CellLocation | None:
    """Locate the end by the shared page: the last recorded statement, refined by a later sample."""
    number = state.number_now()
    page = state.session.page
    if not number or page is None:
        return None
    note, sample = page.note(), page.sample()
    ended = state.session.died_at or time.monotonic()
    cell, rows, _ = page.stack()
    stack = state.session.agent_facts.frames(rows) if cell == number else ()
    if sample.cell == number and sample.line and sample.time >= note.time and not note.finished:
        return CellLocation(
            cell=index,
            line=sample.line,
            source="sample",
            stack=stack,
            age=max(0.0, ended - sample.time),
        )
    if note.cell == number and note.line:
        return CellLocation(
            cell=index, line=note.line, source="statement", age=max(0.0, ended - note.time)
        )
    return None


def _of_single_line(state: TrialState, index: int) -> CellLocation | None:
    """Locate the end in a cell of one line, which needs no facts from the kernel."""
    return (
        _only_line(state, index) if state.number_now() or not state.session.instrumented else None
    )


def _only_line(state: TrialState, index: int) -> CellLocation | None:
    lines = [
        n
        for n, line in enumerate(state.request.node.cells[index].source.splitlines(), 1)
        if line.strip()
    ]
    return CellLocation(cell=index, line=lines[0], source="only line") if len(lines) == 1 else None


def recent_text(state: TrialState) -> str:
    """Return the end of the current cell's stream output."""
    if state.current is None:
        return ""
    outputs = state.request.node.cells[state.current].get("outputs", [])
    texts = [o.get("text", "") for o in outputs[-20:] if o.get("output_type") == "stream"]
    parts = [part for text in texts for part in ([text] if isinstance(text, str) else text)]
    pieces: list[str] = []
    size = 0
    while parts and size < RECENT_CHARACTERS:
        pieces.append(parts.pop()[-RECENT_CHARACTERS:])
        size += len(pieces[-1])
    return without_colours("".join(reversed(pieces))[-RECENT_CHARACTERS:])
