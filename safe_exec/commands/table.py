"""What ``doctor`` and ``limits`` print alike: aligned columns, marks, labelled lines. Imports model and the terminal's style."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence

from safe_exec.model import Enforcement, Mechanism
from safe_exec.reports.terminal import Style
from safe_exec.reports.text import display_width, one_line

HARD, SOFT, NOTHING, PLAIN = "✓", "~", "✗", "·"
_COLOURS = {HARD: "good", SOFT: "warn", NOTHING: "bad", PLAIN: "dim"}
_GAP = "  "


def mark(held: Enforcement) -> str:
    """The sign of how a limit is held: by the system's kernel, more weakly, by nothing, or by the runner as it must be."""
    if held.by is Mechanism.NONE:
        return NOTHING
    if held.by is Mechanism.RUNNER:
        return PLAIN
    return HARD if held.hard else SOFT


def table(rows: Sequence[Sequence[str]], style: Style, indent: str = "  ") -> Iterator[str]:
    """The rows in columns, signs painted; the last column is wrapped below itself where the line is too short."""
    # Signs and text grow where the encoding has no signs: fitted before they are measured.
    cells = [[style.fit(cell) for cell in row] for row in rows]
    signs = {style.fit(sign): colour for sign, colour in _COLOURS.items()}
    widths = [max(map(display_width, column)) for column in zip(*(row[:-1] for row in cells), strict=True)]
    for row in cells:
        fixed = [cell + " " * (width - display_width(cell)) for cell, width in zip(row, widths, strict=False)]
        left = len(indent) + sum(widths) + len(_GAP) * len(widths)
        painted = [style.paint(signs[cell.strip()], cell) if cell.strip() in signs else cell for cell in fixed]
        last = textwrap.wrap(row[-1], max(style.width - left, 24), break_on_hyphens=False) or [""]
        yield (indent + _GAP.join((*painted, last[0]))).rstrip()
        yield from (" " * left + line for line in last[1:])


def labelled(label: str, words: str, style: Style, width: int = 12) -> Iterator[str]:
    """A line under a label in the left margin, wrapped."""
    lines = textwrap.wrap(one_line(words), max(style.width - width - 2, 24), break_on_hyphens=False)
    for row, line in enumerate(lines):
        name = label if row == 0 else ""
        yield f"  {style.paint('dim', name)}{' ' * (width - len(name))}{line}"


def write(lines: Iterable[str], style: Style) -> None:
    """Print the lines as the standard output can show them."""
    sys.stdout.write("".join(f"{style.fit(line)}\n" for line in lines))
    sys.stdout.flush()
