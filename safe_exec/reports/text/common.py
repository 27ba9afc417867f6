"""The wording that reports for people share: headline, names of cells, facts, safe display of text.

People count from 1: "code cell 7" is the seventh code cell, with ``code_index`` 6 in the JSON. Text
from a notebook, a kernel or a path always passes through ``printable``.
"""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterable, Iterator, Sequence

from safe_exec.limits.values import format_limit
from safe_exec.model.ending import signal_name
from safe_exec.model.evidence import Frame
from safe_exec.model.limits import LimitName, Mechanism, Wall
from safe_exec.model.patterns import lazy_pattern
from safe_exec.model.verdict import (
    Cause,
    CauseKind,
    CellStatus,
    Confidence,
    Fact,
    FactValue,
    Origin,
    Status,
    Usage,
    Verdict,
)
from safe_exec.units import format_seconds, format_size

SEPARATOR = " · "
SIGNS = "✗✓│·…█░"
"""The characters of reports that are not ASCII, each one column wide."""
_OWN_SIGNS = str.maketrans(dict.fromkeys(SIGNS, "x"))
HEADLINE_WIDTH = 200
FACT_WIDTH = 160
FRAME_WIDTH = 160

# --- safe display of text -------------------------------------------------------------------

# Control characters except the line break, characters that reorder or hide text (a bidi override
# makes code look like other code: CVE-2021-42574), and surrogates, which no encoding takes. The
# joiners U+200C and U+200D stay, because some scripts need them.
_HARMFUL = lazy_pattern(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e0fff]"
)


def printable(text: str) -> str:
    r"""Return ``text`` with control and invisible characters as escapes (ESC as ``\x1b``)."""
    lines = text.replace("\r\n", "\n").expandtabs(4)
    return _HARMFUL.sub(lambda match: match[0].encode("unicode_escape").decode(), lines)


def single_line(text: str) -> str:
    """Return ``text`` printable, on one line, with single spaces."""
    return " ".join(printable(text).split())


def code_line(text: str) -> str:
    """Return a line of source, printable and without indentation; inner spaces stay."""
    return printable(text).replace("\n", " ").strip()


def display_width(text: str) -> int:
    """Return the columns of ``text`` on a terminal: 2 for wide characters, 0 for combining ones."""
    if is_plain(text):
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def is_plain(text: str) -> bool:
    """Tell whether each character takes one column, as in most lines. They need no rich."""
    # Control characters take no column.
    plain = text.translate(_OWN_SIGNS)
    return plain.isascii() and plain.isprintable()


def clip(text: str, width: int) -> str:
    """Return ``text`` cut to ``width`` columns, with an ellipsis in place of the rest."""
    if display_width(text) <= width:
        return text
    if width < 1:
        return ""
    # One column is for the ellipsis.
    if is_plain(text):
        return text[: width - 1].rstrip() + "…"
    from rich.cells import set_cell_size

    return set_cell_size(text, width - 1).rstrip() + "…"


# --- names ----------------------------------------------------------------------------------


def cell_name(code_index: int) -> str:
    """Return the name of a code cell, counted from 1."""
    return f"code cell {code_index + 1}"


def cell_names(code_indices: Iterable[int]) -> str:
    """Return the name of several code cells, with runs shortened: ``code cells 3, 5-9``."""
    runs = _runs(code_indices)
    return f"{_cell_word(runs)} {', '.join(str(a) if a == b else f'{a}-{b}' for a, b in runs)}"


def cell_sum(code_indices: Iterable[int]) -> str:
    """Return the joint name of a set of cells: ``code cells 1 + 3 + 5-9``."""
    runs = _runs(code_indices)
    parts = (
        [str(a)] if a == b else [str(a), str(b)] if b == a + 1 else [f"{a}-{b}"] for a, b in runs
    )
    return f"{_cell_word(runs)} {' + '.join(name for names in parts for name in names)}"


def _runs(code_indices: Iterable[int]) -> list[list[int]]:
    """Return the first and last number of each run of consecutive cells."""
    # "5-9" instead of five numbers, because a notebook may have hundreds of cells.
    runs: list[list[int]] = []
    for number in sorted({index + 1 for index in code_indices}):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return runs


def _cell_word(runs: list[list[int]]) -> str:
    return "code cell" if len(runs) == 1 and runs[0][0] == runs[0][1] else "code cells"


