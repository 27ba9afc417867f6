"""What an older kernel, a container or a sandbox lacks is taken away: each fallback runs with a real kernel, or the refusal says why."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT, make_notebook, run_notebook, safe_exec
from tests.without import CALLS, COLUMN

pytestmark = [pytest.mark.kills]

DAEMON = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(600)\n    os._exit(0)"
TEXT = "import os\nos.write(1, b'from C\\n')\nos.kill(os.getpid(), 9)"
NEWER = "clone3,pidfd_open,pidfd_send_signal,pidfd_getfd,close_range,openat2,faccessat2,epoll_pwait2,copy_file_range,statx"


def without(calls: str, code: str = "ENOSYS") -> list[str]:
    """A command prefix under which the calls fail."""
    return [
        sys.executable,
        str(ROOT / "tests" / "without.py"),
        ",".join(f"{call}:{code}" for call in calls.split(",")),
    ]


@pytest.mark.parametrize("call", sorted(CALLS))
def test_the_calls_are_gone(call: str) -> None:
    code = f"import ctypes; c = ctypes.CDLL(None, use_errno=True); print(c.syscall({CALLS[call][COLUMN]}, -1, -1, -1, -1), ctypes.get_errno())"
    done = subprocess.run(
        [*without(call, "EXDEV"), sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["-1", "18"]


@pytest.mark.parametrize(
    "calls",
    [
        "clone3",
        "pidfd_open,pidfd_send_signal",
        "close_range",
        NEWER,
        "landlock_create_ruleset",
        "process_vm_readv",
    ],
)
def test_a_death_is_seen_and_the_tree_is_gone(calls: str, tmp_path: Path) -> None:
    """``run_notebook`` looks for what is left: the daemon, groups, notes."""
    path = make_notebook(tmp_path / "nb.ipynb", DAEMON, TEXT)
    verdict = run_notebook(path, "--no-bisect", prefix=without(calls)).verdict
    assert (verdict["status"], verdict["cause"]["kind"], verdict["crash_cell"]["line"]) == (
        "kernel_died",
        "killed",
        3,
    )


@pytest.mark.parametrize("calls", ["tee", "splice", "tee,splice"])
def test_what_was_written_below_python_is_kept(calls: str, tmp_path: Path) -> None:
    """Without tee(2) ipykernel reads the pipe itself, as it always did: what it had not handed on may be lost, what it had is there."""
    path = make_notebook(
        tmp_path / "nb.ipynb",
        "import os\nos.write(1, b'from C\\n')",
        "import time\ntime.sleep(0.5)",
        TEXT,
    )
    outcome = run_notebook(path, "--no-bisect", prefix=without(calls))
    assert outcome.verdict["cause"]["kind"] == "killed"
    texts = "".join(
        o.get("text", "") for c in outcome.notebook.cells[:3] for o in c.get("outputs", [])
    )
    assert texts.count("from C") >= 1


def test_without_sealed_memory_nothing_is_run(tmp_path: Path) -> None:
    path = make_notebook(tmp_path / "nb.ipynb", "print('ran')")
    outcome = run_notebook(path, prefix=without("memfd_create"))
    assert (outcome.verdict["status"], outcome.code) == ("internal_error", 7)
    assert "memfd_create" in outcome.verdict["cause"]["summary"], outcome.stdout
    assert "Traceback" not in outcome.stderr + outcome.stdout


def test_without_landlock_doctor_says_so_and_walls_do_not_claim_it(tmp_path: Path) -> None:
    prefix = without("landlock_create_ruleset,landlock_add_rule,landlock_restrict_self")
    assert json.loads(safe_exec("doctor", "--json", prefix=prefix).stdout)["landlock"] == 0
    path = make_notebook(tmp_path / "nb.ipynb", "open('/tmp/safe-exec-test-nothing', 'a').close()")
    mechanisms = ("--mechanisms", "cgroup-v1,cgroup-v2,rlimit,watchdog,landlock")
    outcome = run_notebook(path, "--limits", "ci", *mechanisms, prefix=prefix)
    Path("/tmp/safe-exec-test-nothing").unlink()
    held = outcome.verdict["environment"]["isolation"]["system"]
    assert (outcome.verdict["status"], held["by"], held["hard"]) == ("passed", "none", False)
    assert "system" in outcome.stdout  # said on the terminal, too


NO_UNIFIED = """
for point in $(awk '$3 == "cgroup2" {print $2}' /proc/self/mounts); do umount -l "$point"; done
exec "$@"
"""


@pytest.mark.bed("cgroup-v1-root", "mount")
@pytest.mark.parametrize(
    "sources",
    [(DAEMON, TEXT), (DAEMON, "hog = []\nwhile True:\n    hog.append(b'x' * (16 << 20))")],
    ids=["killed", "memory"],
)
def test_without_cgroup_kill_the_tree_is_gone(sources: tuple[str, ...], tmp_path: Path) -> None:
    """A kernel before 5.14, or one without the unified tree."""
    prefix = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", NO_UNIFIED, "sh"]
    found = subprocess.run(
        [*prefix, "grep", "-c", "cgroup2", "/proc/self/mounts"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.stdout.strip() == "0"
    path = make_notebook(tmp_path / "nb.ipynb", *sources)
    verdict = run_notebook(path, "--no-bisect", "--memory", "300M", prefix=prefix).verdict
    assert verdict["status"] == "kernel_died"
    assert verdict["enforcement"]["memory"]["by"] == "cgroup-v1"
