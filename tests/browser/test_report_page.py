"""The HTML page in a real browser: sorted, filtered, opened, by mouse and keyboard, on paper; and inert whatever is in it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from playwright.sync_api import Browser, Dialog, Locator, Page, expect, sync_playwright

from safe_exec.model.memory import AllocationLine, CellGrowth, Holder, MemoryUse
from safe_exec.model.verdict import (
    CauseKind,
    CellRecord,
    CellStatus,
    Role,
    Status,
    Timeline,
    Usage,
    Verdict,
)
from safe_exec.reports.batch.html import page as html_page
from safe_exec.reports.batch.results import NotebookResult
from tests.unit.batches import SOURCES, make_batch, make_entry
from tests.unit.builders import (
    GIB,
    make_cause,
    make_crash,
    make_culprit,
    make_culprits,
    make_verdict,
)

expect.set_options(timeout=30_000)  # a busy machine is slow, and no error

MIB = 1 << 20
ATTACK = '<img src="x" onerror="alert(1)"></script><script>window.pwned = 1; alert(2)</script>'


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium") or shutil.which("chromium-headless-shell")
    assert path, "no chromium on this machine: make browser"
    with sync_playwright() as playwright:
        # Chromium's own sandbox does not work for root; the page is a file of ours.
        started = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-gpu"]
        )
        yield started
        started.close()


@dataclass(kw_only=True)
class Seen:
    """A page, and all that went on around it: what it asked for, what it logged, what it popped up."""

    page: Page
    file: Path
    requests: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def row(self, path: str) -> Locator:
        return self.page.get_by_role("button", name=path, exact=True)

    def paths(self) -> list[str]:
        return self.page.locator("tr.line .open").all_inner_texts()

    def dismiss(self, dialog: Dialog) -> None:
        self.said.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def open(self, path: str) -> Locator:
        self.row(path).click()
        return self.page.get_by_role("region", name=path, exact=True)


Show = Callable[..., Seen]


@pytest.fixture
def show(browser: Browser, tmp_path: Path) -> Iterator[Show]:
    """Shows a page of these notebooks; in the end nothing may have been fetched, logged or popped up."""
    made: list[Seen] = []

    def shown(entries: list[NotebookResult], address: str = "", **context: Any) -> Seen:
        batch = make_batch(tmp_path, entries)
        file = batch.out / "report.html"
        html_page.write(batch, file)
        page = browser.new_context(
            **{"viewport": {"width": 1280, "height": 900}} | context
        ).new_page()
        page.set_default_timeout(60_000)
        seen = Seen(page=page, file=file)
        page.on("request", lambda request: seen.requests.append(request.url))
        page.on("console", lambda message: seen.said.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: seen.said.append(f"error: {error}"))
        page.on("dialog", seen.dismiss)
        page.goto(file.as_uri() + address)
        made.append(seen)
        return seen

    yield shown
    for seen in made:
        assert seen.said == []
        assert [
            url for url in seen.requests if not url.startswith((seen.file.as_uri(), "data:,"))
        ] == []
        seen.page.context.close()


def verdict_of(
    seconds: float, memory: int | None, status: Status = Status.KERNEL_DIED, **changes: Any
) -> Verdict:
    """A verdict with a timeline: memory grows cell by cell."""
    ended = CellStatus.KILLED if status is not Status.PASSED else CellStatus.PASSED
    cells = tuple(
        CellRecord(
            index=n + 1,
            code_index=n,
            id=None,
            status=ended
            if n == 1
            else CellStatus.PASSED
            if n == 0 or status is Status.PASSED
            else CellStatus.NOT_RUN,
            started=n * seconds / 2 if n < 2 else None,
            seconds=seconds / 2 if n < 2 else None,
        )
        for n in range(4)
    )
    points = 60
    grown = tuple(None if memory is None else memory * n // (points - 1) for n in range(points))
    timeline = Timeline(
        seconds=tuple(seconds * n / (points - 1) for n in range(points)),
        memory=grown,
        cpu=(None,) * points,
        cell=(1,) * points,
    )
    usage = Usage(wall_seconds=seconds, cpu_seconds=seconds / 2, memory_peak=memory)
    given: dict[str, Any] = {"cells": cells, "timeline": timeline, "usage": usage}
    return make_verdict(status, **given | changes)


def test_machines_and_what_they_ran(show: Show, tmp_path: Path) -> None:
    def entry(name: str, machine: str, second: int, **changes: Any) -> NotebookResult:
        verdict = verdict_of(1.0, MIB, Status.PASSED)
        moments = {
            key: f"2026-01-02T03:04:{second + n:02}.000Z"
            for n, key in enumerate(("started", "finished"))
        }
        environment = replace(verdict.environment, machine=machine)
        verdict = replace(verdict, environment=environment, **moments)
        return make_entry(tmp_path, name, verdict, **changes)

    entries = [
        entry("a.ipynb", "node-a", 0),
        entry("b.ipynb", "node-a", 0),
        entry("c.ipynb", "node-a", 3),
        entry("d.ipynb", "node-b", 0, losses=("node-c",)),
    ]
    seen = show(entries)
    machines = seen.page.locator("#machines")
    # Three of two times four seconds.
    expect(machines.get_by_role("img")).to_have_count(2)
    expect(machines).to_contain_text("3 notebooks, 2 at a time, 38 % busy")
    expect(seen.page.locator("td.machine").last).to_contain_text("node-bworker lost on node-c")
    machines.locator(".run").last.click()
    expect(seen.page.get_by_role("region", name="d.ipynb", exact=True)).to_be_visible()


def test_one_machine_needs_no_column(show: Show, tmp_path: Path) -> None:
    seen = show([make_entry(tmp_path, "a.ipynb", verdict_of(1.0, MIB, Status.PASSED))])
    expect(seen.page.locator("#machines")).to_be_hidden()
    expect(seen.page.locator("td.machine")).to_have_count(0)


MEMORY = MemoryUse(
    peak_bytes=GIB,
    attributed_bytes=912 * MIB,
    native_bytes=50 * MIB,
    complete=True,
    holders=(
        Holder(
            name="big",
            type="DataFrame",
            bytes=612 * MIB,
            summary="DataFrame 1,000 x 3",
            code_index=0,
            growth=(CellGrowth(code_index=0, bytes=612 * MIB),),
        ),
        Holder(
            name="rows",
            type="list",
            bytes=300 * MIB,
            summary="list of 5 bytes",
            code_index=1,
            growth=(CellGrowth(code_index=1, bytes=300 * MIB),),
        ),
    ),
    lines=(AllocationLine(code_index=0, line=1, function="<module>", bytes=612 * MIB),),
)


def mixed(root: Path) -> list[NotebookResult]:
    """A notebook of each kind."""
    oom = verdict_of(
        4.0,
        GIB,
        culprits=make_culprits(),
        cwd=str(root / "docs"),
        stderr_tail="last words of the kernel\n",
    )
    oom = replace(oom, memory=MEMORY)
    error = verdict_of(
        2.0,
        40 * MIB,
        Status.CELL_ERROR,
        cause=make_cause(CauseKind.EXCEPTION, summary="ValueError: no"),
    )
    slow = verdict_of(30.0, 90 * MIB, Status.TIMEOUT, cause=make_cause(CauseKind.CELL_TIMEOUT))
    start = verdict_of(
        1.0,
        None,
        Status.START_FAILED,
        cause=make_cause(CauseKind.KERNEL_START_FAILED),
        timeline=Timeline(),
    )
    return [
        make_entry(root, "docs/a-passed.ipynb", verdict_of(3.0, 300 * MIB, Status.PASSED)),
        make_entry(
            root, "docs/b-memory.ipynb", oom, repro=root / "out" / "docs" / "b-memory.repro.ipynb"
        ),
        make_entry(root, "c-error.ipynb", error),
        make_entry(root, "d-slow.ipynb", slow),
        make_entry(root, "e-start.ipynb", start),
        make_entry(
            root, "f-flaky.ipynb", verdict_of(5.0, 100 * MIB, Status.PASSED), flaky=True, attempts=2
        ),
        make_entry(root, "g-late.ipynb", None),
    ]


BY_RESULT = ["c-error", "d-slow", "docs/b-memory", "e-start", "docs/a-passed", "f-flaky", "g-late"]


def names(seen: Seen) -> list[str]:
    return [path.removesuffix(".ipynb") for path in seen.paths()]


# --- table ------------------------------------------------------------------------------------------------------


def test_the_table_says_what_came_of_each(show: Show, tmp_path: Path) -> None:
    seen = show(mixed(tmp_path))
    expect(seen.page.get_by_role("heading", level=1)).to_have_text("4 of 7 notebooks failed")
    expect(seen.page).to_have_title(
        re.compile("^✗ safe-exec: 3 failed · 1 error · 2 passed · 1 skipped")
    )
    assert names(seen) == BY_RESULT, "what failed comes first"
    cells = seen.page.locator("tr.line", has_text="b-memory").get_by_role("cell").all_inner_texts()
    assert [" ".join(cell.split()) for cell in cells] == [
        "kernel died", "docs/b-memory.ipynb", "code cell 2 · out of memory", "4.0 s", "1.0 GiB",
    ]  # fmt: skip


def test_columns_sort_both_ways_and_what_was_not_measured_comes_last(
    show: Show, tmp_path: Path
) -> None:
    seen = show(mixed(tmp_path))
    time = seen.page.get_by_role("columnheader", name="Time")
    assert (
        seen.page.get_by_role("columnheader", name="Result").get_attribute("aria-sort")
        == "ascending"
    )
    time.get_by_role("button").click()
    expect(time).to_have_attribute("aria-sort", "descending")
    order = ["d-slow", "f-flaky", "docs/b-memory", "docs/a-passed", "c-error", "e-start"]
    assert names(seen) == [*order, "g-late"]
    time.get_by_role("button").click()
    expect(time).to_have_attribute("aria-sort", "ascending")
    assert names(seen) == [*reversed(order), "g-late"]
    seen.page.get_by_role("button", name="Memory peak").click()
    assert names(seen)[:3] == ["docs/b-memory", "docs/a-passed", "f-flaky"] and set(
        names(seen)[-2:]
    ) == {"e-start", "g-late"}
    seen.page.get_by_role("button", name="Notebook", exact=True).click()
    assert names(seen) == sorted(names(seen))
    expect(time).to_have_attribute("aria-sort", "none")


def test_filters(show: Show, tmp_path: Path) -> None:
    seen = show(mixed(tmp_path))
    page, status = seen.page, seen.page.locator("#shown")
    page.get_by_role("button", name=re.compile("^Failed")).click()
    assert names(seen) == BY_RESULT[:3]
    expect(status).to_have_text("3 of 7 notebooks")
    page.get_by_label("Cause").select_option("cell timeout")
    assert names(seen) == ["d-slow"]
    page.get_by_label("Filter").fill("no such thing")
    expect(page.get_by_text("No notebook matches.")).to_be_visible()
    page.get_by_role("button", name="Clear the filter").click()
    expect(page.get_by_label("Filter")).to_be_focused()
    assert names(seen) == BY_RESULT
    page.get_by_label("Filter").fill("DOCS/ out of")
    assert names(seen) == ["docs/b-memory"]
    page.get_by_label("Filter").fill("")
    page.get_by_role("button", name=re.compile("^Flaky")).click()
    assert names(seen) == ["f-flaky"]
    expect(page.get_by_role("button", name=re.compile("^Flaky"))).to_have_attribute(
        "aria-pressed", "true"
    )


# --- one notebook -----------------------------------------------------------------------------------------------


def test_a_case_says_why_where_and_what_to_do(show: Show, tmp_path: Path) -> None:
    seen = show(mixed(tmp_path))
    assert seen.page.locator("tr.below").count() == 0, "drawn when it is opened"
    case = seen.open("docs/b-memory.ipynb")
    expect(case.get_by_role("heading", level=2)).to_contain_text(
        "kernel died in code cell 2 · out of memory · limit 1.0 GiB"
    )
    expect(case.locator(".codeline.marked .words").first).to_have_text(
        f"line 2: {SOURCES[1].splitlines()[1]}"
    )
    assert [line.strip() for line in case.locator(".culprit .words").all_inner_texts()] == [
        SOURCES[0]
    ]
    for words in (
        "accumulator",
        "look first",
        "+612 MiB kept",
        "reproduced 2/2",
        "give it more with --memory",
    ):
        expect(case.get_by_text(words, exact=False).first).to_be_visible()
    expect(case.locator(".culprit .cost.memory")).to_have_text("612 MiB")
    facts = case.locator(".evidence tbody tr").first
    expect(facts).to_contain_text(re.compile("oom kills.*1.*memory.oom_control.*outside"))
    expect(case.locator(".command code")).to_have_text(
        "safe-exec run out/docs/b-memory.repro.ipynb --cwd docs"
    )
    case.get_by_text("End of standard error").click()
    expect(case.get_by_text("last words of the kernel")).to_be_visible()
    case.get_by_text("Stack, innermost first").click()
    expect(case.get_by_text("merge (pandas/core/frame.py:812)")).to_be_visible()
    case.get_by_text("Code cells (4)").click()
    expect(case.get_by_role("row", name="2 killed")).to_be_visible()
    seen.row("docs/b-memory.ipynb").click()
    expect(case).to_have_count(0)


def test_the_chart_shows_memory_against_its_limit(show: Show, tmp_path: Path) -> None:
    seen = show(mixed(tmp_path))
    case = seen.open("docs/b-memory.ipynb")
    chart = case.get_by_role("img")
    expect(chart).to_have_attribute(
        "aria-label", re.compile("^Memory over 4 s: peak 1 GiB of 1 GiB, 4 code cells")
    )
    box, limit = chart.bounding_box(), chart.locator("line.limit").bounding_box()
    line = chart.locator("path.memory").bounding_box()
    assert box and limit and line
    assert abs(line["y"] - limit["y"]) < 3, "the peak touches the limit"
    area = chart.locator("path.area").bounding_box()
    bands = [chart.locator(f"path.stacked.s{n}").bounding_box() for n in range(2)]
    assert area and bands[0] and bands[1]
    # Each is drawn over the one before: 612 and 300 MiB of 1 GiB.
    assert abs(bands[0]["height"] / area["height"] - 612 / 1024) < 0.02
    assert abs((area["y"] + area["height"] - bands[1]["y"]) / area["height"] - 912 / 1024) < 0.02
    expect(case.locator(".legend.stacked")).to_have_text(["big", "rows"])
    assert chart.locator("rect.cell").count() == 2
    assert (
        chart.locator("rect.cell.crashed").count()
        == chart.locator("rect.cell.culprit").count()
        == 1
    )
    far = seen.open("c-error.ipynb")
    expect(far.get_by_text("the limit, 1 GiB, is far above")).to_be_visible()
    assert far.locator("line.limit").count() == 0
    assert seen.open("e-start.ipynb").get_by_role("img").count() == 0


def test_the_chart_is_read_by_pointer_and_by_keyboard(show: Show, tmp_path: Path) -> None:
    seen = show(mixed(tmp_path))
    case = seen.open("docs/b-memory.ipynb")
    chart, readout = case.get_by_role("img"), case.locator(".readout")
    chart.hover()
    expect(readout).to_have_text(re.compile(r"^[12]\.\d+ s · \d+ MiB · code cell [12]$"))
    seen.page.mouse.move(0, 0)
    expect(readout).to_have_text("")
    chart.focus()
    seen.page.keyboard.press("End")
    expect(readout).to_have_text("4 s · 1 GiB · code cell 2")
    seen.page.keyboard.press("ArrowLeft")
    expect(readout).not_to_have_text("4 s · 1 GiB · code cell 2")


def test_the_command_can_be_copied(show: Show, tmp_path: Path) -> None:
    seen = show(mixed(tmp_path), permissions=["clipboard-read", "clipboard-write"])
    case = seen.open("docs/b-memory.ipynb")
    case.get_by_role("button", name="Copy the command to reproduce").click()
    expect(case.get_by_role("button", name="Copied")).to_be_visible()
    assert (
        seen.page.evaluate("navigator.clipboard.readText()")
        == "safe-exec run out/docs/b-memory.repro.ipynb --cwd docs"
    )


def test_a_case_has_an_address(show: Show, tmp_path: Path) -> None:
    entries = mixed(tmp_path)
    seen = show(entries)
    seen.open("docs/b-memory.ipynb")
    address = seen.page.url.removeprefix(seen.file.as_uri())
    again = show(entries, address)
    expect(again.row("docs/b-memory.ipynb")).to_have_attribute("aria-expanded", "true")
    assert show(entries, "#notebook=%E0%A4%A").page.locator("tr.below").count() == 0, (
        "a broken address is no error"
    )


def test_a_long_cell_is_opened_at_its_line(show: Show, tmp_path: Path) -> None:
    source = "\n".join(f"line_{number} = {number}" for number in range(1, 201))
    verdict = verdict_of(1.0, MIB, crash_cell=make_crash(line=150))
    seen = show(
        [
            make_entry(tmp_path, "a.ipynb", verdict, (SOURCES[0], source)),
            make_entry(tmp_path, "b.ipynb", None),
        ]
    )
    expect(seen.open("a.ipynb").locator(".codeline.marked")).to_be_in_viewport()


def test_one_notebook_is_open_from_the_start(show: Show, tmp_path: Path) -> None:
    seen = show(mixed(tmp_path)[1:2])
    expect(seen.page.get_by_role("heading", level=2)).to_be_visible()


def test_no_notebooks(show: Show) -> None:
    expect(show([]).page.get_by_role("heading", level=1)).to_have_text("No notebooks")


def test_five_hundred(show: Show, tmp_path: Path) -> None:
    *told, late = mixed(tmp_path)
    entries = [told[n // 10 % 6] if n % 10 == 0 else late for n in range(500)]
    seen = show(
        [replace(entry, path=f"folder-{n % 7}/{n}.ipynb") for n, entry in enumerate(entries)]
    )
    assert len(seen.paths()) == 500 and seen.page.locator("tr.below").count() == 0
    seen.page.get_by_label("Filter").fill("/1 out of memory")
    assert set(seen.paths()) == {f"folder-{n % 7}/{n}.ipynb" for n in (10, 130, 190)}
    seen.page.locator("tr.line .open").first.click()
    expect(seen.page.get_by_role("heading", level=2)).to_be_visible()


# --- by keyboard, in light and dark, narrow, on paper -----------------------------------------------------------


def test_all_of_it_by_keyboard(show: Show, tmp_path: Path) -> None:
    seen = show(mixed(tmp_path))
    page, keyboard = seen.page, seen.page.keyboard
    keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the notebooks")).to_be_focused()
    keyboard.press("Enter")
    keyboard.press("Tab")
    expect(page.get_by_role("button", name="Result")).to_be_focused()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    for _ in range(5):
        keyboard.press("Tab")
    expect(seen.row("c-error.ipynb")).to_be_focused()
    keyboard.press("Enter")
    expect(seen.row("c-error.ipynb")).to_have_attribute("aria-expanded", "true")
    identity = seen.row("c-error.ipynb").get_attribute("aria-controls")
    expect(page.locator(f"#{identity}")).to_be_visible()
    keyboard.press("Tab")
    expect(page.locator(".detail pre").first).to_be_focused()
    keyboard.press("/")
    expect(page.get_by_label("Filter")).to_be_focused()
    keyboard.type("memory")
    assert names(seen) == ["docs/b-memory"]


CONTRAST = """() => {
  const channel = (value) => (value /= 255, value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const parse = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const ground = (node) => {
    for (; node; node = node.parentElement) {
      const found = parse(getComputedStyle(node).backgroundColor);
      if (found.length === 3 || found[3] === 1) return found;
    }
    return [255, 255, 255];
  };
  const weak = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let seen = 0;
  while (walker.nextNode()) {
    const parent = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !parent.checkVisibility() || parent.closest("script, svg, .hidden, .skip, option")) continue;
    seen += 1;
    const [a, b] = [light(parse(getComputedStyle(parent).color)), light(ground(parent))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) weak.push(`${walker.currentNode.data} ${ratio.toFixed(2)}`);
  }
  return [seen, weak];
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_can_be_read_in_light_and_dark(show: Show, tmp_path: Path, scheme: str) -> None:
    """Contrast of at least 4.5 to 1 (WCAG 2.2, 1.4.3)."""
    seen = show(mixed(tmp_path), color_scheme=scheme)
    for path in ("docs/b-memory.ipynb", "c-error.ipynb", "e-start.ipynb", "docs/a-passed.ipynb"):
        seen.open(path)
    for summary in seen.page.locator("details.more > summary").all():
        summary.click()
    texts, weak = seen.page.evaluate(CONTRAST)
    assert texts > 150 and weak == []
    ground = seen.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground))) > 600) is (scheme == "light")


