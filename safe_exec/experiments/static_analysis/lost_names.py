"""Finds the cells that cannot run after another one failed, because they need its names. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from msgspec.structs import replace

from safe_exec.experiments.static_analysis.dependencies import Dependencies, imported_modules

# More names would not make the reason clearer.
_MOST_NAMES = 3


def cells_without_names(
    sources: Mapping[int, str], failed: Collection[int], *, language: str | None
) -> dict[int, str]:
    """Return the cells that need a name from a failed cell, each with the reason in words.

    ``sources`` are the code cells that may run, by index. A cell that needs a name from a skipped
    cell is skipped too. Without a known language no cell is skipped.
    """
    order = sorted(sources)
    dependencies = _without_repeated_imports(
        Dependencies.of_sources([sources[index] for index in order], language=language),
        [sources[index] for index in order],
        {position for position, index in enumerate(order) if index in failed},
    )
    numbers = {index: number + 1 for number, index in enumerate(order)}
    unavailable = set(failed)
    reasons: dict[int, str] = {}
    for position, index in enumerate(order):
        if index in unavailable:
            continue
        makers = {order[maker] for maker in dependencies.needs(position)} & unavailable
        if makers:
            unavailable.add(index)
            maker = max(makers)
            names = _names(dependencies, position, order.index(maker))
            reasons[index] = f"needs {names} of code cell {numbers[maker]}, which " + (
                "failed" if maker in failed else "was skipped"
            )
    return reasons


def _without_repeated_imports(
    dependencies: Dependencies, sources: Sequence[str], failed: Collection[int]
) -> Dependencies:
    """Disregard each import of a failed cell that an earlier cell has too."""
    if not dependencies.is_python:
        return dependencies
    facts = list(dependencies.facts)
    imports: dict[str, str] = {}
    for position, source in enumerate(sources):
        own = imported_modules(source)
        if position in failed:
            repeated = {name for name, full in own.items() if imports.get(name) == full}
            cell = facts[position]
            facts[position] = replace(cell, defines=cell.defines - repeated)
        else:
            imports |= own
    return Dependencies(facts)


def _names(dependencies: Dependencies, reader: int, maker: int) -> str:
    """Return the names that a cell reads and another one binds, or a word for its effects."""
    facts, definitions = dependencies.facts[reader], dependencies.facts[maker]
    reads = facts.uses | facts.at_once | facts.late_uses | facts.own
    names = sorted(reads & definitions.defines)
    if not names:
        return "an effect"
    listed = ", ".join(f"`{name}`" for name in names[:_MOST_NAMES])
    return listed if len(names) <= _MOST_NAMES else f"{listed} and others"
