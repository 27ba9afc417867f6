"""Show the progress of a batch: a table of running notebooks, and a line for each finished one.

The table needs a terminal, and rich is imported only then. Everything goes to standard error.
Events arrive on the threads of the notebooks, and the table is drawn on the main thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

from msgspec import Struct

from safe_exec.model import events
from safe_exec.reports.batch.results import UNCHANGED, NotebookResult
from safe_exec.reports.follow import OutputFollower
from safe_exec.reports.progress import Situation, quietly, start_live, write_output
from safe_exec.reports.terminal import Style, is_terminal
from safe_exec.reports.text import common
from safe_exec.units import format_seconds

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table

_GOOD = ("passed", UNCHANGED)
_MOST_PATH = 60


class _Running(Struct, frozen=True, kw_only=True):
    """A running notebook."""

    situation: Situation
    since: float
    attempt: int
    machine: str = ""


class BatchProgress:
    """Shows a batch on ``stream``; a context manager.

    After an error the stream is not used again.
    """

    def __init__(
        self,
        stream: TextIO,
        *,
        quiet: bool = False,
        follow: bool = False,
        github: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._follow, self._github = follow, github
        self._stream = stream
        self._style = Style.of(stream)
        self._clock = clock
        self._silent = quiet
        self._live: Live | None = None
        self._turn = threading.Lock()
        self._running: dict[str, _Running] = {}
        self._machines: dict[str, tuple[int, int]] = {}
        self._total = self._finished_count = self._bad = 0
        self._began = clock()

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
        # Events may still arrive from other threads: they find a display that is switched off.
        live, self._live, self._silent = self._live, None, True
        if live is not None:
            quietly(live.stop)

    def begin(self, total: int, jobs: int) -> None:
        """Start with ``total`` notebooks, at most ``jobs`` at a time (0: a cluster decides)."""
        self._total, self._began = total, self._clock()
        at_a_time = f", {jobs} at a time" if jobs else ""
        self._say(f"{common.counted(total, 'notebook')}{at_a_time}", "dim")

    def note(self, text: str) -> None:
        """Show a message to the user."""
        self._say(f"note: {common.single_line(text)}", "")

    def sink(self, path: str, attempt: int, machine: str = "") -> events.EventSink:
        """Return the sink for one notebook's events; it may be called on any thread."""
        notebook = _Running(
            situation=Situation(), since=self._clock(), attempt=attempt, machine=machine
        )
        with self._turn:
            self._running[path] = notebook
        return notebook.situation.take

    def load(self, machines: Mapping[str, tuple[int, int]]) -> None:
        """Store, for each machine of a cluster, how many notebooks run and how many may run."""
        self._machines = dict(sorted(machines.items()))

    def follower(self, path: str) -> OutputFollower | None:
        """Return a display of a notebook's output; ``None`` if the user does not follow outputs."""
        if not self._follow:
            return None
        # A log group must be written at once: several notebooks run at a time.
        return OutputFollower(
            self._write_line, prefix=path, github=self._github, whole_cells=self._github
        )

    def _write_line(self, line: str, stream: str) -> None:
        quietly(lambda: write_output(self._stream, self._live, self._style, line, stream))

    def finished(self, result: NotebookResult, headline: str) -> None:
        """Show a finished notebook."""
        with self._turn:
            self._running.pop(result.path, None)
        self._finished_count += 1
        good = result.status in _GOOD
        # Retries do not count twice: only the last attempt reaches this method.
        self._bad += not good
        count = f"[{self._finished_count:>{len(str(self._total))}}/{self._total}]"
        self._say(f"{count} {line_of(result, headline)}", "" if good else "bad")

    def draw(self) -> None:
        """Redraw the table."""
        live = self._live
        if live is not None and not self._silent:
            self._silent = not quietly(lambda: live.update(self._table(), refresh=True))

    def _say(self, line: str, colour: str) -> None:
        if not self._silent:
            self._silent = not quietly(
                lambda: self._put(
                    self._style.fit(common.clip(line, 2 * common.HEADLINE_WIDTH)), colour
                )
            )

    def _put(self, line: str, colour: str) -> None:
        if self._live is not None:
            # markup=False: a file name with brackets must not be read as a colour.
            style = {"bad": "bold red", "dim": "dim"}.get(colour)
            self._live.console.print(
                line, style=style, markup=False, highlight=False, soft_wrap=True
            )
        else:
            self._stream.write(f"{line}\n")
            self._stream.flush()

    def _table(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2))
        with self._turn:
            # A copy, because notebooks start and finish on other threads while rich draws.
            running = dict(self._running)
        for path, notebook in running.items():
            attempt = f" (attempt {notebook.attempt})" if notebook.attempt > 1 else ""
            name = common.clip(common.single_line(path), _MOST_PATH) + attempt
            seconds = format_seconds(self._clock() - notebook.since)
            column = (common.single_line(notebook.machine),) if self._machines else ()
            usage = notebook.situation.usage()
            cells = (name, *column, notebook.situation.doing(), seconds, usage)
            table.add_row(
                *(Text(self._style.fit(cell), no_wrap=True, overflow="ellipsis") for cell in cells)
            )
        for machine, (running_count, most) in self._machines.items():
            line = f"{common.single_line(machine)}: {running_count} of {most}"
            table.add_row(Text(self._style.fit(line), style="dim"))
        bad = f", {self._bad} not passed" if self._bad else ""
        elapsed = format_seconds(self._clock() - self._began)
        table.add_row(
            Text(
                self._style.fit(f"{self._finished_count} of {self._total} done{bad}"), style="bold"
            ),
            Text(""),
            Text(elapsed),
        )
        return table


def line_of(result: NotebookResult, headline: str) -> str:
    """Return the line of a finished notebook.

    ``✗ docs/a.ipynb: kernel died in code cell 3 · out of memory``
    """
    sign = "✓" if result.status in _GOOD else "✗"
    parts = [headline or common.single_line(result.error or result.status.replace("_", " "))]
    if result.flaky:
        parts.append(f"flaky: attempt {result.attempts}")
    elif result.attempts > 1:
        parts.append(
            f"the same in {result.attempts} attempts" if result.status not in _GOOD else ""
        )
    return f"{sign} {common.single_line(result.path)}: {common.SEPARATOR.join(part for part in parts if part)}"
