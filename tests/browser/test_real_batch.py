"""A real batch, and its page in a real browser: what the kernels did is what a person reads, and markup stays text."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Browser, expect

from tests.browser.test_report_page import ATTACK, Seen, browser
from tests.integration.test_batch import Place, place
from tests.support import make_notebook

pytestmark = pytest.mark.kills
__all__ = ["browser", "place"]


def test_the_page_of_a_real_batch(place: Place, browser: Browser) -> None:
    name = '<img src="x" onerror="alert(1)">'
    make_notebook(place.folder / "fine.ipynb", "print('fine')")
    grow = "import time\nmore = []\nfor _ in range(30):\n    more.append(bytearray(b'x') * (4 << 20))\n    time.sleep(0.02)"
    make_notebook(place.folder / "memory.ipynb", "kept = bytearray(b'x') * (160 << 20)", grow)
    make_notebook(
        place.folder / f"{name}.ipynb",
        f"said = {ATTACK!r}",
        f"import os\nos.write(2, said.encode() + b'\\n')\nraise RuntimeError(said)  # {ATTACK}",
    )
    place.run("memory.ipynb", "fine.ipynb", f"{name}.ipynb", "--memory", "300M", "-j", "1")

    file = place.out / "report.html"
    page = browser.new_context().new_page()
    seen = Seen(page=page, file=file)
    page.on("request", lambda request: seen.requests.append(request.url))
    page.on("console", lambda message: seen.said.append(message.text))
    page.on("pageerror", lambda error: seen.said.append(str(error)))
    page.on("dialog", seen.dismiss)
    page.goto(file.as_uri())
    expect(page.get_by_role("heading", level=1)).to_have_text("2 of 3 notebooks failed")

    case = seen.open("memory.ipynb")
    expect(case.get_by_role("heading", level=2)).to_have_text(
        re.compile(r"kernel died in code cell 2 · out of memory · limit 300 MiB")
    )
    expect(case.locator(".codeline.marked .words").first).to_have_text(re.compile(r"^line [3-5]: "))
    expect(case.get_by_role("heading", name="Caused by code cells 1 + 2")).to_be_visible()
    line, limit = (
        case.locator("path.memory").last.bounding_box(),
        case.locator("line.limit").bounding_box(),
    )
    assert line and limit and abs(line["y"] - limit["y"]) < 30, "memory comes near its limit"
    expect(case.locator(".command code")).to_have_text(
        "safe-exec run out/memory.repro.ipynb --cwd ."
    )
    for link in case.locator(".files a").all():
        assert (place.out / (link.get_attribute("href") or "")).is_file()

    attack = seen.open(f"{name}.ipynb")
    expect(attack.locator(".codeline.marked .words")).to_have_text(
        f"line 3: raise RuntimeError(said)  # {ATTACK}"
    )
    attack.get_by_text("End of standard error").click()
    expect(attack.locator("pre.stderr")).to_contain_text(ATTACK)
    assert page.locator("img").count() == 0 and page.evaluate("window.pwned") is None
    assert seen.said == []
    assert [url for url in seen.requests if not url.startswith((file.as_uri(), "data:,"))] == []
    page.context.close()
