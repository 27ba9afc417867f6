"""The events of a running trial: progress, event log and timeline all read this one stream.

``time`` is seconds since the run began (monotonic). Imports ``model`` only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from msgspec import Struct

from safe_exec.model.ending import TerminationReason
from safe_exec.model.limits import Enforcement, LimitName
from safe_exec.model.verdict import CellStatus, Status


def event_name(kind: str) -> str:
    """Return the name of an event in JSON: ``cell_started`` for ``CellStarted``."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", kind).lower()


class Event(Struct, frozen=True, kw_only=True, tag_field="event", tag=event_name):
    """An event, ``time`` seconds after the run began."""

    time: float


class RunStarted(Event, frozen=True, kw_only=True):
    """The notebook has been read, and its limits are known."""

    run_id: str
    notebook: str
    kernel: str
    code_cells: int
    limits: Mapping[str, int | float | None]


class SandboxBuilt(Event, frozen=True, kw_only=True):
    """The sandbox is ready, and the enforcement of each limit is known."""

    enforcement: Mapping[LimitName, Enforcement]


class KernelStarted(Event, frozen=True, kw_only=True):
    """The kernel process exists, inside its limits."""

    pid: int


class KernelReady(Event, frozen=True, kw_only=True):
    """The kernel answered for the first time."""


class CellStarted(Event, frozen=True, kw_only=True):
    """A code cell was sent.

    ``index`` counts all cells, ``code_index`` the code cells, both from 0.
    """

    index: int
    code_index: int
    source: str


class OutputReceived(Event, frozen=True, kw_only=True):
    """``size`` bytes of a cell's output arrived since the last such event."""

    index: int
    size: int


class UsageSampled(Event, frozen=True, kw_only=True):
    """The sandbox's unreclaimable memory, processor seconds and processes; ``None``: unknown."""

    index: int | None
    memory: int | None
    cpu_seconds: float | None
    processes: int | None


class LimitNear(Event, frozen=True, kw_only=True):
    """More than nine tenths of a limit are in use; emitted once for each limit."""

    limit: LimitName
    used: float
    allowed: float


class LimitReached(Event, frozen=True, kw_only=True):
    """A limit was reached."""

    limit: LimitName
    used: float | None
    allowed: float


class Interrupted(Event, frozen=True, kw_only=True):
    """The kernel was asked to interrupt the cell."""

    index: int | None


class Killed(Event, frozen=True, kw_only=True):
    """safe-exec is about to kill the process tree for this reason."""

    reason: TerminationReason


class KernelEnded(Event, frozen=True, kw_only=True):
    """The kernel process ended; ``status`` is its raw wait status, if known."""

    status: int | None
    # Whether safe-exec had asked it to end.
    expected: bool


class CellFinished(Event, frozen=True, kw_only=True):
    """A code cell ended."""

    index: int
    code_index: int
    status: CellStatus
    seconds: float | None
    cpu_seconds: float | None
    memory_peak: int | None
    memory_kept: int | None


class Warned(Event, frozen=True, kw_only=True):
    """A warning that does not end the run."""

    message: str


class SearchStarted(Event, frozen=True, kw_only=True):
    """The culprit search begins, with ``cells`` candidates and ``budget`` seconds."""

    cells: int
    budget: float


class SearchTrialStarted(Event, frozen=True, kw_only=True):
    """Trial ``number`` (from 1) of the search runs the cells with these indexes."""

    number: int
    cells: tuple[int, ...]


class SearchTrialFinished(Event, frozen=True, kw_only=True):
    """A trial of the search ended with ``fail`` (the same failure), ``pass`` or ``unresolved``.

    ``left`` is the number of cells that may still be culprits, ``best`` the smallest failing set so
    far.
    """

    number: int
    answer: str
    seconds: float
    left: int
    best: tuple[int, ...]


class SearchFinished(Event, frozen=True, kw_only=True):
    """The search is over; ``cells`` are the culprits' indexes."""

    cells: tuple[int, ...]
    minimal: bool


class RunFinished(Event, frozen=True, kw_only=True):
    """The run is over and the verdict is written."""

    status: Status
    cause: str | None


# Takes each event as it happens, on the thread of the run; must be quick and must not raise.
EventSink = Callable[[Event], None]
