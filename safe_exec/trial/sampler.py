"""Samples a running trial ten times a second, for the timeline, the progress display and limits.

Some limits (processor time, endless output) are enforced only by these samples. May import state,
events and model.
"""

from __future__ import annotations

import asyncio
import time

from safe_exec.kernel.session import KernelSession
from safe_exec.model import events
from safe_exec.model.ending import TerminationReason
from safe_exec.model.limits import LimitName
from safe_exec.sandbox.priority import PriorityGuard
from safe_exec.trial.state import TrialState

SAMPLE_SECONDS = 0.1
# Samples between two looks at the sockets.
PEERS_EVERY = 3
# From this share of a limit on it is said to be near.
NEAR = 0.9
# A cell that writes this many times its cap is an endless flood: the run is ended.
FLOOD_FACTOR = 16


def sampled_places(session: KernelSession, number: int) -> list[tuple[int, int]]:
    """Return the lines of cells on the stack of the main thread, innermost first.

    ``number`` is the agent's number of the running cell. If the agent has not sampled the current
    statement yet, the result is the line of that statement.
    """
    page = session.page
    if page is None or not number:
        return []
    note, sample = page.note(), page.sample()
    if note.cell != number or note.finished:
        return []
    if sample.cell == number and sample.line and sample.time >= note.time:
        cell, rows, _ = page.stack()
        frames = session.agent_facts.frames(rows) if cell == number else ()
        places = [(f.cell, f.line) for f in frames if f.cell is not None and f.line is not None]
        if places:
            return places
    index = session.agent_facts.index_of(number)
    return [(index, note.line)] if index is not None and note.line else []


class Sampler:
    """Samples until the kernel is dead or ``run`` is cancelled."""

    def __init__(self, state: TrialState) -> None:
        self.state = state
        self._near: set[LimitName] = set()
        self._output: dict[int, int] = {}

    def note_output(self, index: int, size: int) -> None:
        """Count output; the next sample reports it as one event."""
        self._output[index] = self._output.get(index, 0) + size

    async def run(self) -> None:
        """Take samples until the kernel is dead."""
        session = self.state.session
        # A runner that gets no processor time samples too late to enforce limits.
        guard = PriorityGuard(session.keeper_pid)
        looks = 0
        while not session.died.is_set():
            try:
                self._sample()
            except Exception as error:  # noqa: BLE001
                # One failed sample must not end the sampling: limits depend on it.
                self.state.warn_once(f"usage could not be read: {type(error).__name__}: {error}")
            looks += 1
            # Listing sockets costs more than reading counters.
            if looks % PEERS_EVERY == 0:
                session.find_peers()
                session.note_process()
            ended = time.monotonic()
            await asyncio.sleep(SAMPLE_SECONDS)
            guard.looked(time.monotonic() - ended - SAMPLE_SECONDS)

    def _sample(self) -> None:
        state = self.state
        reading = state.session.meter.read()
        state.metrics.sample(state.now(), reading, state.current)
        self._profile()
        state.session.volumes.measure(own=True)
        for index, size in self._output.items():
            state.sink(events.OutputReceived(time=state.now(), index=index, size=size))
        self._output.clear()
        state.sink(
            events.UsageSampled(
                time=state.now(),
                index=state.current,
                memory=reading.memory,
                cpu_seconds=reading.cpu_seconds,
                processes=reading.tasks,
            )
        )
        limits = state.request.limits
        self._warn_near(LimitName.MEMORY, reading.memory, limits.memory)
        state.check_cpu_time(reading.cpu_seconds)
        self._check_for_flood()

    def _profile(self) -> None:
        """Charge the time since the last call to the lines in the agent's latest sample."""
        state = self.state
        record = state.metrics.records.get(state.current) if state.current is not None else None
        # A process that is held at its fault runs no code.
        if record is not None and record.started is not None and not state.session.is_dying:
            places = sampled_places(state.session, state.number_now())
            state.metrics.profile.add(state.now(), record.started, places)

    def _warn_near(self, name: LimitName, used: float | None, allowed: float | None) -> None:
        state = self.state
        if state.limit is not None or name in self._near:
            return
        if used is not None and allowed and used > NEAR * allowed:
            self._near.add(name)
            state.sink(events.LimitNear(time=state.now(), limit=name, used=used, allowed=allowed))

    def _check_for_flood(self) -> None:
        state = self.state
        client = state.session.client
        written = state.written()
        if state.current is None:
            return
        caps = [(LimitName.CELL_OUTPUT, client.cell_cap), (LimitName.OUTPUT, client.total_cap)]
        # The smaller cap is the one that the cell has exceeded first.
        name, cap = min(
            ((n, c) for n, c in caps if c is not None),
            key=lambda pair: pair[1],
            default=(None, None),
        )
        if name is not None and cap is not None and written > FLOOD_FACTOR * cap:
            state.end_for(name, TerminationReason.OUTPUT, written)
