"""``safe-exec replay``: run the notebook of a verdict again, and compare the outcomes."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
from msgspec.structs import replace

from safe_exec.cli import tables
from safe_exec.errors import UsageError
from safe_exec.experiments.compare import Difference, compares_peaks
from safe_exec.model.ending import signal_name
from safe_exec.model.verdict import Status, Verdict
from safe_exec.reports import progress
from safe_exec.reports.json_text import plain
from safe_exec.reports.masking import Mask, mask_for
from safe_exec.reports.terminal import Style
from safe_exec.reports.text import common
from safe_exec.units import format_size
from safe_exec.workflows.earlier_run import find_notebook, read_verdict
from safe_exec.workflows.prepare import command_line
from safe_exec.workflows.replay import ReplayResult, prepare_replay, replay

SCHEMA = "safe-exec/replay/1"
DIFFERS, CANCELLED = 1, 130

# The differences in environment that are printed; ``--json`` has all of them.
MOST_ROWS = 12
# Outcomes that are no failure of the notebook.
_NOTHING_TO_REPLAY = {
    Status.PASSED: "the run passed",
    Status.CANCELLED: "the run was stopped",
    Status.INTERNAL_ERROR: "safe-exec itself failed, and not the notebook",
}


@click.command(
    "replay", short_help="Run the notebook of a verdict again, and compare the outcomes."
)
@click.argument("verdict", metavar="VERDICT.json", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
def command(verdict: Path, as_json: bool, quiet: bool) -> int:
    """Run the reproduction of VERDICT.json again, or its notebook if there is none, and compare.

    Two failures are the same if cause, signal or exit code, and crash cell agree. Other differences
    are listed, and for different failures also those in environment: versions, system, enforcement
    of limits. The notebook runs in a copy of its folder, with the limits of the original run, and
    no files are written beside it.

    Exit codes: 0 the same failure, 1 another outcome, 2 bad usage, 130 stopped.
    """
    original = read_verdict(verdict)
    if original.cause is None or original.status in _NOTHING_TO_REPLAY:
        raise UsageError(
            f"{verdict}: nothing to replay: {_NOTHING_TO_REPLAY.get(original.status, 'it names no cause')}"
        )
    # A replay does not compare outputs, so it could not show the failure again.
    if original.differences:
        raise UsageError(
            f"{verdict}: nothing to replay: its outputs differ from the stored ones; compare them "
            "with `safe-exec run --compare`"
        )
    source, reproduction = source_of(original, verdict)
    request = prepare_replay(original, source, reproduction=reproduction, command=command_line())
    with progress.Progress(
        sys.stderr, quiet=quiet or (as_json and not sys.stderr.isatty())
    ) as listener:
        # The original verdict was masked when it was written; the new outcome is masked here.
        mask = mask_for({**os.environ, **(request.prepared.job.env or {})})
        result = masked(
            asyncio.run(replay(request, lambda event: listener(mask.everywhere(event)))), mask
        )
    if as_json:
        document = as_document(result, str(verdict))
        sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    elif not quiet:
        style = Style.of(sys.stdout)
        tables.write(report(result, style), style)
    return exit_code(result)


def masked(result: ReplayResult, mask: Mask) -> ReplayResult:
    """Mask the secrets of the environment."""
    return replace(
        result,
        rerun=mask.everywhere(result.rerun),
        agreement=mask.everywhere(result.agreement),
        warnings=mask.everywhere(result.warnings),
    )


def exit_code(result: ReplayResult) -> int:
    """Return 0 if both outcomes agree, 1 if they differ, and 130 if the rerun was stopped."""
    if result.rerun.status is Status.CANCELLED:
        return CANCELLED
    return 0 if result.agreement.same else DIFFERS


def source_of(original: Verdict, path: Path) -> tuple[Path, bool]:
    """Return the notebook to run, and whether it is the reproduction. Raises UsageError."""
    # The reproduction runs only the necessary cells, so it is faster and clearer.
    written = original.culprits.repro_notebook if original.culprits is not None else None
    if written is not None:
        recorded_path = Path(written)
        # It may have moved together with its verdict, for example as a CI artifact.
        for candidate in (recorded_path, path.absolute().parent / recorded_path.name):
            if candidate.is_file():
                return candidate, True
    return find_notebook(original, path), False


# --- as text ------------------------------------------------------------------------------------


def report(result: ReplayResult, style: Style) -> Iterator[str]:
    """Yield the lines of the comparison."""
    agreement, rerun = result.agreement, result.rerun
    if rerun.status is Status.CANCELLED:
        yield f"{style.paint('bad', '✗')} {style.paint('bold', 'stopped before it could be told')}"
        return
    sign = style.paint("good", "✓") if agreement.same else style.paint("bad", "✗")
    title = (
        f"the same here: {same_words(result)}"
        if agreement.same
        else f"not the same: {here_words(result)}"
    )
    yield f"{sign} {style.paint('bold', common.clip(title, common.HEADLINE_WIDTH))}"
    # Differences of the environment explain another outcome; for the same one they are noise.
    differences = () if agreement.same else agreement.environment
    if agreement.failure or differences:
        yield from _rows((*agreement.failure, *differences[:MOST_ROWS]), style)
    if len(differences) > MOST_ROWS:
        yield f"  and {len(differences) - MOST_ROWS} more (--json)"
    yield from tables.labelled("ran", _ran(result), style)
    for warning in result.warnings:
        yield from tables.labelled("warning", warning, style)


def same_words(result: ReplayResult) -> str:
    """Describe the agreement: ``out of memory in code cell 2, peak 480 MiB (480 MiB then)``."""
    original, rerun = result.replay.original, result.rerun
    parts = [_kind_and_cell(rerun, result.agreement.cell)]
    if (
        not any(difference.what == "line" for difference in result.agreement.failure)
        and original.crash_cell
        and original.crash_cell.line
    ):
        parts.append(f"line {original.crash_cell.line}")
    a, b = original.usage.memory_peak, rerun.usage.memory_peak
    # Peaks of different sets of cells are not comparable.
    if a and b and compares_peaks(original, whole_notebook=result.replay.cells is None):
        parts.append(f"peak {format_size(b)} ({format_size(a)} then)")
    return ", ".join(parts)


def here_words(result: ReplayResult) -> str:
    """Describe the new outcome."""
    if result.rerun.cause is None:
        return "it passed here"
    return f"{_kind_and_cell(result.rerun, result.agreement.cell)} here"


def _kind_and_cell(verdict: Verdict, code_index: int | None) -> str:
    assert verdict.cause is not None
    kind = common.kind_words(verdict.cause)
    return kind if code_index is None else f"{kind} in {common.cell_name(code_index)}"


def _rows(differences: Sequence[Difference], style: Style) -> Iterator[str]:
    rows = [("", "then", "here")]
    rows += [
        (common.single_line(difference.what), shown(difference, "then"), shown(difference, "here"))
        for difference in differences
    ]
    yield from tables.table(rows, style)


def shown(difference: Difference, side: str) -> str:
    """Describe one side of a difference."""
    value = getattr(difference, side)
    if value is None:
        return "none"
    if difference.what == "memory peak":
        return format_size(value)
    if difference.what == "signal":
        return signal_name(value)
    text = common.single_line(str(value))
    # Only these two are identifiers; other values are shown as they are.
    return text.replace("_", " ") if difference.what in ("cause", "status") else text


def _ran(result: ReplayResult) -> str:
    name = common.single_line(result.replay.prepared.job.path.name)
    cells = result.replay.cells
    subject = (
        f"{name}{common.SEPARATOR}{common.cell_sum(c.code_index for c in cells)} of the notebook"
        if cells
        else name
    )
    return f"{subject}, in a copy of its folder"


# --- as JSON ------------------------------------------------------------------------------------


def as_document(result: ReplayResult, path: str) -> dict[str, Any]:
    """Return the comparison as JSON values."""
    agreement = result.agreement
    return {
        "schema": SCHEMA,
        "verdict": plain(path),
        "notebook": plain(str(result.replay.prepared.job.path)),
        "reproduction": result.replay.cells is not None,
        "same": agreement.same and result.rerun.status is not Status.CANCELLED,
        "then": _side(result.replay.original),
        "here": _side(result.rerun),
        "differs": [plain(difference) for difference in agreement.failure],
        "environment": [
            {"what": d.what, "then": plain(d.then), "here": plain(d.here)}
            for d in agreement.environment
        ],
        "warnings": [plain(warning) for warning in result.warnings],
    }


def _side(verdict: Verdict) -> dict[str, Any]:
    return {
        "status": verdict.status.value,
        "cause": plain(verdict.cause),
        "crash_cell": plain(verdict.crash_cell),
        "memory_peak": verdict.usage.memory_peak,
        "seconds": verdict.usage.wall_seconds,
    }
