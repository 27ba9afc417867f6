"""What each culprit did, from evidence: its memory, its names, and how the search found it. Pure; imports model, units, slicing."""

from __future__ import annotations

import builtins
from collections.abc import Mapping

from safe_exec.experiments.static_analysis.dependencies import Dependencies
from safe_exec.model.verdict import CellRecord, CrashCell, Culprit, Role
from safe_exec.records import dataclass
from safe_exec.units import format_size

WORTH_NAMING = 8 << 20
"""Memory below this is not what filled it."""
SHARE = 0.05
RISKY = 2
"""From this suspicion on a cell changes more than its own names."""
MOST_NAMES = 3
_BUILTINS = frozenset(dir(builtins))
LINE_LENGTH = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """The result of a search in the cells' own indexes: the set, and those of it that only trials showed to be needed.

    ``order`` are the indexes of all cells that ``dependencies`` counts from 0, in its order. ``setting`` is the word by which a notebook
    sets the limit that was reached, where that is an engine's own.
    """

    cells: tuple[int, ...]
    found: frozenset[int]
    order: tuple[int, ...]
    dependencies: Dependencies
    sources: Mapping[int, str]
    records: Mapping[int, CellRecord]
    memory_limit: int | None
    crash: CrashCell
    setting: str = ""


def culprits_of(found: Found) -> tuple[Culprit, ...]:
    """One culprit for each cell of the set."""
    return tuple(_culprit(found, index) for index in found.cells)


def _culprit(found: Found, index: int) -> Culprit:
    record = found.records[index]
    role, note = _role(found, index)
    return Culprit(
        index=index,
        code_index=record.code_index,
        id=record.id,
        role=role,
        note=note,
        source_line=first_line(found.sources[index]),
    )


def _role(found: Found, index: int) -> tuple[Role, str]:
    if index == found.crash.index:
        return Role.CRASH, "running when it happened"
    return (Role.TRIGGER, f"sets {found.setting}") if _sets(found, index) else _role_of_others(found, index)


def _role_of_others(found: Found, index: int) -> tuple[Role, str]:
    kept = kept_by(found, index)
    if kept is not None:
        return Role.ACCUMULATOR, f"+{format_size(kept)} kept"
    used = _uses(found, index)
    if index in found.found and (not used or _suspicion(found, index) >= RISKY):
        return Role.TRIGGER if _suspicion(found, index) >= RISKY else Role.SETUP, _unseen(found, index)
    if used:
        return Role.DEFINITION, used
    if _suspicion(found, index) >= RISKY:
        return Role.TRIGGER, _unseen(found, index)
    return Role.SETUP, "must run before; why is not visible"


def _sets(found: Found, index: int) -> bool:
    """Whether a cell sets the limit that was reached."""
    return bool(found.setting) and found.setting in found.sources[index]


def kept_by(found: Found, index: int) -> int | None:
    """What a cell kept, where memory is what ran out and it is worth naming."""
    limit, kept = found.memory_limit, found.records[index].memory_kept
    if limit is None or kept is None or kept < max(WORTH_NAMING, SHARE * limit):
        return None
    return kept


def _suspicion(found: Found, index: int) -> int:
    return found.dependencies.suspicions()[found.order.index(index)]


def _unseen(found: Found, index: int) -> str:
    risky = _suspicion(found, index) >= RISKY
    return "no later cell names it: it changes the state of the process" if risky else "must run before; why is not visible"


def _uses(found: Found, index: int) -> str:
    """``defines `frame`, used by code cell 7``: the names that later culprits take from a cell."""
    names: list[str] = []
    users: list[int] = []
    at = found.order.index(index)
    culprits = frozenset(map(found.order.index, found.cells))
    for later in (cell for cell in found.cells if cell > index):
        position = found.order.index(later)
        taken = sorted(_taken(found.dependencies, position, at, culprits))
        if taken:
            users.append(found.records[later].code_index + 1)
            names += [name for name in taken if name not in names]
    if not names:
        return ""
    shown = ", ".join(f"`{name}`" for name in names[:MOST_NAMES]) + (" and more" if len(names) > MOST_NAMES else "")
    cells = "code cell" if len(users) == 1 else "code cells"
    return f"defines {shown}, used by {cells} {', '.join(map(str, users))}"


def _taken(dependencies: Dependencies, position: int, at: int, culprits: frozenset[int]) -> set[str]:
    """The names that one cell reads and another one was the last of the culprits to bind before it."""
    reads = dependencies.facts[position].uses | dependencies.facts[position].late_uses
    # What cannot be read may bind any name, but nobody takes ``print`` from it.
    names = reads - (_BUILTINS - dependencies.facts[at].defines)
    return {name for name in names if next((c for c in dependencies.definers(name, position) if c in culprits), None) == at}


def look_first(found: Found, culprits: tuple[Culprit, ...], growth: int | None) -> int:
    """The index of the cell to read first. ``growth`` is by how much the crash cell itself grew, in bytes, where that is known.

    The cell that set an engine's own limit, else what set it off, else what kept more than the crash
    cell asked for, else the cell whose code ran innermost, else the crash cell.
    """
    setters = [c.index for c in culprits if c.role is Role.TRIGGER and _sets(found, c.index)]
    if setters:
        return setters[-1]
    triggers = [c.index for c in culprits if c.role is Role.TRIGGER]
    if triggers:
        return triggers[-1]
    kept = {c.index: kept_by(found, c.index) or 0 for c in culprits if c.role is Role.ACCUMULATOR}
    largest = max(kept, key=lambda index: kept[index], default=None)
    if largest is not None and kept[largest] > (growth or 0):
        return largest
    inner = next((frame.cell for frame in found.crash.stack if frame.cell is not None), None)
    return inner if inner in found.cells and inner is not None else found.crash.index


def first_line(source: str) -> str | None:
    """The first line that says something."""
    lines = [line.strip() for line in source.splitlines()]
    telling = [line for line in lines if line and not line.startswith("#")] or [line for line in lines if line]
    return telling[0][:LINE_LENGTH] if telling else None
