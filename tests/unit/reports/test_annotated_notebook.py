"""The annotated notebook: valid whatever happened, untouched where it passed, inert whatever text comes in."""

from __future__ import annotations

import copy
import re
from typing import Any

import nbformat
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from nbformat import NotebookNode

from safe_exec.model.evidence import Frame
from safe_exec.model.limits import Limits
from safe_exec.model.verdict import CauseKind, CellStatus, Role, Status, Stopped, Verdict
from safe_exec.notebook.notebook import strip_annotations
from safe_exec.reports.annotated_notebook import annotate
from safe_exec.reports.text.common import single_line
from safe_exec.reports.text.markdown import code_span, fenced, inert
from tests.unit.builders import (
    every_verdict,
    make_cause,
    make_crash,
    make_culprit,
    make_culprits,
    make_fact,
    make_records,
    make_verdict,
    name_of,
    nothing_found,
)

SOURCES = (
    "import pandas",
    'frame = load()\njoined = frame.merge(big, on="k")\njoined.head()',
    "stale()",
    "later()",
)
NB: Any = nbformat  # which has no types
ANSI = re.compile(r"\x1b\[(?:31|1|0)m")


def make_notebook(minor: int = 5) -> NotebookNode:
    """A markdown cell and four code cells; the first two ran now, the outputs of the others are from earlier."""
    cells = [NB.v4.new_markdown_cell("# Title", id="first")]
    for name, source in zip(("second", "third", "fourth", "fifth"), SOURCES, strict=True):
        output = NB.v4.new_output("stream", name="stdout", text=f"output of {name}\n")
        cells.append(NB.v4.new_code_cell(source, id=name, execution_count=9, outputs=[output]))
    notebook = NB.v4.new_notebook(cells=cells)
    notebook.nbformat_minor = minor
    if minor < 5:
        for cell in notebook.cells:
            del cell["id"]
    assert isinstance(notebook, NotebookNode)
    return notebook


def without_figures(notebook: NotebookNode) -> NotebookNode:
    """The notebook without ``metadata.safe_exec``."""
    bare = copy.deepcopy(notebook)
    for node in (bare, *bare.cells):
        node.metadata.pop("safe_exec", None)
    return bare


def our_errors(cell: NotebookNode) -> list[NotebookNode]:
    return [
        o
        for o in cell.get("outputs", [])
        if o.output_type == "error" and o.ename.startswith("SafeExec: ")
    ]


@pytest.mark.parametrize("minor", [0, 4, 5])
@pytest.mark.parametrize("verdict", every_verdict(), ids=name_of)
def test_every_annotated_notebook_is_valid(verdict: Verdict, minor: int) -> None:
    before = make_notebook(minor)
    kept = copy.deepcopy(before)
    annotated = annotate(before, verdict)
    NB.validate(annotated)
    assert before == kept, "the notebook handed in was changed"
    assert NB.reads(NB.writes(annotated), as_version=4) == annotated
    passed = verdict.status is Status.PASSED
    assert len(annotated.cells) == len(before.cells) + (not passed)
    assert ("id" in annotated.cells[0]) == (minor >= 5)


def test_a_passed_notebook_gets_figures_and_nothing_else() -> None:
    before = make_notebook()
    annotated = annotate(before, make_verdict(Status.PASSED))
    assert without_figures(annotated) == before
    assert annotated.metadata.safe_exec.result.status == "passed"
    assert annotated.cells[1].metadata.safe_exec.result == {
        "status": "passed",
        "started": None,
        "seconds": 1.5,
        "cpu_seconds": None,
        "memory_peak": None,
        "memory_kept": None,
        "output_bytes": None,
        "output_truncated": False,
    }
    assert "safe_exec" not in annotated.cells[0].metadata


