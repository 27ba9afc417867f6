"""An interrupt at the end of a cell's time reaches the kernel's children too, and the verdict says whether the cell ended at it."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import make_notebook, run_notebook

pytestmark = pytest.mark.kills

IN_A_SANDBOX = ("--limits", "ci")
SLOW_TO_END = """%%bash
python3 - <<'EOF'
import time
try:
    time.sleep(60)
finally:
    time.sleep(0.3)
EOF"""
DEFAULT_HANDLER = (
    "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_DFL)\ntime.sleep(60)"
)
SWALLOWED = "import time\nwhile True:\n    try:\n        time.sleep(60)\n    except KeyboardInterrupt:\n        pass"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A cell that hangs. ``texts`` must be in its outputs, ``ended`` is the fact "ended at the interrupt"."""

    id: str
    cell: str
    texts: tuple[str, ...]
    ended: bool | None = True
    options: tuple[str, ...] = ()
    kernel: str = "python3"
    beds: tuple[str, ...] = ()


ROWS = (
    Row(
        id="system",
        cell="import os\nprint('status', os.system('sleep 60'))",
        texts=(f"status {signal.SIGINT}\n",),
    ),
    Row(
        id="system-walled",
        cell="import os\nprint('status', os.system('sleep 60'))",
        texts=(f"status {signal.SIGINT}\n",),
        options=IN_A_SANDBOX,
        beds=("bubblewrap",),
    ),
    # The first interrupt ends the child alone: its parent, in system(3), ignores it.
    Row(
        id="system-then-sleep",
        cell="import os, time\nos.system('sleep 60')\ntime.sleep(60)",
        texts=("KeyboardInterrupt",),
    ),
    Row(
        id="run",
        cell="import subprocess\nsubprocess.run(['sleep', '60'])",
        texts=("KeyboardInterrupt",),
    ),
    Row(id="bash", cell="%%bash\necho first\nsleep 60", texts=("first", "was interrupted")),
    Row(
        id="bash-walled",
        cell="%%bash\necho first\nsleep 60",
        texts=("first", "was interrupted"),
        options=IN_A_SANDBOX,
        beds=("bubblewrap",),
    ),
    Row(
        id="bash-slow-to-end", cell=SLOW_TO_END, texts=("was interrupted and did not end at once",)
    ),
    Row(
        id="bash-ignores",
        cell="%%bash\ntrap '' INT\nsleep 60",
        texts=("was interrupted and did not end at once",),
    ),
    Row(
        id="R",
        cell='print(system("sleep 60"))',
        texts=(f"[1] {signal.SIGINT}",),
        kernel="ir",
        beds=("R",),
    ),
    Row(id="kernel-ends", cell=DEFAULT_HANDLER, texts=(), ended=None),
    Row(id="swallowed", cell=SWALLOWED, texts=(), ended=False),
)


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=row.id, marks=pytest.mark.bed(*row.beds)) for row in ROWS]
)
def test_an_interrupt(row: Row, tmp_path: Path) -> None:
    language = "R" if row.kernel == "ir" else "python"
    path = make_notebook(tmp_path / "nb.ipynb", row.cell, kernel=row.kernel, language=language)
    outcome = run_notebook(path, "--cell-timeout", "1.5s", "--no-bisect", *row.options)

    cause = outcome.verdict["cause"]
    assert (outcome.verdict["status"], cause["kind"]) == ("timeout", "cell_timeout"), outcome.stdout
    facts = {fact["fact"]: fact["value"] for fact in cause["evidence"]}
    assert facts.get("ended at the interrupt") is row.ended, outcome.stdout
    assert ("an interrupt did not end it" in cause["summary"]) == (row.ended is False), cause[
        "summary"
    ]
    outputs = [o for cell in outcome.notebook.cells for o in cell.get("outputs", [])]
    shown = "".join(o.get("text", "") + o.get("ename", "") + o.get("evalue", "") for o in outputs)
    assert all(text in shown for text in row.texts), shown
    assert "TypeError" not in shown, shown
