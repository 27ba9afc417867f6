"""Describes each limit that can be probed: unit, bounds, notation, and its own causes. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping

from msgspec import Struct

from safe_exec.experiments.threshold.search import ProbeOutcome, ProbeProblem
from safe_exec.model.limits import LimitName
from safe_exec.model.verdict import Cause, CauseKind

KIB, MIB = 1 << 10, 1 << 20
# The kernel accounts memory in pages, so a finer limit makes no difference.
PAGE = 4096
# Values are rounded to a unit that is this many times finer than the precision, so that they are
# short to type.
FINE = 4.0

# Endings that a lack of nearly any resource may cause, as in a library that does not check the
# result of malloc.
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


class Scale(Struct, frozen=True, kw_only=True):
    """One limit that can be probed.

    ``causes`` are the causes with which this limit ends a run. Values are rounded to one of
    ``units``, the finest first. ``guess`` is the starting value if no peak is measured. ``margin``
    is the share to add to the smallest passing value for daily use.
    """

    name: LimitName
    unit: str
    # The causes with which this limit ends a run.
    causes: frozenset[CauseKind]
    # Values are rounded to one of these, the finest first.
    units: tuple[float, ...]
    least: float
    # The starting value if no peak is measured.
    guess: float
    # The share to add to the smallest passing value for daily use.
    margin: float

    @property
    def is_integral(self) -> bool:
        """Whether the limit's values are whole numbers."""
        return self.unit == "count"

    @property
    def option(self) -> str:
        """The option on the command line."""
        return f"--{self.name.value.replace('_', '-')}"

    def fit(self, value: float, precision: float) -> float:
        """Round a value up to one that is convenient to type."""
        if math.isinf(value):
            return value
        unit = max(
            (unit for unit in self.units if unit * FINE <= value * precision), default=self.units[0]
        )
        return max(self.least, round(math.ceil(value / unit - 1e-6) * unit, 3))

    def limit(self, value: float) -> int | float | None:
        """Convert a value of the search to the type of the limit."""
        if math.isinf(value):
            return None
        return round(value, 3) if self.unit == "seconds" else round(value)

    def written(self, value: float) -> str:
        """Format exactly this value as the option accepts it: ``396M``, ``1.25s``, ``17``."""
        if math.isinf(value):
            return "none"
        if self.unit == "seconds":
            # From 1e5 on, %g writes an exponent.
            return f"{round(value, 3):g}s" if value < 1e5 else f"{value:.0f}s"  # noqa: PLR2004
        size = round(value)
        for factor, letter in ((MIB, "M"), (KIB, "K")) if self.unit == "bytes" else ():
            if size % factor == 0:
                return f"{size // factor}{letter}"
        return str(size)

    def advised(self, value: float) -> float:
        """Return the value to recommend if ``value`` is the smallest that passed."""
        return self.fit(value * (1 + self.margin), 0.05 if self.margin else 0.0)

    def outcome(self, cause: Cause | None) -> ProbeOutcome:
        """Classify a run by its cause: whether this limit ended it."""
        if cause is None:
            return ProbeOutcome.PASSED
        if cause.kind in self.causes:
            return ProbeOutcome.STRUCK
        return ProbeOutcome.OTHERWISE if cause.kind in MAYBE else ProbeOutcome.UNRELATED

    def question(
        self, *, initial: float | None, most: float, precision: float, budget: float
    ) -> ProbeProblem:
        """Return the problem statement for the threshold search."""
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
# Times depend on the machine and on what else it does.
_HALF_AGAIN = 0.5


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


# The limits that can be probed. Outputs are cut at theirs, which ends no run, and `cpus` slows down
# only.
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
