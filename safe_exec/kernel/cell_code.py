"""Maps frames of compiled code to cells and lines, from the agent's reports."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from msgspec import Struct

from safe_exec.agent import sources
from safe_exec.kernel.fault_report import escaped

# A cell's code has its own file name. Code that a magic compiles from a cell's body may share a
# name with other code (``<string>``, ``<timed exec>``). There the function and its lines decide; if
# several match, the one that was compiled last.

MOST_SOURCES = 20_000
LONGEST_MAP = 500
_line_of: Callable[[list[list[int]], int], int] = sources.line_of
# The line map of code whose lines are those of the cell.
IDENTITY = [[1, 1]]


class Source(Struct, frozen=True, kw_only=True):
    """Code that was compiled from a cell; ``cell`` is the number that the agent gave the cell.

    ``line_map`` is as in ``agent.sources``. ``functions`` lists the code objects, each as its name,
    first line and last line; ``None`` if the file name alone identifies the code.
    """

    cell: int
    line_map: list[list[int]]
    functions: tuple[tuple[str, int, int], ...] | None = None

    def has(self, function: str, line: int) -> bool:
        """Whether a line of a function can belong to this code."""
        if self.functions is None:
            return True
        return any(
            name == function and first <= line <= last for name, first, last in self.functions
        )


class CellCode:
    """The sources that the agent has reported.

    ``index_of`` gives the notebook's index for the agent's number of a cell.
    """

    def __init__(self, index_of: Callable[[int], int | None]) -> None:
        self._index_of = index_of
        self._sources: dict[str, list[Source]] = {}
        self._count = 0

    def follow(self, origin: CellCode, cells: Collection[int]) -> None:
        """Know the sources of some cells of the kernel of which this one is a copy."""
        for name, sources_of_name in origin._sources.items():
            self._sources[name] = [source for source in sources_of_name if source.cell in cells]
        self._count = origin._count

    def add(self, name: str, source: Source) -> None:
        """Add a source; those beyond MOST_SOURCES are ignored."""
        if self._count < MOST_SOURCES:
            self._count += 1
            self._sources.setdefault(escaped(name), []).append(source)

    def locate(self, function: str, line: int | None, file: str) -> tuple[int | None, int | None]:
        """Return cell and line in it, for a frame as faulthandler writes it.

        For other code it returns no cell, and the line unchanged.
        """
        for source in reversed(self._sources.get(file, ())):
            if line is None:
                index = self._index_of(source.cell) if source.functions is None else None
                return index, None
            line_in_cell = _line_of(source.line_map, line) if source.has(function, line) else 0
            index = self._index_of(source.cell) if line_in_cell else None
            if index is not None:
                return index, line_in_cell
        return None, line


def source_of(fact: Mapping[str, Any]) -> Source:
    """Read a source from one of the agent's facts.

    Raises ValueError, TypeError or KeyError for an invalid fact.
    """
    functions = fact.get("codes")
    return Source(
        cell=int(fact["cell"]),
        line_map=[[int(first), int(line)] for first, line in fact.get("lines", IDENTITY)][
            :LONGEST_MAP
        ],
        functions=None
        if functions is None
        else tuple((str(name)[:200], int(first), int(last)) for name, first, last in functions),
    )
