"""Make the pictures of the documentation: ``python -m tools.pictures docs``.

Those of the README show real runs of the notebooks in ``examples/``: the report page of a batch with
one notebook opened, and an annotated notebook as nbconvert renders it. Those of docs/interactive.md
show JupyterLab after a death.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Page

from tools.jupyterlab import DEATHS, chromium, jupyterlab, prepare_deaths

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
    _photograph_jupyterlab(target)


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
    with chromium(WIDTH, HEIGHT) as page:
        page.goto((folder / "out" / "report.html").as_uri())
        page.get_by_role("button", name=f"{OPENED}.ipynb").click()
        _save(page, target / "report-page.png")
        page.goto((folder / f"{OPENED}.out.html").as_uri())
        _save(page, target / "annotated-notebook.png")


def _photograph_jupyterlab(target: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="jupyterlab-") as scratch:
        folder = Path(scratch) / "notebooks"
        folder.mkdir()
        prepare_deaths(folder, Path(scratch))
        with jupyterlab(folder, Path(scratch) / "state", Path(scratch)) as lab:
            for name in DEATHS:
                notebook = lab.open(f"{name}.ipynb")
                notebook.run_all()
                notebook.error(3)
                if name != "timeout":
                    notebook.close_dialog()
                notebook.wait_for_kernel("Idle")
                lab.page.screenshot(path=target / f"jupyterlab-{name}.png")


def _save(page: Page, path: Path) -> None:
    # From the top of the page, whatever has the focus.
    page.evaluate("scrollTo(0, 0)")
    page.screenshot(path=path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
