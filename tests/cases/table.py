"""The table of what the search for culprits took, case by case: shown by pytest at its end, and written into the documentation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

PROPERTY = "culprits"
"""The property of a test's report that holds its row."""
BEGIN, END = "<!-- cases -->", "<!-- end of cases -->"
HEAD = ("case", "cells", "culprits", "trials", "seconds", "first runs", "method", "look first")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One case. Cells are code cells, counted from 0; ``cells`` is how many ran, ``runs`` the seconds in units of the first run.

    ``blamed``: a person would look there first, too.
    """

    case: str
    cells: int
    culprits: tuple[int, ...]
    trials: int
    seconds: float
    runs: float
    method: str
    look_first: int | None
    blamed: bool


def render(rows: Sequence[Row]) -> str:
    """The table in Markdown; cells counted from 1, as in all that is shown to people."""
    lines = [line(HEAD), line(["---"] * len(HEAD))]
    for row in sorted(rows, key=lambda row: row.case):
        first = (
            "" if row.look_first is None else f"{row.look_first + 1}{'' if row.blamed else ' *'}"
        )
        culprits = ", ".join(str(cell + 1) for cell in row.culprits)
        figures = [str(row.trials), f"{row.seconds:.1f}", f"{row.runs:.1f}"]
        lines.append(line([row.case, str(row.cells), culprits, *figures, row.method, first]))
    figures = [
        f"{median(r.trials for r in rows):g}",
        f"{median(r.seconds for r in rows):.1f}",
        f"{median(r.runs for r in rows):.1f}",
    ]
    lines.append(line(["median", f"{median(r.cells for r in rows):g}", "", *figures, "", ""]))
    figures = [
        str(max(r.trials for r in rows)),
        f"{max(r.seconds for r in rows):.1f}",
        f"{max(r.runs for r in rows):.1f}",
    ]
    lines.append(line(["most", str(max(r.cells for r in rows)), "", *figures, "", ""]))
    return "\n".join(lines)


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def write(path: Path, rows: Sequence[Row]) -> None:
    """Put the table between the two marks in a document, in place of what is there."""
    before, begin, rest = path.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{path}: no place for the table between {BEGIN} and {END}")
    path.write_text(f"{before}{BEGIN}\n\n{render(rows)}\n\n{END}{after}")
