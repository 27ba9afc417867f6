"""Shared output of ``doctor`` and ``limits``: aligned columns, signs, labelled lines."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence

from safe_exec.model.limits import Enforcement, LimitName, Mechanism, Wall
from safe_exec.reports.terminal import Style
from safe_exec.reports.text import layout
from safe_exec.reports.text.common import single_line
from safe_exec.sandbox.advice.fix import Fix

# ``Style.fit`` replaces these by ASCII on terminals that cannot show them.
HARD, SOFT, NOTHING, PLAIN = "✓", "~", "✗", "·"
_COLOURS = {HARD: "good", SOFT: "warn", NOTHING: "bad", PLAIN: "dim"}


def mark(enforcement: Enforcement) -> str:
    """Return the sign for the enforcement of a limit: hard, soft, none, or by the runner."""
    if enforcement.by is Mechanism.NONE:
        return NOTHING
    # Neither strong nor weak: waiting and receiving output need no mechanism of the system.
    if enforcement.by is Mechanism.RUNNER:
        return PLAIN
    return HARD if enforcement.hard else SOFT


def enforcement_columns(enforcement: Enforcement) -> tuple[str, str, str]:
    """Return the columns of an enforcement: mechanism, hard or soft, and its note."""
    if enforcement.by is Mechanism.NONE:
        return "nothing", "", enforcement.note
    return enforcement.by.value, "hard" if enforcement.hard else "soft", enforcement.note


def wall_rows(walls: Mapping[Wall, Enforcement]) -> list[tuple[str, ...]]:
    """Return a row for each wall."""
    # The runner enforces the environment before the kernel starts, so there is no way around it.
    return [
        (
            HARD if enforcement.hard else mark(enforcement),
            wall.value,
            *enforcement_columns(enforcement),
        )
        for wall, enforcement in walls.items()
    ]


def enforcement_document(
    enforcement_by_name: Mapping[LimitName, Enforcement] | Mapping[Wall, Enforcement],
) -> dict[str, dict[str, object]]:
    """Return the enforcement of limits or walls as JSON values."""
    return {
        name.value: {"by": enforcement.by.value, "hard": enforcement.hard, "note": enforcement.note}
        for name, enforcement in enforcement_by_name.items()
    }


def table(rows: Sequence[Sequence[str]], style: Style, indent: str = "  ") -> Iterator[str]:
    """Yield the rows in columns; the last column is wrapped."""
    # ASCII replacements are longer than the signs, so they are inserted before measuring.
    cells = [[style.fit(cell) for cell in row] for row in rows]
    signs = {style.fit(sign): colour for sign, colour in _COLOURS.items()}
    lines = layout.columns(cells, signs, width=style.width - len(indent), colour=style.colour)
    yield from (f"{indent}{line}".rstrip() for line in lines)


def labelled(label: str, text: str, style: Style, width: int = 12) -> Iterator[str]:
    """Yield wrapped lines under a label in the left margin."""
    lines = layout.wrap(single_line(text), max(style.width - width - 2, layout.LEAST_WIDTH))
    for row, line in enumerate(lines):
        name = label if row == 0 else ""
        yield f"  {style.paint('dim', name)}{' ' * (width - len(name))}{line}"


def remedy(names: Sequence[str], reason: str, fixes: Sequence[Fix], style: Style) -> Iterator[str]:
    """Yield the reason for a weakness, and its fixes."""
    label = style.paint("warn", f"to fix {', '.join(names)}")
    yield f"  {label}: {reason}"
    for number, fix in enumerate(fixes):
        # Fixes are alternatives, the best first.
        either = "or " if number and not fix.title.startswith("or ") else ""
        yield f"    {either}{fix.title}{':' if fix.steps else ''}"
        # Never wrapped, because the user copies commands into a shell.
        yield from (f"      {style.paint('bold', step)}" for step in fix.steps)
        if fix.note:
            yield f"      {style.paint('dim', f'({fix.note})')}"


def write(lines: Iterable[str], style: Style) -> None:
    """Print the lines in the colours and characters that ``style`` allows for standard output."""
    sys.stdout.write("".join(f"{style.fit(line)}\n" for line in lines))
    sys.stdout.flush()