def counted(count: int, thing: str) -> str:
    """Return a count with its noun: ``1 trial``, ``6 trials``."""
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def path_seen(path: str, verdict: Verdict) -> str:
    """Return a path relative to the run's directory; unprintable characters stay in it."""
    return path.removeprefix(verdict.cwd.rstrip("/") + "/")


def not_run(verdict: Verdict) -> tuple[int, ...]:
    """Return the ``code_index`` of every cell that did not run."""
    return tuple(cell.code_index for cell in verdict.cells if cell.status is CellStatus.NOT_RUN)


def skipped_reasons(verdict: Verdict) -> list[str]:
    """Describe the cells that could not run after a failure: ``code cell 5 needs `x` of ...``."""
    return [
        f"{cell_name(cell.code_index)} {single_line(cell.reason)}"
        for cell in verdict.cells
        if cell.reason is not None
    ]


def frame_line(frame: Frame, verdict: Verdict) -> str:
    """Describe a frame of a stack: ``load (cache.py:12)``, or its cell and line."""
    if frame.cell is None:
        place = ":".join(str(part) for part in (frame.file, frame.line) if part is not None) or "?"
        return f"{single_line(frame.function)} ({single_line(place)})"
    source = code_line(frame.source_line or "")
    return clip(
        f"{frame_place(frame, verdict)}: {source}" if source else frame_place(frame, verdict),
        FRAME_WIDTH,
    )


def frame_place(frame: Frame, verdict: Verdict) -> str:
    """Describe the location of a frame in a cell: ``in `load`, code cell 1, line 5``."""
    code_index = next(
        (record.code_index for record in verdict.cells if record.index == frame.cell), None
    )
    name = "a cell" if code_index is None else cell_name(code_index)
    line = f", line {frame.line}" if frame.line is not None else ""
    return (
        f"in {name}{line}"
        if is_own_code(frame)
        else f"in `{single_line(frame.function)}`, {name}{line}"
    )


def is_own_code(frame: Frame) -> bool:
    """Return whether a frame is top-level code of a cell, not a function that it defines."""
    return frame.function.startswith(("<module>", "<cell line"))


def inner_frames(verdict: Verdict, most: int) -> list[Frame]:
    """Return the innermost calls in cells that the crash line led to, in the order of the calls."""
    crash = verdict.crash_cell
    if crash is None:
        return []
    # Frames of libraries explain little; the user can change the code of cells.
    frames = [frame for frame in crash.stack if frame.cell is not None and frame.line is not None]
    first_frame = next(
        (
            n
            for n, frame in enumerate(frames)
            if (frame.cell, frame.line) == (crash.index, crash.line)
        ),
        0,
    )
    return frames[:first_frame][:most][::-1]


# --- outcome --------------------------------------------------------------------------------

_STATUS_TEXT = {
    Status.PASSED: "passed",
    Status.CELL_ERROR: "error",
    Status.KERNEL_DIED: "kernel died",
    Status.TIMEOUT: "timed out",
    Status.LIMIT_EXCEEDED: "limit exceeded",
    Status.START_FAILED: "kernel did not start",
    Status.INTERNAL_ERROR: "safe-exec failed",
    Status.CANCELLED: "cancelled",
}

_KIND_WORDS = {
    CauseKind.STDIN: "waits for input",
    CauseKind.ISOLATION: "blocked by isolation",
    CauseKind.UNKNOWN: "cause unknown",
    CauseKind.WORKER_OUT_OF_MEMORY: "worker process out of memory",
}

# Their summary says everything; the kind would only repeat the status.
_SUMMARY_IS_HEADLINE = frozenset({CauseKind.EXCEPTION, CauseKind.KERNEL_START_FAILED})

_MEASURES: dict[CauseKind, tuple[LimitName, str | None]] = {
    CauseKind.OUT_OF_MEMORY: (LimitName.MEMORY, "memory_peak"),
    CauseKind.MEMORY_ERROR: (LimitName.MEMORY, "memory_peak"),
    CauseKind.WORKER_OUT_OF_MEMORY: (LimitName.MEMORY, "memory_peak"),
    CauseKind.CPU_TIME: (LimitName.CPU_TIME, "cpu_seconds"),
    CauseKind.CELL_TIMEOUT: (LimitName.CELL_TIMEOUT, None),
    CauseKind.NOTEBOOK_TIMEOUT: (LimitName.TIMEOUT, None),
    CauseKind.TOO_MANY_PROCESSES: (LimitName.PROCESSES, "processes_peak"),
    CauseKind.TOO_MANY_OPEN_FILES: (LimitName.OPEN_FILES, None),
    CauseKind.FILE_TOO_LARGE: (LimitName.FILE_SIZE, None),
    CauseKind.OUTPUT_FLOOD: (LimitName.OUTPUT, "output_bytes"),
}
_USED_WORD = {
    "memory_peak": "peak",
    "processes_peak": "peak",
    "cpu_seconds": "used",
    "output_bytes": "received",
}


