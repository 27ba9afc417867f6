"""Whether two runs failed the same way, and in what they and their surroundings differ. Pure; imports failure and model.

What decides is what decides for the search for culprits: kind of the cause, signal or exit code, crash cell. A line that was sampled and a
peak move a little from run to run: they are told, and make no other failure of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from msgspec import Struct

from safe_exec.experiments.culprits.failure import Failure
from safe_exec.model.limits import LimitName
from safe_exec.model.verdict import CauseKind, Culprit, Verdict

PEAK_SHARE = 0.1
"""Peaks that are no further apart are the same."""
MEMORY = frozenset(
    {CauseKind.OUT_OF_MEMORY, CauseKind.MEMORY_ERROR, CauseKind.WORKER_OUT_OF_MEMORY}
)
Value = str | int | float | None


class Difference(Struct, frozen=True, kw_only=True):
    """Something that is not as it was. ``decides``: it makes another failure of it."""

    what: str
    then: Value
    here: Value
    decides: bool = False


class Agreement(Struct, frozen=True, kw_only=True):
    """Two runs compared. ``cell`` is the ``code_index`` of the cell in the notebook of then in which it happened here."""

    failure: tuple[Difference, ...]
    environment: tuple[Difference, ...]
    cell: int | None

    @property
    def same(self) -> bool:
        """Whether it is the same failure."""
        return not any(difference.decides for difference in self.failure)


def compare(then: Verdict, here: Verdict, cells: Sequence[Culprit] | None = None) -> Agreement:
    """Compare a run with one of before that failed. ``cells`` are those that ``here`` ran alone, where it ran a reproduction."""
    cell = _code_index(here, cells)
    return Agreement(
        failure=tuple(_failures(then, here, cells, cell)),
        environment=tuple(environment_differences(then, here)),
        cell=cell,
    )


def _code_index(here: Verdict, cells: Sequence[Culprit] | None) -> int | None:
    crash = here.crash_cell
    if crash is None or cells is None:
        return None if crash is None else crash.code_index
    return cells[crash.code_index].code_index if crash.code_index < len(cells) else None


def _failures(
    then: Verdict, here: Verdict, cells: Sequence[Culprit] | None, cell: int | None
) -> Iterator[Difference]:
    assert then.cause is not None
    if here.cause is None:
        yield Difference(
            what="status", then=then.status.value, here=here.status.value, decides=True
        )
        return
    was, found = Failure.of(then.cause, 0), Failure.of(here.cause, 0)
    another_form = was.has_form(here.cause)
    for what, before, now in (
        ("cause", was.kind.value, found.kind.value),
        ("signal", was.signal, found.signal),
        ("exit code", was.exit_code, found.exit_code),
    ):
        if before != now:
            yield Difference(what=what, then=before, here=now, decides=not another_form)
    if was.kind is found.kind is CauseKind.EXCEPTION and was.error != found.error:
        yield Difference(what="error", then=was.error, here=found.error, decides=True)
    place = None if then.crash_cell is None else then.crash_cell.code_index
    if place != cell:
        # Heap corruption strikes where the heap happens to lie.
        moved = was.moves and was.is_like(here.cause)
        yield Difference(
            what="code cell", then=_counted(place), here=_counted(cell), decides=not moved
        )
    elif not _same_line(then, here, whole=cells is None):
        yield Difference(what="line", then=_line(then), here=_line(here))
    yield from _peaks(then, here, whole=cells is None)


def _counted(code_index: int | None) -> int | None:
    """As people count."""
    return None if code_index is None else code_index + 1


def _line(verdict: Verdict) -> int | None:
    return verdict.crash_cell.line if verdict.crash_cell is not None else None


def _same_line(then: Verdict, here: Verdict, *, whole: bool) -> bool:
    """By its number, or by its text where the cell may have been made shorter; what is not known is no difference."""
    a, b = then.crash_cell, here.crash_cell
    if a is None or b is None or a.line is None or b.line is None:
        return True
    if whole or a.source_line is None or b.source_line is None:
        return a.line == b.line
    return a.source_line.strip() == b.source_line.strip()


def compares_peaks(then: Verdict, *, whole: bool) -> bool:
    """Whether the peaks of both should be alike: a reproduction does less, unless it is memory that runs out."""
    return whole or (then.cause is not None and then.cause.kind in MEMORY)


def _peaks(then: Verdict, here: Verdict, *, whole: bool) -> Iterator[Difference]:
    a, b = then.usage.memory_peak, here.usage.memory_peak
    if a and b and compares_peaks(then, whole=whole) and abs(a - b) > PEAK_SHARE * a:
        yield Difference(what="memory peak", then=a, here=b)


# --- where they ran ---------------------------------------------------------------------------------------------


def environment_differences(then: Verdict, here: Verdict) -> Iterator[Difference]:
    """What is different around two runs: versions, the system, what holds each limit."""
    a, b = then.environment, here.environment
    for what, before, now in (
        ("safe-exec", then.safe_exec_version, here.safe_exec_version),
        ("python", a.python, b.python),
        ("platform", a.platform, b.platform),
        ("kernel", then.notebook.kernel, here.notebook.kernel),
    ):
        if before != now:
            yield Difference(what=what, then=before, here=now)
    for name in LimitName:
        held, holds = (found.enforcement.get(name) for found in (then, here))
        by, by_now = held.by.value if held else None, holds.by.value if holds else None
        if by != by_now:
            yield Difference(what=f"{name.value} held by", then=by, here=by_now)
    if a.packages is not None and b.packages is not None:
        yield from _packages(a.packages, b.packages)


def _packages(then: Mapping[str, str], here: Mapping[str, str]) -> Iterator[Difference]:
    for name in sorted(then.keys() | here.keys(), key=str.lower):
        if then.get(name) != here.get(name):
            yield Difference(what=name, then=then.get(name), here=here.get(name))
