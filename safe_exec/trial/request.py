"""The input and the result of a trial. May import model, events, capabilities and plan."""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import Struct, field

from safe_exec.keeper.protocol import KeptFile
from safe_exec.model import events
from safe_exec.model.ending import Ending
from safe_exec.model.evidence import ActivityObservation, CellLocation, Evidence
from safe_exec.model.limits import Limits
from safe_exec.sandbox.host.capabilities import HostCapabilities
from safe_exec.sandbox.plan import SpawnPlan
from safe_exec.trial.metrics import MetricsRecorder

if TYPE_CHECKING:
    from safe_exec.kernel.allocation_file import AllocationFile
    from safe_exec.kernel.coverage_file import CoverageFile
    from safe_exec.kernel.fork_channel import RootHandover
    from safe_exec.kernel.prestart import PrestartedKernel
    from safe_exec.kernel.snapshots import KernelSnapshots, SleepingKernel


class Cancellation:
    """Signals that ask safe-exec to stop.

    A signal that arrives before a trial listens is not lost.
    """

    def __init__(self) -> None:
        self.signals: list[int] = []
        self._listener: Callable[[], None] | None = None

    def arrive(self, number: int) -> None:
        """Record a signal and notify the listener."""
        self.signals.append(number)
        if self._listener is not None:
            self._listener()

    def attach(self, listener: Callable[[], None]) -> None:
        """Call ``listener`` at each further signal, and at once if one has already arrived."""
        self._listener = listener
        if self.signals:
            listener()


class HangRecognition(Struct, frozen=True, kw_only=True):
    """Ends a cell that shows a known hang, before its time is up.

    ``is_known`` tells whether an observation of the running cell shows the known hang. It has to do
    so for ``seconds`` without a break. Then ``goes_on`` is called with the last observation: if it
    returns true, the cell is no longer observed and runs until its time is up.
    """

    cell: int
    is_known: Callable[[ActivityObservation, Any], bool]
    seconds: float
    goes_on: Callable[[ActivityObservation], bool]


class TrialRequest(Struct, frozen=True, kw_only=True):
    """The cells to run, with their limits, sandbox and listeners.

    ``node`` is a stripped notebook; outputs are added to it in place. ``cells`` are the indexes to
    run (``None``: all), and ``cell_limits`` returns the limits of one cell. ``before_cells`` is
    awaited once the kernel is ready. With ``hasty`` a kernel whose cells have run is killed instead
    of shut down, since nobody needs the effects of its exit hooks. With ``with_locals`` the native
    stack of a crash shows local variables. ``early`` is a kernel that was started in advance.
    ``on_message`` is called with each message that changed a cell (the cell's index, and the
    message as it is stored); it must not raise. ``hang`` is a hang to recognise.
    """

    run_id: str
    # A stripped notebook; outputs are added to it in place.
    node: Any
    kernel_name: str
    cwd: Path
    limits: Limits
    machine: HostCapabilities
    plan: SpawnPlan
    # Returns the limits of one cell, which its metadata may change.
    cell_limits: Callable[[Any], Limits]
    largest_output: int | None = None
    allow_errors: bool = False
    # The indexes of the cells to run; None: all.
    cells: frozenset[int] | None = None
    skipped: frozenset[int] = frozenset()
    exit_is_success: bool = True
    # A failing `!command` raises.
    strict_shell: bool = False
    # For a run that only looks for the holders of memory: its kernel takes more time for each
    # census, and records allocations here if it can.
    allocations: AllocationFile | None = None
    # Records which lines of library code run; not for the trials of a search.
    coverage: CoverageFile | None = None
    # For a kernel that runs no cells itself, but answers the culprit search in forks.
    forks: RootHandover | None = None
    # Receives copies of the kernel from before each cell, to go on after one that fails.
    snapshots: KernelSnapshots | None = None
    # The kernel is a copy of an earlier one, from before a cell that failed.
    continues: SleepingKernel | None = None
    # An interactive kernel leaves a copy of itself behind before each cell.
    restorable: bool = False
    # Answers to `input()`; None: it raises.
    stdin_lines: tuple[str, ...] | None = None
    # Cells that may raise, as if they had nbclient's tag for it.
    may_raise: frozenset[int] = frozenset()
    env: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    sink: events.EventSink = lambda _event: None
    started: float = field(default_factory=time.monotonic)
    cancellation: Cancellation = field(default_factory=Cancellation)
    # Awaited once the kernel is ready.
    before_cells: Callable[[], Awaitable[None]] | None = None
    # Awaited with the index of each code cell when it is its turn; tells whether to run it.
    is_wanted: Callable[[int], Awaitable[bool]] | None = None
    # Kill the kernel when its cells have run: nobody needs the effects of its exit hooks.
    hasty: bool = False
    # Show local variables in the native stack of a crash.
    with_locals: bool = False
    hang: HangRecognition | None = None
    # The kernel that was started in advance.
    early: PrestartedKernel | None = None
    # Called with each message that changed a cell. It must not raise.
    on_message: Callable[[int, dict[str, Any]], None] = lambda _index, _message: None


class TrialResult(Struct, frozen=True, kw_only=True):
    """The observations of a trial. ``node`` is the notebook with its outputs.

    ``instrumented`` is true if safe-exec's agent ran inside the kernel.
    """

    ending: Ending
    evidence: Evidence
    metrics: MetricsRecorder
    node: Any
    location: CellLocation | None
    hello: Mapping[str, Any]
    warnings: tuple[str, ...]
    # Whether the agent ran inside the kernel.
    instrumented: bool = True
    # Files that were copied out of a private copy of the folder.
    kept_files: tuple[KeptFile, ...] = ()
    # The copy of the kernel from before the cell that failed; the caller closes it.
    sleeping: SleepingKernel | None = None
    # Why there is none, if one was asked for.
    no_copy: str = ""