def status_words(status: Status) -> str:
    """Return a status in words: ``kernel died``."""
    return _STATUS_TEXT[status]


def kind_words(cause: Cause) -> str:
    """Return the kind of a cause in words, with the confidence unless it is certain."""
    text = _KIND_WORDS.get(cause.kind, cause.kind.value.replace("_", " "))
    return text if cause.confidence is Confidence.CERTAIN else f"{text} ({cause.confidence.value})"


def headline(verdict: Verdict) -> str:
    """Return the verdict in one line.

    ``kernel died in code cell 7 · out of memory · limit 1.0 GiB, peak 1.0 GiB``
    """
    parts = [_status_and_cell(verdict), *_why(verdict), *_figures(verdict)]
    return clip(SEPARATOR.join(part for part in parts if part), HEADLINE_WIDTH)


def _status_and_cell(verdict: Verdict) -> str:
    status = _STATUS_TEXT[verdict.status]
    return (
        status
        if verdict.crash_cell is None
        else f"{status} in {cell_name(verdict.crash_cell.code_index)}"
    )


def _why(verdict: Verdict) -> list[str]:
    # Kind and ending, for example "segmentation fault · SIGSEGV".
    cause = verdict.cause
    if cause is None:
        return []
    if headline_has_summary(verdict):
        return [single_line(cause.summary)]
    ending = signal_name(cause.signal) if cause.signal is not None else ""
    if cause.exit_code is not None and not ending:
        ending = f"exit status {cause.exit_code}"
    activity = cause.activity.value.replace("_", " ") if cause.activity is not None else ""
    return [kind_words(cause), "" if cause.kind in _MEASURES else ending, activity]


def headline_has_summary(verdict: Verdict) -> bool:
    """Return whether the headline includes the summary of the cause."""
    cause = verdict.cause
    internal = verdict.status is Status.INTERNAL_ERROR
    return cause is not None and (internal or cause.kind in _SUMMARY_IS_HEADLINE)


def _figures(verdict: Verdict) -> list[str]:
    if verdict.status is Status.PASSED:
        return _passed_figures(verdict)
    measure = _MEASURES.get(verdict.cause.kind) if verdict.cause is not None else None
    if measure is None:
        return []
    limit, used = measure
    allowed = verdict.limits.of(limit)
    figures = [] if allowed is None else [f"limit {quantity(limit, allowed)}"]
    # Limit and use side by side show at a glance whether the limit is too low.
    value = getattr(verdict.usage, used) if used is not None else None
    if used is not None and value is not None:
        qualifier = memory_qualifier(verdict.usage) if used == "memory_peak" else ""
        figures.append(f"{_USED_WORD[used]} {qualifier}{quantity(limit, value)}")
    return [", ".join(figures)]


def memory_qualifier(usage: Usage) -> str:
    """Return a qualifier for memory that was not measured exactly, else ""."""
    if usage.memory_lower_bound:
        return "at least "
    return "at most " if usage.memory_upper_bound else ""


def _passed_figures(verdict: Verdict) -> list[str]:
    count = verdict.notebook.code_cells
    usage = verdict.usage
    return [
        f"{count} code cell{'' if count == 1 else 's'}",
        format_seconds(usage.wall_seconds) if usage.wall_seconds is not None else "",
        f"peak {memory_qualifier(usage)}{format_size(usage.memory_peak)}"
        if usage.memory_peak is not None
        else "",
    ]


def quantity(limit: LimitName, value: float) -> str:
    """Format a value of ``limit`` with its unit."""
    return format_limit(limit.value, value)


_MOMENT = {
    Status.CELL_ERROR: "raised the error",
    Status.KERNEL_DIED: "running when the kernel died",
    Status.TIMEOUT: "running when its time was up",
    Status.LIMIT_EXCEEDED: "running when the limit struck",
    Status.INTERNAL_ERROR: "running when safe-exec failed",
    Status.CANCELLED: "running when the run was stopped",
}


