"""Annotate a notebook: its own cells and outputs, and the outcome of the run beside them.

A notebook that passed only gets figures in its metadata. Otherwise a banner comes first, the crash
cell gets an ``error`` output, which every viewer shows in red, the outputs of other culprits start
with a note, and the outputs of cells that did not run are removed. ``notebook`` strips all of this
before the next run. Text from the notebook or the kernel is displayed only: it cannot add markup or
colours.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from safe_exec.model.verdict import (
    VERDICT_SCHEMA,
    CauseKind,
    CellRecord,
    CellStatus,
    CrashCell,
    Culprit,
    Culprits,
    Status,
    Verdict,
)
from safe_exec.notebook.notebook import BANNER_ROLE, BANNER_TAG, METADATA_KEY, OUR_ERROR_PREFIX
from safe_exec.notebook.validate import complete_metadata
from safe_exec.reports.json_text import plain
from safe_exec.reports.text import common, culprits, memory, native, profile
from safe_exec.reports.text.markdown import code_span, fenced, inert

if TYPE_CHECKING:
    from nbformat import NotebookNode

_RESULT_KEY = "result"
_CULPRIT_ROLE = "culprit"
_SKIPPED_ROLE = "skipped"
_BANNER_ID = "safe-exec-banner"
_CELL_ID = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_CONTEXT_LINES = 4
_SOURCE_WIDTH = 160
_MOST_FRAMES = 3
_MOST_DIFFERENCES = 5
_RED, _BOLD, _PLAIN = "\x1b[31m", "\x1b[1m", "\x1b[0m"


def annotate(
    executed: NotebookNode,
    verdict: Verdict,
    hide: Callable[[str], str] = str,
    *,
    figures: bool = True,
) -> NotebookNode:
    """Return an annotated copy of ``executed``, the notebook with the outputs collected so far.

    ``hide`` removes secrets from lines of source. Without ``figures`` nothing is added to metadata.
    The copy shares single outputs with ``executed``, which stays as it is.
    """
    notebook = _copied(executed)
    notebook.cells = [_copied(cell) for cell in executed.cells]
    # Viewers need the language for highlighting, and some notebooks lack it.
    if figures and verdict.notebook.kernel is not None:
        complete_metadata(notebook.metadata, verdict.notebook.kernel, verdict.notebook.language)
    if figures:
        _mark(notebook, _notebook_figures(verdict))
    for record in verdict.cells:
        if record.index < len(notebook.cells):
            _annotate_cell(notebook.cells[record.index], record, figures=figures)
    if verdict.status is not Status.PASSED:
        for failure in verdict.each_failure():
            _mark_culprits(notebook, failure, figures=figures)
            _add_error(notebook, failure, hide)
        # Inserted last: until then indexes refer to the notebook as it ran.
        notebook.cells.insert(0, _banner(notebook, verdict))
    return notebook


def _copied(node: NotebookNode) -> NotebookNode:
    """Copy a notebook or cell with its metadata and its list of outputs; the outputs are shared."""
    # Not deepcopy: outputs may be large, or nested too deeply to recurse.
    copied = copy.copy(node)
    copied.metadata = copy.copy(node.metadata)
    if METADATA_KEY in node.metadata:
        copied.metadata[METADATA_KEY] = copy.copy(node.metadata[METADATA_KEY])
    if "outputs" in node:
        copied.outputs = list(node.outputs)
    return copied


def _node(content: dict[str, Any]) -> NotebookNode:
    # Importing nbformat takes longer than importing this package, so it happens here.
    from nbformat import notebooknode

    make: Any = notebooknode.from_dict
    node: NotebookNode = make(content)
    return node


# --- figures --------------------------------------------------------------------------------


def _mark(node: NotebookNode, result: dict[str, Any]) -> None:
    """Store ``result`` in the metadata of a cell or notebook."""
    ours = node.metadata.setdefault(METADATA_KEY, _node({}))
    # If the user stores something else under this key, it is not replaced.
    if isinstance(ours, dict):
        ours[_RESULT_KEY] = _node(plain(result))


def _notebook_figures(verdict: Verdict) -> dict[str, Any]:
    return {
        "schema": VERDICT_SCHEMA,
        "safe_exec_version": verdict.safe_exec_version,
        "run_id": verdict.run_id,
        "started": verdict.started,
        "finished": verdict.finished,
        "status": verdict.status,
        "exit_code": verdict.exit_code,
        "cause": verdict.cause.kind if verdict.cause is not None else None,
        "usage": verdict.usage,
    }


def _annotate_cell(cell: NotebookNode, record: CellRecord, *, figures: bool) -> None:
    if figures:
        values = plain(record)
        # The index of a cell is not stored: it changes with the banner and with edits.
        left_out = {"index", "code_index", "id"} | ({"reason"} if record.reason is None else set())
        _mark(cell, {key: values[key] for key in values if key not in left_out})
    has_not_run = record.status is CellStatus.NOT_RUN or record.reason is not None
    if has_not_run and cell.cell_type == "code":
        # Outputs of an earlier run would look like results of this one.
        cell.outputs = []
        cell.execution_count = None
    if record.reason is not None:
        cell.outputs = [_skip_output(record.reason)]


def _skip_output(reason: str) -> NotebookNode:
    data = {
        "text/markdown": f"**safe-exec: skipped**: {inert(common.single_line(reason))}",
        "text/plain": f"safe-exec: skipped: {common.single_line(reason)}",
    }
    metadata = {METADATA_KEY: {_RESULT_KEY: {"role": _SKIPPED_ROLE}}}
    return _node({"output_type": "display_data", "data": data, "metadata": metadata})


# --- culprits -------------------------------------------------------------------------------


def _mark_culprits(notebook: NotebookNode, verdict: Verdict, *, figures: bool) -> None:
    """Mark each culprit in its metadata, and all but the crash cell with a visible note."""
    search = verdict.culprits
    if search is None:
        return
    others = culprits.others(verdict)
    for culprit in search.cells:
        cell = notebook.cells[culprit.index] if culprit.index < len(notebook.cells) else None
        if cell is None or cell.cell_type != "code":
            continue
        ours = cell.metadata.setdefault(METADATA_KEY, _node({})) if figures else None
        if isinstance(ours, dict):
            mark = {
                "role": culprit.role,
                "note": culprit.note,
                "look_first": culprit.index == search.look_first,
            }
            ours.setdefault(_RESULT_KEY, _node({}))[_CULPRIT_ROLE] = _node(plain(mark))
        if culprit in others:
            cell.outputs.insert(0, _culprit_output(culprit))


def _culprit_output(culprit: Culprit) -> NotebookNode:
    role, note = culprit.role.value, culprits.note(culprit)
    data = {
        "text/markdown": f"**safe-exec: culprit** ({role}): {inert(note)}",
        "text/plain": f"safe-exec: culprit ({role}): {note}",
    }
    metadata = {METADATA_KEY: {_RESULT_KEY: {"role": _CULPRIT_ROLE}}}
    return _node({"output_type": "display_data", "data": data, "metadata": metadata})


# --- the error output -----------------------------------------------------------------------


def _add_error(notebook: NotebookNode, verdict: Verdict, hide: Callable[[str], str]) -> None:
    cell = _crashed(notebook, verdict.crash_cell)
    # The kernel's own traceback is the best description of a plain exception.
    if cell is None or (verdict.cause is not None and verdict.cause.kind is CauseKind.EXCEPTION):
        return
    cell.outputs.append(error_output(hide(cell.source), verdict))


def error_output(source: str, verdict: Verdict) -> NotebookNode:
    """Return the outcome as an ``error`` output for the cell with this source."""
    output = {
        "output_type": "error",
        "ename": _error_name(verdict),
        "evalue": _error_value(verdict),
        "traceback": list(_traceback(source, verdict)),
    }
    return _node(output)


def _crashed(notebook: NotebookNode, crash: CrashCell | None) -> NotebookNode | None:
    if crash is None or crash.index >= len(notebook.cells):
        return None
    cell: NotebookNode = notebook.cells[crash.index]
    return cell if cell.cell_type == "code" else None


def _error_name(verdict: Verdict) -> str:
    """Return the name of the error: ``SafeExec: out_of_memory``.

    It contains the kind of the cause, or the status if there is no cause.
    """
    kind = verdict.cause.kind if verdict.cause is not None else verdict.status
    return f"{OUR_ERROR_PREFIX}: {kind.value}"


def _summary(verdict: Verdict) -> str:
    return (
        common.single_line(verdict.cause.summary)
        if verdict.cause is not None
        else common.headline(verdict)
    )


def _error_value(verdict: Verdict) -> str:
    """Return cause, line and evidence on one line."""
    facts = "; ".join(common.evidence_lines(verdict, 3))
    return " | ".join(part for part in (_summary(verdict), common.moment(verdict), facts) if part)


def _traceback(source: str, verdict: Verdict) -> Iterator[str]:
    """Yield the lines of the error output."""
    # Colours are safe here: `printable` removes escape sequences from all foreign text.
    crash = verdict.crash_cell
    yield _red("-" * 75)
    yield f"{_red(_error_name(verdict))}: {_summary(verdict)}"
    if crash is not None:
        yield f"{common.cell_name(crash.code_index).capitalize()}, {common.moment(verdict)}"
        yield from _source_lines(source, crash.line)
        yield from _block(
            "Stack, innermost first", [common.frame_line(frame, verdict) for frame in crash.stack]
        )
        yield from _block("Native stack, innermost first", native.stack_lines(verdict))
    for difference in verdict.differences:
        if crash is not None and difference.index == crash.index:
            lines = [common.printable(line) for line in difference.lines]
            yield from _block(common.single_line(difference.summary), lines)
    yield from _block("Held by", memory.holder_lines(verdict))
    yield from _block("Allocated", memory.allocation_lines(verdict))
    yield from _block("Evidence", common.evidence_lines(verdict))
    if verdict.cause is not None and verdict.cause.advice:
        yield f"{_BOLD}Next:{_PLAIN} {common.single_line(verdict.cause.advice)}"


def _red(text: str) -> str:
    return f"{_RED}{text}{_PLAIN}"


def _block(title: str, lines: list[str]) -> Iterator[str]:
    if lines:
        yield f"{_BOLD}{title}:{_PLAIN}"
        yield from (f"    {line}" for line in lines)


def _source_lines(source: str, line: int | None) -> Iterator[str]:
    """Yield the source around ``line`` with an arrow, as IPython does in tracebacks."""
    lines = source.split("\n")
    if line is None or not 1 <= line <= len(lines):
        return
    first = max(1, line - _CONTEXT_LINES)
    for number, source_line in enumerate(lines[first - 1 : line + _CONTEXT_LINES], start=first):
        code = common.clip(common.printable(source_line), _SOURCE_WIDTH)
        yield _red(f"----> {number} {code}") if number == line else f"{number:>7} {code}"


# --- the banner -----------------------------------------------------------------------------


def _banner(notebook: NotebookNode, verdict: Verdict) -> NotebookNode:
    cell = _node(
        {
            "cell_type": "markdown",
            "metadata": {"tags": [BANNER_TAG], METADATA_KEY: {_RESULT_KEY: {"role": BANNER_ROLE}}},
            "source": "\n\n".join(_paragraphs(verdict)),
        }
    )
    if (notebook.nbformat, notebook.nbformat_minor) >= (
        4,
        5,
    ):  # cells have ids from there on, and none before
        cell.id = _unused_id({other.get("id") for other in notebook.cells})
    return cell


def _unused_id(ids: set[str | None]) -> str:
    number, name = 1, _BANNER_ID
    # A user may have copied an earlier banner, including its id.
    while name in ids:
        number, name = number + 1, f"{_BANNER_ID}-{number + 1}"
    return name


def _paragraphs(verdict: Verdict) -> Iterator[str]:
    yield f"**\u2717 safe-exec: {inert(common.headline(verdict))}**"
    if verdict.cause is not None and not common.headline_has_summary(verdict):
        yield f"**Why:** {inert(verdict.cause.summary)}"
    if verdict.crash_cell is not None:
        yield from _location(verdict.crash_cell, verdict)
    for title, lines in (
        ("Held by", memory.holder_lines(verdict)),
        ("Allocated", memory.allocation_lines(verdict)),
    ):
        if lines:
            yield f"**{title}:**\n\n" + "\n".join(f"- {inert(line)}" for line in lines)
    if verdict.culprits is not None:
        yield from _culprit_paragraphs(verdict.culprits, verdict)
    for title, difference_lines in common.difference_blocks(verdict, _MOST_DIFFERENCES):
        yield f"**Differs:** {inert(title)}" + (
            f"\n\n{fenced(chr(10).join(difference_lines))}" if difference_lines else ""
        )
    facts = common.evidence_lines(verdict)
    if facts:
        yield "**Evidence:**\n\n" + "\n".join(f"- {_fact(line)}" for line in facts)
    if verdict.cause is not None and verdict.cause.advice:
        yield f"**Next:** {inert(verdict.cause.advice)}"
    if verdict.cause is None and verdict.warnings:
        yield "**Warnings:**\n\n" + "\n".join(
            f"- {code_span(common.single_line(warning))}" for warning in verdict.warnings
        )
    yield from _further_failures(verdict)
    yield from _cells_not_run(verdict)
    yield "*Written by safe-exec, which takes this cell away when it runs the notebook again.*"


def _further_failures(verdict: Verdict) -> Iterator[str]:
    """Yield the failures after the first one, and the cells that could not run because of them."""
    for other in verdict.each_failure()[1:]:
        yield _other_failure(other)
    skipped = common.skipped_reasons(verdict)
    if skipped:
        yield "**Skipped:**\n\n" + "\n".join(f"- {inert(line)}" for line in skipped)


def _other_failure(verdict: Verdict) -> str:
    """Describe a further failure of the run: its headline, place, cause and culprits."""
    lines = []
    if verdict.cause is not None and not common.headline_has_summary(verdict):
        lines.append(inert(verdict.cause.summary))
    if verdict.crash_cell is not None:
        lines.append(f"{_linked(verdict.crash_cell)}, {common.moment(verdict)}")
    search = verdict.culprits
    if search is not None and search.cells:
        lines.append(f"caused by {culprits.names(search)}")
        command = culprits.reproduce_command(verdict)
        lines += [f"reproduce: {code_span(command)}"] if command else []
    title = f"**\u2717 Also: {inert(common.headline(verdict))}**"
    return "\n".join([title, "", *(f"- {line}" for line in lines)])


def _location(crash: CrashCell, verdict: Verdict) -> Iterator[str]:
    """Yield the crash line, and the lines of functions in other cells that it called."""
    yield _quoted(f"**Where:** {_linked(crash)}, {common.moment(verdict)}", crash.source_line)
    records = {record.index: record for record in verdict.cells}
    for frame in common.inner_frames(verdict, _MOST_FRAMES):
        record = records.get(frame.cell if frame.cell is not None else -1)
        if record is not None:
            function = (
                ""
                if common.is_own_code(frame)
                else f"{code_span(common.single_line(frame.function))}, "
            )
            yield _quoted(f"in {function}{_linked(record)}, line {frame.line}", frame.source_line)
    if time := profile.summary(verdict):
        yield f"**Time:** {inert(time)}"
    if native_function := native.summary(verdict):
        yield f"**Native:** {code_span(native_function)}"


def _quoted(label: str, source_line: str | None) -> str:
    return (
        f"{label}:\n\n{fenced(common.clip(common.code_line(source_line), _SOURCE_WIDTH))}"
        if source_line
        else label
    )


def _linked(cell: CrashCell | CellRecord | Culprit) -> str:
    name = common.cell_name(cell.code_index)
    # JupyterLab and the HTML of nbconvert both accept this anchor.
    return f"[{name}](#cell-id={cell.id})" if cell.id and _CELL_ID.fullmatch(cell.id) else name


def _culprit_paragraphs(search: Culprits, verdict: Verdict) -> Iterator[str]:
    """Yield the culprits and the effect of each, and the command that reproduces the failure."""
    outcome = culprits.outcome(search)
    if not search.cells:
        yield f"**Culprits:** none found; {outcome}."
        return
    failures, runs = search.reproduced
    checked = f"reproduced {failures} of {runs}" if runs else ""
    summary = "; ".join(part for part in (culprits.names(search), checked, outcome) if part)
    others = culprits.others(verdict)
    listed_cells = [
        *others[: culprits.MOST_SHOWN],
        *(culprit for culprit in search.cells if culprit not in others),
    ]
    lines = [f"- {_linked(c)} ({c.role.value}): {inert(culprits.note(c))}" for c in listed_cells]
    if len(others) > culprits.MOST_SHOWN:
        lines.append(f"- and {len(others) - culprits.MOST_SHOWN} more")
    yield f"**Culprits:** {summary}:\n\n" + "\n".join(lines)
    first = culprits.look_first(verdict)
    if first is not None:
        yield f"**Look first:** {_linked(first)}"
    command = culprits.reproduce_command(verdict)
    if command:
        yield f"**Reproduce:** {code_span(command)}"


def _fact(line: str) -> str:
    label, _, value = line.partition(": ")
    return f"{inert(label)}: {code_span(value)}" if value else code_span(line)


def _cells_not_run(verdict: Verdict) -> Iterator[str]:
    records = common.not_run(verdict)
    if records:
        yield f"{common.cell_names(records).capitalize()} did not run; earlier outputs are removed."
