"""The HTML page as a file: one document, nothing fetched, data that stays data, and never more of it than is good."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from safe_exec.model.verdict import CellStatus, Timeline, Verdict
from safe_exec.reports.batch import source_map
from safe_exec.reports.batch.html import page, page_data
from safe_exec.reports.batch.results import BatchResult, NotebookResult
from safe_exec.reports.batch.text import NotebookReport
from tests.unit.batches import SOURCES, every_entry, make_batch, make_entry
from tests.unit.builders import make_crash, make_culprit, make_culprits, make_records, make_verdict

REPORTS = Path(page.__file__).parent
ATTACK = "</script><script>alert(1)</script><!--<script>"


class Document(HTMLParser):
    """The page as a browser would read it: elements with their attributes, and the content of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: dict[str, str] = {}
        self.styles: list[str] = []
        self._within: tuple[str, str] | None = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._within = (tag, dict(attrs).get("id") or "")

    def handle_endtag(self, tag: str) -> None:
        self._within = None

    def handle_data(self, data: str) -> None:
        if self._within is not None:
            tag, name = self._within
            if tag == "script":
                self.scripts[name] = self.scripts.get(name, "") + data
            else:
                self.styles.append(data)

    def data(self, name: str) -> Any:
        return json.loads(self.scripts[name])


def written(batch: BatchResult) -> Document:
    path = batch.out / "report.html"
    page.write(batch, path)
    return Document(path.read_text("utf-8"))


