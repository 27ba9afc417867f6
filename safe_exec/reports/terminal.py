"""What a person sees on the terminal: the progress while a notebook runs, and the diagnosis after it.

Imports ``model``, ``events``, ``units`` and the shared texts; rich only once there is a terminal to draw on, for it
takes longer to import than a small notebook to run. Progress goes to standard error, the diagnosis to standard output.
"""

from __future__ import annotations

import os
import shutil
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

from safe_exec import events
from safe_exec.model import CellStatus, ExitStatus, LimitName, Status, TerminationReason, Verdict
from safe_exec.reports import text
from safe_exec.units import format_seconds, format_size

if TYPE_CHECKING:
    from rich.live import Live
    from rich.text import Text

_PLAIN_WIDTH = 110
_LABEL_WIDTH = 12
_NOTE_COLUMN = 50
_MOST_FACTS = 4
_STDERR_LINES = 5
_GLYPHS = "✗✓│·…█░"
_ASCII = str.maketrans({"✗": "x", "✓": "ok", "│": "|", "·": "-", "…": "...", "█": "#", "░": "."})
_COLOURS = {"bad": "\x1b[1;31m", "good": "\x1b[1;32m", "warn": "\x1b[33m", "dim": "\x1b[2m", "bold": "\x1b[1m"}
_RESET = "\x1b[0m"


# --- what a stream can show -------------------------------------------------------------------------------------

LEAST_ROOM = 20
"""Columns that a line of source needs to say anything."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Style:
    """What a stream can show: ``width`` in columns, colours or not, and the encoding that all has to fit in."""

    width: int = _PLAIN_WIDTH
    colour: bool = False
    encoding: str = "utf-8"

    @classmethod
    def of(cls, stream: TextIO) -> Style:
        """The style for ``stream``: colours on a terminal only, and never with ``NO_COLOR`` set (no-color.org)."""
        terminal = is_terminal(stream)
        width = shutil.get_terminal_size((_PLAIN_WIDTH, 24)).columns if terminal else _PLAIN_WIDTH
        colour = terminal and not os.environ.get("NO_COLOR")
        return cls(width=max(width, 40), colour=colour, encoding=getattr(stream, "encoding", None) or "utf-8")

    def paint(self, colour: str, words: str) -> str:
        """``words`` in one of our colours, where there are any."""
        return f"{_COLOURS[colour]}{words}{_RESET}" if self.colour and words else words

    def fit(self, line: str) -> str:
        """``line`` with what the encoding lacks replaced: our signs by ASCII ones, the rest by escapes."""
        if not _can_encode(self.encoding, _GLYPHS):
            line = line.translate(_ASCII)
        return line.encode(self.encoding, "backslashreplace").decode(self.encoding)


def is_terminal(stream: TextIO) -> bool:
    """Whether ``stream`` is a terminal that can move its cursor and show colours."""
    try:
        return stream.isatty() and os.environ.get("TERM") != "dumb"
    except (AttributeError, ValueError):  # no real stream, or a closed one
        return False


def _can_encode(encoding: str, words: str) -> bool:
    try:
        words.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


# --- the diagnosis ----------------------------------------------------------------------------------------------


def print_diagnosis(verdict: Verdict, stream: TextIO, style: Style | None = None) -> None:
    """Writes the diagnosis of ``verdict`` to ``stream``; without ``style``, as the stream can show it."""
    shown = style or Style.of(stream)
    stream.write("".join(f"{shown.fit(line)}\n" for line in diagnosis(verdict, shown)))
    stream.flush()


def diagnosis(verdict: Verdict, style: Style) -> Iterator[str]:
    """The diagnosis line by line: headline, line, why, evidence, weak limits, warnings, advice, files."""
    passed = verdict.status is Status.PASSED
    sign = style.paint("good", "✓") if passed else style.paint("bad", "✗")
    yield f"{sign} {style.paint('bold', text.headline(verdict))}"
    yield from _crash_line(verdict, style)
    if verdict.cause is not None and not text.headline_has_summary(verdict):
        yield from _entry("why", [verdict.cause.summary], style)
    yield from _entry("evidence", text.evidence_lines(verdict, _MOST_FACTS), style)
    yield from _entry("stderr", _last_words(verdict), style)
    yield from _entry("weak limit", text.weak_limits(verdict), style, "warn")
    yield from _entry("warning", list(verdict.warnings), style, "warn")
    yield from _entry("next", [verdict.cause.advice] if verdict.cause is not None else [], style)
    yield from _entry("wrote", [text.SEPARATOR.join(_written(verdict))], style)


def _crash_line(verdict: Verdict, style: Style) -> Iterator[str]:
    crash = verdict.crash_cell
    if crash is None:
        return
    head = f"{crash.code_index + 1:>5} │ "
    note = style.paint("dim", text.moment(verdict))
    code = text.code_line(crash.source_line or "")
    room = style.width - len(head) - len(text.moment(verdict)) - 2
    if room < LEAST_ROOM:  # a narrow terminal: the note gets a line of its own
        yield head + text.clip(code, style.width - len(head))
        yield " " * len(head) + note
        return
    code = text.clip(code, room)
    pad = min(room, max(_NOTE_COLUMN - len(head), text.display_width(code))) - text.display_width(code)
    yield f"{head}{code}{' ' * pad}  {note}"


def _entry(label: str, items: list[str], style: Style, colour: str = "dim") -> Iterator[str]:
    """Items under one label in the left margin, wrapped; nothing at all where there are none."""
    indent = 2 + _LABEL_WIDTH
    for number, words in enumerate(words for words in map(text.one_line, items) if words):
        lines = textwrap.wrap(words, max(style.width - indent, 20), break_on_hyphens=False)
        for row, line in enumerate(lines):
            name = label if number == row == 0 else ""
            yield f"  {style.paint(colour, name)}{' ' * (_LABEL_WIDTH - len(name))}{line}"


def _last_words(verdict: Verdict) -> list[str]:
    """The end of the kernel's stderr where it is the best clue there is: nothing ran that could say more."""
    if verdict.status not in (Status.START_FAILED, Status.INTERNAL_ERROR):
        return []
    return [line for line in verdict.stderr_tail.splitlines() if line.strip()][-_STDERR_LINES:]