def test_the_crash_cell_gets_a_red_error() -> None:
    cell = annotate(make_notebook(), make_verdict()).cells[3]
    assert [output.output_type for output in cell.outputs] == ["stream", "error"]
    error = cell.outputs[1]
    assert error.ename == "SafeExec: out_of_memory"
    assert error.evalue == (
        "the summary of out_of_memory | line 2, running when the kernel was killed | "
        "oom kills: 1 · memory.oom_control; memory peak: 1.0 GiB · memory.max_usage_in_bytes"
    )
    assert "".join(error.traceback).startswith("\x1b[31m---")
    assert ANSI.sub("", "\n".join(error.traceback[1:])).splitlines() == [
        "SafeExec: out_of_memory: the summary of out_of_memory",
        "Code cell 2, line 2, running when the kernel was killed",
        "      1 frame = load()",
        '----> 2 joined = frame.merge(big, on="k")',
        "      3 joined.head()",
        "Stack, innermost first:",
        "    merge (pandas/core/frame.py:812)",
        "    in code cell 2, line 2",
        "Evidence:",
        "    oom kills: 1 · memory.oom_control",
        "    memory peak: 1.0 GiB · memory.max_usage_in_bytes",
        "Next: give it more with --memory, or load less at once",
    ]


def test_the_banner_says_what_where_why_and_what_next() -> None:
    banner = annotate(make_notebook(), make_verdict()).cells[0]
    assert banner.cell_type == "markdown"
    assert banner.metadata == {"tags": ["safe-exec"], "safe_exec": {"result": {"role": "banner"}}}
    assert banner.source.split("\n\n") == [
        "**✗ safe-exec: kernel died in code cell 2 · out of memory · limit 1.0 GiB, peak 1.0 GiB**",
        "**Why:** the summary of out&#95;of&#95;memory",
        "**Where:** [code cell 2](#cell-id=third), line 2, running when the kernel was killed:",
        '```text\njoined = frame.merge(big, on="k")\n```',
        "**Evidence:**",
        "- oom kills: `1 · memory.oom_control`\n- memory peak: `1.0 GiB · memory.max_usage_in_bytes`",
        "**Next:** give it more with --memory, or load less at once",
        "Code cells 3-4 did not run; earlier outputs are removed.",
        "*Written by safe-exec, which takes this cell away when it runs the notebook again.*",
    ]


def test_the_id_of_the_banner_is_its_own() -> None:
    notebook = make_notebook()
    notebook.cells[0].id, notebook.cells[1].id = "safe-exec-banner", "safe-exec-banner-2"
    ids = [cell.id for cell in annotate(notebook, make_verdict()).cells]
    assert ids[0] == "safe-exec-banner-3"
    assert len(set(ids)) == len(ids)


def test_cells_that_did_not_run_lose_their_outputs_and_others_keep_theirs() -> None:
    before = make_notebook()
    annotated = annotate(before, make_verdict())
    for cell in annotated.cells[4:]:
        assert (cell.outputs, cell.execution_count) == ([], None)
        assert cell.metadata.safe_exec.result.status == "not_run"
    assert annotated.cells[2].outputs == before.cells[1].outputs
    assert [cell.source for cell in annotated.cells[1:]] == [cell.source for cell in before.cells]


def test_a_skipped_cell_keeps_its_outputs() -> None:
    records = make_records(
        CellStatus.PASSED, CellStatus.KILLED, CellStatus.SKIPPED, CellStatus.NOT_RUN
    )
    annotated = annotate(make_notebook(), make_verdict(cells=records))
    assert [len(cell.outputs) for cell in annotated.cells[2:]] == [1, 2, 1, 0]


def test_an_exception_keeps_to_the_traceback_of_the_kernel() -> None:
    notebook = make_notebook()
    own = NB.v4.new_output("error", ename="ValueError", evalue="no", traceback=["ValueError: no"])
    notebook.cells[2].outputs.append(own)
    plain = annotate(notebook, make_verdict(Status.CELL_ERROR, CauseKind.EXCEPTION))
    assert plain.cells[3].outputs == notebook.cells[2].outputs
    limit = annotate(notebook, make_verdict(Status.CELL_ERROR, CauseKind.TOO_MANY_OPEN_FILES))
    assert limit.cells[3].outputs[:-1] == notebook.cells[2].outputs
    assert limit.cells[3].outputs[-1].ename == "SafeExec: too_many_open_files"


def test_a_run_without_a_cause_names_its_status() -> None:
    annotated = annotate(
        make_notebook(),
        make_verdict(Status.CANCELLED, cause=None, warnings=("stopped by SIGTERM",)),
    )
    assert our_errors(annotated.cells[3])[0].ename == "SafeExec: cancelled"
    assert "- `stopped by SIGTERM`" in annotated.cells[0].source


