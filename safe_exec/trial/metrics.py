"""Records the figures of a run: cells, samples, counters. Pure.

Imports model and the meter's types.

Memory means unreclaimable memory if the system reports it. A figure that nobody measured stays
``None``.
"""

from __future__ import annotations

from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from safe_exec.model.verdict import CellRecord, CellStatus, Timeline
from safe_exec.sandbox.usage.meter import Counters, Reading
from safe_exec.trial.profile import TimeProfile

# More points than a chart has pixels would only make the verdict larger.
TIMELINE_POINTS = 500


class _Sample(Struct, frozen=True, kw_only=True):
    seconds: float
    memory: int | None
    cpu: float | None
    cell: int


class MetricsRecorder:
    """Records figures while a trial runs; read only afterwards."""

    def __init__(self, records: dict[int, CellRecord], started: float) -> None:
        self.records = records
        self.started = started
        self.samples: list[_Sample] = []
        self.profile = TimeProfile()
        self.counters = Counters()
        self.last_run: int | None = None
        self.cell_of_first_oom: int | None = None
        self.ready_at: float | None = None
        self.tasks_peak: int | None = None
        self.memory_last: int | None = None
        self.cpu_last: float | None = None
        self.oom_before = 0
        self.oom_cell = 0
        self.oom_by_cell: dict[int, int] = {}
        self.highest: Reading = Reading()
        self.upper_bound = False
        self._at_start: Reading | None = None
        self.wall_seconds: float | None = None

    @classmethod
    def for_notebook(cls, node: Any, started: float) -> MetricsRecorder:
        """Create a recorder with one record, marked as not run, for each code cell."""
        records: dict[int, CellRecord] = {}
        for index, cell in enumerate(node.cells):
            if cell.cell_type == "code":
                records[index] = CellRecord(
                    index=index,
                    code_index=len(records),
                    id=cell.get("id"),
                    status=CellStatus.NOT_RUN,
                )
        return cls(records, started)

    def code_index(self, index: int) -> int:
        """Return the position of a cell among the code cells."""
        return self.records[index].code_index

    def ready(self, moment: float) -> None:
        """Record when the kernel answered for the first time."""
        self.ready_at = moment

    def skip(self, index: int) -> None:
        """Mark a cell as skipped."""
        self.records[index] = replace(self.records[index], status=CellStatus.SKIPPED)

    def begin(self, index: int, moment: float, reading: Reading | None) -> None:
        """Record the start of a cell."""
        self._at_start = reading
        self.last_run = index
        # The memory at the start is a lower bound of the cell's peak.
        peak = reading.memory if reading else None
        self.records[index] = replace(self.records[index], started=moment, memory_peak=peak)
        if reading:
            self._keep(reading)

    def begin_again(self) -> None:
        """Forget the peaks and counts of a dead kernel that a copy of it did not reach."""
        self.counters = Counters()
        self.cell_of_first_oom = None
        self.oom_before = self.oom_cell = 0
        self.oom_by_cell.clear()
        self.highest, self.upper_bound = Reading(), False
        self.samples.clear()
        if self.last_run is not None:
            record = self.records[self.last_run]
            self.records[self.last_run] = replace(record, memory_peak=None)

    def sample(self, moment: float, reading: Reading, index: int | None) -> None:
        """Record a sample taken during the run."""
        cell = -1 if index is None else index
        self.samples.append(
            _Sample(seconds=moment, memory=reading.memory, cpu=reading.cpu_seconds, cell=cell)
        )
        # Bounds the memory of a long run; thinning keeps the peaks.
        if len(self.samples) > 8 * TIMELINE_POINTS:
            self.samples = thin(self.samples, 4 * TIMELINE_POINTS)
        self._keep(reading)
        if index is not None and index in self.records:
            record = self.records[index]
            self.records[index] = replace(
                record, memory_peak=_most(record.memory_peak, reading.memory)
            )

    def _keep(self, reading: Reading) -> None:
        self.tasks_peak = _most(self.tasks_peak, reading.tasks)
        self.upper_bound = self.upper_bound or reading.upper_bound
        if (reading.memory or 0) > (self.highest.memory or 0):
            self.highest = reading
        # A failed reading must not erase the last known value.
        self.memory_last = reading.memory if reading.memory is not None else self.memory_last
        self.cpu_last = reading.cpu_seconds if reading.cpu_seconds is not None else self.cpu_last

    def end(
        self,
        index: int,
        moment: float,
        status: CellStatus,
        *,
        reading: Reading | None,
        oom_kills: int | None,
        output_bytes: int | None,
        truncated: bool,
    ) -> CellRecord:
        """Record the end of a cell and return its record."""
        record, start = self.records[index], self._at_start
        # The counter is cumulative; the difference belongs to this cell.
        self.oom_cell = max(0, (oom_kills or 0) - self.oom_before)
        if self.oom_cell > 0:
            self.oom_by_cell[index] = self.oom_cell
            if self.cell_of_first_oom is None:
                self.cell_of_first_oom = index
        self.oom_before = max(self.oom_before, oom_kills or 0)
        if reading:
            self._keep(reading)
        end_reading = reading or Reading()
        self.records[index] = replace(
            record,
            status=status,
            seconds=None if record.started is None else moment - record.started,
            cpu_seconds=_difference(end_reading.cpu_seconds, start.cpu_seconds if start else None),
            memory_peak=_most(record.memory_peak, end_reading.memory),
            memory_kept=_difference(end_reading.memory, start.memory if start else None),
            output_bytes=output_bytes,
            output_truncated=truncated,
        )
        self.samples.append(
            _Sample(
                seconds=moment, memory=end_reading.memory, cpu=end_reading.cpu_seconds, cell=index
            )
        )
        return self.records[index]

    def abandon(self, index: int) -> None:
        """Mark a cell as killed if it began and no end was recorded; its output so far remains."""
        record = self.records[index]
        if record.started is not None and record.status is CellStatus.NOT_RUN:
            self.records[index] = replace(record, status=CellStatus.KILLED)

    def raise_peak(self, index: int, memory: int) -> None:
        """Raise a cell's memory peak to a value that a counter, not a sample, reported."""
        self.records[index] = replace(
            self.records[index], memory_peak=_most(self.records[index].memory_peak, memory)
        )

    def close(self, moment: float) -> None:
        """Record the end of the run."""
        self.wall_seconds = moment

    @property
    def memory_peak(self) -> int | None:
        """The highest unreclaimable memory observed."""
        peaks = [s.memory for s in self.samples if s.memory is not None]
        peaks += [r.memory_peak for r in self.records.values() if r.memory_peak is not None]
        return max(peaks, default=None)

    def timeline(self) -> Timeline:
        """Return at most 500 samples in order, with all peaks."""
        points = thin(sorted(self.samples, key=lambda s: s.seconds), TIMELINE_POINTS)
        return Timeline(
            seconds=tuple(round(s.seconds, 4) for s in points),
            memory=tuple(s.memory for s in points),
            cpu=tuple(s.cpu for s in points),
            cell=tuple(s.cell for s in points),
        )


def thin(samples: list[_Sample], most: int) -> list[_Sample]:
    """Reduce the samples to ``most``.

    Of each group of neighbours keep the one with the most memory.
    """
    if len(samples) <= most:
        return samples
    # Rounded up, so that the result never exceeds the maximum.
    size = -(-len(samples) // most)
    groups = [samples[at : at + size] for at in range(0, len(samples), size)]
    return [max(group, key=lambda s: s.memory or 0) for group in groups]


def _most(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else max(a, b)


def _difference(end: Any, start: Any) -> Any:
    return None if end is None or start is None else end - start
