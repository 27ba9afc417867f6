"""What a trial is asked, and what it answers. May import model, events, machine and plan."""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import Struct, field

from safe_exec.model import events
from safe_exec.model.ending import Ending
from safe_exec.model.evidence import CellLocation, Evidence
from safe_exec.model.limits import Limits
from safe_exec.sandbox.host.capabilities import HostCapabilities
from safe_exec.sandbox.plan import SpawnPlan
from safe_exec.trial.metrics import MetricsRecorder

if TYPE_CHECKING:
    from safe_exec.kernel.prestart import PrestartedKernel


class Cancellation:
    """Signals that ask us to stop; those that come before a trial listens are not lost."""

    def __init__(self) -> None:
        self.signals: list[int] = []
        self._listener: Callable[[], None] | None = None

    def arrive(self, number: int) -> None:
        """A signal came."""
        self.signals.append(number)
        if self._listener is not None:
            self._listener()

    def attach(self, listener: Callable[[], None]) -> None:
        """Call ``listener`` at each signal from now on, and at once for one that came before."""
        self._listener = listener
        if self.signals:
            listener()


class TrialRequest(Struct, frozen=True, kw_only=True):
    """What to run and how. ``node`` is a stripped notebook; it is filled with outputs in place.

    ``cells`` are the indexes to run (``None``: all), but for the ``skipped``.
    ``exit_is_success``: ``sys.exit(0)`` ends the run as passed. ``cell_limits`` gives the
    limits of one cell. ``before_cells`` is awaited once the kernel is ready. ``hasty``: a
    kernel whose cells are done is killed, not shut down: nobody asks what its exit hooks do.
    ``early`` is the sandbox that was opened ahead. ``on_message`` is called with each message that
    put something into a cell (its index, and what is kept of the message); it must not raise.
    """

    run_id: str
    node: Any
    kernel_name: str
    cwd: Path
    limits: Limits
    machine: HostCapabilities
    plan: SpawnPlan
    cell_limits: Callable[[Any], Limits]
    largest_output: int | None = None
    allow_errors: bool = False
    cells: frozenset[int] | None = None
    skipped: frozenset[int] = frozenset()
    exit_is_success: bool = True
    env: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    sink: events.EventSink = lambda _event: None
    started: float = field(default_factory=time.monotonic)
    cancellation: Cancellation = field(default_factory=Cancellation)
    before_cells: Callable[[], Awaitable[None]] | None = None
    hasty: bool = False
    early: PrestartedKernel | None = None
    on_message: Callable[[int, dict[str, Any]], None] = lambda _index, _message: None


class TrialResult(Struct, frozen=True, kw_only=True):
    """What was observed. ``node`` is the notebook with the outputs gathered; ``instrumented``: code of ours ran in the kernel."""

    ending: Ending
    evidence: Evidence
    metrics: MetricsRecorder
    node: Any
    location: CellLocation | None
    hello: Mapping[str, Any]
    warnings: tuple[str, ...]
    instrumented: bool = True
