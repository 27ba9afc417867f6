"""Maps frames of compiled code to cells and lines, by the agent's account."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from msgspec import Struct

from safe_exec.agent import sources
from safe_exec.kernel.fault_report import escaped

# A cell's own code has a file name of its own. Code that a magic made of a cell's body may share
# one with anything (``<string>``, ``<timed exec>``): there the function and its lines decide, and
# of several that fit the one that was compiled last.

MOST_SOURCES = 20_000
LONGEST_MAP = 500
_line_of: Callable[[list[list[int]], int], int] = sources.line_of
# The line map of code whose lines are those of the cell.
IDENTITY = [[1, 1]]


class Source(Struct, frozen=True, kw_only=True):
    """Code of a cell, by the cell's number inside.

    ``line_map`` is as in ``agent.sources``. ``functions`` are name, first and last line of each
    code object; ``None`` where the file name alone decides.
    """

    cell: int
    line_map: list[list[int]]
    functions: tuple[tuple[str, int, int], ...] | None = None

    def has(self, function: str, line: int) -> bool:
        """Whether a line of a function can be of this code."""
        if self.functions is None:
            return True
        return any(
            name == function and first <= line <= last for name, first, last in self.functions
        )


class CellCode:
    """The sources that the agent has reported.

    ``index_of`` gives the notebook's index for a cell's number inside.
    """

    def __init__(self, index_of: Callable[[int], int | None]) -> None:
        self._index_of = index_of
        self._sources: dict[str, list[Source]] = {}
        self._count = 0

    @classmethod
    def of_files(cls, cells: Mapping[str, int]) -> CellCode:
        """For file names of which each belongs to one cell, lines unchanged."""
        code = cls(lambda number: number)
        for name, cell in cells.items():
            code.add(name, Source(cell=cell, line_map=IDENTITY))
        return code

    def add(self, name: str, source: Source) -> None:
        """Add a source; those beyond the bound are ignored."""
        if self._count < MOST_SOURCES:
            self._count += 1
            self._sources.setdefault(escaped(name), []).append(source)

    def locate(self, function: str, line: int | None, file: str) -> tuple[int | None, int | None]:
        """The notebook's cell and the line in it, for a file name as faulthandler writes it.

        No cell and the line as it is for code of no cell.
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
    """A source from a fact of the kernel process.

    Raises ValueError, TypeError or KeyError for what is none.
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
