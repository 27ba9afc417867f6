"""No control groups and no namespaces, as in many containers: what rlimits and the watchdog hold, and what is said of the rest.

The place: control groups mounted read-only, a filter that refuses namespaces and mounts as Docker's does, and an ordinary user, or a
root without capabilities.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.kills import HOG, SPIN, THREADS
from tests.support import (
    NOBODY,
    ROOT,
    Outcome,
    make_notebook,
    ordinary_user,
    run_notebook,
    safe_exec,
)

pytestmark = [pytest.mark.kills, pytest.mark.bed("ordinary-user", "mount")]

READ_ONLY = """
for point in $(awk '$3 ~ /^cgroup/ {print $2}' /proc/self/mounts); do mount -o remount,bind,ro "$point"; done
exec "$@"
"""
QUICK = ("--no-bisect", "--cell-timeout", "20")


def container() -> list[str]:
    """A command prefix: nothing of control groups can be written, no namespace can be had."""
    filtered = [sys.executable, str(ROOT / "tests" / "without.py"), "namespaces:EPERM"]
    return [
        "unshare",
        "--mount",
        "--propagation",
        "private",
        "sh",
        "-ec",
        READ_ONLY,
        "sh",
        *filtered,
    ]


USER = [*container(), *ordinary_user()]
ROOT_WITHOUT_RIGHTS = [*container(), "setpriv", "--inh-caps=-all", "--bounding-set=-all", "env"]


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="bare-") as name:
        os.chown(name, NOBODY, NOBODY)
        yield Path(name)


def run(folder: Path, prefix: list[str], *cells: str, options: tuple[str, ...] = ()) -> Outcome:
    path = make_notebook(folder / "nb.ipynb", *cells)
    return run_notebook(
        path, *QUICK, *options, prefix=prefix, env={"HOME": str(folder)}, cwd=folder
    )


def said(outcome: Outcome) -> tuple[str, str | None]:
    verdict = outcome.verdict
    return verdict["status"], (verdict["cause"] or {}).get("kind")


def test_doctor_says_what_cannot_be_held(folder: Path) -> None:
    done = safe_exec("doctor", "--json", prefix=USER, env={"HOME": str(folder)})
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    assert {"memory", "cpus"} <= set(found["weak"])
    assert {name: (held["by"], held["hard"]) for name, held in found["limits"].items()} == {
        "memory": ("rlimit", False),
        "cpus": ("none", False),
        "cpu_time": ("rlimit", True),
        "processes": ("rlimit", False),
        "open_files": ("rlimit", True),
        "file_size": ("rlimit", True),
        "disk": (found["limits"]["disk"]["by"], False),
        "shm": ("none", False),
        **dict.fromkeys(
            ("cell_timeout", "timeout", "start_timeout", "cell_output", "output"), ("runner", False)
        ),
    }
    assert not found["bubblewrap"]["works"]
    assert found["remedies"]
    text = safe_exec("doctor", prefix=USER, env={"HOME": str(folder)}).stdout
    assert "RLIMIT_DATA" in text and "cpus" in text


def test_memory(folder: Path) -> None:
    outcome = run(folder, USER, "x = 1", HOG, options=("--memory", "300M"))
    assert said(outcome) == ("kernel_died", "out_of_memory"), outcome.stdout
    held = outcome.verdict["enforcement"]["memory"]
    assert (held["by"], held["hard"]) == ("rlimit", False)
    assert "shared memory is not counted" in held["note"]
    assert "weak limit" in outcome.stdout


def test_processor_time(folder: Path) -> None:
    outcome = run(folder, USER, SPIN, options=("--cpu-time", "2s", "--cpus", "1"))
    assert said(outcome) == ("kernel_died", "cpu_time"), outcome.stdout
    assert outcome.verdict["enforcement"]["cpus"]["by"] == "none"


def test_processes(folder: Path) -> None:
    outcome = run(folder, USER, THREADS, options=("--processes", "64"))
    assert said(outcome) == ("cell_error", "too_many_processes"), outcome.stdout
    assert outcome.verdict["enforcement"]["processes"]["by"] == "rlimit"


def test_places_of_others_that_end_are_not_the_notebook_s(folder: Path) -> None:
    """Eight other processes of the user end while the notebook runs; RLIMIT_NPROC counted them."""
    gate = folder / "gate"
    os.mkfifo(gate)
    os.chown(gate, NOBODY, NOBODY)
    others = "for _ in 1 2 3 4 5 6 7 8; do cat gate & done; echo started; wait"
    with subprocess.Popen(
        [*ordinary_user(), "sh", "-c", others], cwd=folder, stdout=subprocess.PIPE, text=True
    ) as shell:
        assert shell.stdout is not None and shell.stdout.readline() == "started\n"
        leave = f"""