def test_on_a_narrow_screen_nothing_is_wider_than_it(show: Show, tmp_path: Path) -> None:
    seen = show(mixed(tmp_path), viewport={"width": 360, "height": 740})
    for path in ("docs/b-memory.ipynb", "e-start.ipynb"):
        expect(seen.open(path)).to_be_visible()
    assert seen.page.evaluate("document.documentElement.scrollWidth") == 360
    seen.page.get_by_role("button", name="Time").click()
    assert names(seen)[0] == "d-slow"


def test_on_paper_what_failed_is_opened_and_closed_again(show: Show, tmp_path: Path) -> None:
    seen = show(mixed(tmp_path))
    page = seen.page
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("section.detail").count() == 4
    assert page.locator("details.more:not([open])").count() == 0
    expect(page.get_by_text("last words of the kernel")).to_be_visible()
    expect(page.locator(".tools")).to_be_hidden()
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("section.detail").count() == 0
    assert page.pdf().startswith(b"%PDF")


def test_without_scripts_it_says_so(show: Show, tmp_path: Path) -> None:
    expect(
        show(mixed(tmp_path), java_script_enabled=False).page.get_by_text("scripts are off")
    ).to_be_visible()


# --- whatever is in it ------------------------------------------------------------------------------------------


def test_a_notebook_full_of_markup_is_text(show: Show, tmp_path: Path) -> None:
    cause = make_cause(CauseKind.EXCEPTION, summary=ATTACK, advice=ATTACK)
    verdict = verdict_of(
        1.0,
        MIB,
        Status.CELL_ERROR,
        cause=cause,
        stderr_tail=ATTACK,
        warnings=(ATTACK,),
        crash_cell=make_crash(line=1, source_line=ATTACK),
        culprits=make_culprits(
            make_culprit(note=ATTACK, source_line=ATTACK), make_culprit(1, Role.CRASH, note=ATTACK)
        ),
    )
    entry = make_entry(tmp_path, "a.ipynb", verdict, (ATTACK, ATTACK))
    refused = make_entry(tmp_path, "b.ipynb", None, status="refused", error=ATTACK)
    name = ATTACK.replace("/", "|")
    seen = show([replace(entry, path=f"{name}.ipynb"), refused])
    page = seen.page
    page.locator("tr.line .open").first.click()
    for summary in page.locator("details.more > summary").all():
        summary.click()
    case = page.locator("section.detail")
    expect(case.locator(".codeline.marked .words")).to_have_text(f"line 1: {ATTACK}")
    expect(case.locator("pre.stderr")).to_have_text(ATTACK)
    expect(case.locator("h2")).to_contain_text(ATTACK)
    assert page.locator("img, iframe, object, embed").count() == 0
    assert page.evaluate("window.pwned") is None
    # Ours, the table's data, and one for each notebook; none was added.
    assert page.evaluate("document.scripts.length") == 4
    assert (
        page.evaluate(
            "[...document.querySelectorAll('*')].flatMap((e) => e.getAttributeNames()).filter((a) => a.startsWith('on'))"
        )
        == []
    )
    page.get_by_label("Filter").fill("<img")
    assert len(seen.paths()) == 2


def test_a_script_that_got_in_would_not_run(show: Show, tmp_path: Path) -> None:
    """The policy of the page is the second line: what is not the one script is refused."""
    seen = show(mixed(tmp_path))
    seen.page.evaluate(
        """() => {
          const script = document.createElement('script');
          script.textContent = 'window.pwned = 1';
          document.body.append(script);
          const image = document.createElement('img');
          image.setAttribute('onerror', 'window.pwned = 2');
          image.src = 'data:image/png;base64,broken';
          document.body.append(image);
          return image.decode().catch(() => null);
        }"""
    )
    assert seen.page.evaluate("window.pwned") is None
    assert any("Content Security Policy" in words for words in seen.said)
    seen.said.clear()
