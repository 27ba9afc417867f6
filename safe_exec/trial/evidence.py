"""Collects the observations of a trial into one :class:`Evidence`, with the location in the cell.

It interprets nothing: each figure comes from its most direct source. May import kernel, state and
model.
"""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING

from msgspec.structs import replace

from safe_exec.kernel.allocation_file import Recording
from safe_exec.kernel.fault_report import parse_fault
from safe_exec.kernel.native_stack import native_frames, with_innermost
from safe_exec.model.ending import CellFailed, Ending, TimedOut
from safe_exec.model.evidence import CellLocation, Evidence, FaultReport, Frame, MissedPeak
from safe_exec.sandbox.mechanisms.watchdog import Peaks
from safe_exec.trial import own_process
from safe_exec.trial.crash_site import crash_site, recent_text
from safe_exec.trial.final_output import final_output
from safe_exec.trial.missed_peak import missed_peak
from safe_exec.trial.refusals import isolation_conflicts, raised_by
from safe_exec.trial.request import TrialResult

if TYPE_CHECKING:
    from safe_exec.sandbox.usage.meter import Counters
    from safe_exec.trial.request import TrialRequest
    from safe_exec.trial.state import TrialState

# A group that never came this near to its limit cannot have hit it.
NEAR_LIMIT = 0.95
# From this share of the limit on, a sample says who had the memory; a sample of a smaller use says
# nothing of the rest.
NEAR_PEAK = 0.5


def trial_result(
    state: TrialState, ending: Ending, evidence: Evidence, location: CellLocation | None
) -> TrialResult:
    """Return the result of a trial whose kernel's process started."""
    session = state.session
    return TrialResult(
        ending=ending,
        evidence=evidence,
        metrics=state.metrics,
        node=state.request.node,
        location=location,
        hello=session.agent_facts.hello,
        warnings=tuple(state.warnings),
        instrumented=session.instrumented,
    )


def collect_evidence(state: TrialState, ending: Ending) -> tuple[Evidence, CellLocation | None]:
    """Return the evidence of a finished trial, and the location in the current cell."""
    session, metrics, request = state.session, state.metrics, state.request
    ended = session.ended
    fault = _fault(state)
    location = crash_site(state, ending, fault)
    # The keeper read the counters at the death, before it removed the group.
    counters = ended.counters if ended else metrics.counters
    metrics.counters = counters if ended else metrics.counters
    kills = counters.oom_kills
    # The raw charge includes reclaimable page cache.
    peak = _memory_peak(state, kills, counters.memory_peak_raw)
    is_elsewhere = elsewhere(counters, request.limits.memory)
    memory_bound = session.meter.bound_hit() if is_elsewhere else None
    process_bound = session.meter.tasks_bound(request.limits.processes)
    client = session.client
    error = ending.error if isinstance(ending, CellFailed | TimedOut) else None
    current = metrics.records.get(state.current) if state.current is not None else None
    raised = raised_by(state, ending.error) if isinstance(ending, CellFailed) else None
    recording = (
        session.allocations.read(session.agent_facts.code, peak)
        if session.allocations is not None
        else Recording()
    )
    return Evidence(
        exit=ended.status if ended else None,
        termination=ended.reason if ended else None,
        oom_kills=kills,
        oom_kills_cell=metrics.oom_cell,
        oom_kills_in_time=state.oom_kills_in_time,
        oom_kills_earlier=tuple(
            (cell, n) for cell, n in metrics.oom_by_cell.items() if cell != state.current
        ),
        oom_elsewhere=is_elsewhere,
        oom_bound=(str(memory_bound.group), memory_bound.limit) if memory_bound else None,
        oomd_killed=ended.oomd if ended else None,
        process_refusals=counters.fork_refusals,
        process_bound=(str(process_bound[0]), process_bound[1]) if process_bound else None,
        memory_peak=peak,
        memory_peak_raw=counters.memory_peak_raw,
        memory_last=metrics.memory_last,
        memory_children=_children_memory(state),
        memory_kernel=ended.resident_peak if ended else None,
        memory_upper_bound=metrics.upper_bound or _watched(state).upper_bound,
        memory_missed=_missed_peak(state),
        processes_at_timeout=state.tasks_at_timeout,
        crowd_at_timeout=state.crowd_at_timeout,
        processes_peak=counters.tasks_peak or _tasks_peak(state),
        cpu_seconds=counters.cpu_seconds if counters.cpu_seconds is not None else metrics.cpu_last,
        kernel_cpu_seconds=ended.cpu_seconds if ended else None,
        error=error,
        fault=fault,
        handler_replaced=not session.agent_facts.armed,
        caught_signals=ended.caught_signals if ended else None,
        location=location,
        observation=state.observation,
        cell_seconds=current.seconds if current else None,
        cell_output_bytes=current.output_bytes if current else None,
        cell_output_received=client.accounts.received,
        cell_output_age=_age(client.accounts.last),
        cell_output_truncated=client.accounts.truncated,
        output_bytes=None
        if metrics.ready_at is None
        else sum(r.output_bytes or 0 for r in metrics.records.values()),
        exit_caller=session.agent_facts.frames(session.agent_facts.exit_caller),
        exit_request=_exit_request(state),
        remote_hosts=tuple(session.agent_facts.hosts),
        signals_to_keeper=tuple(session.sandbox.signals_to_keeper),
        stderr_tail=ended.stderr if ended else "",
        disk_free=ended.disk_free if ended and ended.disk_free is not None else _disk_free(request),
        open_files=state.open_files,
        memory_maps=state.memory_maps,
        agent=session.instrumented,
        own_actions=own_process.actions(state),
        tracing=session.agent_facts.own_actions.tracing,
        changed_limits=session.changes.limits() if session.changes else (),
        replaced_by=session.changes.executed if session.changes else None,
        kill_command=own_process.command(state),
        died_at=session.died_at,
        overcommit=own_process.overcommit(),
        cell_active=state.cell_active,
        last_words=recent_text(state)[-4000:],
        printed=state.printed,
        stderr_in_time=state.stderr_in_time,
        named_lock=state.named_lock,
        isolation=session.sandbox.isolation,
        raised=raised.errors if raised else (),
        conflicts=isolation_conflicts(state, ending, location),
        volumes=session.volumes.lowest(),
        final_output=final_output(session),
        allocations=recording.lines,
        allocations_error=session.agent_facts.recording_error or recording.error,
        censuses=session.agent_facts.census.all(session.agent_facts.index_of),
    ), location


