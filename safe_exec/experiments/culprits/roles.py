"""Describes each culprit's part in the failure: its memory, its names, and its effects.

Pure; imports model, units and the static analysis.
"""

from __future__ import annotations

import builtins
from collections.abc import Mapping

from msgspec import Struct
from msgspec.structs import replace

from safe_exec.experiments.static_analysis.dependencies import Dependencies, imported_modules
from safe_exec.experiments.static_analysis.effects import (
    Effect,
    EffectKind,
    effects_of,
    functions_of,
    is_imports_only,
)
from safe_exec.model.verdict import CellRecord, CrashCell, Culprit, Role
from safe_exec.units import format_size

# A cell that kept less than this did not fill the memory.
WORTH_NAMING = 8 << 20
# A cell that kept less than this share of the limit did not fill it either.
SHARE = 0.05
# From this suspicion on a cell changes more than its own names.
RISKY = 2
# A note with more names would not fit on a line of the terminal.
MOST_NAMES = 3
_BUILTINS = frozenset(dir(builtins))
# Longer source lines are cut in the verdict.
LINE_LENGTH = 200
UNSEEN = "must run before; the reason is not visible"


class CulpritSet(Struct, frozen=True, kw_only=True):
    """The result of a search, by cell index, with the context that its description needs.

    ``dynamic_deps`` are the cells that only trials showed to be needed. ``order`` lists the cell
    indexes in the order in which ``dependencies`` numbers them from 0. ``setting`` is the name of
    an engine's own limit if that limit was reached.
    """

    cells: tuple[int, ...]
    dynamic_deps: frozenset[int]
    order: tuple[int, ...]
    dependencies: Dependencies
    sources: Mapping[int, str]
    records: Mapping[int, CellRecord]
    memory_limit: int | None
    crash: CrashCell
    setting: str = ""


def culprits_of(culprit_set: CulpritSet) -> tuple[Culprit, ...]:
    """Return one culprit for each cell of the set."""
    return tuple(_culprit(culprit_set, index) for index in culprit_set.cells)


def _culprit(culprit_set: CulpritSet, index: int) -> Culprit:
    record = culprit_set.records[index]
    role, note, line = _role(culprit_set, index)
    source = culprit_set.sources[index]
    return Culprit(
        index=index,
        code_index=record.code_index,
        id=record.id,
        role=role,
        note=note,
        source_line=line_of(source, line) or first_line(source),
    )


def _role(culprit_set: CulpritSet, index: int) -> tuple[Role, str, int | None]:
    """Return the role, the note, and the line that the note refers to (or ``None``)."""
    # The crash cell may also define or keep things; that it crashed matters most.
    if index == culprit_set.crash.index:
        return Role.CRASH, "running when it happened", None
    if _sets(culprit_set, index):
        return (
            Role.TRIGGER,
            f"sets {culprit_set.setting}",
            _line_with(culprit_set.sources[index], culprit_set.setting),
        )
    return _role_of_others(culprit_set, index)


def _role_of_others(culprit_set: CulpritSet, index: int) -> tuple[Role, str, int | None]:
    # Exhausted memory is explained by the cells that kept it.
    kept_bytes = kept_by(culprit_set, index)
    if kept_bytes is not None:
        return Role.ACCUMULATOR, f"+{format_size(kept_bytes)} kept", None
    # A definition is a weaker explanation than an effect on the process.
    used, effect = _uses(culprit_set, index), _effect(culprit_set, index)
    by_trials = index in culprit_set.dynamic_deps
    if _sets_off(effect, by_trials=by_trials, used=used) or (
        effect is None and not used and _side_effect_risk(culprit_set, index) >= RISKY
    ):
        # A shell line or a magic has no effect that could be read.
        note, line = (effect.text, effect.line) if effect else ("runs a command or a magic", None)
        return Role.TRIGGER, note, line
    if used:
        return Role.DEFINITION, used, None
    return Role.SETUP, effect.text if effect else UNSEEN, effect.line if effect else None


def _sets_off(effect: Effect | None, *, by_trials: bool, used: str) -> bool:
    """Tell whether an effect may have triggered the later failure."""
    # For a changed object or file only trials can show that, and only for a cell that is not needed
    # for anything else.
    if effect is None:
        return False
    if effect.kind is EffectKind.PROCESS:
        return by_trials or not used or effect.on_all_code
    return by_trials and (effect.kind is not EffectKind.CALL or not used)


def _effect(culprit_set: CulpritSet, index: int) -> Effect | None:
    """Return a cell's most significant effect, including effects of functions that it calls."""
    modules: dict[str, str] = {}
    functions: dict[str, Effect] = {}
    for candidate in (cell for cell in culprit_set.order if cell <= index):
        functions |= functions_of(culprit_set.sources[candidate], modules)
        modules |= imported_modules(culprit_set.sources[candidate])
    effects = [
        _through(effect, functions) for effect in effects_of(culprit_set.sources[index], modules)
    ]
    telling = [
        _for_users(culprit_set, index, effect) for effect in effects if not _is_builtin_call(effect)
    ]
    return min(telling, key=lambda effect: effect.kind, default=None)


def _is_builtin_call(effect: Effect) -> bool:
    return effect.kind is EffectKind.CALL and effect.name in _BUILTINS


def _through(effect: Effect, functions: Mapping[str, Effect]) -> Effect:
    """Replace the call of a function from the notebook by the effect of that function."""
    inner = functions.get(effect.name or "") if effect.kind is EffectKind.CALL else None
    if inner is None:
        return effect
    return replace(inner, text=f"{effect.text}, which {inner.text}", line=effect.line)


