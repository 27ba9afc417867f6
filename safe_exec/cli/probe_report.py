"""Print the progress and the result of ``probe``, as text or JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from safe_exec.cli import tables
from safe_exec.experiments.threshold.scales import Scale
from safe_exec.experiments.threshold.search import StopReason
from safe_exec.model.limits import Enforcement, Mechanism
from safe_exec.reports.json_text import plain
from safe_exec.reports.terminal import Style, is_terminal
from safe_exec.reports.text import common
from safe_exec.units import format_seconds
from safe_exec.workflows.probe import ProbeReport, ProbeRun

SCHEMA = "safe-exec/probe/1"
_CLEAR = "\r\x1b[K"
_LABEL = 12
_BLANK = " " * (2 + _LABEL)


def quantity(scale: Scale, value: float) -> str:
    """Format a value, with more digits if three would hide the precision."""
    if math.isinf(value):
        return "no limit"
    text = common.quantity(scale.name, value)
    # One decimal place would be too coarse for 1.2 s.
    return text if scale.unit != "seconds" or value >= 10 else f"{round(value, 3):g} s"  # noqa: PLR2004


# --- during the runs ----------------------------------------------------------------------------


class RunLines:
    """Prints a line for each finished run, and on a terminal the current run. Never raises."""

    def __init__(self, stream: TextIO, scale: Scale, *, quiet: bool = False) -> None:
        self._stream, self._scale = stream, scale
        self._style = Style.of(stream)
        self._silent = quiet
        self._live = is_terminal(stream) and not quiet

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live:
            self._write(_CLEAR)

    def begins(self, number: int, value: float) -> None:
        """Show that run ``number`` starts."""
        if self._live:
            text = f"run {number}{common.SEPARATOR}{self._with(value)}{common.SEPARATOR}Ctrl-C keeps what is known"
            self._write(f"{_CLEAR}{self._style.fit(common.clip(text, self._style.width - 1))}")

    def ended(self, number: int, run: ProbeRun) -> None:
        """Show that run ``number`` has ended."""
        parts = (
            f"run {number}",
            self._with(run.value),
            what_became(run),
            format_seconds(run.seconds),
        )
        line = self._style.fit(common.SEPARATOR.join(part for part in parts if part))
        self._write(f"{_CLEAR if self._live else ''}{line}\n")

    def _with(self, value: float) -> str:
        return f"{self._scale.name.value.replace('_', ' ')} {quantity(self._scale, value)}"

    def _write(self, text: str) -> None:
        if self._silent:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            # The reader of the stream has exited; the probe goes on for its result.
            self._silent = True


def what_became(run: ProbeRun) -> str:
    """Return ``passed``, or the failure and its location."""
    # A run that was cut proves nothing about the limit.
    if run.cut:
        return "not finished: the budget is over"
    if run.passed or run.cause is None:
        return "passed"
    kind = common.kind_words(run.cause)
    # Near its limit a program may only crawl, which counts as a failure.
    if run.slow:
        kind = "gave up: more than ten times as long as the run that passed"
    crash = run.crash_cell
    if crash is None:
        return kind
    return f"{kind} in {common.cell_name(crash.code_index)}" + (
        f", line {crash.line}" if crash.line is not None else ""
    )


# --- the result ---------------------------------------------------------------------------------


def report(probe: ProbeReport, path: str, command: str | None, style: Style) -> Iterator[str]:
    """Yield the lines of the result; ``command`` repeats the failing run."""
    name = probe.scale.name.value.replace("_", " ")
    title = f"{name} of {common.single_line(Path(path).name)}"
    missing = "" if probe.bracket.found else f": {_why_not(probe)}"
    yield style.paint("bold", common.clip(title, style.width)) + missing
    yield from _sides(probe, style)
    yield from _crash(probe, style)
    yield from tables.labelled("", common.SEPARATOR.join(_figures(probe)), style)
    yield from _notes(probe, style)
    advice = advised(probe)
    if advice is not None:
        yield from tables.labelled(
            "use", f"{probe.scale.option} {advice}   {_over(probe.scale)}", style
        )
    if command is not None:
        # Never wrapped, because the user copies this line into a shell.
        yield f"  {style.paint('dim', 'reproduce')}{' ' * (_LABEL - len('reproduce'))}{common.code_line(command)}"


def _sides(probe: ProbeReport, style: Style) -> Iterator[str]:
    scale, passing, failing = probe.scale, probe.passing(), probe.failing()
    values = [quantity(scale, run.value) for run in (passing, failing) if run is not None]
    # Aligned, so that the two values are easy to compare.
    width = max(map(common.display_width, values), default=0)
    if passing is not None:
        peak = (
            f"   {'used' if scale.unit == 'seconds' else 'peak'} {quantity(scale, passing.peak)}"
            if passing.peak
            else ""
        )
        yield from _side("passes with", quantity(scale, passing.value).ljust(width) + peak, style)
    if failing is not None:
        yield from _side(
            "fails with",
            f"{quantity(scale, failing.value).ljust(width)}   {what_became(failing)}",
            style,
        )
        # The label already names the probed limit; only another cause needs its summary.
        if failing.cause is not None and not _of_its_own(probe, failing):
            yield from tables.labelled("", failing.cause.summary, style)


def _side(label: str, text: str, style: Style) -> Iterator[str]:
    """Yield the passing or the failing side of the result, on two lines if it is too long."""
    if len(_BLANK) + common.display_width(text) <= style.width:
        yield f"  {style.paint('dim', label)}{' ' * (_LABEL - len(label))}{text.rstrip()}"
    else:
        yield from tables.labelled(label, text, style)


def _of_its_own(probe: ProbeReport, run: ProbeRun) -> bool:
    """Return whether the probed limit caused a run's failure."""
    return run.cause is not None and run.cause.kind in probe.scale.causes