def _written(verdict: Verdict) -> list[str]:
    """The paths written, as seen from the directory of the run."""
    home = verdict.cwd.rstrip("/") + "/"
    return [text.one_line(path.removeprefix(home)) for path in verdict.outputs.values()]


# --- progress ---------------------------------------------------------------------------------------------------

_REFRESH_SECONDS = 0.1
_SLOW_CELL_SECONDS = 1.0
_BAR_WIDTH = 12


class _Situation:
    """What has been seen of the run so far: folds the events into what a line of progress says."""

    def __init__(self) -> None:
        self.kernel = ""
        self.cells = 0
        self.time = 0.0
        self.cell: events.CellStarted | None = None
        self.ready = False
        self.killed = False
        self.memory: int | None = None
        self.memory_limit: float | None = None
        self.cpu_share: float | None = None
        self._cpu_sample: tuple[float, float] | None = None

    def take(self, event: events.Event) -> None:
        self.time = event.time
        match event:
            case events.RunStarted():
                self.kernel, self.cells = event.kernel, event.code_cells
                self.memory_limit = event.limits.get(LimitName.MEMORY)
            case events.KernelReady():
                self.ready = True
            case events.Killed():
                self.killed = True
            case events.CellStarted():
                self.cell = event
            case events.UsageSampled():
                self._sample(event)

    def _sample(self, event: events.UsageSampled) -> None:
        self.memory = event.memory
        if event.cpu_seconds is None:
            return
        if self._cpu_sample is not None and event.time > self._cpu_sample[0]:
            then, used = self._cpu_sample
            self.cpu_share = max(0.0, event.cpu_seconds - used) / (event.time - then)
        self._cpu_sample = (event.time, event.cpu_seconds)

    def cell_of(self, code_index: int) -> str:
        return f"{text.cell_name(code_index)}/{self.cells}" if self.cells else text.cell_name(code_index)

    def where(self) -> str:
        return text.cell_name(self.cell.code_index) if self.cell is not None else "the kernel"

    def doing(self) -> str:
        """What runs now and its first line of source."""
        if self.cell is None:
            return f"kernel {text.one_line(self.kernel)} is ready" if self.ready else "starting the kernel"
        return f"{self.cell_of(self.cell.code_index)}  {first_line(self.cell.source)}"

    def figures(self) -> str:
        """Time of the cell, memory against its limit, processors in use; only what was measured."""
        parts = [format_seconds(self.spent()), self._memory()]
        if self.cpu_share is not None:
            parts.append(f"cpu {self.cpu_share:.0%}")
        return "  ".join(part for part in parts if part)

    def spent(self) -> float:
        """Seconds since the cell began, or the run where none has."""
        return max(0.0, self.time - (self.cell.time if self.cell is not None else 0.0))

    def _memory(self) -> str:
        if self.memory is None:
            return ""
        if not self.memory_limit:
            return format_size(self.memory)
        full = round(_BAR_WIDTH * min(1.0, self.memory / self.memory_limit))
        bar = "█" * full + "░" * (_BAR_WIDTH - full)
        return f"{bar} {format_size(self.memory)}/{format_size(self.memory_limit)}"


def first_line(source: str) -> str:
    """The first line of a cell that says something."""
    lines = [text.code_line(line) for line in source.split("\n")]
    return next((line for line in lines if line and not line.startswith("#")), lines[0])


