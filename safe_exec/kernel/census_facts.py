"""Reads the agent's reports on the holders of memory. All of them are claims."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from safe_exec.model.memory import Census, CensusLine, CensusRow, CensusSite

MOST_ROWS = 30
MOST_SITES = 10
# The last census of so many cells is kept.
MOST_CELLS = 2000
LONGEST_TEXT = 200
# No address space is larger.
MOST_BYTES = 1 << 47


class CensusFacts:
    """The last census of each cell.

    The key is the agent's number of the cell, 0 before the first cell.
    """

    def __init__(self) -> None:
        self._by_cell: dict[int, dict[str, Any]] = {}

    def take(self, fact: dict[str, Any]) -> None:
        """Store a report. Raises TypeError, KeyError and similar for an invalid one."""
        number = int(fact["cell"])
        _census(fact, None, lambda _number: None)
        stored = self._by_cell.get(number)
        # A census that ran out of time may have seen less.
        if stored is not None and not fact["finished"] and fact["total"] < stored["total"]:
            return
        if stored is not None or len(self._by_cell) < MOST_CELLS:
            self._by_cell[number] = fact

    def all(self, index_of: Callable[[int], int | None]) -> tuple[Census, ...]:
        """Return all censuses, the earliest first."""
        return tuple(
            _census(fact, index_of(number) if number else None, index_of)
            for number, fact in sorted(self._by_cell.items())
        )


def _census(
    fact: dict[str, Any], cell: int | None, index_of: Callable[[int], int | None]
) -> Census:
    rows = tuple(_row(row, index_of) for row in list(fact["census"])[:MOST_ROWS])
    return Census(
        cell=cell,
        memory=_size(fact["memory"]),
        total=max(_size(fact["total"]), sum(row.bytes for row in rows)),
        complete=fact["complete"] is True,
        finished=fact["finished"] is True,
        settled=fact["settled"] is True,
        rows=tuple(sorted(rows, key=lambda row: -row.bytes)),
        lines=tuple(
            line
            for line in (_line(line, index_of) for line in list(fact["lines"])[:MOST_ROWS])
            if line.sites
        ),
    )


def _line(line: list[Any], index_of: Callable[[int], int | None]) -> CensusLine:
    size, frames = line
    sites = (
        CensusSite(cell=cell, line=int(number), function=_text(function))
        for function, number, cell_number in list(frames)[:MOST_SITES]
        if (cell := index_of(int(cell_number))) is not None and int(number) > 0
    )
    return CensusLine(bytes=_size(size), sites=tuple(sites))


def _row(row: list[Any], index_of: Callable[[int], int | None]) -> CensusRow:
    name, kind, size, summary, number = row
    return CensusRow(
        name=_text(name),
        type=_text(kind),
        bytes=_size(size),
        summary=_text(summary),
        cell=index_of(int(number)) if number else None,
    )


def _text(value: Any) -> str:
    return str(value)[:LONGEST_TEXT]


def _size(value: Any) -> int:
    return min(max(0, int(value)), MOST_BYTES)
