"""A real JupyterLab in headless chromium: open a notebook, run its cells, see what a person sees."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import nbformat
from nbformat import v4
from playwright.sync_api import Locator, Page, sync_playwright

START_SECONDS = 120
CELL_SECONDS = 60
WIDTH, HEIGHT = 960, 800


class Lab:
    """JupyterLab on a folder; kernels are those of ``prefix``. State and settings lie beside it."""

    def __init__(self, page: Page, url: str, state: Path) -> None:
        self.page, self.state = page, state
        self._url = url

    def open(self, name: str) -> Notebook:
        """Open a notebook of the folder and wait for its kernel."""
        # One document, without the browser of files beside it.
        self.page.goto(f"{self._url}/doc/tree/{name}?reset")
        notebook = Notebook(self.page)
        notebook.wait_for_kernel("Idle")
        return notebook


class Notebook:
    """The open notebook."""

    def __init__(self, page: Page) -> None:
        self.page = page

    def wait_for_kernel(self, status: str) -> None:
        """Wait until the status bar shows a kernel in this status."""
        # Without a kernel the bar says "No Kernel | Idle", and cells that are run then vanish
        # without an error.
        bar = self.page.locator("#jp-main-statusbar", has_text=re.compile(rf"\) \| {status}"))
        bar.wait_for(timeout=START_SECONDS * 1000)

    def run_all(self) -> None:
        """Choose Run All Cells in the menu."""
        self.page.get_by_role("menuitem", name="Run", exact=True).click()
        self.page.get_by_role("menuitem", name=re.compile("^Run All Cells")).click()

    def cell(self, number: int) -> Locator:
        """A cell, counted from 1."""
        return self.page.locator(".jp-NotebookPanel .jp-Cell").nth(number - 1)

    def error(self, number: int) -> str:
        """The text of a cell's error, once it is there."""
        output = self.cell(number).locator(".jp-OutputArea-output", has_text="SafeExec:")
        output.wait_for(timeout=CELL_SECONDS * 1000)
        return output.inner_text()

    def close_dialog(self) -> str:
        """Close the dialog that JupyterLab opens after a death, and return its text."""
        dialog = self.page.locator(".jp-Dialog")
        dialog.wait_for(timeout=CELL_SECONDS * 1000)
        text = dialog.inner_text()
        dialog.get_by_role("button", name="Ok").click()
        return text

    def run_in_new_cell(self, source: str) -> str:
        """Run a cell at the end of the notebook and return its output."""
        cells = self.page.locator(".jp-NotebookPanel .jp-Cell")
        count = cells.count()
        self.page.locator(".jp-Notebook-footer").click()
        cell = cells.nth(count)
        cell.locator(".cm-content").click()
        self.page.keyboard.insert_text(source)
        self.page.keyboard.press("Control+Enter")
        output = cell.locator(".jp-OutputArea-output").last
        output.wait_for(timeout=CELL_SECONDS * 1000)
        return output.inner_text()


# What people meet: the kernel dies, or a cell does not end. The third cell is to blame each time, and
# it needs the first one.
DEATHS = {
    "memory": (
        "size = 10 << 20",
        "label = 'unrelated'",
        "rows = []\nfor _ in range(1000):\n    rows.append(bytearray(b'x') * size)",
    ),
    "segfault": ("import ctypes\naddress = 0", "label = 'unrelated'", "ctypes.string_at(address)"),
    "timeout": ("step = 0", "label = 'unrelated'", "total = 0\nwhile True:\n    total += step"),
}


def prepare_deaths(folder: Path, prefix: Path) -> None:
    """Write the notebooks of ``DEATHS``, and install the kernel that they name."""
    name = "python3-safe-exec"
    argv = [sys.executable, "-m", "safe_exec", "kernelspec", "install", "--limits", "ci"]
    argv += ["--memory", "300M", "--cell-timeout", "3s", "--name", name, "--prefix", str(prefix)]
    argv += ["--display-name", "Python 3 (safe-exec)"]
    subprocess.run(argv, check=True, capture_output=True, timeout=START_SECONDS)
    for notebook, sources in DEATHS.items():
        node = v4.new_notebook(cells=[v4.new_code_cell(source) for source in sources])
        node.metadata.kernelspec = {"name": name, "display_name": name, "language": "python"}
        nbformat.write(node, folder / f"{notebook}.ipynb")


@contextmanager
def jupyterlab(folder: Path, state: Path, prefix: Path) -> Iterator[Lab]:
    """Start JupyterLab on ``folder`` and a browser; both end with the context."""
    settings = state / "settings"
    settings.mkdir(parents=True)
    (settings / "overrides.json").write_text(json.dumps(SETTINGS))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {
        **os.environ,
        "JUPYTER_PATH": str(prefix / "share" / "jupyter"),
        "JUPYTER_RUNTIME_DIR": str(state / "runtime"),
        "JUPYTER_CONFIG_DIR": str(state / "config"),
        "JUPYTER_DATA_DIR": str(state / "data"),
        "JUPYTER_PREFER_ENV_PATH": "1",
        "XDG_STATE_HOME": str(state),
        "XDG_CACHE_HOME": str(state / "cache"),
    }
    argv = [sys.executable, "-m", "jupyterlab", "--no-browser", f"--ServerApp.port={port}"]
    argv += ["--ServerApp.ip=127.0.0.1", "--IdentityProvider.token=", "--allow-root"]
    argv += [f"--ServerApp.root_dir={folder}", f"--LabApp.app_settings_dir={settings}"]
    argv += [f"--LabApp.workspaces_dir={state / 'workspaces'}"]
    argv += [f"--LabApp.user_settings_dir={state / 'user'}"]
    with (state / "jupyterlab.log").open("wb") as log:
        server = subprocess.Popen(argv, env=env, stdout=log, stderr=log, cwd=folder)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_for(f"{url}/api/status", server)
        with chromium(WIDTH, HEIGHT) as page:
            yield Lab(page, url, state)
    finally:
        server.terminate()
        server.wait(30)


# No question about news, which a person answers once.
SETTINGS = {
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
}


def _wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        try:
            with urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError("JupyterLab did not start; jupyterlab.log says why")


@contextmanager
def chromium(width: int, height: int) -> Iterator[Page]:
    """A page of this size in headless chromium."""
    path = shutil.which("chromium") or shutil.which("chromium-headless-shell")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-gpu"]
        )
        try:
            yield browser.new_page(viewport={"width": width, "height": height})
        finally:
            browser.close()