def notable(event: events.Event, now: _Situation) -> str | None:
    """The line that stays on the screen for ``event``, with a terminal or without; ``None`` for none."""
    match event:
        case events.LimitNear():
            name, used, allowed = _amounts(event.limit, event.used, event.allowed)
            return f"{name} near its limit in {now.where()}: {used} of {allowed}"
        case events.LimitReached():
            name, used, allowed = _amounts(event.limit, event.used, event.allowed)
            return f"{name} limit reached in {now.where()}: {used or 'all'} of {allowed}"
        case events.Interrupted():
            return f"interrupting {now.where()} after {format_seconds(now.spent())}"
        case events.Killed() if event.reason is not TerminationReason.SHUTDOWN:
            return f"ending the kernel: {event.reason.value.replace('_', ' ')}"
        case events.KernelEnded(expected=False) if not now.killed:  # it is no news that our own kill worked
            how = str(ExitStatus(event.status)) if event.status is not None else "exit status not known"
            return f"the kernel died in {now.where()}: {how}" if now.cell is not None else f"the kernel died: {how}"
    return None


def _amounts(limit: LimitName, used: float | None, allowed: float) -> tuple[str, str, str]:
    name = limit.value.replace("_", " ")
    return name, "" if used is None else text.quantity(limit, used), text.quantity(limit, allowed)


def plain_line(event: events.Event, now: _Situation) -> str | None:
    """What a log without a terminal gets besides: the start of the kernel, and cells that were slow or did not pass."""
    match event:
        case events.KernelReady():
            return f"kernel {text.one_line(now.kernel)} ready after {format_seconds(event.time)}"
        case events.CellFinished():
            slow = event.seconds is not None and event.seconds > _SLOW_CELL_SECONDS
            return _finished(event, now) if slow or event.status in (CellStatus.FAILED, CellStatus.KILLED) else None
    return None


def _finished(event: events.CellFinished, now: _Situation) -> str:
    parts = [f"{now.cell_of(event.code_index)} {event.status.value}"]
    if event.seconds is not None:
        parts.append(format_seconds(event.seconds))
    if event.memory_peak is not None:
        parts.append(f"peak {format_size(event.memory_peak)}")
    return text.SEPARATOR.join(parts)


class Progress:
    """An event sink that shows the run on ``stream``: one line that lives on a terminal, plain lines elsewhere.

    A context manager, which leaves the terminal as it was. There is no thread: the line is drawn anew as events come
    in, ten times a second at most. Never raises: a stream that fails is not written to again.
    """

    def __init__(self, stream: TextIO, *, quiet: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._style = Style.of(stream)
        self._clock = clock
        self._now = _Situation()
        self._silent = quiet
        self._live: Live | None = None
        self._drawn = float("-inf")

    def __enter__(self) -> Self:
        if not self._silent and is_terminal(self._stream):
            self._live = _start_live(self._stream)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        live, self._live, self._silent = self._live, None, True
        if live is not None:
            _quietly(live.stop)

    def __call__(self, event: events.Event) -> None:
        """Show an event; a stream that is gone silences the progress and nothing else."""
        self._now.take(event)
        if not self._silent and not _quietly(lambda: self._show(event)):
            self._silent = True

    def _show(self, event: events.Event) -> None:
        line = notable(event, self._now)
        if self._live is not None:
            self._draw(self._live, line)
            return
        line = line or plain_line(event, self._now)
        if line is not None:
            self._stream.write(f"{self._style.fit(line)}\n")
            self._stream.flush()

    def _draw(self, live: Live, line: str | None) -> None:
        if line is not None:
            live.console.print(self._style.fit(line), style="yellow", markup=False, highlight=False, soft_wrap=True)
        if self._clock() - self._drawn >= _REFRESH_SECONDS:
            self._drawn = self._clock()
            live.update(self._status_line(live.console.width), refresh=True)

    def _status_line(self, width: int) -> Text:
        from rich.text import Text

        figures = self._style.fit(self._now.figures())
        room = max(0, width - text.display_width(figures) - 3)
        doing = text.clip(self._style.fit(self._now.doing()), room)
        pad = " " * (room - text.display_width(doing) + 2)
        return Text.assemble((doing, "bold"), pad, (figures, "cyan"), no_wrap=True, overflow="crop")


def _start_live(stream: TextIO) -> Live:
    from rich.console import Console
    from rich.live import Live

    # No redirection: what else is written belongs to whoever writes it.
    console = Console(file=stream)
    live = Live(console=console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False)
    live.start()
    # A runner that is killed cannot bring a hidden cursor back.
    console.show_cursor(True)
    return live


def _quietly(action: Callable[[], None]) -> bool:
    """Does it; false where the stream is closed, broken or cannot take the text."""
    try:
        action()
    except (OSError, ValueError):
        return False
    return True
