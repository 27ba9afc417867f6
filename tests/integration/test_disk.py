"""A limit on what is written to disk, with and without bubblewrap, and what comes back of a copy of the folder."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support import EXECUTABLE, make_notebook, run_notebook, wait_until

NO_BUBBLEWRAP = {"PATH": "/nowhere"}

WRITE = """
import os, tempfile, time
{open}
while True:
    os.write(fd, bytes(1 << 20))
    time.sleep(0.01)
"""
FOLDER = WRITE.format(open="fd = os.open('big', os.O_CREAT | os.O_WRONLY)")
TEMPORARY = WRITE.format(open="fd = tempfile.mkstemp()[0]")
REMOVED = WRITE.format(open="fd = os.open('big', os.O_CREAT | os.O_WRONLY)\nos.unlink('big')")
BY_CHILD = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {FOLDER!r}], check=True)"
SMALL_FILES = """
import os, time
os.mkdir("many")
for number in range(10_000_000):
    os.close(os.open(f"many/{number}", os.O_CREAT | os.O_WRONLY))
    if number % 100 == 0:
        time.sleep(0.01)
"""


@pytest.mark.parametrize(
    "cell",
    [FOLDER, TEMPORARY, REMOVED, BY_CHILD, SMALL_FILES],
    ids=["folder", "temporary", "removed", "by-child", "small-files"],
)
def test_without_bubblewrap_the_watchdog_ends_the_run(cell: str, tmp_path: Path) -> None:
    (tmp_path / "there-before").write_bytes(b"x" * (30 << 20))
    path = make_notebook(tmp_path / "nb.ipynb", "x = 1", cell)
    done = run_notebook(
        path, "--no-bisect", "--disk", "20M", "--cell-timeout", "100", env=NO_BUBBLEWRAP
    )
    verdict = done.verdict
    assert (done.code, verdict["status"], verdict["cause"]["kind"]) == (
        5,
        "limit_exceeded",
        "disk_full",
    ), done.stdout
    assert verdict["crash_cell"]["code_index"] == 1
    assert (verdict["enforcement"]["disk"]["by"], verdict["enforcement"]["disk"]["hard"]) == (
        "watchdog",
        False,
    )
    assert "weak limit  disk: only the watchdog holds it" in done.stdout, done.stdout


def test_without_bubblewrap_what_stays_below_passes(tmp_path: Path) -> None:
    (tmp_path / "there-before").write_bytes(b"x" * (30 << 20))
    again = "    with open('f', 'wb') as f:\n        f.write(bytes(8 << 20))\n    time.sleep(0.1)\n    os.unlink('f')"
    cell = f"import os, time\nfor _ in range(12):\n{again}"
    path = make_notebook(tmp_path / "nb.ipynb", cell, "open('kept', 'w').write('mine')")
    done = run_notebook(path, "--disk", "20M", env=NO_BUBBLEWRAP)
    assert done.code == 0, done.stdout
    assert (tmp_path / "kept").read_text() == "mine"


@pytest.mark.bed("bubblewrap", "mount")
def test_what_somebody_else_changed_meanwhile_stays_and_is_told(tmp_path: Path) -> None:
    for name in ("both", "others", "go"):
        (tmp_path / name).write_text("as it was")
    cell = (
        "import time\nopen('both', 'w').write('by the notebook')\nopen('new', 'w').write('by the notebook')\nprint('wrote', flush=True)\n"
        "while open('go').read() != 'go': time.sleep(0.01)"
    )
    path = make_notebook(tmp_path / "nb.ipynb", cell)
    events = tmp_path / "events"
    argv = [
        str(EXECUTABLE),
        "run",
        str(path),
        "--no-bisect",
        "--disk",
        "20M",
        "--cell-timeout",
        "100",
        "--events",
        str(events),
    ]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        wait_until(
            lambda: events.exists() and "output_received" in events.read_text(),
            60,
            "the cell has written",
        )
        (tmp_path / "both").write_text("by somebody else")
        (tmp_path / "others").write_text("by somebody else")
        (tmp_path / "go").write_text("go")
        said = "".join(run.communicate(timeout=120))
    assert run.returncode == 0, said
    assert {name: (tmp_path / name).read_text() for name in ("both", "others", "new")} == {
        "both": "by somebody else",
        "others": "by somebody else",
        "new": "by the notebook",
    }
    assert "left as it is there: both" in said, said