@pytest.mark.parametrize(
    "crash", [None, make_crash(index=99), make_crash(index=0)], ids=["none", "beyond", "markdown"]
)
def test_without_a_crash_cell_there_is_no_error_output(crash: Any) -> None:
    annotated = annotate(make_notebook(), make_verdict(crash_cell=crash))
    assert not any(our_errors(cell) for cell in annotated.cells)
    NB.validate(annotated)


# --- culprits ---------------------------------------------------------------------------------------------------


def paragraphs(verdict: Verdict) -> list[str]:
    return str(annotate(make_notebook(), verdict).cells[0].source).split("\n\n")


def test_the_banner_names_the_culprits_and_how_to_see_it_again() -> None:
    said = paragraphs(make_verdict(culprits=make_culprits()))
    start = said.index("**Culprits:** code cells 1 + 2; reproduced 2 of 2:")
    assert said[start + 1 : start + 4] == [
        "- [code cell 1](#cell-id=second) (accumulator): +612 MiB kept\n- [code cell 2](#cell-id=third) (crash): asked for more",
        "**Look first:** [code cell 1](#cell-id=second)",
        "**Reproduce:** `safe-exec run analysis.repro.ipynb`",
    ]


def test_the_banner_says_what_a_search_did_not_come_to() -> None:
    alone = make_culprits(
        make_culprit(1, Role.CRASH),
        look_first=2,
        minimal=False,
        stopped=Stopped.BUDGET,
        repro_notebook=None,
    )
    said = paragraphs(make_verdict(culprits=alone))
    assert (
        "**Culprits:** code cell 2 alone; reproduced 2 of 2; not known to be minimal: the budget ran out:"
        in said
    )
    assert not any(part.startswith(("**Look first", "**Reproduce")) for part in said)
    found = nothing_found(Stopped.NOT_REPRODUCED)
    assert "**Culprits:** none found; it did not happen again in 3 of 3 runs." in paragraphs(
        make_verdict(culprits=found)
    )


def test_the_banner_lists_eight_culprits_beside_the_crash_cell() -> None:
    many = [make_culprit(i, Role.SETUP) for i in range(12)]
    listing = next(
        part
        for part in paragraphs(make_verdict(culprits=make_culprits(*many)))
        if part.startswith("- ")
    )
    lines = listing.splitlines()
    assert len(lines) == 10
    assert (
        lines[7].startswith("- code cell 9 (setup)")
        and lines[8].startswith("- [code cell 2]")
        and lines[9] == "- and 3 more"
    )


def test_each_culprit_has_a_mark_and_all_but_the_crash_cell_say_so() -> None:
    before = make_notebook()
    annotated = annotate(before, make_verdict(culprits=make_culprits()))
    NB.validate(annotated)
    first, crash, other = annotated.cells[2:5]
    assert first.outputs[0] == {
        "output_type": "display_data",
        "data": {
            "text/markdown": "**safe-exec: culprit** (accumulator): +612 MiB kept",
            "text/plain": "safe-exec: culprit (accumulator): +612 MiB kept",
        },
        "metadata": {"safe_exec": {"result": {"role": "culprit"}}},
    }
    assert first.outputs[1:] == before.cells[1].outputs
    assert first.metadata.safe_exec.result.culprit == {
        "role": "accumulator",
        "note": "+612 MiB kept",
        "look_first": True,
    }
    assert first.metadata.safe_exec.result.status == "passed"
    assert crash.metadata.safe_exec.result.culprit == {
        "role": "crash",
        "note": "asked for more",
        "look_first": False,
    }
    assert [output.output_type for output in crash.outputs] == ["stream", "error"]
    assert "culprit" not in other.metadata.safe_exec.result
    for ours, own in zip(annotated.cells[1:], before.cells, strict=True):
        assert (ours.source, ours.id, ours.metadata.get("tags")) == (
            own.source,
            own.id,
            own.metadata.get("tags"),
        )


def test_a_culprit_without_a_note_is_told_by_its_role() -> None:
    found = make_culprits(make_culprit(0, Role.SETUP, note=""), make_culprit(1, Role.CRASH))
    output = annotate(make_notebook(), make_verdict(culprits=found)).cells[2].outputs[0]
    assert output.data["text/plain"] == "safe-exec: culprit (setup): must run before"


