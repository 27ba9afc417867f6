"""GitHub Actions: annotations at the right file and line, escaped; a summary that is inert and never too long."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from msgspec.structs import replace

from safe_exec.model.verdict import CauseKind, Status
from safe_exec.reports.batch.ci import github
from safe_exec.reports.batch.results import BatchResult
from tests.unit.batches import every_entry, make_batch, make_entry
from tests.unit.builders import make_cause, make_crash, make_culprits, make_verdict

MARKDOWN = MarkdownIt("commonmark", {"html": True}).enable("table")
COMMAND = re.compile(r"::(error|warning|notice) ((?:[a-z]+=[^,:]*)(?:,[a-z]+=[^,:]*)*)::(.*)")


def undo(words: str) -> str:
    unescaped = {"%0A": "\n", "%0D": "\r", "%3A": ":", "%2C": ",", "%25": "%"}
    return re.sub("%(?:0A|0D|3A|2C|25)", lambda code: unescaped[code[0]], words)


def read(line: str) -> tuple[str, dict[str, str], str]:
    """A workflow command as the runner takes it apart: name, properties, message."""
    found = COMMAND.fullmatch(line)
    assert found, line
    pairs = dict(part.split("=", 1) for part in found[2].split(","))
    return found[1], {key: undo(value) for key, value in pairs.items()}, undo(found[3])


def commands(batch: BatchResult, base: Path | None = None) -> list[tuple[str, dict[str, str], str]]:
    return [read(line) for line in github.annotations(batch, base)]


def test_one_error_for_each_notebook_that_failed(tmp_path: Path) -> None:
    batch = make_batch(tmp_path, every_entry(tmp_path))
    found = commands(batch)
    failed = [
        entry.path
        for entry in batch.results
        if entry.status not in ("passed", "not_run", "unchanged")
    ]
    assert [properties["file"] for name, properties, _ in found if name == "error"] == failed
    assert [properties["file"] for name, properties, _ in found if name == "warning"] == [
        "flaky.ipynb"
    ]
    assert next(message for name, _, message in found if name == "notice").startswith(
        f"{len(failed)} notebooks failed"
    )


def test_an_annotation_stands_at_the_line_that_failed(tmp_path: Path) -> None:
    entry = make_entry(tmp_path, "docs/a, b: 100%.ipynb", make_verdict(culprits=make_culprits()))
    ((name, properties, message),) = commands(make_batch(tmp_path, [entry]))
    assert (
        name == "error"
        and properties["file"] == entry.path
        and properties["title"] == f"{entry.path}: out of memory"
    )
    line = entry.source.read_text().splitlines()[int(properties["line"]) - 1]
    assert json.loads(line.strip().rstrip(",")) == 'joined = frame.merge(big, on="k")'
    assert message.splitlines()[0].startswith("kernel died in code cell 2 · out of memory")
    assert (
        "caused by code cells 1 + 2" in message
        and "next: give it more" in message
        and "evidence" not in message
    )


def test_without_a_known_line_the_cell_and_without_a_cell_the_file(tmp_path: Path) -> None:
    no_line = make_entry(tmp_path, "a.ipynb", make_verdict(crash_cell=make_crash(line=None)))
    no_cell = make_entry(tmp_path, "b.ipynb", make_verdict(Status.START_FAILED))
    beyond = make_entry(tmp_path, "c.ipynb", make_verdict(crash_cell=make_crash(line=99)))
    changed = make_entry(tmp_path, "d.ipynb", make_verdict())
    changed.source.write_text(changed.source.read_text() + "\n")
    lines = [
        int(properties["line"])
        for _, properties, _ in commands(make_batch(tmp_path, [no_line, no_cell, beyond, changed]))
    ]
    assert (
        json.loads(no_line.source.read_text().splitlines()[lines[0] - 1].strip().rstrip(","))
        == "small = 1\n"
    )
    assert lines[1:] == [1, lines[0], 1]


def test_paths_are_those_of_the_checkout(tmp_path: Path) -> None:
    root = tmp_path / "below"
    root.mkdir()
    batch = make_batch(root, [make_entry(root, "a.ipynb", make_verdict())])
    assert commands(batch, tmp_path)[0][1]["file"] == "below/a.ipynb"
    assert commands(batch, tmp_path / "elsewhere")[0][1]["file"] == str(root / "a.ipynb")


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=()), max_size=40), st.text(max_size=40))
def test_a_command_is_one_line_and_says_what_it_was_given(message: str, title: str) -> None:
    line = github.command("error", message, file="a.ipynb", line=3, title=title)
    assert len(line.splitlines()) == 1
    name, properties, said = read(line)
    assert (name, properties["file"], properties["line"]) == ("error", "a.ipynb", "3")
    plain = str.maketrans("", "", "".join(map(chr, (*range(0x20), *range(0x7F, 0xA0)))))
    printable = all(char.isprintable() for char in message + title)
    assert not printable or (said.translate(plain), properties["title"]) == (message, title)


# --- the summary ------------------------------------------------------------------------------------------------


def text_of(markdown: str) -> str:
    """All that a reader of the markdown sees as text, HTML left out."""
    tokens = [child for token in MARKDOWN.parse(markdown) for child in (token.children or [token])]
    return "\n".join(
        token.content for token in tokens if token.type in ("text", "code_inline", "fence")
    )


def test_a_summary_has_all_notebooks_and_what_there_is_to_know(tmp_path: Path) -> None:
    entry = make_entry(tmp_path, "docs/a.ipynb", make_verdict(culprits=make_culprits()))
    passed = make_entry(tmp_path, "b.ipynb", make_verdict(Status.PASSED), flaky=True, attempts=2)
    summary = github.summary(
        make_batch(tmp_path, [passed, entry, make_entry(tmp_path, "c.ipynb", None)])
    )
    said = text_of(summary)
    for words in (
        "1 failed · 1 passed · 1 skipped · 1 flaky",
        "flaky: passed at attempt 2",
        'joined = frame.merge(big, on="k")',
        "not run",
        "1.0 GiB",
    ):
        assert words in said, words
    assert said.index("docs/a.ipynb") < said.index("b.ipynb"), "what failed comes first"
    assert summary.count("<details>") == summary.count("</details>") == 1
    assert "safe-exec replay out/docs/a.ipynb.verdict.json" in said


ATTACKS = (
    "<script>alert(1)</script>",
    "| x | y |",
    "](javascript:alert(1))",
    "`` ``` `",
    "$x$ \\(y\\)",
    "@someone #1",
    "</details><h1>",
    "http://evil",
)


@pytest.mark.parametrize("words", ATTACKS)
def test_text_of_a_notebook_is_inert(tmp_path: Path, words: str) -> None:
    cause = make_cause(CauseKind.EXCEPTION, summary=words, advice=words)
    verdict = make_verdict(
        Status.CELL_ERROR,
        cause=cause,
        crash_cell=make_crash(source_line=words),
        culprits=make_culprits(),
    )
    entry = replace(
        make_entry(tmp_path, "a.ipynb", verdict), path=f"{words.replace('/', '')}.ipynb"
    )
    summary = github.summary(make_batch(tmp_path, [entry]))
    tokens = [child for token in MARKDOWN.parse(summary) for child in (token.children or [token])]
    html = "".join(token.content for token in tokens if token.type in ("html_inline", "html_block"))
    assert set(re.findall(r"</?\w+", html)) == {"<details", "</details", "<summary", "</summary"}
    assert not {token.type for token in tokens} & {"link_open", "image"}
    assert html.count("<details>") == html.count("</details>") == 1
    table = summary.partition("<details>")[0]
    assert [len(line.split("|")) for line in table.splitlines() if line.startswith("|")] == [
        7,
        7,
        7,
    ]


def test_every_verdict_can_be_summed_up(tmp_path: Path) -> None:
    batch = make_batch(tmp_path, every_entry(tmp_path))
    said = github.summary(batch)
    assert all(entry.path.replace("_", "&#95;") in said for entry in batch.results)


def test_a_summary_is_never_longer_than_github_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = make_batch(tmp_path, every_entry(tmp_path))
    whole = len(github.summary(batch).encode())
    for most in (20_000, 4_000, 1_000):
        assert most < whole
        monkeypatch.setattr(github, "MOST_BYTES", most)
        summary = github.summary(batch)
        assert len(summary.encode()) <= most
        assert "more details did not fit here" in summary
        assert summary.count("<details>") == summary.count("</details>")
