"""What happens while a trial runs, as typed events: progress, the event log and the timeline all read this one stream.

Imports ``model`` only. ``time`` is seconds since the run began (monotonic).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from safe_exec.model.ending import TerminationReason
from safe_exec.model.limits import Enforcement, LimitName
from safe_exec.model.verdict import CellStatus, Status
from safe_exec.records import dataclass


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened ``time`` seconds after the run began."""

    time: float


@dataclass(frozen=True, kw_only=True)
class RunStarted(Event):
    """The notebook is read and its limits are known."""

    run_id: str
    notebook: str
    kernel: str
    code_cells: int
    limits: Mapping[str, int | float | None]


@dataclass(frozen=True, kw_only=True)
class SandboxBuilt(Event):
    """The enclosure stands; what holds each limit is settled."""

    enforcement: Mapping[LimitName, Enforcement]


@dataclass(frozen=True, kw_only=True)
class KernelStarted(Event):
    """The kernel process exists, inside its limits."""

    pid: int


@dataclass(frozen=True, kw_only=True)
class KernelReady(Event):
    """The kernel answered for the first time."""


@dataclass(frozen=True, kw_only=True)
class CellStarted(Event):
    """A code cell was sent. ``index`` counts all cells, ``code_index`` the code cells, both from 0."""

    index: int
    code_index: int
    source: str


@dataclass(frozen=True, kw_only=True)
class OutputReceived(Event):
    """``size`` bytes of output of a cell came in (gathered, not one event a message)."""

    index: int
    size: int


@dataclass(frozen=True, kw_only=True)
class UsageSampled(Event):
    """Unreclaimable memory in bytes, processor seconds and processes of the sandbox; ``None``: not measured."""

    index: int | None
    memory: int | None
    cpu_seconds: float | None
    processes: int | None


@dataclass(frozen=True, kw_only=True)
class LimitNear(Event):
    """More than nine tenths of a limit are used; once for each limit."""

    limit: LimitName
    used: float
    allowed: float


@dataclass(frozen=True, kw_only=True)
class LimitReached(Event):
    """A limit was reached."""

    limit: LimitName
    used: float | None
    allowed: float


@dataclass(frozen=True, kw_only=True)
class Interrupted(Event):
    """The kernel was asked to interrupt the cell."""

    index: int | None


@dataclass(frozen=True, kw_only=True)
class Killed(Event):
    """We are about to kill the tree, for this reason."""

    reason: TerminationReason


@dataclass(frozen=True, kw_only=True)
class KernelEnded(Event):
    """The kernel process ended; ``status`` is its raw wait status where it is known."""

    status: int | None
    expected: bool


@dataclass(frozen=True, kw_only=True)
class CellFinished(Event):
    """A code cell ended."""

    index: int
    code_index: int
    status: CellStatus
    seconds: float | None
    cpu_seconds: float | None
    memory_peak: int | None
    memory_kept: int | None


@dataclass(frozen=True, kw_only=True)
class Warned(Event):
    """Something the user should know that does not end the run."""

    message: str


@dataclass(frozen=True, kw_only=True)
class SearchStarted(Event):
    """The search for culprits begins: ``cells`` code cells may be among them, ``budget`` seconds may be spent."""

    cells: int
    budget: float


@dataclass(frozen=True, kw_only=True)
class SearchTrialStarted(Event):
    """Trial ``number`` (from 1) of the search runs the cells with these indexes."""

    number: int
    cells: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class SearchTrialFinished(Event):
    """A trial of the search ended; ``answer`` is ``fail`` (the same failure), ``pass`` or ``unresolved``.

    ``left`` is how many cells may still be among the culprits, ``best`` the smallest set so far that fails.
    """

    number: int
    answer: str
    seconds: float
    left: int
    best: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class SearchFinished(Event):
    """The search is over; ``cells`` are the culprits' indexes."""

    cells: tuple[int, ...]
    minimal: bool


@dataclass(frozen=True, kw_only=True)
class RunFinished(Event):
    """The run is over and the verdict is written."""

    status: Status
    cause: str | None


EventSink = Callable[[Event], None]
"""Takes each event as it happens, on the thread of the run; must be quick and must not raise."""
