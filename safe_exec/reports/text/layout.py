"""Lay out text for a terminal with rich: paint, wrap, and align in columns.

rich is imported on first use: the import takes some 18 ms. A run draws with it on a terminal, but
the diagnosis of most failures needs it for nothing else.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING

from safe_exec.reports.text.common import display_width, is_plain

if TYPE_CHECKING:
    from rich.console import Console

STYLES: Mapping[str, str] = {
    "bad": "bold red",
    "good": "bold green",
    "warn": "yellow",
    "dim": "dim",
    "bold": "bold",
}
LEAST_WIDTH = 24
"""The columns that wrapped text gets on any terminal, however narrow."""


def paint(style: str, text: str) -> str:
    """Return ``text`` between the escape sequences of one of ``STYLES``."""
    from rich.style import Style

    return Style.parse(STYLES[style]).render(text)


def wrap(text: str, width: int) -> list[str]:
    """Break ``text`` at spaces into lines of at most ``width`` columns; longer words are split."""
    if display_width(text) <= width:
        return [text] if text.strip() else []
    # rich begins a new line for a word that is longer than a line.
    if is_plain(text) and max(map(len, text.split()), default=0) <= width:
        return textwrap.wrap(text, width, break_on_hyphens=False)
    from rich.text import Text

    lines = Text(text).wrap(_console(width), width, overflow="fold")
    return [line.plain.rstrip() for line in lines if line.plain.strip()]


def columns(
    rows: Iterable[Sequence[str]], styles: Mapping[str, str], *, width: int, colour: bool
) -> Iterator[str]:
    """Yield the lines of a table without borders. Only its last column is wrapped.

    A cell whose text is a key of ``styles`` is painted in that style.
    """
    from rich.table import Table
    from rich.text import Text

    cells = [
        [
            Text(cell, style=STYLES[styles[cell]] if cell in styles else "", overflow="fold")
            for cell in row
        ]
        for row in rows
    ]
    table = Table.grid(padding=(0, 2), pad_edge=False)
    *fixed, last = zip(*cells, strict=True)
    for _ in fixed:
        table.add_column(no_wrap=True)
    # A narrow terminal cuts the lines rather than the columns.
    fixed_width = sum(max(cell.cell_len for cell in column) + 2 for column in fixed)
    table.add_column(min_width=min(LEAST_WIDTH, max(cell.cell_len for cell in last)))
    for row in cells:
        table.add_row(*row)
    console = _console(max(width, fixed_width + LEAST_WIDTH), colour=colour)
    with console.capture() as capture:
        console.print(table)
    yield from (line.rstrip() for line in capture.get().splitlines())


@cache
def _console(width: int, *, colour: bool = False) -> Console:
    from rich.console import Console

    # The caller knows the stream. rich must not look at ours, nor at the environment.
    return Console(
        file=io.StringIO(),
        width=width,
        force_terminal=colour,
        color_system="standard" if colour else None,
        markup=False,
        highlight=False,
        emoji=False,
        _environ={},
    )
