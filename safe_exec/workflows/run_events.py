"""The events of a run that are not those of a trial, and the way of all events to their sinks."""

from __future__ import annotations

import logging
import time

from safe_exec.model import events
from safe_exec.model.events import Event, EventSink
from safe_exec.model.verdict import Verdict
from safe_exec.reports.masking import Mask
from safe_exec.workflows.job import PreparedJob

log = logging.getLogger("safe_exec")


def run_started(prepared: PreparedJob) -> events.RunStarted:
    """Return the first event of a run, which names its notebook and the number of its cells."""
    return events.RunStarted(
        time=time.monotonic() - prepared.started,
        run_id=prepared.run_id,
        notebook=str(prepared.job.path),
        kernel=prepared.kernel_name,
        code_cells=sum(cell.cell_type == "code" for cell in prepared.node.cells),
        limits=prepared.limits.values.as_dict(),
    )


def run_finished(prepared: PreparedJob, verdict: Verdict) -> events.RunFinished:
    """Return the last event of a run, with its status and the kind of its cause."""
    cause = verdict.cause.kind.value if verdict.cause else None
    return events.RunFinished(
        time=time.monotonic() - prepared.started, status=verdict.status, cause=cause
    )


def fan_out(sinks: tuple[EventSink, ...], mask: Mask) -> EventSink:
    """Combine event sinks into one, and mask the secrets in events."""
    # A sink that raises gets no more events: a broken progress display must not cost the run.
    # A copy, because sinks that raise are removed while events arrive.
    live = list(sinks)

    def emit(event: Event) -> None:
        # Masked once for all sinks: events reach log files and terminals.
        event = mask.everywhere(event)
        for sink in tuple(live):
            try:
                sink(event)
            except Exception:
                live.remove(sink)
                log.exception("an event sink failed and gets no more events")

    return emit
