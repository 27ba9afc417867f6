"""Show progress on the terminal while a notebook runs.

On a terminal one line is redrawn in place; elsewhere plain lines are written. Progress goes to
standard error, so that standard output holds the diagnosis alone. rich is imported only for a
terminal, because importing it takes longer than running a small notebook.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

from safe_exec.model import events
from safe_exec.model.ending import ExitStatus, TerminationReason
from safe_exec.model.limits import LimitName
from safe_exec.model.verdict import CellStatus
from safe_exec.reports.terminal import Style, is_terminal
from safe_exec.reports.text import common
from safe_exec.units import format_seconds, format_size

if TYPE_CHECKING:
    from rich.live import Live
    from rich.text import Text

# Ten redraws a second look continuous; more would only cost time.
_REFRESH_SECONDS = 0.1
_SLOW_CELL_SECONDS = 1.0
_BAR_WIDTH = 12
_SEARCH_LINE_SECONDS = 10.0
_TICK_SECONDS = 0.5
_SEARCH_INDENT = " " * 8


class _Search:
    """The state of a search for culprits, updated from its events."""

    def __init__(self, started: events.SearchStarted, code_indices: dict[int, int]) -> None:
        self._began, self._budget = started.time, started.budget
        self._code_indices = code_indices
        self._cells_left = started.cells
        self._last_news = started.time
        self._trial = 0
        self._best: tuple[int, ...] = ()
        self.running = True
        self.news = False

    def take(self, event: events.Event) -> None:
        match event:
            case events.SearchTrialStarted():
                self._trial = event.number
            case events.SearchTrialFinished():
                # A line is due if the set has become smaller, and otherwise every ten seconds as a
                # sign of life.
                self.news = (
                    event.best != self._best or event.time - self._last_news >= _SEARCH_LINE_SECONDS
                )
                self._last_news = event.time if self.news else self._last_news
                self._trial, self._cells_left, self._best = event.number, event.left, event.best
            case events.SearchFinished():
                self._best, self.running = event.cells, False

    def doing(self) -> str:
        """Describe the search: ``trial 4 · 5 cells left · best: code cells 1 + 3 + 7``."""
        if not self.running:
            return self._names(self._best) if self._best else "no culprits found"
        return common.SEPARATOR.join(part for part in (self.stage(), self.best()) if part)

    def stage(self) -> str:
        return f"trial {max(1, self._trial)}{common.SEPARATOR}{common.counted(self._cells_left, 'cell')} left"

    def best(self) -> str:
        return f"best: {self._names(self._best)}" if self._best else ""

    def elapsed(self, time: float) -> str:
        """Describe the time spent: ``12 s of 60 s``."""
        elapsed = _whole(max(0.0, time - self._began))
        return f"{elapsed} of {_whole(self._budget)}" if math.isfinite(self._budget) else elapsed

    def result(self, event: events.SearchFinished) -> str:
        minimal = "" if event.minimal or not event.cells else "not known to be minimal"
        outcome = f"culprits: {self._names(event.cells)}" if event.cells else "no culprits found"
        parts = (
            outcome,
            minimal,
            common.counted(self._trial, "trial"),
            format_seconds(max(0.0, event.time - self._began)),
        )
        return common.SEPARATOR.join(part for part in parts if part)

    def _names(self, indices: Iterable[int]) -> str:
        """Name the cells with these indexes; the numbers of code cells come from the first run."""
        code = [self._code_indices.get(index) for index in indices]
        numbers = [index for index in code if index is not None]
        return (
            common.cell_sum(numbers)
            if len(numbers) == len(code)
            else common.counted(len(code), "cell")
        )


def _whole(seconds: float) -> str:
    """Format whole seconds, so that a counting display does not jitter; minutes from ten on."""
    return f"{seconds:.0f} s" if seconds < 600 else format_seconds(seconds)  # noqa: PLR2004


class Situation:
    """The state of a run, updated from its events."""

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
        self.search: _Search | None = None
        self._code_indices: dict[int, int] = {}
        self._cpu_sample: tuple[float, float] | None = None

    def take(self, event: events.Event) -> None:
        """Update the state from an event."""
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
                # Kept for the search, whose events name cells by their index in the notebook.
                self._code_indices[event.index] = event.code_index
            case events.SearchStarted():
                self.search = _Search(event, self._code_indices)
            case events.UsageSampled():
                self._sample(event)
        if self.search is not None:
            self.search.take(event)

    def _sample(self, event: events.UsageSampled) -> None:
        self.memory = event.memory
        if event.cpu_seconds is None:
            return
        if self._cpu_sample is not None and event.time > self._cpu_sample[0]:
            previous_time, used = self._cpu_sample
            # The counter of a new kernel starts at zero, so a difference may be negative.
            self.cpu_share = max(0.0, event.cpu_seconds - used) / (event.time - previous_time)
        self._cpu_sample = (event.time, event.cpu_seconds)

    def cell_of(self, code_index: int) -> str:
        """Name a cell and its position: ``code cell 3/7``."""
        return (
            f"{common.cell_name(code_index)}/{self.cells}"
            if self.cells
            else common.cell_name(code_index)
        )

    def where(self) -> str:
        """Name the running cell, or the kernel before the first cell."""
        return common.cell_name(self.cell.code_index) if self.cell is not None else "the kernel"

    def doing(self) -> str:
        """Describe the running cell with its first line of source, or the state of the search."""
        if self.search is not None:
            return f"search  {self.search.doing()}"
        if self.cell is None:
            return (
                f"kernel {common.single_line(self.kernel)} is ready"
                if self.ready
                else "starting the kernel"
            )
        return f"{self.cell_of(self.cell.code_index)}  {first_line(self.cell.source)}"

    def figures(self, since: float = 0.0) -> str:
        """Describe time, memory and processors of the running cell.

        Unmeasured figures are left out. During a search, describe only the time spent. ``since`` is
        the time since the last event in seconds.
        """
        if self.search is not None:
            return self.search.elapsed(self.time + since) if self.search.running else ""
        return "  ".join(part for part in (format_seconds(self.elapsed()), self.usage()) if part)

    def usage(self) -> str:
        """Describe memory and processors of the running cell; unmeasured figures are left out."""
        parts = [self._memory()]
        if self.cpu_share is not None:
            parts.append(f"cpu {self.cpu_share:.0%}")
        return "  ".join(part for part in parts if part)

    def elapsed(self) -> float:
        """Return the seconds since the cell started, or since the start of the run."""
        return max(0.0, self.time - (self.cell.time if self.cell is not None else 0.0))

    def _memory(self) -> str:
        if self.memory is None:
            return ""
        if not self.memory_limit:
            return format_size(self.memory)
        # Memory may exceed its limit for a moment with a watchdog, so the bar is capped.
        full = round(_BAR_WIDTH * min(1.0, self.memory / self.memory_limit))
        bar = "█" * full + "░" * (_BAR_WIDTH - full)
        return f"{bar} {format_size(self.memory)}/{format_size(self.memory_limit)}"


def first_line(source: str) -> str:
    """Return the first line of a cell that is neither empty nor a comment."""
    lines = [common.code_line(line) for line in source.split("\n")]
    return next((line for line in lines if line and not line.startswith("#")), lines[0])


def notable(event: events.Event, situation: Situation) -> str | None:
    """Return the line for an event that every user should see, or ``None``."""
    match event:
        case events.LimitNear():
            name, used, allowed = _amounts(event.limit, event.used, event.allowed)
            return f"{name} near its limit in {situation.where()}: {used} of {allowed}"
        case events.LimitReached():
            name, used, allowed = _amounts(event.limit, event.used, event.allowed)
            return f"{name} limit reached in {situation.where()}: {used or 'all'} of {allowed}"
        case events.Interrupted():
            return f"interrupting {situation.where()} after {format_seconds(situation.elapsed())}"
        case events.Killed() if event.reason is not TerminationReason.SHUTDOWN:
            return f"ending the kernel: {event.reason.value.replace('_', ' ')}"
        case events.KernelEnded(expected=False) if (
            not situation.killed
        ):  # it is no news that our own kill worked
            outcome = (
                str(ExitStatus(event.status))
                if event.status is not None
                else "exit status not known"
            )
            return (
                f"the kernel died in {situation.where()}: {outcome}"
                if situation.cell is not None
                else f"the kernel died: {outcome}"
            )
    return None


def _amounts(limit: LimitName, used: float | None, allowed: float) -> tuple[str, str, str]:
    name = limit.value.replace("_", " ")
    return (
        name,
        "" if used is None else common.quantity(limit, used),
        common.quantity(limit, allowed),
    )


def plain_line(event: events.Event, situation: Situation) -> str | None:
    """Return the additional line that a log file gets for this event; ``None`` for most events."""
    match event:
        case events.KernelReady():
            return f"kernel {common.single_line(situation.kernel)} ready after {format_seconds(event.time)}"
        case events.CellFinished():
            # A log of a notebook with a thousand fast cells has to stay readable.
            slow = event.seconds is not None and event.seconds > _SLOW_CELL_SECONDS
            return (
                _finished(event, situation)
                if slow or event.status in (CellStatus.FAILED, CellStatus.KILLED)
                else None
            )
        case events.SearchStarted():
            budget = f" (budget {_whole(event.budget)})" if math.isfinite(event.budget) else ""
            return f"searching for the culprits among {common.counted(event.cells, 'code cell')}{budget}"
        case events.SearchTrialFinished() if situation.search is not None and situation.search.news:
            return common.SEPARATOR.join((situation.doing(), situation.figures()))
        case events.SearchFinished() if situation.search is not None:
            return situation.search.result(event)
    return None


def _finished(event: events.CellFinished, situation: Situation) -> str:
    parts = [f"{situation.cell_of(event.code_index)} {event.status.value}"]
    if event.seconds is not None:
        parts.append(format_seconds(event.seconds))
    if event.memory_peak is not None:
        parts.append(f"peak {format_size(event.memory_peak)}")
    return common.SEPARATOR.join(parts)


class Progress:
    """An event sink that shows the run on ``stream``; a context manager.

    The line is redrawn with events, at most ten times a second, and during a search by the event
    loop. There is no thread, so nothing draws while the program exits. Never raises: after an error
    the stream is not written to again.
    """

    def __init__(
        self, stream: TextIO, *, quiet: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream = stream
        self._style = Style.of(stream)
        self._clock = clock
        self._situation = Situation()
        self._silent = quiet
        self._live: Live | None = None
        self._last_draw = float("-inf")
        self._last_event = 0.0
        self._ticking = False

    def __enter__(self) -> Self:
        if not self._silent and is_terminal(self._stream):
            self._live = start_live(self._stream)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # Silenced first: later events must not draw on a terminal that was restored.
        live, self._live, self._silent = self._live, None, True
        if live is not None:
            quietly(live.stop)

    def __call__(self, event: events.Event) -> None:
        """Show an event."""
        self._situation.take(event)
        self._last_event = self._clock()
        if not self._silent and not quietly(lambda: self._show(event)):
            # A closed terminal silences the display; the run goes on.
            self._silent = True
        self._keep_ticking()

    def write_line(self, line: str, stream: str) -> None:
        """Write a line of a cell's output above the line that is redrawn, even in quiet mode."""
        quietly(lambda: write_output(self._stream, self._live, self._style, line, stream))

    def _show(self, event: events.Event) -> None:
        line = notable(event, self._situation)
        if self._live is not None:
            self._draw(self._live, line)
            return
        line = line or plain_line(event, self._situation)
        if line is not None:
            self._stream.write(f"{self._style.fit(line)}\n")
            self._stream.flush()

    def _draw(self, live: Live, line: str | None) -> None:
        if line is not None:
            live.console.print(
                self._style.fit(line), style="yellow", markup=False, highlight=False, soft_wrap=True
            )
        if self._clock() - self._last_draw >= _REFRESH_SECONDS:
            self._last_draw = self._clock()
            live.update(self._status_line(live.console.width), refresh=True)

    def _keep_ticking(self) -> None:
        # Trials of a search take seconds and emit few events: the event loop redraws the clock.
        search = self._situation.search
        if (
            self._ticking
            or self._silent
            or self._live is None
            or search is None
            or not search.running
        ):
            return
        try:
            asyncio.get_running_loop().call_later(_TICK_SECONDS, self._tick)
        # Without a running loop the line is redrawn by events alone.
        except RuntimeError:
            return
        self._ticking = True

    def _tick(self) -> None:
        live, self._ticking = self._live, False
        if live is not None and not self._silent:
            self._silent = not quietly(lambda: self._draw(live, None))
        self._keep_ticking()

    def _status_line(self, width: int) -> Text:
        from rich.text import Text

        # Figures keep their place at the right edge while the source on the left changes.
        figures = self._style.fit(self._situation.figures(self._clock() - self._last_event))
        room = max(0, width - common.display_width(figures) - 3)
        doing, below = self._style.fit(self._situation.doing()), ""
        if self._situation.search is not None and self._situation.search.running:
            below = "Ctrl-C keeps the best so far"
            # On a narrow terminal the best set moves to the second line.
            if common.display_width(doing) > room:
                doing = f"search  {self._situation.search.stage()}"
                best = self._situation.search.best()
                below = f"{best}{common.SEPARATOR}Ctrl-C keeps it" if best else below
            below = f"\n{_SEARCH_INDENT}{self._style.fit(below)}"
        doing = common.clip(self._style.fit(doing), room)
        pad = " " * (room - common.display_width(doing) + 2)
        return Text.assemble(
            (doing, "bold"), pad, (figures, "cyan"), (below, "dim"), no_wrap=True, overflow="crop"
        )


def write_output(target: TextIO, live: Live | None, style: Style, line: str, stream: str) -> None:
    """Write a line of a cell's output; ``stream`` is the cell's stream, empty for a heading."""
    fitted_line = style.fit(line)
    if live is None:
        target.write(f"{fitted_line}\n")
        target.flush()
        return
    colour = {"stderr": "yellow", "": "dim"}.get(stream)
    live.console.print(fitted_line, style=colour, markup=False, highlight=False, soft_wrap=True)


def start_live(stream: TextIO) -> Live:
    """Start a line that is redrawn in place and disappears at the end."""
    from rich.console import Console
    from rich.live import Live

    # Output of other code, such as warnings, must not pass through rich's redirection.
    console = Console(file=stream)
    live = Live(
        console=console,
        auto_refresh=False,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    live.start()
    # rich hides the cursor, and a runner that is killed could not show it again.
    console.show_cursor(True)
    return live


def quietly(action: Callable[[], None]) -> bool:
    """Call ``action``; return false if the stream is closed, broken or cannot encode the text."""
    try:
        action()
    except (OSError, ValueError):
        return False
    return True
