"""Recognises a known hang by its picture, long before the cell's time is up. Pure.

The picture of a hang is all that an observer sees: the kernel's activity, the system call in which
it is blocked, the statement of the crash cell that runs and the innermost frame. A trial that shows
the same picture for long enough counts as failed. That may be wrong: a cell that is only slow looks
the same. So such an answer decides which trial comes next, and nothing else: the result is
confirmed by a run up to the whole timeout.
"""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from safe_exec.diagnosis.rules.activity import activity_of
from safe_exec.experiments.static_analysis.statements import statements_of
from safe_exec.model.evidence import ActivityObservation, Frame
from safe_exec.model.verdict import Activity, CauseKind, Verdict

# How long the same picture has to last. A cell that is only slow may look the same for longer: the
# confirmation finds that out, and the search then starts again without recognition.
SAME_SECONDS = 2.0
# With a shorter timeout there is nothing to gain.
LEAST_TIMEOUT = 2 * SAME_SECONDS
HANGS = frozenset({CauseKind.CELL_TIMEOUT, CauseKind.UNRESPONSIVE, CauseKind.STDIN})


class HangPicture(Struct, frozen=True, kw_only=True):
    """The picture of a hang; two hangs with equal pictures are taken for the same one.

    ``statement`` is the text of the top-level statement that the crash cell is running.
    ``innermost`` describes the innermost frame: its function, and the text of its line if it is in
    a cell, else its file. It is ``None`` for a loop in Python, whose lines change all the time.
    """

    activity: Activity | None
    syscall: str | None
    # Of a kernel that runs without the agent: only the scheduler knows whether it computes.
    state: str | None
    statement: str | None
    innermost: tuple[str, str] | None

    @classmethod
    def of_verdict(cls, verdict: Verdict, node: Any) -> HangPicture | None:
        """Return the picture of the hang in a verdict; ``None`` for another failure.

        Also ``None`` if too little was seen of the hang to know it again. ``node`` is the notebook.
        """
        cause, crash = verdict.cause, verdict.crash_cell
        if cause is None or crash is None or cause.kind not in HANGS:
            return None
        facts = {fact.fact: fact.value for fact in cause.evidence}
        syscall = facts.get("blocked in")
        state = facts.get("process state")
        picture = cls(
            activity=cause.activity,
            syscall=str(syscall) if syscall is not None else None,
            state=str(state) if state is not None and not crash.stack else None,
            statement=_statement(crash.stack, crash.index, node),
            innermost=_innermost(crash.stack, cause.activity, node),
        )
        has_place = picture.statement is not None or picture.innermost is not None
        # Nothing is to be read from a process that is stopped.
        is_enough = picture.activity is Activity.STOPPED or (picture.activity and picture.syscall)
        return picture if has_place or is_enough else None

    @classmethod
    def of_observation(
        cls, observation: ActivityObservation, stack: tuple[Frame, ...], cell: int, node: Any
    ) -> HangPicture:
        """Return the picture of a kernel that runs ``cell`` of ``node``.

        ``stack`` lacks IPython's frames.
        """
        activity, syscall = activity_of(observation), observation.syscall
        return cls(
            activity=activity,
            syscall=syscall if syscall is not None and not syscall.isdigit() else None,
            state=observation.state if not stack else None,
            statement=_statement(stack, cell, node),
            innermost=_innermost(stack, activity, node),
        )


def seconds_until_recognised(cell_timeout: float | None) -> float | None:
    """Return the seconds after which an unchanged picture counts as the same hang.

    ``cell_timeout`` is that of the cell, in seconds. Returns ``None`` if it is too short for an
    early recognition to save time.
    """
    if cell_timeout is None or cell_timeout < LEAST_TIMEOUT:
        return None
    return SAME_SECONDS


def line_in(stack: tuple[Frame, ...], cell: int) -> int | None:
    """Return the line at which a cell runs; ``None`` if the stack does not show it."""
    return next((frame.line for frame in stack if frame.cell == cell), None)


def _line_text(frame: Frame, node: Any) -> str | None:
    if frame.cell is None or frame.line is None or frame.cell >= len(node.cells):
        return None
    lines = str(node.cells[frame.cell].source).splitlines()
    return lines[frame.line - 1].strip() if 1 <= frame.line <= len(lines) else None


def _statement(stack: tuple[Frame, ...], cell: int, node: Any) -> str | None:
    """Return the text of the top-level statement that the crash cell is in."""
    # The outermost frame of the cell: the cell itself calls all the others.
    frame = next((frame for frame in reversed(stack) if frame.cell == cell), None)
    if frame is None or frame.line is None:
        return None
    statements = statements_of(str(node.cells[cell].source), None)
    texts = [text for first, text in statements if first <= frame.line]
    return texts[-1] if texts else _line_text(frame, node)


def _innermost(
    stack: tuple[Frame, ...], activity: Activity | None, node: Any
) -> tuple[str, str] | None:
    if not stack or activity is Activity.PYTHON_LOOP:
        return None
    frame = stack[0]
    return frame.function, _line_text(frame, node) or frame.file or ""
