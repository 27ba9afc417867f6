"""What a rule may look at, and the small helpers that all families share. Pure; imports model and units."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping

from msgspec import Struct, field

from safe_exec.model.ending import Died, Ending, StartFailed
from safe_exec.model.evidence import Evidence, Frame
from safe_exec.model.limits import Enforcement, LimitName, Limits, Wall
from safe_exec.model.verdict import (
    Cause,
    CauseKind,
    CellRecord,
    Confidence,
    Fact,
    FactValue,
    Origin,
)
from safe_exec.units import format_size

# A cell that kept less than this is not named as one that fills the memory.
KEPT_WORTH_NAMING = 8 << 20


class Context(Struct, frozen=True, kw_only=True):
    """One trial as the rules see it: how it ended, what was observed, under which limits."""

    ending: Ending
    evidence: Evidence
    limits: Limits
    enforcement: Mapping[LimitName, Enforcement] = field(default_factory=dict)
    cells: tuple[CellRecord, ...] = ()
    current: int | None = None
    language: str | None = "python"
    walls: Mapping[Wall, Enforcement] = field(default_factory=dict)

    @property
    def is_python(self) -> bool:
        """Whether advice may speak of Python's own calls; so it does where the language is not known."""
        return self.language in (None, "python")

    def human(self, index: int | None) -> str:
        """``code cell 3``, counted from 1 as a reader of the notebook counts."""
        record = next((c for c in self.cells if c.index == index), None)
        return f"code cell {record.code_index + 1}" if record else "a cell"

    def frame(self, frame: Frame) -> str:
        """``copy_block, code cell 3, line 2``; of a library's code the file and its line."""
        if frame.cell is None:
            return f"{frame.function} ({frame.file}, line {frame.line})"
        own = frame.function.startswith(("<module>", "<cell line"))
        place = f"{self.human(frame.cell)}, line {frame.line}"
        return place if own else f"{frame.function}, {place}"

    def if_limited(self, name: LimitName, advice: str) -> str:
        """A piece of advice that names a limit's option: empty if the run has no such limit, since its option would not help."""
        return "" if self.limits.of(name) is None else advice

    def accumulators(self) -> str:
        """``code cell 3 kept 612.0 MiB, code cell 5 kept ...``: the cells that hold the most, the current one left out."""
        large_cells = [
            c
            for c in self.cells
            if (c.memory_kept or 0) >= KEPT_WORTH_NAMING and c.index != self.current
        ]
        most = sorted(large_cells, key=lambda c: -(c.memory_kept or 0))[:3]
        most.sort(key=lambda c: c.index)
        return ", ".join(
            f"{self.human(c.index)} kept {format_size(c.memory_kept or 0)}" for c in most
        )


Rule = Callable[[Context], Cause | None]


def outside(fact: str, value: FactValue, source: str) -> Fact:
    """A fact that the system around the kernel says."""
    return Fact(fact=fact, value=value, source=source, origin=Origin.OUTSIDE)


def inside(fact: str, value: FactValue, source: str) -> Fact:
    """A fact that the kernel process says of itself."""
    return Fact(fact=fact, value=value, source=source, origin=Origin.INSIDE)


def signal_name(number: int) -> str:
    """SIGKILL for 9; ``signal 40`` for one without a name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


# Errors that say that a program failed, and leave the reason to what it printed.
OF_PROGRAMS = (
    "CalledProcessError",
    "UsageError",
    "SystemExit",
    "CommandError",
    "ShellError",
    "Error",
    "ERROR",
    "",
)


def leaves_reason_to_output(context: Context) -> bool:
    """Whether the cell's error says no more than that a program failed: it printed why."""
    error = context.evidence.error
    return error is not None and (error.ename in OF_PROGRAMS or not context.is_python)


def exit_facts(evidence: Evidence) -> tuple[Fact, ...]:
    """The raw end of the process, first in every list of evidence about a death.

    Only for a kernel that died: after any other ending the process ends by our own shutdown, which says nothing.
    """
    status = evidence.exit
    if status is None:
        facts = [outside("wait status", None, "whoever would have read it was killed too")]
    else:
        facts = [outside("ended with", str(status), "wait status of the kernel process")]
    if evidence.termination is not None:
        facts.append(
            outside(
                "killed by safe-exec for",
                evidence.termination.value,
                "recorded before the signal was sent",
            )
        )
    return tuple(facts)


def alive(moment: str) -> Fact:
    """The kernel process had not ended: an error, or a request to end the kernel, is a reply of a live kernel."""
    return outside("kernel process", f"alive {moment}", "the keeper had no wait status")


def make(  # noqa: PLR0917 - a cause reads as one line: what, in words, how sure, why, what to do
    context: Context,
    kind: CauseKind,
    summary: str,
    confidence: Confidence,
    evidence: tuple[Fact, ...],
    advice: str = "",
) -> Cause:
    """A cause, with the exit of the kernel filled in where the kernel ended by itself or for a limit."""
    status = context.evidence.exit if isinstance(context.ending, Died | StartFailed) else None
    return Cause(
        kind=kind,
        summary=summary,
        confidence=confidence,
        evidence=evidence,
        advice=advice,
        signal=-status.signal if status and status.signal is not None else None,
        exit_code=status.exit_code if status else None,
    )