import os, pathlib, time
os.close(os.open("gate", os.O_WRONLY))
shell = pathlib.Path("/proc/{shell.pid}/stat")
while " Z " not in shell.read_text():
    time.sleep(0.01)
"""
        outcome = run(folder, USER, leave, THREADS, options=("--processes", "64"))
    assert said(outcome) == ("cell_error", "too_many_processes"), outcome.stdout
    assert "can't start new thread" in outcome.stdout
    note = outcome.verdict["enforcement"]["processes"]["note"]
    assert "the watchdog lowers it" in note


def test_output(folder: Path) -> None:
    outcome = run(
        folder, USER, "while True:\n    print('flood' * 2000)", options=("--output", "200k")
    )
    assert said(outcome) == ("limit_exceeded", "output_flood"), outcome.stdout


def test_time_and_a_daemon(folder: Path) -> None:
    """The daemon forks twice into a session of its own; ``run_notebook`` sees that it is gone."""
    daemon = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(600)\n    os._exit(0)"
    outcome = run(folder, USER, daemon, "time.sleep(60)", options=("--cell-timeout", "2"))
    assert said(outcome) == ("timeout", "cell_timeout"), outcome.stdout


def test_what_is_required_is_refused(folder: Path) -> None:
    outcome = run(folder, USER, "x = 1", options=("--memory", "1G", "--require", "memory"))
    assert (outcome.verdict["status"], outcome.code) == ("internal_error", 7)
    assert "--require memory" in outcome.stdout + outcome.stderr


def test_root_without_rights(folder: Path) -> None:
    """RLIMIT_NPROC does not count for user 0: the watchdog does."""
    os.chown(folder, 0, 0)
    outcome = run(
        folder,
        ROOT_WITHOUT_RIGHTS,
        THREADS + "\ntime.sleep(20)",
        options=("--processes", "64", "--memory", "1G"),
    )
    assert said(outcome) == ("limit_exceeded", "too_many_processes"), outcome.stdout
    assert {
        name: outcome.verdict["enforcement"][name]["by"] for name in ("memory", "processes")
    } == {
        "memory": "rlimit",
        "processes": "watchdog",
    }


PACED = """
import mmap, time
kept, began = [], time.perf_counter()
while True:
    block = mmap.mmap(-1, 16 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block.write(b"x" * (16 << 20))
    kept.append(block)
    time.sleep(max(0.0, began + len(kept) * (16 << 20) / 1e9 - time.perf_counter()))
"""


def test_the_watchdog_is_not_passed_by_far(folder: Path) -> None:
    """At 1 GB/s. Measured: 48 MiB past 500 (`make bench`); the bound leaves room for a machine on which the watchdog waits for its turn."""
    outcome = run(folder, USER, PACED, options=("--memory", "300M", "--mechanisms", "watchdog"))
    assert said(outcome) == ("kernel_died", "out_of_memory"), outcome.stdout
    assert 1.0 <= outcome.verdict["usage"]["memory_peak"] / (300 << 20) < 3.0