def test_culprits_that_are_no_code_cells_are_passed_over() -> None:
    found = make_culprits(
        make_culprit(index=0), make_culprit(index=99), make_culprit(1, Role.CRASH)
    )
    annotated = annotate(make_notebook(), make_verdict(culprits=found))
    NB.validate(annotated)
    assert "safe_exec" not in annotated.cells[1].metadata


def test_a_rerun_takes_the_marks_of_culprits_away_and_nothing_of_the_users() -> None:
    before = make_notebook()
    before.cells[1].metadata.safe_exec = NB.from_dict({"limits": {"memory": "2G"}})
    before.cells[1].metadata.tags = ["mine"]
    before.cells[1].outputs.append(
        NB.v4.new_output("display_data", {"text/plain": "mine"}, metadata={"mine": 1})
    )
    for cell in before.cells[3:]:
        cell.outputs, cell.execution_count = [], None
    annotated = annotate(before, make_verdict(culprits=make_culprits()))
    assert annotated != before
    assert strip_annotations(annotated) == before
    assert strip_annotations(NB.reads(NB.writes(annotated), as_version=4)) == before


@pytest.mark.parametrize("line", [None, 0, 99])
def test_a_line_that_is_not_there_shows_no_source(line: int | None) -> None:
    annotated = annotate(make_notebook(), make_verdict(crash_cell=make_crash(line=line)))
    assert not any("---->" in row for row in our_errors(annotated.cells[3])[0].traceback)


def test_the_users_own_metadata_stays() -> None:
    notebook = make_notebook()
    limits = {"memory": "2G"}
    notebook.metadata.safe_exec = NB.from_dict({"limits": limits})
    notebook.cells[2].metadata.safe_exec = NB.from_dict({"limits": limits})
    notebook.cells[3].metadata.safe_exec = "mine"
    annotated = annotate(notebook, make_verdict())
    assert (
        annotated.metadata.safe_exec.limits
        == limits
        == annotated.cells[3].metadata.safe_exec.limits
    )
    assert annotated.cells[4].metadata.safe_exec == "mine"


def test_an_output_however_deep_does_not_stop_the_report() -> None:
    notebook = make_notebook()
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    dict.__setitem__(
        notebook.cells[2].outputs[0], "metadata", {"deep": deep}
    )  # a NotebookNode would recurse
    annotated = annotate(notebook, make_verdict())
    assert annotated.cells[3].outputs[0] is notebook.cells[2].outputs[0]
    assert len(notebook.cells[2].outputs) == 1


@pytest.mark.parametrize("verdict", every_verdict(), ids=name_of)
def test_what_is_added_is_what_is_stripped_before_a_run(verdict: Verdict) -> None:
    before = make_notebook()
    for cell in before.cells[3:]:
        cell.outputs, cell.execution_count = [], None
    if verdict.status is Status.START_FAILED:
        for cell in before.cells[1:3]:
            cell.outputs, cell.execution_count = [], None
    assert strip_annotations(annotate(before, verdict)) == before


def test_a_notebook_without_cells() -> None:
    annotated = annotate(
        NB.v4.new_notebook(), make_verdict(Status.START_FAILED, cells=(), limits=Limits())
    )
    assert len(annotated.cells) == 1
    NB.validate(annotated)


# --- inert text -------------------------------------------------------------------------------------------------

MARKDOWN = MarkdownIt("commonmark", {"linkify": False}).enable(["table", "strikethrough"])
NASTY = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[click](javascript:alert(1))",
    "![i](http://evil/x.png)",
    "**bold** _it_ ~~s~~",
    "`code` ``more`` ```fence",
    "$x$ and $$y$$ \\(z\\) \\begin{align}",
    "&lt;b&gt; &#60;b&#62;",
    "# head | table | <!-- c -->",
    "https://evil.example www.evil.example a@b.c",
    "\x1b[31mred\x1b[0m \u202eodd \ud800",
    "trailing \\",
    "line\n\n<b>para</b>\n\n```\nfence",
]
anything = st.one_of(
    st.text(st.characters(), max_size=30),
    st.text(alphabet="`$\\<>&*_[]()!#|~ \nab", max_size=30),
    st.sampled_from(NASTY),
)


