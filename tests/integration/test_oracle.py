"""What a run is said to have used, beside what BenchExec's runexec says of the same load.

runexec measures a program, we measure a notebook: so the load is a Python program that a cell starts, the same that runexec starts. Both
read control groups of their own making, but other files at other moments, and what a kernel takes by itself is ours to subtract: processor
time is that of the cell alone, and from the memory of each the same program without a load is taken. A load says itself when it is done, by
the processor time that it has used, so a busy machine makes it slower and not larger.
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import make_notebook, run_notebook

RUNEXEC = Path(sys.executable).parent / "runexec"
SHARE = 0.05
"""How far the figures may be from each other, of those of runexec."""
MIB = 1 << 20

SPIN = "import time\ndef spin(seconds):\n    while time.process_time() < seconds: pass\n"
NOTHING = SPIN
ALONE = SPIN + "hog = bytearray(b'x') * (300 << 20)\nspin(4)"
SHARED = (
    SPIN
    + "import mmap\nhog = mmap.mmap(-1, 200 << 20)\nfor at in range(0, len(hog), 4096): hog[at] = 1\nspin(3)"
)
CHILDREN = (
    SPIN
    + """
import os
done_r, done_w = os.pipe()
stay_r, stay_w = os.pipe()
for _ in range(3):
    if os.fork() == 0:
        os.close(stay_w)
        hog = bytearray(b'x') * (90 << 20)
        spin(1.5)
        os.write(done_w, b"x")
        os.read(stay_r, 1)  # until all are done: their memory is there at one time
        os._exit(0)
for _ in range(3): os.read(done_r, 1)
os.close(stay_w)
for _ in range(3): os.wait()
"""
)


@dataclass(frozen=True, kw_only=True)
class Use:
    """Bytes and seconds."""

    memory: float
    raw: float
    cpu: float


def by_runexec(load: Path) -> Use:
    argv = [
        str(part)
        for part in (
            RUNEXEC,
            "--no-container",
            "--output",
            load.with_suffix(".log"),
            "--",
            sys.executable,
            load,
        )
    ]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=True)
    said = dict(re.findall(r"^(\w+)=([\d.]+)", done.stdout, re.MULTILINE))
    assert said["returnvalue"] == "0", done.stdout
    return Use(memory=float(said["memory"]), raw=float(said["memory"]), cpu=float(said["cputime"]))


def by_us(load: Path) -> Use:
    cell = (
        f"import subprocess, sys\nsubprocess.run([{sys.executable!r}, {str(load)!r}], check=True)"
    )
    path = make_notebook(load.with_suffix(".ipynb"), "x = 1", cell)
    done = run_notebook(path, "--no-bisect", "--memory", "2G")
    assert done.code == 0, done.stdout
    enforcement = done.verdict["enforcement"]
    assert enforcement["memory"]["by"].startswith("cgroup"), enforcement
    usage = done.verdict["usage"]
    return Use(
        memory=usage["memory_peak"],
        raw=usage["memory_peak_raw"],
        cpu=done.verdict["cells"][1]["cpu_seconds"],
    )


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Use, Use]:
    """What either takes for a program that does nothing. Once without being looked at: then all that it reads is in the page cache."""
    load = tmp_path_factory.mktemp("idle") / "nothing.py"
    load.write_text(NOTHING)
    by_us(load)
    by_runexec(load)
    return by_us(load), by_runexec(load)


@pytest.mark.bed("runexec", "cgroup-v1-root")
@pytest.mark.parametrize(
    ("source", "most", "seconds"),
    [(ALONE, 300 * MIB, 4.0), (SHARED, 200 * MIB, 3.0), (CHILDREN, 270 * MIB, 4.5)],
    ids=["alone", "shared", "children"],
)
def test_figures_are_those_of_runexec(
    source: str, most: int, seconds: float, idle: tuple[Use, Use], tmp_path: Path
) -> None:
    load = tmp_path / "load.py"
    load.write_text(source)
    ours, theirs = by_us(load), by_runexec(load)
    idle_ours, idle_theirs = idle
    said = f"ours {ours}, idle {idle_ours}; theirs {theirs}, idle {idle_theirs}"
    memory = theirs.memory - idle_theirs.memory
    assert memory == pytest.approx(most, rel=SHARE), f"not the load that was meant; {said}"
    assert theirs.cpu == pytest.approx(seconds, rel=SHARE), f"not the load that was meant; {said}"
    assert ours.raw - idle_ours.raw == pytest.approx(memory, rel=SHARE), (
        f"peak of all that was charged; {said}"
    )
    assert ours.memory - idle_ours.memory == pytest.approx(memory, rel=SHARE), (
        f"peak of what cannot be reclaimed; {said}"
    )
    assert ours.cpu == pytest.approx(theirs.cpu, rel=SHARE), f"processor time; {said}"
