"""Every completed write to stdout and stderr, and every display, before a death is in the notebook, however the kernel dies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support import make_notebook, run_notebook

DEATHS = {
    "sigkill": "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
    "exit": "import os\nos._exit(3)",
    "segfault": "import ctypes\nctypes.string_at(0)",
    "abort": "import os\nos.abort()",
    "libc-exit": "import ctypes\nctypes.CDLL(None)._exit(5)",
}

WRITES = {
    "print": ("print('last words')", "stdout", "last words\n"),
    "no-newline": ("print('a', end='')\nprint('b', end='')", "stdout", "ab"),
    "stderr": ("import sys\nprint('oops', file=sys.stderr)", "stderr", "oops\n"),
    "write": (
        "import sys\nsys.stdout.write('x' * 100_000 + 'END')",
        "stdout",
        "x" * 100_000 + "END",
    ),
    "many": (
        "for n in range(20_000):\n    print(n)",
        "stdout",
        "".join(f"{n}\n" for n in range(20_000)),
    ),
    "unicode": ("print('grüße, 你好, 🦊')", "stdout", "grüße, 你好, 🦊\n"),
    "descriptor": ("import os\nos.write(1, b'from C\\n')", "stdout", "from C\n"),
    "child": (
        "import subprocess\n_ = subprocess.run(['echo', 'from a child'])",
        "stdout",
        "from a child\n",
    ),
    "shell": ("!echo from a shell", "stdout", "from a shell\r\n"),
    "logging": ("import logging\nlogging.warning('careful')", "stderr", "WARNING:root:careful\n"),
    "after-a-flush": ("print('one', flush=True)\nprint('two')", "stdout", "one\ntwo\n"),
}


def stream(notebook: Any, index: int, name: str) -> str:
    outputs = notebook.cells[index].outputs
    return "".join(o.text for o in outputs if o.output_type == "stream" and o.name == name)


@pytest.mark.kills
@pytest.mark.parametrize("write", WRITES)
def test_what_was_written_before_a_sigkill(tmp_path: Path, write: str) -> None:
    source, name, text = WRITES[write]
    path = make_notebook(tmp_path / "nb.ipynb", "print('before')", f"{source}\n{DEATHS['sigkill']}")
    outcome = run_notebook(path, "--cell-timeout", "30")
    assert outcome.verdict["status"] == "kernel_died"
    assert stream(outcome.notebook, 2, name) == text  # cell 0 is the banner
    assert stream(outcome.notebook, 1, "stdout") == "before\n"


@pytest.mark.kills
@pytest.mark.parametrize("death", DEATHS)
def test_text_and_displays_in_order_before_each_death(tmp_path: Path, death: str) -> None:
    cell = (
        "from IPython.display import display, HTML\nimport sys\nprint('one')\ndisplay(HTML('<b>two</b>'))\nprint('three')\n"
        "print('four', file=sys.stderr)\ndisplay({'application/json': {'n': 5}}, raw=True)\n"
        + DEATHS[death]
    )
    outcome = run_notebook(make_notebook(tmp_path / "nb.ipynb", cell), "--cell-timeout", "30")
    assert outcome.verdict["status"] == "kernel_died"
    outputs = [o for o in outcome.notebook.cells[1].outputs if o.output_type != "error"]
    seen = [
        (o.output_type, o.get("name") or next(iter(o.data)), (o.get("text") or "").strip())
        for o in outputs
    ]
    assert ("display_data", "application/json", "") in seen
    assert ("stream", "stderr", "four") in seen
    order = [entry for entry in seen if entry[1] != "stderr"]
    assert order[0][2] == "one"
    assert [entry[2] for entry in order if entry[0] == "stream"] == ["one", "three"]
    displays = [entry for entry in order if entry[0] == "display_data"]
    assert len(displays) == 2


@pytest.mark.kills
def test_a_forked_childs_text_does_not_hide_the_kernels(tmp_path: Path) -> None:
    cell = (
        "import os, time\npid = os.fork()\nif pid == 0:\n    print('child ' * 50)\n    time.sleep(0.5)\n    os._exit(0)\n"
        "os.waitpid(pid, 0)\nprint('parent')\n" + DEATHS["sigkill"]
    )
    outcome = run_notebook(make_notebook(tmp_path / "nb.ipynb", cell), "--cell-timeout", "30")
    assert "parent\n" in stream(outcome.notebook, 1, "stdout")


@pytest.mark.kills
def test_interrupted_cells_keep_their_traceback(tmp_path: Path) -> None:
    cell = "def inner():\n    while True:\n        pass\n\ninner()"
    outcome = run_notebook(make_notebook(tmp_path / "nb.ipynb", cell), "--cell-timeout", "2")
    errors = [o for o in outcome.notebook.cells[1].outputs if o.output_type == "error"]
    assert [e.ename for e in errors] == ["KeyboardInterrupt", "SafeExec: cell_timeout"]
    assert "inner()" in "\n".join(errors[0].traceback)
    assert outcome.verdict["crash_cell"]["line"] in (2, 3)


@pytest.mark.kills
@pytest.mark.parametrize("profile", ["default", "ci"])
def test_what_arrived_is_not_put_there_twice(tmp_path: Path, profile: str) -> None:
    # With processes of its own (ci) the kernel has another id than the one by which we know it, and signs its messages with that.
    cell = f"import time\nprint('once', flush=True)\ntime.sleep(1)\n{DEATHS['sigkill']}"
    outcome = run_notebook(
        make_notebook(tmp_path / "nb.ipynb", cell), "--limits", profile, "--no-bisect"
    )
    assert outcome.verdict["status"] == "kernel_died"
    assert stream(outcome.notebook, 1, "stdout") == "once\n"