def tags(markdown: str) -> list[str]:
    """The tags that ``markdown`` turns into, and ``html`` for each piece of raw HTML."""
    found = []
    for token in MARKDOWN.parse(markdown):
        for piece in [token, *(token.children or [])]:
            if piece.type.startswith("html"):
                found.append("html")
            elif piece.tag:
                found.append(piece.tag)
    return found


def shown(markdown: str) -> str:
    """The text that a reader of ``markdown`` sees."""
    pieces = (piece for token in MARKDOWN.parse(markdown) for piece in token.children or [])
    return "".join(piece.content for piece in pieces)


@settings(max_examples=300)
@given(anything)
def test_inert_text_shows_itself_and_does_nothing(words: str) -> None:
    markdown = f"Why: {inert(words)}"
    assert set(tags(markdown)) <= {"p", "code"}
    assert shown(markdown) == f"Why: {single_line(words)}".rstrip()
    prose = re.sub(r"`[^`]*`", "", markdown)
    assert "$" not in prose and "\\" not in prose and "://" not in prose


@settings(max_examples=300)
@given(anything.map(lambda words: " ".join(words.replace("\x00", "").split())).filter(bool))
def test_a_code_span_holds_whatever_it_is_given(words: str) -> None:
    words = words.encode("utf-8", "replace").decode()
    markdown = f"- a: {code_span(words)} b"
    assert tags(markdown).count("code") == 1 and "html" not in tags(markdown)
    assert shown(markdown) == f"a: {words} b"


@given(anything)
def test_a_fence_holds_whatever_it_is_given(words: str) -> None:
    blocks = MARKDOWN.parse(f"{fenced(words)}\n\nafter")
    assert [block.type for block in blocks] == [
        "fence",
        "paragraph_open",
        "inline",
        "paragraph_close",
    ]


@settings(max_examples=100, deadline=None)
@given(anything.filter(lambda words: words.strip()))
def test_nothing_from_the_kernel_gets_out_of_its_place(words: str) -> None:
    cause = make_cause(
        summary=words, advice=words, evidence=(make_fact(fact=words, value=words, source=words),)
    )
    crash = make_crash(source_line=words, id=words)
    notebook = make_notebook()
    notebook.cells[2].source = words
    cells = (
        make_culprit(note=words, id=words, source_line=words),
        make_culprit(1, Role.CRASH, note=words, id=words),
    )
    culprits = make_culprits(*cells, repro_notebook=words)
    annotated = annotate(
        notebook, make_verdict(cause=cause, crash_cell=crash, warnings=(words,), culprits=culprits)
    )
    NB.validate(annotated)
    annotated.cells[0].source.encode()
    assert set(tags(annotated.cells[0].source)) <= {"p", "strong", "em", "code", "ul", "li", "a"}
    # The links to the crash cell (two) and to the other culprit (two), opened and closed.
    assert tags(annotated.cells[0].source).count("a") <= 8
    assert set(tags(annotated.cells[2].outputs[0].data["text/markdown"])) <= {"p", "strong", "code"}
    assert len(annotated.cells[2].outputs[0].data["text/plain"].splitlines()) == 1
    error = our_errors(annotated.cells[3])[0]
    for line in (error.evalue, *error.traceback):
        line.encode()
        assert "\n" not in line and "\x1b" not in ANSI.sub("", line)


@pytest.mark.parametrize("words", NASTY)
def test_nasty_texts_one_by_one(words: str) -> None:
    test_nothing_from_the_kernel_gets_out_of_its_place.hypothesis.inner_test(words)  # type: ignore[attr-defined]


def test_the_banner_names_the_function_and_the_cell_of_each_line_further_in() -> None:
    load = Frame(function="load", line=5, cell=1, source_line="    return read(path)")
    crash = make_crash(stack=(load, Frame(function="<module>", line=2, cell=2)))
    banner = annotate(make_notebook(), make_verdict(crash_cell=crash)).cells[0].source
    assert (
        "in `load`, [code cell 1](#cell-id=second), line 5:\n\n```text\nreturn read(path)\n```"
        in banner
    )