def _crash(probe: ProbeReport, style: Style) -> Iterator[str]:
    failing = probe.failing()
    crash = failing.crash_cell if failing is not None else None
    if crash is not None and crash.source_line is not None:
        head = f"{crash.code_index + 1:>7} │ "
        yield head + common.clip(common.code_line(crash.source_line), style.width - len(head))


def _figures(probe: ProbeReport) -> Iterator[str]:
    yield common.counted(len(probe.runs), "run")
    yield format_seconds(sum(run.seconds for run in probe.runs))
    if probe.bracket.found:
        yield "to 1" if probe.scale.is_integral else f"to {probe.precision * 100:.3g} %"


def _notes(probe: ProbeReport, style: Style) -> Iterator[str]:
    if probe.bracket.wavers:
        yield from tables.labelled(
            "wavers", "between these two it passed at one time and failed at another", style
        )
    failing = probe.failing()
    if (
        probe.bracket.passes is not None
        and failing is not None
        and failing.cause
        and not _of_its_own(probe, failing)
    ):
        yield from tables.labelled(
            "note",
            f"it does not die of this limit itself just below, but of {failing.cause.kind.value}",
            style,
        )
    weak = weak_hold(probe.enforcement)
    if weak:
        yield from tables.labelled("weak limit", weak, style)
    for warning in probe.warnings:
        yield from tables.labelled("warning", warning, style)


def weak_hold(enforcement: Enforcement | None) -> str:
    """Describe a limit that the operating system does not enforce."""
    if enforcement is None or enforcement.hard or enforcement.by is Mechanism.RUNNER:
        return ""
    return f"only the {enforcement.by.value} holds it" + (
        f"; {common.single_line(enforcement.note)}" if enforcement.note else ""
    )


def _over(scale: Scale) -> str:
    # Counts are exact.
    if not scale.margin:
        return "(what it needs)"
    return f"({scale.margin * 100:.0f} % above what it needs)"


def advised(probe: ProbeReport) -> str | None:
    """Return the recommended value, in the syntax of the option."""
    passes = probe.bracket.passes
    # Without both sides the value may be far above the need.
    if passes is None or math.isinf(passes) or not probe.bracket.found:
        return None
    return probe.scale.written(probe.scale.advised(passes))


def _why_not(probe: ProbeReport) -> str:
    name = probe.scale.name.value.replace("_", " ")
    match probe.bracket.ended:
        case StopReason.UNRELATED:
            return f"it fails for another reason, which another limit on {name} does not change"
        case StopReason.MOST:
            return (
                "it fails with all that there is"
                if probe.bracket.passes is None
                else "it passes only without a limit"
            )
        case StopReason.LEAST:
            return "it passes with the least that can be set"
        case StopReason.BUDGET:
            return "the budget ran out (--budget)"
        case StopReason.CANCELLED:
            return "stopped; what is known so far"
    return "it passes and fails by chance"


# --- as JSON ------------------------------------------------------------------------------------


def as_document(probe: ProbeReport, path: str, command: str | None) -> dict[str, Any]:
    """Return the result as JSON values: bytes, seconds, counts."""
    # As the value of a run, null means no limit; ``passes`` and ``fails`` are null if unknown.
    bracket, passing, failing = probe.bracket, probe.passing(), probe.failing()
    return {
        "schema": SCHEMA,
        "notebook": plain(path),
        "limit": probe.scale.name.value,
        "unit": probe.scale.unit,
        "passes": _value(probe.scale, bracket.passes),
        "fails": _value(probe.scale, bracket.fails),
        "wavers": bracket.wavers,
        "found": bracket.found,
        "ended": bracket.ended.value if bracket.ended is not None else None,
        "reason": None if bracket.found else _why_not(probe),
        "precision": 0 if probe.scale.is_integral else probe.precision,
        "peak": passing.peak if passing is not None else None,
        "cause": plain(failing.cause) if failing is not None else None,
        "crash_cell": plain(failing.crash_cell) if failing is not None else None,
        "advised": advised(probe),
        "reproduce": plain(command),
        "enforcement": plain(probe.enforcement),
        "runs": [_run(probe.scale, run) for run in probe.runs],
        "seconds": sum(run.seconds for run in probe.runs),
        "warnings": [plain(warning) for warning in probe.warnings],
    }


def _value(scale: Scale, value: float | None) -> int | float | None:
    return None if value is None else scale.limit(value)


def _run(scale: Scale, run: ProbeRun) -> dict[str, Any]:
    crash = run.crash_cell
    return {
        "value": _value(scale, run.value),
        "passed": run.passed,
        "cut": run.cut,
        "seconds": run.seconds,
        "peak": run.peak,
        "cause": run.cause.kind.value if run.cause is not None else None,
        "summary": plain(run.cause.summary) if run.cause is not None else None,
        "code_index": crash.code_index if crash is not None else None,
        "line": crash.line if crash is not None else None,
    }
