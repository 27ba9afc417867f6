"""Compares two runs: whether they failed the same way, and how their environments differ.

The comparison uses the criteria of the culprit search: cause kind, signal or exit code, and crash
cell. A sampled line and a memory peak vary from run to run; they are reported as differences but do
not make it another failure. Pure; imports failure and model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from msgspec import Struct

from safe_exec.experiments.culprits.failure import Failure
from safe_exec.model.limits import LimitName
from safe_exec.model.verdict import CauseKind, Culprit, Verdict

# Peaks that are no further apart are the same.
PEAK_SHARE = 0.1
MEMORY = frozenset(
    {CauseKind.OUT_OF_MEMORY, CauseKind.MEMORY_ERROR, CauseKind.WORKER_OUT_OF_MEMORY}
)
Value = str | int | float | None


class Difference(Struct, frozen=True, kw_only=True):
    """One difference between the runs.

    ``then`` is the value of the original run, ``here`` that of the rerun. ``decides`` is true if
    the difference makes the failure another one.
    """

    # The field names are keys of the JSON output of `replay`.
    what: str
    then: Value
    here: Value
    # Whether it makes the failure another one.
    decides: bool = False


class Agreement(Struct, frozen=True, kw_only=True):
    """The comparison of two runs.

    ``cell`` is the ``code_index``, in the original notebook, of the cell that failed in the rerun.
    """

    failure: tuple[Difference, ...]
    environment: tuple[Difference, ...]
    cell: int | None

    @property
    def same(self) -> bool:
        """Whether both runs failed the same way."""
        return not any(difference.decides for difference in self.failure)


def compare(original: Verdict, rerun: Verdict, cells: Sequence[Culprit] | None = None) -> Agreement:
    """Compare a rerun with the original run, which failed.

    ``cells`` are the cells of the original notebook that the rerun executed, if it ran a
    reproduction.
    """
    cell = _code_index(rerun, cells)
    return Agreement(
        failure=tuple(_failures(original, rerun, cells, cell)),
        environment=tuple(environment_differences(original, rerun)),
        cell=cell,
    )


def _code_index(rerun: Verdict, cells: Sequence[Culprit] | None) -> int | None:
    crash = rerun.crash_cell
    # A rerun of the whole notebook has the same cell indexes.
    if crash is None or cells is None:
        return None if crash is None else crash.code_index
    return cells[crash.code_index].code_index if crash.code_index < len(cells) else None


def _failures(
    original: Verdict, rerun: Verdict, cells: Sequence[Culprit] | None, cell: int | None
) -> Iterator[Difference]:
    assert original.cause is not None
    # Without a failure there is nothing else to compare.
    if rerun.cause is None:
        yield Difference(
            what="status", then=original.status.value, here=rerun.status.value, decides=True
        )
        return
    original_failure, rerun_failure = Failure.of(original.cause, 0), Failure.of(rerun.cause, 0)
    another_form = original_failure.has_form(rerun.cause)
    for aspect, original_value, rerun_value in (
        ("cause", original_failure.kind.value, rerun_failure.kind.value),
        ("signal", original_failure.signal, rerun_failure.signal),
        ("exit code", original_failure.exit_code, rerun_failure.exit_code),
    ):
        if original_value != rerun_value:
            yield Difference(
                what=aspect, then=original_value, here=rerun_value, decides=not another_form
            )
    if (
        original_failure.kind is rerun_failure.kind is CauseKind.EXCEPTION
        and original_failure.error != rerun_failure.error
    ):
        yield Difference(
            what="error", then=original_failure.error, here=rerun_failure.error, decides=True
        )
    place = None if original.crash_cell is None else original.crash_cell.code_index
    if place != cell:
        # Heap corruption strikes where the heap happens to lie.
        moved = original_failure.moves and original_failure.is_like(rerun.cause)
        yield Difference(
            what="code cell", then=_counted(place), here=_counted(cell), decides=not moved
        )
    elif not _same_line(original, rerun, whole_notebook=cells is None):
        yield Difference(what="line", then=_line(original), here=_line(rerun))
    yield from _peaks(original, rerun, whole_notebook=cells is None)


def _counted(code_index: int | None) -> int | None:
    """Convert an index to a number counted from 1."""
    return None if code_index is None else code_index + 1


def _line(verdict: Verdict) -> int | None:
    return verdict.crash_cell.line if verdict.crash_cell is not None else None


def _same_line(original: Verdict, rerun: Verdict, *, whole_notebook: bool) -> bool:
    """Compare the lines by number, or by text if the cell may have been shortened.

    An unknown line is no difference.
    """
    a, b = original.crash_cell, rerun.crash_cell
    if a is None or b is None or a.line is None or b.line is None:
        return True
    if whole_notebook or a.source_line is None or b.source_line is None:
        return a.line == b.line
    return a.source_line.strip() == b.source_line.strip()


def compares_peaks(original: Verdict, *, whole_notebook: bool) -> bool:
    """Tell whether the memory peaks are comparable.

    A reproduction executes less, so its peak is comparable only if memory ran out.
    """
    return whole_notebook or (original.cause is not None and original.cause.kind in MEMORY)


def _peaks(original: Verdict, rerun: Verdict, *, whole_notebook: bool) -> Iterator[Difference]:
    a, b = original.usage.memory_peak, rerun.usage.memory_peak
    if (
        a
        and b
        and compares_peaks(original, whole_notebook=whole_notebook)
        and abs(a - b) > PEAK_SHARE * a
    ):
        yield Difference(what="memory peak", then=a, here=b)


# --- where they ran -------------------------------------------------------------------------------


def environment_differences(original: Verdict, rerun: Verdict) -> Iterator[Difference]:
    """Yield the differences in versions, in the system, and in the enforcement of each limit."""
    a, b = original.environment, rerun.environment
    for aspect, original_value, rerun_value in (
        ("safe-exec", original.safe_exec_version, rerun.safe_exec_version),
        ("python", a.python, b.python),
        ("platform", a.platform, b.platform),
        ("kernel", original.notebook.kernel, rerun.notebook.kernel),
    ):
        if original_value != rerun_value:
            yield Difference(what=aspect, then=original_value, here=rerun_value)
    for name in LimitName:
        original_enforcement, rerun_enforcement = (
            verdict.enforcement.get(name) for verdict in (original, rerun)
        )
        original_mechanism, rerun_mechanism = (
            original_enforcement.by.value if original_enforcement else None,
            rerun_enforcement.by.value if rerun_enforcement else None,
        )
        if original_mechanism != rerun_mechanism:
            yield Difference(
                what=f"{name.value} held by", then=original_mechanism, here=rerun_mechanism
            )
    if a.packages is not None and b.packages is not None:
        yield from _packages(a.packages, b.packages)


def _packages(original: Mapping[str, str], rerun: Mapping[str, str]) -> Iterator[Difference]:
    for name in sorted(original.keys() | rerun.keys(), key=str.lower):
        if original.get(name) != rerun.get(name):
            yield Difference(what=name, then=original.get(name), here=rerun.get(name))