def moment(verdict: Verdict) -> str:
    """Describe the crash line: ``line 3, running when the kernel was killed``."""
    if verdict.cause is not None and verdict.cause.kind is CauseKind.OUTPUT_DIFFERS:
        return "its output differs from the stored one"
    cell = verdict.crash_cell
    activity = _MOMENT.get(verdict.status, "")
    if (
        verdict.status is Status.KERNEL_DIED
        and verdict.cause is not None
        and _was_killed(verdict.cause)
    ):
        activity = "running when the kernel was killed"
    line = f"line {cell.line}" if cell is not None and cell.line is not None else "line not known"
    if cell is not None and cell.file_line is not None:
        name = single_line(os.path.basename(verdict.notebook.path))
        line += f" ({name}:{cell.file_line})"
    return f"{line}, {activity}" if activity else line


def _was_killed(cause: Cause) -> bool:
    return cause.signal == -int(signal.SIGKILL) or cause.kind in (
        CauseKind.OUT_OF_MEMORY,
        CauseKind.CPU_TIME,
    )


# --- evidence -------------------------------------------------------------------------------

_SIZE_FACT = lazy_pattern(r"(?:^|_|\b)(?:memory|bytes|size|disk|free|stack[_ ]limit)(?:$|_|\b)")
_TIME_FACT = lazy_pattern(r"(?:^|_|\b)(?:seconds|time|age|timeout)(?:$|_|\b)")


def fact_line(fact: Fact) -> str:
    """Describe a fact: ``oom kills: 1 · memory.events``."""
    text = f"{fact_name(fact)}: {fact_value(fact.fact, fact.value)}"
    source = single_line(fact.source)
    if fact.origin is Origin.INSIDE:
        # A notebook can make its kernel claim anything, so the reader has to see where a fact is
        # from.
        source = f"{source}, said by the kernel" if source else "said by the kernel"
    return clip(f"{text}{SEPARATOR}{source}" if source else text, FACT_WIDTH)


def fact_name(fact: Fact) -> str:
    """Return the name of a fact in words."""
    return single_line(fact.fact).replace("_", " ")


def fact_value(name: str, value: FactValue) -> str:
    """Format the value of a fact; its name implies the unit."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "not measured"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return single_line(value)
    if _SIZE_FACT.search(name):
        return format_size(value)
    if _TIME_FACT.search(name):
        return format_seconds(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def evidence_lines(verdict: Verdict, most: int | None = None) -> list[str]:
    """Describe the facts behind the cause, at most ``most`` of them."""
    facts: Sequence[Fact] = verdict.cause.evidence if verdict.cause is not None else ()
    return [fact_line(fact) for fact in facts[:most]]


def difference_blocks(verdict: Verdict, most: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield title and diff lines of at most ``most`` differing outputs."""
    for difference in verdict.differences[:most]:
        title = f"{cell_name(difference.code_index)}{SEPARATOR}{single_line(difference.summary)}"
        yield title, tuple(printable(line) for line in difference.lines)
    more = len(verdict.differences) - most
    if more > 0:
        yield f"{more} more, in the verdict (differences)", ()


def weak_limits(verdict: Verdict) -> list[str]:
    """Describe the limits that the operating system does not enforce."""
    lines = []
    for name, enforcement in verdict.enforcement.items():
        # The runner enforces time and output limits by design, so they are not weak.
        if (
            verdict.limits.of(name) is None
            or enforcement.hard
            or enforcement.by is Mechanism.RUNNER
        ):
            continue
        by = (
            "nothing holds it"
            if enforcement.by is Mechanism.NONE
            else f"only the {enforcement.by.value} holds it"
        )
        note = f"; {single_line(enforcement.note)}" if enforcement.note else ""
        lines.append(f"{name.value.replace('_', ' ')}: {by}{note}")
    return lines


def weak_walls(verdict: Verdict) -> list[str]:
    """Describe the walls that the operating system does not enforce; ``doctor`` says more."""
    # Only root is asked to run as another user.
    weak = {
        w: enforcement
        for w, enforcement in verdict.environment.isolation.items()
        if not enforcement.hard and w is not Wall.USER
    }
    names = [
        wall.value.replace("_", " ")
        if enforcement.by is Mechanism.NONE
        else f"{wall.value} ({enforcement.by.value} holds a part)"
        for wall, enforcement in weak.items()
    ]
    # A note first names the part that is enforced, then the reason for the rest.
    reasons = dict.fromkeys(
        single_line(enforcement.note.rpartition("; ")[2]) for enforcement in weak.values()
    )
    return (
        ["; ".join(part for part in (f"{', '.join(names)} not held", *reasons) if part)]
        if weak
        else []
    )
