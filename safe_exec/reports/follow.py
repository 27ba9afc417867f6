"""Live output of cells, line by line, for a terminal or a log (``--follow``).

Text of a notebook is only displayed: control characters are escaped, and lines that GitHub would
take for commands are changed. A progress bar shows its last state, and occasionally an earlier one.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable

from safe_exec.model import events
from safe_exec.reports.text import common

# A progress bar that never ends its line is shown again after this time.
PROGRESS_SECONDS = 10.0
# A longer line is shown in pieces, so that a line without an end takes no memory.
LONGEST_LINE = 8192
_CONTROL_SEQUENCE = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
# GitHub finds its older commands anywhere in a line.
_OLD_COMMAND = re.compile(r"##(?=\[)")


# Writes a line, given with its stream in the notebook; headings have an empty one.
LineWriter = Callable[[str, str], None]


class OutputFollower:
    """Follows the output of one notebook: an event sink, and a listener for text.

    ``prefix`` starts each line, as the name of the notebook in a batch. ``github`` puts the output
    of a cell into a log group. ``whole_cells`` writes the lines of a cell when it has ended, all at
    once: groups of several notebooks must not be mixed.
    """

    def __init__(
        self,
        write: LineWriter,
        *,
        prefix: str = "",
        github: bool = False,
        whole_cells: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._write = write
        self._prefix = common.single_line(prefix)
        self._github = github
        self._whole_cells = whole_cells
        self._clock = clock
        self._cells = 0
        self._cell: events.CellStarted | None = None
        self._headed = False
        self._partial: dict[str, str] = {}
        self._last_progress = clock()
        self._group_lines: list[str] = []

    def __call__(self, event: events.Event) -> None:
        """Record the start and the end of a cell."""
        match event:
            case events.RunStarted():
                self._cells = event.code_cells
            case events.CellStarted():
                self._cell, self._headed = event, False
                self._last_progress = self._clock()
            # The run may end without the end of its cell.
            case events.CellFinished() | events.RunFinished():
                self._finish()

    def take(self, _index: int, stream: str, text: str) -> None:
        """Show text that arrived from the running cell."""
        *lines, remainder = (self._partial.get(stream, "") + text).split("\n")
        for line in lines:
            self._line(stream, line)
        while len(remainder) > LONGEST_LINE:
            self._line(stream, remainder[:LONGEST_LINE])
            remainder = remainder[LONGEST_LINE:]
        self._partial[stream] = remainder
        is_progress = "\r" in remainder
        if is_progress and self._clock() - self._last_progress >= PROGRESS_SECONDS:
            self._last_progress = self._clock()
            self._line(stream, remainder)
            # The next state overwrites this one.
            self._partial[stream] = "\r"

    def _finish(self) -> None:
        for stream, text in self._partial.items():
            if text.strip():
                self._line(stream, text)
        self._partial.clear()
        if self._headed and self._github:
            self._put("::endgroup::", "")
        if self._group_lines:
            self._write("\n".join(self._group_lines), "")
            self._group_lines.clear()
        self._cell = None

    def _line(self, stream: str, text: str) -> None:
        if not self._headed:
            self._headed = True
            self._head()
        # A carriage return goes back to the start of the line: only the last state is seen.
        states = [state for state in text.split("\r") if state]
        shown_text = common.printable(_CONTROL_SEQUENCE.sub("", states[-1] if states else ""))
        if self._github:
            # With a bar in front a line is no command of GitHub's.
            self._put("| " + _OLD_COMMAND.sub("# #", shown_text), stream)
        else:
            self._put(f"{self._line_prefix()}{shown_text}", stream)

    def _line_prefix(self) -> str:
        if not self._prefix:
            return ""
        number = "" if self._cell is None else f" [{self._cell.code_index + 1}]"
        return f"{self._prefix}{number}: "

    def _head(self) -> None:
        name = "" if self._cell is None else common.cell_name(self._cell.code_index)
        if self._cells and name:
            name = f"{name}/{self._cells}"
        title = common.SEPARATOR.join(part for part in (self._prefix, name) if part)
        if self._github:
            self._put(f"::group::{title}", "")
        elif not self._prefix:
            self._put(f"--- {title} ---", "")

    def _put(self, line: str, stream: str) -> None:
        if self._whole_cells:
            self._group_lines.append(line)
        else:
            self._write(line, stream)
