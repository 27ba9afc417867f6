"""Turns a query into the request of a trial: its cells and their deadlines. Pure.

Each cell gets a deadline derived from its earlier run time: a cell that hangs because another one
is missing must not cost the whole cell timeout.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

from msgspec.structs import replace

from safe_exec.experiments.culprits.failure import TIMES
from safe_exec.experiments.culprits.oracle.subject import Subject
from safe_exec.experiments.culprits.protocol import Query
from safe_exec.experiments.rerun import SETTLE_SECONDS
from safe_exec.model.limits import Limits
from safe_exec.trial.request import TrialRequest

# A cell that took t seconds may take so many times t and so much more before a trial is given up.
SLACK_FACTOR, SLACK_SECONDS = 10.0, 5.0
# The least a crash cell is given: what killed it early in the first run may be gone, and what comes
# after takes its time.
CRASH_SECONDS = 10.0

CellLimits = Callable[[Any], Limits]


def request_of(
    subject: Subject, template: TrialRequest, query: Query, other: Any | None
) -> TrialRequest:
    """Return the request of a trial of the query's cells, or of all cells of the notebook ``other``.

    ``template`` has the trial's own sandbox and folder.
    """
    node = copy.deepcopy(subject.node if other is None else other)
    notebook_timeout = template.limits.timeout
    time_budget = max(1.0, query.time_budget - SETTLE_SECONDS)
    timeout = time_budget if notebook_timeout is None else min(notebook_timeout, time_budget)
    return replace(
        template,
        node=node,
        cells=frozenset(query.cells) if other is None else None,
        limits=replace(template.limits, timeout=timeout),
        cell_limits=(
            _with_deadlines(subject, template.cell_limits, node)
            if other is None
            else template.cell_limits
        ),
        started=time.monotonic(),
    )


def deadline_of(subject: Subject, index: int) -> float | None:
    """Return the seconds that a cell may take in a trial; ``None`` keeps its original limit."""
    failure = subject.failure
    if index == failure.cell and failure.kind in TIMES:
        return None
    # Without its killer, the crash cell may run much longer than it did.
    least = CRASH_SECONDS if index == failure.cell else 0.0
    return max(least, SLACK_FACTOR * subject.seconds.get(index, 0.0) + SLACK_SECONDS)


def with_timeout(cell_limits: CellLimits, cell: Any, seconds: float | None) -> CellLimits:
    """Return the limits of cells, with a smaller timeout for one of them."""

    def limits_of(other: Any) -> Limits:
        limits = cell_limits(other)
        if other is not cell or seconds is None or limits.cell_timeout is None:
            return limits
        return replace(limits, cell_timeout=min(limits.cell_timeout, seconds))

    return limits_of


def _with_deadlines(subject: Subject, cell_limits: CellLimits, node: Any) -> CellLimits:
    deadlines = {id(cell): deadline_of(subject, index) for index, cell in enumerate(node.cells)}

    def limits_of(cell: Any) -> Limits:
        limits, deadline = cell_limits(cell), deadlines.get(id(cell))
        if deadline is None or (
            limits.cell_timeout is not None and limits.cell_timeout <= deadline
        ):
            return limits
        return replace(limits, cell_timeout=deadline, interrupt_grace=0.0)

    return limits_of
