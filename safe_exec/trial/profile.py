"""Measures the time of each line of code cells, from samples. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from safe_exec.model.verdict import ProfileLine

# A line is a cell's index in the notebook, and a line in it.
Place = tuple[int, int]

# Of a verdict; the remaining lines took the least time.
MOST_LINES = 200
# Less time than that on a line is noise of the sampling.
LEAST_SECONDS = 0.05


class TimeProfile:
    """Adds up samples of the position of the kernel's main thread."""

    def __init__(self) -> None:
        self._seconds: defaultdict[Place, float] = defaultdict(float)
        self._own_seconds: defaultdict[Place, float] = defaultdict(float)
        self._last_time: float | None = None

    def add(self, time: float, begin: float, stack: Sequence[Place]) -> None:
        """Count the time since the last sample, or since the cell began, for the lines of a stack.

        ``time`` and ``begin`` are in seconds since the run began; the stack is innermost first. An
        empty stack is one whose lines are not known.
        """
        start = max(begin, self._last_time) if self._last_time is not None else begin
        self._last_time = time
        duration = max(0.0, time - start)
        if stack:
            self._own_seconds[stack[0]] += duration
        # A recursive function counts once.
        for place in set(stack):
            self._seconds[place] += duration

    def lines(self, code_indices: Mapping[int, int]) -> tuple[ProfileLine, ...]:
        """Return the lines that took the most time.

        ``code_indices`` maps cell indexes to code cells.
        """
        lines = [
            ProfileLine(
                code_index=code_indices[cell],
                line=line,
                seconds=round(seconds, 3),
                own_seconds=round(self._own_seconds.get((cell, line), 0.0), 3),
            )
            for (cell, line), seconds in self._seconds.items()
            if seconds >= LEAST_SECONDS and cell in code_indices
        ]
        lines.sort(key=lambda row: (-row.seconds, -row.own_seconds, row.code_index, row.line))
        return tuple(lines[:MOST_LINES])
