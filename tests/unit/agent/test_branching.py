"""Which states of a process are not forked, each in a Python of its own, without a kernel."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from safe_exec.agent import branching

# The agent's code carries no types.
files_in: Any = branching.files_in

# The state is made by code as a cell would; then the process is forked and looked at, as for a
# snapshot. The last line of its output is the reason.
PROBE = """
import asyncio, os, sys
sys.path.insert(0, {agent!r})
import branching
own = branching.inherited_state(-1)
loop = asyncio.new_event_loop()
asyncio.set_event_loop(loop)
{state}
reason = branching.why_not_branchable(own, loop, -1)
if not reason:
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)
    reason = "threads" if branching.threads() > 1 else ""
sys.stdout.write("\\n" + reason)
sys.stdout.flush()
os._exit(0)
"""
SUB_INTERPRETER = """
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters
kept = interpreters.create()
"""
OPENMP = """
import ctypes, ctypes.util
gomp = ctypes.CDLL(ctypes.util.find_library("gomp"))
body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: None)
gomp.GOMP_parallel(body, None, 2, 0)
"""
TASK = """
async def later():
    await asyncio.sleep(60)
async def begin():
    global kept
    kept = asyncio.ensure_future(later())
    await asyncio.sleep(0)
loop.run_until_complete(begin())
"""
STATES = {
    "nothing": ("x = 1", ""),
    "random numbers": ("import random\nrandom.seed(1)", ""),
    "signal handler": ("import signal\nsignal.signal(signal.SIGUSR1, print)", ""),
    "exit hook": ("import atexit\natexit.register(print)", ""),
    "thread that has ended": (
        "import threading\nt = threading.Thread(target=int)\nt.start()\nt.join()",
        "",
    ),
    "numpy": ("import numpy as np\nm = np.ones((300, 300)) @ np.ones((300, 300))", ""),
    "pandas": ("import pandas as pd\nf = pd.DataFrame({'a': [1, 2]}).groupby('a').size()", ""),
    "matplotlib": (
        "import matplotlib\nmatplotlib.use('agg')\nimport matplotlib.pyplot as p\np.plot([1])",
        "",
    ),
    "compiled function": (
        "import numba\n@numba.njit\ndef f(x):\n    return x + 1\nf(1)",
        "",
    ),
    "closed file": ("open(os.devnull).read()\nwith open(__file__ or '/dev/null') as f: pass", ""),
    "database in memory": ("import sqlite3\nc = sqlite3.connect(':memory:')", ""),
    "ended task": ("loop.run_until_complete(asyncio.sleep(0))", ""),
    "thread": (
        "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()",
        "threads",
    ),
    "timer thread": ("import threading\nthreading.Timer(60, print).start()", "threads"),
    "executor": (
        "from concurrent.futures import ThreadPoolExecutor\ne = ThreadPoolExecutor()\ne.submit(int)",
        "threads",
    ),
    "openmp": (OPENMP, "threads"),
    "polars": ("import polars", "polars"),
    "pool": ("import multiprocessing\np = multiprocessing.Pool(1)", "child processes"),
    "child": ("import subprocess\nc = subprocess.Popen(['sleep', '60'])", "child processes"),
    "dead child": (
        "import subprocess\nc = subprocess.Popen(['true'])\nos.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)",
        "child processes",
    ),
    "task": (TASK, "asyncio tasks"),
    "timer": ("import signal\nsignal.setitimer(signal.ITIMER_REAL, 60)", "a timer"),
    "alarm": ("import signal\nsignal.alarm(60)", "a timer"),
    "sub-interpreter": (SUB_INTERPRETER, "sub-interpreters"),
    "socket": ("import socket\ns = socket.socket()", "an open socket"),
    "socket pair": ("import socket\ns = socket.socketpair()", "an open socket"),
    "pipe": ("p = os.pipe()", "an open pipe"),
    "event": ("import select\ne = select.epoll()", "an open anon_inode"),
    "temporary file": ("import tempfile\nf = tempfile.TemporaryFile()", "an open file"),
    "database": (
        "import sqlite3, tempfile\nc = sqlite3.connect(tempfile.mkdtemp() + '/d')\nc.execute('create table t (x)')",
        "an open file",
    ),
    "shared memory": ("import mmap\nm = mmap.mmap(-1, 4096)", "shared memory"),
    "mapped file": (
        (
            "import mmap, tempfile\nf = tempfile.TemporaryFile()\nf.truncate(99)\n"
            "m = mmap.mmap(f.fileno(), 99)\nf.close()\nos.close(max(branching.descriptors()))"
        ),
        "shared memory",
    ),
}


@pytest.mark.parametrize(("state", "reason"), STATES.values(), ids=STATES)
def test_a_state_is_forked_or_declined(state: str, reason: str, tmp_path: Path) -> None:
    agent = str(Path(branching.__file__).parent)
    script = tmp_path / "probe.py"
    script.write_text(PROBE.format(agent=agent, state=state))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env={"PATH": "/usr/bin:/bin", "TMPDIR": str(tmp_path), "HOME": str(tmp_path)},
    )
    assert done.stdout.rpartition("\n")[2] == reason


def test_changes_of_files_are_seen_but_not_those_of_bytecode_or_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    (tmp_path / "folder").mkdir()
    ours = str(tmp_path / "safe-exec-")
    (tmp_path / "safe-exec-1").mkdir()
    before = files_in([str(tmp_path)], (ours,))
    assert before is not None
    (tmp_path / "folder" / "__pycache__").mkdir()
    (tmp_path / "folder" / "__pycache__" / "a.pyc").write_text("x")
    (tmp_path / "safe-exec-1" / "socket").write_text("x")
    assert files_in([str(tmp_path)], (ours,)) == before
    # A folder to watch may lie in a run's own directory.
    inner = files_in([str(tmp_path / "safe-exec-1")], (ours,))
    assert inner is not None
    assert len(inner) == 1
    (tmp_path / "folder" / "b").write_text("x")
    assert files_in([str(tmp_path)], (ours,)) != before


def test_a_folder_with_too_many_files_is_not_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(branching, "MOST_FILES", 3)
    for name in "abcd":
        (tmp_path / name).touch()
    assert files_in([str(tmp_path)], ("/nowhere",)) is None
