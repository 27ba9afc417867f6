"""What probing a limit needs to know of it: its unit, its bounds, how a value is written, which causes are its own. Pure.

Imports model, problem's neighbours threshold, and units.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from msgspec import Struct

from safe_exec.experiments.threshold.search import ProbeOutcome, ProbeProblem
from safe_exec.model.limits import LimitName
from safe_exec.model.verdict import Cause, CauseKind

KIB, MIB = 1 << 10, 1 << 20
PAGE = 4096
FINE = 4.0
"""Values are rounded to a unit so many times finer than the precision, that they can be typed."""

MAYBE = frozenset(
    {
        CauseKind.SEGFAULT,
        CauseKind.ABORT,
        CauseKind.BUS_ERROR,
        CauseKind.STACK_OVERFLOW,
        CauseKind.KILLED,
        CauseKind.TERMINATED,
        CauseKind.UNRESPONSIVE,
        CauseKind.KERNEL_START_FAILED,
        CauseKind.UNKNOWN,
    }
)
"""How programs may end for want of nearly anything: a library that does not look whether malloc gave it something."""


class Scale(Struct, frozen=True, kw_only=True):
    """One limit that can be probed.

    ``causes`` are its own: what it ends a run with. ``units`` are what its values are rounded to, the finest first; ``guess`` is where to
    begin where nothing is measured; ``margin`` is what a limit in daily use should have over the least that passes.
    """

    name: LimitName
    unit: str
    causes: frozenset[CauseKind]
    units: tuple[float, ...]
    least: float
    guess: float
    margin: float

    @property
    def is_integral(self) -> bool:
        """Whether it counts things."""
        return self.unit == "count"

    @property
    def option(self) -> str:
        """As on the command line."""
        return f"--{self.name.value.replace('_', '-')}"

    def fit(self, value: float, precision: float) -> float:
        """The next value at or above that is round enough to be typed."""
        if math.isinf(value):
            return value
        unit = max(
            (unit for unit in self.units if unit * FINE <= value * precision), default=self.units[0]
        )
        return max(self.least, round(math.ceil(value / unit - 1e-6) * unit, 3))

    def limit(self, value: float) -> int | float | None:
        """A value of the search as the limit takes it."""
        if math.isinf(value):
            return None
        return round(value, 3) if self.unit == "seconds" else round(value)

    def written(self, value: float) -> str:
        """A value as the option takes it, and exactly that value: ``396M``, ``1.25s``, ``17``."""
        if math.isinf(value):
            return "none"
        if self.unit == "seconds":
            return f"{round(value, 3):g}s" if value < 1e5 else f"{value:.0f}s"  # noqa: PLR2004 - from there %g writes an exponent
        size = round(value)
        for factor, letter in ((MIB, "M"), (KIB, "K")) if self.unit == "bytes" else ():
            if size % factor == 0:
                return f"{size // factor}{letter}"
        return str(size)

    def advised(self, value: float) -> float:
        """What to set where the least that passed is ``value``."""
        return self.fit(value * (1 + self.margin), 0.05 if self.margin else 0.0)

    def outcome(self, cause: Cause | None) -> ProbeOutcome:
        """How a run with this cause ended, as far as this limit is concerned."""
        if cause is None:
            return ProbeOutcome.PASSED
        if cause.kind in self.causes:
            return ProbeOutcome.STRUCK
        return ProbeOutcome.OTHERWISE if cause.kind in MAYBE else ProbeOutcome.UNRELATED

    def question(
        self, *, initial: float | None, most: float, precision: float, budget: float
    ) -> ProbeProblem:
        """What the search is asked."""
        return ProbeProblem(
            initial=math.inf if initial is None else float(initial),
            least=self.least,
            most=max(most, self.least),
            guess=self.guess,
            precision=precision,
            is_integral=self.is_integral,
            fit=lambda value: self.fit(value, precision),
            budget=budget,
        )


_MEMORY = frozenset(
    {CauseKind.OUT_OF_MEMORY, CauseKind.MEMORY_ERROR, CauseKind.WORKER_OUT_OF_MEMORY}
)
_SIZES = (float(PAGE), float(64 * KIB), float(MIB))
_TIMES = (0.001, 0.01, 0.1, 1.0)
_HALF_AGAIN = 0.5
"""Times depend on the machine and on what else it does."""


def _scale(
    name: LimitName,
    unit: str,
    *causes: CauseKind,
    units: tuple[float, ...],
    guess: float,
    margin: float,
) -> Scale:
    return Scale(
        name=name,
        unit=unit,
        causes=frozenset(causes),
        units=units,
        least=units[0],
        guess=guess,
        margin=margin,
    )


SCALES: Mapping[LimitName, Scale] = {
    scale.name: scale
    for scale in (
        _scale(LimitName.MEMORY, "bytes", *_MEMORY, units=_SIZES, guess=128 * MIB, margin=0.05),
        _scale(
            LimitName.CPU_TIME,
            "seconds",
            CauseKind.CPU_TIME,
            units=_TIMES,
            guess=1.0,
            margin=_HALF_AGAIN,
        ),
        _scale(
            LimitName.CELL_TIMEOUT,
            "seconds",
            CauseKind.CELL_TIMEOUT,
            units=_TIMES,
            guess=1.0,
            margin=_HALF_AGAIN,
        ),
        _scale(
            LimitName.TIMEOUT,
            "seconds",
            CauseKind.NOTEBOOK_TIMEOUT,
            units=_TIMES,
            guess=2.0,
            margin=_HALF_AGAIN,
        ),
        _scale(
            LimitName.PROCESSES,
            "count",
            CauseKind.TOO_MANY_PROCESSES,
            units=(1.0,),
            guess=16,
            margin=0.0,
        ),
        _scale(
            LimitName.OPEN_FILES,
            "count",
            CauseKind.TOO_MANY_OPEN_FILES,
            units=(1.0,),
            guess=64,
            margin=0.0,
        ),
        _scale(
            LimitName.FILE_SIZE,
            "bytes",
            CauseKind.FILE_TOO_LARGE,
            units=(1.0, *_SIZES),
            guess=MIB,
            margin=0.05,
        ),
    )
}
"""The limits that can be probed. Outputs are cut at theirs, which ends no run, and ``cpus`` slows down only."""
