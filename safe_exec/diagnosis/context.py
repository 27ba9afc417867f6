"""The input of a rule, and the helpers that all families of rules share. Pure.

Imports model, units.
"""

from __future__ import annotations

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
    """One trial as the rules see it: its ending, the observations, and the limits."""

    ending: Ending
    evidence: Evidence
    limits: Limits
    # The mechanism of each limit.
    enforcement: Mapping[LimitName, Enforcement] = field(default_factory=dict)
    cells: tuple[CellRecord, ...] = ()
    # The index of the cell that the ending names.
    current: int | None = None
    language: str | None = "python"
    # The mechanism of each wall of isolation.
    walls: Mapping[Wall, Enforcement] = field(default_factory=dict)

    @property
    def is_python(self) -> bool:
        """Whether advice may mention Python's own calls; also true if the language is unknown."""
        return self.language in (None, "python")

    def human(self, index: int | None) -> str:
        """Name a cell: ``code cell 3``, counted from 1 as readers of the notebook count."""
        record = next((c for c in self.cells if c.index == index), None)
        return f"code cell {record.code_index + 1}" if record else "a cell"

    def frame(self, frame: Frame) -> str:
        """Describe a frame: ``copy_block, code cell 3, line 2``, or file and line of a library."""
        if frame.cell is None:
            return f"{frame.function} ({frame.file}, line {frame.line})"
        own = frame.function.startswith(("<module>", "<cell line"))
        place = f"{self.human(frame.cell)}, line {frame.line}"
        return place if own else f"{frame.function}, {place}"

    def if_limited(self, name: LimitName, advice: str) -> str:
        """Return advice about a limit's option, or "" if the run has no such limit.

        Raising a limit that does not exist would not help.
        """
        return "" if self.limits.of(name) is None else advice

    def accumulators(self) -> str:
        """Return the cells that keep the most memory: ``code cell 3 kept 612.0 MiB, ...``.

        The current cell is left out.
        """
        large_cells = [
            c
            for c in self.cells
            if (c.memory_kept or 0) >= KEPT_WORTH_NAMING and c.index != self.current
        ]
        # Sort by size to select, then by position: readers look for cells in notebook order.
        most = sorted(large_cells, key=lambda c: -(c.memory_kept or 0))[:3]
        most.sort(key=lambda c: c.index)
        return ", ".join(
            f"{self.human(c.index)} kept {format_size(c.memory_kept or 0)}" for c in most
        )


Rule = Callable[[Context], Cause | None]


def outside(fact: str, value: FactValue, source: str) -> Fact:
    """Return a fact that was observed outside the kernel process."""
    return Fact(fact=fact, value=value, source=source, origin=Origin.OUTSIDE)


def inside(fact: str, value: FactValue, source: str) -> Fact:
    """Return a fact that the kernel process claims about itself."""
    return Fact(fact=fact, value=value, source=source, origin=Origin.INSIDE)


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
    """Tell whether the cell's error says only that a program failed.

    The reason is then in the output of that program.
    """
    error = context.evidence.error
    return error is not None and (error.ename in OF_PROGRAMS or not context.is_python)


def exit_facts(evidence: Evidence) -> tuple[Fact, ...]:
    """Return facts about the end of the process: its wait status, or why that is unknown.

    Use them only for a kernel that died. After any other ending safe-exec itself shut the kernel
    down, so its status says nothing.
    """
    status = evidence.exit
    if status is None:
        facts = [outside("wait status", None, "the process that would have read it was killed too")]
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
    """Return the fact that the kernel was alive: only a live kernel replies with an error."""
    return outside("kernel process", f"alive {moment}", "the keeper had no wait status")


def make(  # noqa: PLR0917 - a cause reads as one line: what, in words, how sure, why, what to do
    context: Context,
    kind: CauseKind,
    summary: str,
    confidence: Confidence,
    evidence: tuple[Fact, ...],
    advice: str = "",
) -> Cause:
    """Return a cause, with signal and exit code if the kernel ended by itself."""
    # After any other ending the exit status is that of our own shutdown.
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