def detail(batch: BatchResult, number: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = written(batch).data(f"notebook-{number}")
    return found


def failed(
    root: Path, verdict: Verdict, sources: tuple[str, ...] = SOURCES, **changes: Any
) -> NotebookResult:
    return make_entry(root, "a.ipynb", verdict, sources, **changes)


def test_one_page_for_every_notebook_there_can_be(tmp_path: Path) -> None:
    batch = make_batch(tmp_path, every_entry(tmp_path))
    document = written(batch)
    rows = document.data("batch")["rows"]
    assert [row["path"] for row in rows] == [entry.path for entry in batch.results]
    assert {f"notebook-{number}" for number in range(len(rows))} | {"batch", ""} == set(
        document.scripts
    )
    assert [document.data(f"notebook-{number}")["headline"] for number in range(len(rows))]
    assert {row["outcome"] for row in rows} == {"passed", "failed", "error", "skipped"}
    unknown = next(row for row in rows if row["path"] == "gone.ipynb")
    assert (
        unknown["memory"] is None
        and unknown["seconds"] is None
        and unknown["what"] == "its verdict cannot be read any more"
    )


def test_no_notebooks(tmp_path: Path) -> None:
    assert written(make_batch(tmp_path, [])).data("batch")["rows"] == []


# --- nothing is fetched, nothing runs but ours ------------------------------------------------------------------


def test_nothing_is_asked_of_the_network(tmp_path: Path) -> None:
    document = written(make_batch(tmp_path, every_entry(tmp_path)))
    for tag, attributes in document.elements:
        assert tag not in ("img", "iframe", "object", "embed", "base", "form")
        assert not attributes.get("src")
        assert (attributes.get("href") or "#").startswith(("#", "data:,"))
    assert not re.search(r"url\(|@import|https?:", document.styles[0])
    assert set(re.findall(r"https?://[^\"']+", document.scripts[""])) == {
        "http://www.w3.org/2000/svg"
    }


def test_only_this_style_and_this_script_may_be(tmp_path: Path) -> None:
    document = written(make_batch(tmp_path, []))
    policy = next(
        a["content"]
        for tag, a in document.elements
        if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    for rule, content in {
        "script-src": document.scripts[""],
        "style-src": document.styles[0],
    }.items():
        assert (
            rules[rule]
            == f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
        )
    assert rules["default-src"] == "'none'"
    assert (
        sum(tag == "script" and "type" not in attributes for tag, attributes in document.elements)
        == 1
    )
    assert not [
        name
        for _, attributes in document.elements
        for name in attributes
        if name.startswith("on") or name == "style"
    ]


def test_the_script_makes_no_markup_of_text() -> None:
    script = (REPORTS / "page.js").read_text()
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|DOMParser|srcdoc|setTimeout\(['\"]",
        script,
    )


def test_text_of_notebooks_is_data(tmp_path: Path) -> None:
    verdict = make_verdict(
        stderr_tail=ATTACK,
        culprits=make_culprits(make_culprit(note=ATTACK, source_line=ATTACK)),
        warnings=(ATTACK,),
    )
    entry = replace(
        failed(tmp_path, verdict, (ATTACK, ATTACK)),
        path=f"{ATTACK.replace('/', '')}.ipynb",
        error=ATTACK,
    )
    batch = make_batch(tmp_path, [entry], command=(ATTACK,), limits=ATTACK)
    document = written(batch)
    clean = written(make_batch(tmp_path, [failed(tmp_path, make_verdict())]))
    assert [tag for tag, _ in document.elements] == [tag for tag, _ in clean.elements]
    assert document.scripts[""] == clean.scripts[""]
    shown = document.data("notebook-0")
    assert shown["stderr"]["text"] == ATTACK and ATTACK in shown["crash"]["source"]["lines"]


@settings(deadline=None)
@given(
    st.recursive(
        st.text(st.characters(exclude_categories=())) | st.none() | st.integers() | st.booleans(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_data_comes_back_and_never_ends_its_element(value: Any) -> None:
    written_as = page.as_data(value)
    assert json.loads(written_as) == value
    assert written_as.isascii() and not set("<>&") & set(written_as)
    assert html.unescape(written_as) == written_as


# --- what is shown ----------------------------------------------------------------------------------------------


def test_the_source_of_crash_cell_and_culprits(tmp_path: Path) -> None:
    shown = detail(make_batch(tmp_path, [failed(tmp_path, make_verdict(culprits=make_culprits()))]))
    assert shown["crash"]["source"] == {
        "first": 1,
        "marked": 2,
        "lines": SOURCES[1].split("\n"),
        "cut": 0,
        "alone": False,
    }
    assert [cell["source"]["lines"] for cell in shown["culprits"]["cells"]] == [
        [SOURCES[0]],
        SOURCES[1].split("\n"),
    ]
    assert [cell["first"] for cell in shown["culprits"]["cells"]] == [True, False]


def test_of_a_notebook_that_has_changed_only_the_line_of_the_verdict_is_shown(
    tmp_path: Path,
) -> None:
    entry = failed(tmp_path, make_verdict(culprits=make_culprits()))
    entry.source.write_text("{}")
    shown = detail(make_batch(tmp_path, [entry]))
    assert (
        shown["crash"]["source"]["lines"] == ['joined = frame.merge(big, on="k")']
        and shown["crash"]["source"]["alone"]
    )
    entry = failed(tmp_path, make_verdict(crash_cell=make_crash(source_line=None)))
    entry.source.unlink()
    assert detail(make_batch(tmp_path, [entry]))["crash"]["source"] is None


def test_characters_that_lie_about_code_are_written_out(tmp_path: Path) -> None:
    shown = detail(
        make_batch(tmp_path, [failed(tmp_path, make_verdict(), ("x", "a\u202eb\n\x1b[31mred"))])
    )
    assert shown["crash"]["source"]["lines"] == ["a\\u202eb", "\\x1b[31mred"]


def test_a_long_cell_is_cut_around_its_line() -> None:
    source = "\n".join(f"line {number}" for number in range(1, 1001))
    for line, first in {1: 1, 500: 350, 1000: 701, None: 1}.items():
        shown = page_data.code(source, None, line, 300)
        assert shown is not None and (shown["first"], len(shown["lines"]), shown["cut"]) == (
            first,
            300,
            700,
        )
        if line is not None:
            assert shown["lines"][line - first] == f"line {line}"
    wide = page_data.code("\n".join(["x" * 5000] * 1000), None, 500, 300)
    assert wide is not None and {len(words) for words in wide["lines"]} == {page_data.LINE_WIDTH}
    assert sum(map(len, wide["lines"])) <= 300 * page_data.USUAL_WIDTH
    assert (
        wide["first"] <= 500 < wide["first"] + len(wide["lines"])
        and wide["cut"] + len(wide["lines"]) == 1000
    )
    one = page_data.code("x" * 5000, None, 1, 300)
    assert one is not None and len(one["lines"]) == 1


def test_links_go_to_files_below_the_page_only(tmp_path: Path) -> None:
    entry = failed(
        tmp_path,
        make_verdict(),
        notebook=tmp_path / "out" / "java script:a#b?.ipynb",
        repro=tmp_path / "elsewhere.ipynb",
    )
    files = detail(make_batch(tmp_path, [entry]))["files"]
    assert files == [
        {"name": "annotated notebook", "href": "./java%20script%3Aa%23b%3F.ipynb"},
        {"name": "verdict", "href": "./a.ipynb.verdict.json"},
    ]


def test_a_timeline_keeps_its_peak_and_its_gaps() -> None:
    memory = tuple(None if n % 7 == 0 else n % 97 for n in range(500))
    memory = (*memory[:250], 1000, *memory[251:])
    samples = Timeline(
        seconds=tuple(n / 10 for n in range(500)), memory=memory, cpu=(None,) * 500, cell=(0,) * 500
    )
    for most in (80, 400, 1000):
        shown = page_data.timeline(samples, most)
        assert len(shown["seconds"]) == len(shown["memory"]) <= most
        assert shown["seconds"][shown["memory"].index(1000)] == 25.0
        assert shown["seconds"] == sorted(shown["seconds"])
    gap = Timeline(seconds=(0.0, 1.0), memory=(None, None), cpu=(None, None), cell=(0, 0))
    assert page_data.timeline(gap, 80)["memory"] == [None, None]
    assert page_data.timeline(Timeline(), 80) == {"seconds": [], "memory": []}


def test_much_is_cut_and_said(tmp_path: Path) -> None:
    many = tuple(make_culprit(n, note="x") for n in range(60))
    verdict = make_verdict(
        culprits=make_culprits(*many),
        stderr_tail="y" * 60_000,
        cells=make_records(CellStatus.PASSED) * 900,
    )
    shown = detail(make_batch(tmp_path, [failed(tmp_path, verdict)]))
    assert (len(shown["culprits"]["cells"]), shown["culprits"]["cut"]) == (20, 40)
    assert (len(shown["cells"]), shown["cells_cut"]) == (300, 600)
    assert (len(shown["stderr"]["text"]), shown["stderr"]["cut"]) == (6000, 54_000)


def test_of_five_hundred_notebooks_each_is_bounded(tmp_path: Path) -> None:
    samples = Timeline(
        seconds=tuple(n / 7 for n in range(500)),
        memory=tuple(12345678 * n for n in range(500)),
        cpu=(1.5,) * 500,
        cell=(3,) * 500,
    )
    verdict = make_verdict(timeline=samples, culprits=make_culprits(), stderr_tail="x" * 65536)
    one = failed(tmp_path, verdict, ("y = 1\n" * 5000,) * 3)
    sizes = {}
    for count in (1, 500):
        batch = make_batch(
            tmp_path, [replace(one, path=f"{number}.ipynb") for number in range(count)]
        )
        sizes[count] = len(page.as_data(page_data.detail(NotebookReport.of(one), batch, tmp_path)))
    assert sizes[500] < 20_000, "ten megabytes for the page"
    assert sizes[500] < sizes[1], "of few notebooks more points are shown"


def test_the_page_is_made_piece_by_piece(tmp_path: Path) -> None:
    """No verdict is read before the one before it has been written."""
    entries = [make_entry(tmp_path, f"{n}.ipynb", make_verdict()) for n in range(3)]
    pieces = page._pieces(make_batch(tmp_path, entries), tmp_path)
    before = [next(pieces), next(pieces)]
    assert '"notebook-0"' in before[1]
    assert entries[1].verdict is not None
    entries[1].verdict.unlink()
    assert "its verdict cannot be read any more" in next(pieces)


def test_a_notebook_is_told_without_a_verdict_of_another_version(tmp_path: Path) -> None:
    entry = failed(tmp_path, make_verdict())
    assert entry.verdict is not None
    entry.verdict.write_text(
        entry.verdict.read_text().replace("safe-exec/verdict/1", "safe-exec/verdict/99")
    )
    assert NotebookReport.of(entry).verdict is None
    assert (
        detail(make_batch(tmp_path, [entry]))["headline"]
        == "kernel died · its verdict cannot be read any more"
    )
    assert source_map.file_line(NotebookReport.of(entry)) is None