def evidence_without_kernel(state: TrialState) -> Evidence:
    """Return the evidence of a trial whose kernel's process did not start."""
    sandbox = state.sandbox
    return Evidence(
        signals_to_keeper=tuple(sandbox.signals_to_keeper) if sandbox is not None else (),
        disk_free=_disk_free(state.request),
        overcommit=own_process.overcommit(),
        isolation=sandbox.isolation if sandbox is not None else None,
    )


def _exit_request(state: TrialState) -> tuple[Frame, ...]:
    """Return the stack of the call of ``exit()`` that ended the kernel, if there was one."""
    facts, client = state.session.agent_facts, state.session.client
    exiting_cell = client.asked_to_exit
    rows = next(
        (
            rows
            for number, (_, rows) in facts.exit_requests.items()
            if facts.index_of(number) == exiting_cell
        ),
        [],
    )
    return facts.frames(rows)


def _fault(state: TrialState) -> FaultReport | None:
    session = state.session
    ended = session.ended
    if ended is None:
        return None
    main = session.agent_facts.hello.get("main")
    cells = session.agent_facts.code
    report = parse_fault(
        ended.fault, cells, main, ended.stack_bytes, ended.stack_limit, ended.faulting_thread
    )
    if report is None and ended.status and ended.status.signal == signal.SIGABRT:
        # Py_FatalError writes to the C library's stderr, wherever the fault handler's descriptor
        # is.
        report = parse_fault(recent_text(state), cells, main, None, None)
    if report is not None and session.native is not None:
        python = session.agent_facts.hello.get("python")
        frames = native_frames(session.native, cells, python)
        report = replace(report, native=frames, native_error=session.native.error)
    if report is None:
        return None
    return with_innermost(report, was_to_be_read=session.reads_native)


def _memory_peak(state: TrialState, kills: int | None, raw: int | None) -> int | None:
    """Return the highest unreclaimable memory of the run, in bytes."""
    # When the limit kills a process, everything reclaimable has been reclaimed: then the peak is
    # the raw charge.
    peak, limit = state.metrics.memory_peak, state.request.limits.memory
    watched = _watched(state).memory
    if watched is not None:
        peak = max(peak or 0, watched)
    if kills and raw is not None and limit is not None and raw >= NEAR_LIMIT * limit:
        if state.current is not None:
            state.metrics.raise_peak(state.current, raw)
        return max(raw, peak or 0)
    return peak


def _children_memory(state: TrialState) -> int | None:
    """Return the memory of the kernel's child processes at the peak.

    ``None`` if they were not measured near the peak.
    """
    watched, sampled = _watched(state), state.metrics.highest
    highest = max(
        ((watched.memory, watched.children), (sampled.memory, sampled.children_memory)),
        key=lambda pair: pair[0] or 0,
    )
    limit = state.request.limits.memory
    return highest[1] if limit is None or (highest[0] or 0) >= NEAR_PEAK * limit else None


def _tasks_peak(state: TrialState) -> int | None:
    """Return the most tasks that the samples or the watchdog saw."""
    return max(
        (n for n in (_watched(state).tasks, state.metrics.tasks_peak) if n is not None),
        default=None,
    )


def _watched(state: TrialState) -> Peaks:
    """Return the watchdog's peaks; empty without a watchdog."""
    watchdog = state.session.provisioner.watchdog
    return watchdog.peaks if watchdog is not None else Peaks()


def _missed_peak(state: TrialState) -> MissedPeak | None:
    """Return the peak of memory that the watchdog may have missed."""
    ended = state.session.ended
    if ended is None:
        return None
    waited = [n for n in (ended.resident_peak, ended.orphans_peak) if n is not None]
    return missed_peak(
        _watched(state),
        state.request.limits.memory,
        max(waited, default=None),
        state.kernel_resident_peak,
    )


def elsewhere(counters: Counters, limit: int | None) -> bool | None:
    """Tell whether a limit outside this sandbox was hit."""
    # That is the case if the sandbox's own limit was not hit. If nobody counts hits, it is the case
    # if the sandbox never came near its limit.
    if not counters.oom_kills:
        return None
    if counters.limit_hits is not None:
        return counters.limit_hits == 0
    raw = counters.memory_peak_raw
    return None if raw is None else limit is None or raw < NEAR_LIMIT * limit


def _age(last: float | None) -> float | None:
    return None if last is None else time.monotonic() - last


def _disk_free(request: TrialRequest) -> int | None:
    """Return the free bytes in the folder.

    ``None`` for a limited folder, which only the keeper sees.
    """
    if request.plan.disk is not None:
        return None
    try:
        filesystem = os.statvfs(request.cwd)
        return filesystem.f_bavail * filesystem.f_frsize
    except OSError:
        return None
