"""Runs a notebook several times and finds the cells whose results differ (``--repeat``)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from msgspec.structs import replace

from safe_exec.model.verdict import CellStatus, FlakyCell, Verdict
from safe_exec.notebook.comparison import ComparisonRules, differences

if TYPE_CHECKING:
    from safe_exec.trial.request import Cancellation
    from safe_exec.workflows.job import PreparedJob


class FinishedRun(NamedTuple):
    """The verdict of a run, and the notebook with its outputs."""

    verdict: Verdict
    node: Any


async def repeated(
    prepared: PreparedJob, first: FinishedRun, cancellation: Cancellation
) -> Verdict:
    """Run the notebook again as often as its job says.

    Return the first verdict with flaky cells added. Each run has a kernel of its own, in the same
    folder. A signal ends the repetition.
    """
    from safe_exec.workflows.prepare import prepare
    from safe_exec.workflows.run import run_undocumented

    job = replace(prepared.job, repeat=1, keep_going=False, writes=False, comparison=None, sinks=())
    runs: list[FinishedRun] = []
    while len(runs) < prepared.job.repeat - 1 and not cancellation.signals:
        runs.append(FinishedRun(*await run_undocumented(prepare(job), cancellation=cancellation)))
    if cancellation.signals:
        # The interrupted run says nothing about the notebook.
        runs = runs[:-1]
    cells = flaky_cells(first, runs, prepared.job.comparison or ComparisonRules())
    warnings = tuple(f"flaky: code cell {cell.code_index + 1}: {cell.summary}" for cell in cells)
    return replace(
        first.verdict,
        runs=len(runs) + 1,
        flaky_cells=cells,
        warnings=(*first.verdict.warnings, *warnings),
    )


def flaky_cells(
    first: FinishedRun, others: Sequence[FinishedRun], rules: ComparisonRules
) -> tuple[FlakyCell, ...]:
    """Return the cells whose status or outputs differ from those of the first run."""
    cells = []
    for position, record in enumerate(first.verdict.cells):
        if record.status is CellStatus.SKIPPED:
            continue
        counts: Counter[str] = Counter()
        for run in others:
            other = run.verdict.cells[position]
            if other.status is not record.status:
                counts[
                    f"{other.status.value.replace('_', ' ')} instead of {record.status.value}"
                ] += 1
                continue
            stored, new = first.node.cells[record.index], run.node.cells[record.index]
            counts.update(d.summary for d in differences(stored, new.outputs, rules))
        if counts:
            total = len(others)
            summary = ", ".join(f"{text} in {n} of {total} repeats" for text, n in counts.items())
            cells.append(
                FlakyCell(index=record.index, code_index=record.code_index, summary=summary)
            )
    return tuple(cells)
