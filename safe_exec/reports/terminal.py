"""Print the diagnosis of a run, with the width, colours and characters that a stream supports.

The diagnosis goes to standard output; ``progress`` writes to standard error before it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import TextIO

from msgspec import Struct

from safe_exec.model.verdict import Status, Verdict
from safe_exec.reports.text import common, culprits, layout, memory, native, profile

# The width of log files and CI consoles, which have no width of their own.
_PLAIN_WIDTH = 110
_LABEL_WIDTH = 12
_INDENT = 2 + _LABEL_WIDTH
_NOTE_COLUMN = 50
_MOST_FACTS = 4
_MOST_FRAMES = 3
_STDERR_LINES = 5
_MOST_DIFFERENCES = 3
_DIFFERENCE_LINES = 12
_ASCII = str.maketrans({"✗": "x", "✓": "ok", "│": "|", "·": "-", "…": "...", "█": "#", "░": "."})


# --- streams --------------------------------------------------------------------------------

LEAST_ROOM = 20
"""The least width for a line of source, in columns."""


class Style(Struct, frozen=True, kw_only=True):
    """The display capabilities of a stream: its width in columns, colours, and its encoding."""

    width: int = _PLAIN_WIDTH
    colour: bool = False
    encoding: str = "utf-8"

    @classmethod
    def of(cls, stream: TextIO) -> Style:
        """Return the style of ``stream``."""
        # Colours are for terminals only, and never with NO_COLOR set (https://no-color.org).
        terminal = is_terminal(stream)
        width = shutil.get_terminal_size((_PLAIN_WIDTH, 24)).columns if terminal else _PLAIN_WIDTH
        colour = terminal and not os.environ.get("NO_COLOR")
        return cls(
            width=max(width, 40),
            colour=colour,
            encoding=getattr(stream, "encoding", None) or "utf-8",
        )

    def paint(self, colour: str, text: str) -> str:
        """Return ``text`` in a colour, if the stream has colours."""
        return layout.paint(colour, text) if self.colour and text and colour else text

    def fit(self, line: str) -> str:
        """Replace characters that the encoding lacks: known signs by ASCII, others by escapes."""
        if not _can_encode(self.encoding, common.SIGNS):
            line = line.translate(_ASCII)
        return line.encode(self.encoding, "backslashreplace").decode(self.encoding)


def is_terminal(stream: TextIO) -> bool:
    """Return whether ``stream`` is a terminal that can move its cursor and show colours."""
    try:
        return stream.isatty() and os.environ.get("TERM") != "dumb"
    # A replaced stream without isatty, or a closed one.
    except (AttributeError, ValueError):
        return False


def _can_encode(encoding: str, text: str) -> bool:
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


# --- the diagnosis --------------------------------------------------------------------------


def print_diagnosis(verdict: Verdict, stream: TextIO, style: Style | None = None) -> None:
    """Write the diagnosis to ``stream``, in the style of the stream unless one is given."""
    style_in_use = style or Style.of(stream)
    stream.write(
        "".join(f"{style_in_use.fit(line)}\n" for line in diagnosis(verdict, style_in_use))
    )
    stream.flush()


def diagnosis(verdict: Verdict, style: Style) -> Iterator[str]:
    """Yield the lines of the diagnosis, from the headline to the written files."""
    passed = verdict.status is Status.PASSED
    sign = style.paint("good", "✓") if passed else style.paint("bad", "✗")
    yield f"{sign} {style.paint('bold', common.headline(verdict))}"
    yield from _crash_line(verdict, style)
    yield from _entry("held by", memory.holder_lines(verdict), style)
    yield from _entry("allocated", memory.allocation_lines(verdict), style)
    yield from _culprits(verdict, style)
    yield from _differences(verdict, style)
    if verdict.cause is not None and not common.headline_has_summary(verdict):
        yield from _entry("why", [verdict.cause.summary], style)
    yield from _entry("time", [profile.summary(verdict)], style)
    yield from _entry("native", [native.summary(verdict)], style)
    yield from _entry("locals", native.locals_lines(verdict, _MOST_FRAMES), style)
    yield from _entry("evidence", common.evidence_lines(verdict, _MOST_FACTS), style)
    for other in verdict.each_failure()[1:]:
        yield from _other_failure(other, style)
    yield from _entry("skipped", common.skipped_reasons(verdict), style)
    yield from _entry("stderr", _last_words(verdict), style)
    yield from _entry("weak limit", common.weak_limits(verdict), style, "warn")
    yield from _entry("weak wall", common.weak_walls(verdict), style, "warn")
    yield from _entry("warning", list(verdict.warnings), style, "warn")
    yield from _entry("next", [verdict.cause.advice] if verdict.cause is not None else [], style)
    yield from _entry("wrote", [common.SEPARATOR.join(_written(verdict))], style)
    # Never wrapped, because the user copies this line into a shell.
    yield from (
        f"{_margin('reproduce', style)}{command}"
        for command in [culprits.reproduce_command(verdict)]
        if command
    )


def _other_failure(verdict: Verdict, style: Style) -> Iterator[str]:
    """Yield a further failure of the run, in fewer lines than the first one."""
    yield f"{style.paint('bad', '✗')} {style.paint('bold', common.headline(verdict))}"
    yield from _crash_line(verdict, style)
    yield from _culprits(verdict, style)
    if verdict.cause is not None and not common.headline_has_summary(verdict):
        yield from _entry("why", [verdict.cause.summary], style)
    command = culprits.reproduce_command(verdict)
    if command:
        yield f"{_margin('reproduce', style)}{command}"


def _differences(verdict: Verdict, style: Style) -> Iterator[str]:
    colours = {"-": "bad", "+": "good", "@": "dim"}
    for title, lines in common.difference_blocks(verdict, _MOST_DIFFERENCES):
        yield from _entry("differs", [title], style)
        for line in lines[:_DIFFERENCE_LINES]:
            text = common.clip(line, style.width - _INDENT)
            yield " " * _INDENT + style.paint(colours.get(line[:1], ""), text)
        if len(lines) > _DIFFERENCE_LINES:
            yield " " * _INDENT + style.paint("dim", f"... {len(lines) - _DIFFERENCE_LINES} more")


def _crash_line(verdict: Verdict, style: Style) -> Iterator[str]:
    # The crash line first, then the functions in other cells that it had called.
    crash = verdict.crash_cell
    # A difference of outputs has no line.
    if crash is not None and not verdict.differences:
        yield from _source_row(crash.code_index, crash.source_line, common.moment(verdict), style)
    numbers = {record.index: record.code_index for record in verdict.cells}
    for frame in common.inner_frames(verdict, _MOST_FRAMES):
        if frame.cell in numbers:
            yield from _source_row(
                numbers[frame.cell], frame.source_line, common.frame_place(frame, verdict), style
            )


def _source_row(code_index: int, source_line: str | None, note: str, style: Style) -> Iterator[str]:
    """Yield a line of a cell with a note beside it, or below it on a narrow terminal."""
    head = f"{code_index + 1:>5} │ "
    # On a narrow terminal code matters more than the note beside it.
    code = common.code_line(source_line or "")
    room = style.width - len(head) - common.display_width(note) - 2
    if room < LEAST_ROOM:
        yield head + common.clip(code, style.width - len(head))
        for line in layout.wrap(note, max(style.width - len(head), LEAST_ROOM)):
            yield " " * len(head) + style.paint("dim", line)
        return
    yield _noted(head, len(head), common.clip(code, room), note, style)


def _noted(head: str, head_width: int, text: str, note: str, style: Style) -> str:
    """Return one line. Its note begins at the note column, or after the text if that is longer."""
    room = style.width - head_width - common.display_width(note) - 2
    pad = min(
        room, max(_NOTE_COLUMN - head_width, common.display_width(text))
    ) - common.display_width(text)
    return f"{head}{text}{' ' * pad}  {style.paint('dim', note)}"


def _culprits(verdict: Verdict, style: Style) -> Iterator[str]:
    """Yield the culprits and the effect of each, or the reason why none are known."""
    search = verdict.culprits
    # Without a search there is nothing to say, not even that no culprits are known.
    if search is None:
        return
    figures, outcome = culprits.figures(search), culprits.outcome(search)
    if not search.cells:
        yield from _entry("search", [f"{outcome}{common.SEPARATOR}{figures}"], style)
        return
    names = culprits.names(search)
    if _INDENT + common.display_width(names) + 2 + common.display_width(figures) <= style.width:
        yield _noted(_margin("caused by", style), _INDENT, names, figures, style)
    else:
        yield from _entry("caused by", [names, figures], style)
    yield from _entry("", [outcome], style)
    others = culprits.others(verdict)
    for culprit in others[: culprits.MOST_SHOWN]:
        yield from _source_row(
            culprit.code_index, culprit.source_line, culprits.note(culprit), style
        )
    if len(others) > culprits.MOST_SHOWN:
        yield f"{'':>5} │ and {len(others) - culprits.MOST_SHOWN} more"
    first = culprits.look_first(verdict)
    if first is not None:
        summary = f"{common.cell_name(first.code_index)}{common.SEPARATOR}{first.role.value}: {culprits.note(first)}"
        yield from _entry("look first", [summary], style)


def _entry(label: str, items: list[str], style: Style, colour: str = "dim") -> Iterator[str]:
    """Yield the items under one label in the left margin, wrapped."""
    for number, text in enumerate(text for text in map(common.single_line, items) if text):
        lines = layout.wrap(text, max(style.width - _INDENT, LEAST_ROOM))
        for row, line in enumerate(lines):
            yield _margin(label if number == row == 0 else "", style, colour) + line


def _margin(label: str, style: Style, colour: str = "dim") -> str:
    return f"  {style.paint(colour, label)}{' ' * (_LABEL_WIDTH - len(label))}"


def _last_words(verdict: Verdict) -> list[str]:
    """Return the last lines of the kernel's stderr if the kernel never started."""
    # In all other cases the cause quotes the relevant line, and stderr is mostly warnings.
    if verdict.status not in (Status.START_FAILED, Status.INTERNAL_ERROR):
        return []
    return [line for line in verdict.stderr_tail.splitlines() if line.strip()][-_STDERR_LINES:]


def _written(verdict: Verdict) -> list[str]:
    """Return the written paths, relative to the directory of the run."""
    return [
        common.single_line(common.path_seen(path, verdict)) for path in verdict.outputs.values()
    ]
