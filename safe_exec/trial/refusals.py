"""What the cells of a trial say they could not have: the input of ``conflicts``, from the error and from the outputs. May import the trial's state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from safe_exec.model.ending import CellError, CellFailed, Ending, Passed
from safe_exec.model.evidence import IsolationConflict, NeedKind, Place, Raised
from safe_exec.model.limits import Mechanism, Wall
from safe_exec.records import replace
from safe_exec.trial.conflicts import Sight, conflicts
from safe_exec.trial.needs import Need, is_write, needs_of_error, needs_of_output

if TYPE_CHECKING:
    from safe_exec.kernel.agent_facts import RaisedTold
    from safe_exec.trial.state import TrialState

MOST_CELLS = 200
OUTPUT_CHARACTERS = 1 << 16


def raised_by(state: TrialState, error: CellError) -> RaisedTold | None:
    """The attributes of the error that the current cell ended with, as the kernel tells them; a cell may show several."""
    told = state.session.told.raised.get(state.number_now(), ())
    return next((one for one in reversed(told) if one.errors and one.errors[0].type == error.ename), None)


def isolation_conflicts(state: TrialState, ending: Ending, place: Place | None) -> tuple[IsolationConflict, ...]:
    """What the cells asked for and isolation took away; nothing where there are no walls, or where the kernel did not live to the end."""
    facts = state.session.sandbox.isolation if state.session.sandbox else None
    if facts is None or not isinstance(ending, CellFailed | Passed):
        return ()
    told = raised_by(state, ending.error) if isinstance(ending, CellFailed) else None
    user = state.request.plan.walls.get(Wall.USER)
    sight = Sight(
        facts=facts,
        env=state.request.env,
        cwd=told.cwd if told else None,
        sys_path=told.sys_path if told else (),
        search=told.search if told else "",
        other_user=user is not None and user.by is not Mechanism.NONE,
    )
    removed = facts.removed_variables
    needs = _of_error(state, ending.error, told.errors if told else (), place) if isinstance(ending, CellFailed) else []
    needs += [need for index, text in outputs(state) for need in needs_of_output(text, removed, index)]
    return conflicts(needs, sight)


def _of_error(state: TrialState, error: CellError, raised: tuple[Raised, ...], place: Place | None) -> list[Need]:
    facts = state.session.sandbox.isolation if state.session.sandbox else None
    assert state.current is not None
    source = state.request.node.cells[state.current].source.splitlines()
    line = source[place.line - 1] if place is not None and 0 < place.line <= len(source) else "\n".join(source)
    writes = is_write(line)
    needs = needs_of_error(error, raised, facts.removed_variables if facts else ())
    return [_guessed(replace(need, cell=state.current), writes) for need in needs]


def _guessed(need: Need, writes: bool | None) -> Need:
    """With a guess from the source where the kernel does not say whether a file was to be written; that makes no need exact."""
    return replace(need, writes=True, exact=False) if writes and need.writes is None and need.kind is NeedKind.PATH else need


def outputs(state: TrialState) -> Iterator[tuple[int, str]]:
    """The text that cells put out, the current or last one's first."""
    cells = state.request.node.cells
    last = len(cells) - 1 if state.current is None else state.current
    for index in range(last, max(-1, last - MOST_CELLS), -1):
        texts = [output.get("text", "") for output in cells[index].get("outputs", ()) if output.get("output_type") == "stream"]
        text = "".join(part for text in texts for part in ([text] if isinstance(text, str) else text))
        if text:
            yield index, text[-OUTPUT_CHARACTERS:]
