"""Make the pictures of the README: ``python -m tools.pictures docs``.

Both show real runs of the notebooks in ``examples/``: the report page of a batch with one notebook
opened, and an annotated notebook as nbconvert renders it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
OPENED = "leak-over-cells"
BATCH_SECONDS, CONVERT_SECONDS = 600, 120
WIDTH, HEIGHT = 1200, 1000


def main(target: Path) -> None:
    """Run the examples in a temporary folder and write both pictures to ``target``."""
    with tempfile.TemporaryDirectory(prefix="pictures-") as scratch:
        folder = Path(scratch)
        for notebook in EXAMPLES.glob("*.ipynb"):
            # Documents of earlier runs may lie beside the examples.
            if not notebook.name.endswith((".out.ipynb", ".repro.ipynb")):
                shutil.copy(notebook, folder)
        # The exit codes say that notebooks failed, as they should.
        _safe_exec(folder, "batch", ".", "--out", "out")
        _safe_exec(folder, "run", f"{OPENED}.ipynb")
        _convert(folder)
        _photograph(folder, target)


def _safe_exec(folder: Path, *arguments: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "safe_exec", *arguments],
        cwd=folder,
        check=False,
        timeout=BATCH_SECONDS,
    )


def _convert(folder: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "nbconvert", "--to", "html", f"{OPENED}.out.ipynb"],
        cwd=folder,
        check=True,
        timeout=CONVERT_SECONDS,
    )


def _photograph(folder: Path, target: Path) -> None:
    browser_path = shutil.which("chromium") or shutil.which("chromium-headless-shell")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=browser_path, args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        page.goto((folder / "out" / "report.html").as_uri())
        page.get_by_role("button", name=f"{OPENED}.ipynb").click()
        _save(page, target / "report-page.png")
        page.goto((folder / f"{OPENED}.out.html").as_uri())
        _save(page, target / "annotated-notebook.png")
        browser.close()


def _save(page: Page, path: Path) -> None:
    # From the top of the page, whatever has the focus.
    page.evaluate("scrollTo(0, 0)")
    page.screenshot(path=path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
