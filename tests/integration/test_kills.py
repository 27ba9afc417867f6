"""Really kills real kernels: each cause by each enforcement that can produce it, as root and as an ordinary user.

``KILLS`` is the table; ``test_meta.py`` fails for any cause, status, limit or mechanism in the code that no row of it exercises.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.kills import KILLS, Kill
from tests.support import NOBODY, make_notebook, ordinary_user, run_notebook


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that anybody may enter (pytest's own are root's alone)."""
    with tempfile.TemporaryDirectory(prefix="kill-") as name:
        path = Path(name)
        path.chmod(0o755)
        yield path


@pytest.mark.kills
@pytest.mark.parametrize(
    "kill", [pytest.param(kill, id=kill.id, marks=pytest.mark.bed(*kill.beds)) for kill in KILLS]
)
def test_kill(kill: Kill, folder: Path) -> None:
    if kill.needs_small_disk:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=8m", "safe-exec-test", str(folder)], check=True
        )
    try:
        check(kill, folder)
    finally:
        if kill.needs_small_disk:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def check(kill: Kill, folder: Path) -> None:
    path = make_notebook(
        folder / "nb.ipynb", *kill.cells, kernel=kill.kernel, language=kill.language
    )
    spec = folder / "jupyter" / "kernels" / "broken"
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text(
        '{"argv": ["/no/such/python", "{connection_file}"], "display_name": "x", "language": "python"}'
    )
    env = {
        "HOME": str(folder),
        "IPYTHONDIR": str(folder / "ipython"),
        "JUPYTER_PATH": str(folder / "jupyter"),
    }
    prefix: list[str] = []
    if kill.user:
        os.chown(folder, NOBODY, NOBODY)
        prefix = ordinary_user()
    if kill.startup:
        start = folder / "ipython" / "profile_default" / "startup"
        start.mkdir(parents=True)
        (start / "00.py").write_text(kill.startup)
    options = [*kill.options, "--no-bisect"]
    if kill.mechanisms:
        options += ["--mechanisms", ",".join(kill.mechanisms)]

    outcome = run_notebook(path, *options, env=env, prefix=prefix, cwd=folder)

    verdict = outcome.verdict
    cause = verdict["cause"] or {}
    report = f"{outcome.stdout}\n{outcome.stderr}\n{cause}"
    assert verdict["status"] == kill.status, report
    assert cause.get("kind") == kill.cause, report
    if kill.activity is not None:
        assert cause.get("activity") == kill.activity, report
    if kill.limit is not None:
        assert verdict["enforcement"][kill.limit]["by"] == kill.by, verdict["enforcement"]
    crash = verdict["crash_cell"]
    if kill.cell is not None:
        assert crash is not None and crash["code_index"] == kill.cell, report
    if kill.line is not None:
        assert crash["line"] == kill.line, report
    if kill.saved is not None:
        texts = [o.get("text", "") for c in outcome.notebook.cells for o in c.get("outputs", [])]
        assert any(kill.saved in text for text in texts), texts
    assert 0 < len(outcome.stdout.splitlines()) < 30