def _for_users(culprit_set: CulpritSet, index: int, effect: Effect) -> Effect:
    """Add to the text of an effect the culprits that use the changed object."""
    if effect.kind < EffectKind.OBJECT or effect.name is None:
        return effect
    positions = {cell: culprit_set.order.index(cell) for cell in culprit_set.cells if cell > index}
    facts = culprit_set.dependencies.facts
    users = [
        c for c, at in positions.items() if effect.name in facts[at].uses | facts[at].late_uses
    ]
    if not users:
        return effect
    cells = ", ".join(str(culprit_set.records[cell].code_index + 1) for cell in users)
    return replace(
        effect,
        text=f"{effect.text}; `{effect.name}` is used by code "
        f"cell{'s' if len(users) > 1 else ''} {cells}",
    )


def _sets(culprit_set: CulpritSet, index: int) -> bool:
    """Tell whether a cell sets the engine limit that was reached."""
    return bool(culprit_set.setting) and culprit_set.setting in culprit_set.sources[index]


def kept_by(culprit_set: CulpritSet, index: int) -> int | None:
    """Return the bytes that a cell kept, if memory ran out and the amount is worth naming."""
    limit, kept_bytes = culprit_set.memory_limit, culprit_set.records[index].memory_kept
    if limit is None or kept_bytes is None or kept_bytes < max(WORTH_NAMING, SHARE * limit):
        return None
    # The memory of modules is no data that accumulates.
    if is_imports_only(culprit_set.sources[index]):
        # Modules, and no data.
        return None
    return kept_bytes


def _side_effect_risk(culprit_set: CulpritSet, index: int) -> int:
    return culprit_set.dependencies.side_effect_risks()[culprit_set.order.index(index)]


def _uses(culprit_set: CulpritSet, index: int) -> str:
    """Return the names that later culprits take from a cell.

    The text has the form ``defines `frame`, used by code cell 7``.
    """
    names: list[str] = []
    users: list[int] = []
    at = culprit_set.order.index(index)
    culprits = frozenset(map(culprit_set.order.index, culprit_set.cells))
    for user in (cell for cell in culprit_set.cells if cell > index):
        position = culprit_set.order.index(user)
        used_names = sorted(_taken(culprit_set.dependencies, position, at, culprits))
        if used_names:
            users.append(culprit_set.records[user].code_index + 1)
            names += [name for name in used_names if name not in names]
    if not names:
        return ""
    names_text = ", ".join(f"`{name}`" for name in names[:MOST_NAMES]) + (
        " and more" if len(names) > MOST_NAMES else ""
    )
    cells = "code cell" if len(users) == 1 else "code cells"
    return f"defines {names_text}, used by {cells} {', '.join(map(str, users))}"


def _taken(
    dependencies: Dependencies, position: int, at: int, culprits: frozenset[int]
) -> set[str]:
    """Return the names that a cell reads and whose last binding among the culprits is in ``at``."""
    reads = dependencies.facts[position].uses | dependencies.facts[position].late_uses
    # What cannot be read may bind any name, but nobody takes ``print`` from it.
    names = reads - (_BUILTINS - dependencies.facts[at].defines)
    return {
        name
        for name in names
        if next((c for c in dependencies.definers(name, position) if c in culprits), None) == at
    }


def look_first(culprit_set: CulpritSet, culprits: tuple[Culprit, ...], growth: int | None) -> int:
    """Return the index of the cell to read first.

    It is the first that exists of: the cell that set the engine's own limit, the trigger, the cell
    that kept more memory than the crash cell requested, the cell with the innermost frame, the
    crash cell. ``growth`` is the growth of the crash cell itself in bytes, if known. A changed
    object or file does not count as the trigger of exhausted memory.
    """
    setters = [c.index for c in culprits if c.role is Role.TRIGGER and _sets(culprit_set, c.index)]
    if setters:
        return setters[-1]
    triggers = [
        c.index
        for c in culprits
        if c.role is Role.TRIGGER
        and (culprit_set.memory_limit is None or _acts_on_process(culprit_set, c.index))
    ]
    if triggers:
        return triggers[-1]
    kept_bytes = {
        c.index: kept_by(culprit_set, c.index) or 0 for c in culprits if c.role is Role.ACCUMULATOR
    }
    largest = max(kept_bytes, key=lambda index: kept_bytes[index], default=None)
    if largest is not None and kept_bytes[largest] > (growth or 0):
        return largest
    inner = next((frame.cell for frame in culprit_set.crash.stack if frame.cell is not None), None)
    return inner if inner in culprit_set.cells and inner is not None else culprit_set.crash.index


def _line_with(source: str, text: str) -> int | None:
    return next(
        (number for number, line in enumerate(source.splitlines(), 1) if text in line), None
    )


def _acts_on_process(culprit_set: CulpritSet, index: int) -> bool:
    effect = _effect(culprit_set, index)
    return effect is not None and effect.kind is EffectKind.PROCESS and not effect.is_input


def line_of(source: str, line: int | None) -> str | None:
    """Return a line of a cell, counted from 1; ``None`` if it is empty or does not exist."""
    lines = source.splitlines()
    text = lines[line - 1].strip() if line is not None and 0 < line <= len(lines) else ""
    return text[:LINE_LENGTH] or None


def first_line(source: str) -> str | None:
    """Return the first line of code, or the first line at all in a cell of comments."""
    lines = [line.strip() for line in source.splitlines()]
    telling = [line for line in lines if line and not line.startswith("#")] or [
        line for line in lines if line
    ]
    return telling[0][:LINE_LENGTH] if telling else None
