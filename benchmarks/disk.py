"""Measures how far a kernel gets past a limit on the disk that only the watchdog holds: ``python -m benchmarks.disk [--rounds N]``.

The cell writes one file, at about 1 GB/s and as fast as the machine takes it. Told is what the file takes on the disk after the run, beyond
the limit: the sentence that stands in docs/limits.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import nbformat

EXECUTABLE = Path(sys.executable).parent / "safe-exec"
MIB = 1 << 20
LIMIT = 500 * MIB
DISK_FULL = 5
NO_BUBBLEWRAP = "rlimit,watchdog"
PIECE = 4 * MIB
WRITE = f"""
import os, time
piece, begun, written = os.urandom({PIECE}), time.monotonic(), 0
fd = os.open("big", os.O_CREAT | os.O_WRONLY)
while written < {8 << 30}:
    written += os.write(fd, piece)
    time.sleep(max(0.0, begun + written / {{rate}} - time.monotonic()))
"""
RATES = {"at about 1 GB/s": 1e9, "as fast as the machine took it": 1e12}


@dataclass(frozen=True, kw_only=True, slots=True)
class Past:
    """MiB past the limit, in each round."""

    rate: str
    mib: tuple[float, ...]

    def __str__(self) -> str:
        return f"{statistics.median(self.mib):.0f} MiB past it {self.rate} ({min(self.mib):.0f} to {max(self.mib):.0f})"


def past(folder: Path, rate: float) -> float:
    """One run: how far the file got past the limit, in MiB."""
    (folder / "big").unlink(missing_ok=True)
    path = folder / "nb.ipynb"
    nbformat.write(
        nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(WRITE.format(rate=rate))]), path
    )
    argv = [
        str(EXECUTABLE),
        "run",
        "-q",
        "--no-bisect",
        "--mechanisms",
        NO_BUBBLEWRAP,
        "--disk",
        str(LIMIT),
        str(path),
    ]
    done = subprocess.run(argv, check=False, capture_output=True, text=True, env=os.environ)
    verdict = json.loads((folder / "nb.verdict.json").read_text())
    if done.returncode != DISK_FULL or verdict["cause"]["kind"] != "disk_full":
        raise SystemExit(f"not ended for the disk: {done.returncode} {done.stdout}{done.stderr}")
    return ((folder / "big").stat().st_blocks * 512 - LIMIT) / MIB


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.disk", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    folder = Path(tempfile.mkdtemp(prefix="bench-disk-"))
    try:
        found = [
            Past(rate=name, mib=tuple(past(folder, rate) for _ in range(rounds)))
            for name, rate in RATES.items()
        ]
    finally:
        shutil.rmtree(folder)
    told = f"with {LIMIT // MIB} MiB allowed, the file ended {'; '.join(map(str, found))}; the median of {rounds} runs each"
    print(told)


if __name__ == "__main__":
    main()
