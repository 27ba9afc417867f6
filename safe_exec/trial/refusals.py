"""Finds the refusals in the error and outputs of a trial's cells: the input of ``conflicts``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from safe_exec.model.ending import CellError, CellFailed, Ending, Passed
from safe_exec.model.evidence import CellLocation, IsolationConflict, Raised
from safe_exec.model.limits import Mechanism, Wall
from safe_exec.trial.conflicts import Sight, conflicts
from safe_exec.trial.needs import (
    Need,
    may_write,
    needs_of_empty,
    needs_of_error,
    needs_of_none,
    needs_of_output,
)

if TYPE_CHECKING:
    from safe_exec.kernel.agent_facts import ReportedErrors
    from safe_exec.trial.state import TrialState

MOST_CELLS = 200
OUTPUT_CHARACTERS = 1 << 16


def raised_by(state: TrialState, error: CellError) -> ReportedErrors | None:
    """Return the attributes of the error that ended the current cell, as claimed inside."""
    reported_errors = state.session.agent_facts.raised.get(state.number_now(), ())
    return next(
        (
            one
            for one in reversed(reported_errors)
            if one.errors and one.errors[0].type == error.ename
        ),
        None,
    )


def isolation_conflicts(
    state: TrialState, ending: Ending, location: CellLocation | None
) -> tuple[IsolationConflict, ...]:
    """Return the things that the cells asked for and isolation took away.

    The result is empty without isolation, or if the kernel did not survive.
    """
    facts = state.session.sandbox.isolation
    if facts is None or not isinstance(ending, CellFailed | Passed):
        return ()
    raised = raised_by(state, ending.error) if isinstance(ending, CellFailed) else None
    user = state.request.plan.walls.get(Wall.USER)
    language = state.request.node.metadata.get("language_info", {})
    sight = Sight(
        facts=facts,
        env=state.request.env,
        cwd=raised.cwd if raised else None,
        sys_path=raised.sys_path if raised else (),
        search=raised.search if raised else "",
        other_user=user is not None and user.by is not Mechanism.NONE,
        r_version=str(language.get("version", "")) if language.get("name") == "R" else None,
    )
    removed = facts.removed_variables
    needs = (
        _of_error(state, ending.error, raised.errors if raised else (), location)
        if isinstance(ending, CellFailed)
        else []
    )
    for index, text in outputs(state):
        writes = may_write(state.request.node.cells[index].source)
        needs += [replace(need, may_write=writes) for need in needs_of_output(text, removed, index)]
    return conflicts(needs, sight)


def _of_error(
    state: TrialState, error: CellError, raised: tuple[Raised, ...], location: CellLocation | None
) -> list[Need]:
    facts = state.session.sandbox.isolation
    assert state.current is not None
    source = state.request.node.cells[state.current].source.splitlines()
    line = (
        source[location.line - 1]
        if location is not None and 0 < location.line <= len(source)
        else "\n".join(source)
    )
    removed = facts.removed_variables if facts else ()
    needs = needs_of_error(error, raised, removed)
    needs += needs_of_none(error, _sources(state), [line, *_lines(state, location)], removed)
    needs = [replace(need, may_write=may_write(line)) for need in needs]
    needs += needs_of_empty(error, _sources(state), [line, *_lines(state, location)])
    return [replace(need, cell=state.current) for need in needs]


def _sources(state: TrialState) -> list[str]:
    """Return the code of the cells up to the current one."""
    cells = state.request.node.cells[: 1 + (state.current or 0)]
    return [cell.source for cell in cells if cell.cell_type == "code"]


def _lines(state: TrialState, location: CellLocation | None) -> Iterator[str]:
    """Yield the lines of the notebook that a traceback passes through."""
    for frame in location.stack if location is not None else ():
        if (
            frame.cell is not None
            and frame.line is not None
            and 0 <= frame.cell < len(state.request.node.cells)
        ):
            yield from state.request.node.cells[frame.cell].source.splitlines()[
                frame.line - 1 : frame.line
            ]


def outputs(state: TrialState) -> Iterator[tuple[int, str]]:
    """Yield the text output of cells, starting with the current or last one."""
    cells = state.request.node.cells
    last = len(cells) - 1 if state.current is None else state.current
    for index in range(last, max(-1, last - MOST_CELLS), -1):
        text = _tail(cells[index].get("outputs", ()))
        if text:
            yield index, text


def _tail(outputs: Sequence[Any]) -> str:
    """Return the end of a cell's stream text."""
    # Joining all of it would double the runner's memory after a flood of output.
    parts: list[str] = []
    room = OUTPUT_CHARACTERS
    for output in reversed(outputs):
        if output.get("output_type") != "stream":
            continue
        text = output.get("text", "")
        for part in [text] if isinstance(text, str) else reversed(text):
            parts.append(part[-room:])
            room -= len(parts[-1])
            if room <= 0:
                return "".join(reversed(parts))
    return "".join(reversed(parts))
