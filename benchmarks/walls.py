"""Measures what walls cost a small notebook: ``python -m benchmarks.walls [--rounds N]``.

The same notebook under ``ci`` and ``untrusted`` as they ship, and under their limits alone, without walls and without file systems of limited
size. The three take turns within every round; told is the median of the ratios of the rounds, as a machine that is slower for a while is
slower for all of them. At most 1.15 is aimed at.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat

from safe_exec.limits.profiles import load_profile
from safe_exec.limits.values import format_limit
from safe_exec.model.limits import LimitName

EXECUTABLE = Path(sys.executable).parent / "safe-exec"
CELLS = (
    "x = 1",
    "print(x)",
    "y = [n * n for n in range(1000)]",
    "sum(y)",
    "open('written', 'w').write('x')",
)
PROFILES = ("ci", "untrusted")
WALLS_ONLY = (LimitName.DISK, LimitName.SHM)
MOST = 1.15


def limits_alone(profile: str, folder: Path) -> Path:
    """A file with the limits of a profile and nothing of its isolation."""
    limits = load_profile(profile, machine_memory=None).limits
    held = {name: limits.of(name) for name in LimitName if name not in WALLS_ONLY}
    lines = [f"  {name.value}: {format_limit(name.value, value)}" for name, value in held.items()]
    path = folder / f"{profile}-limits.yaml"
    path.write_text("limits:\n" + "\n".join(lines) + "\n")
    return path


def seconds(notebook: Path, limits: str) -> float:
    """One run of the whole command."""
    begun = time.perf_counter()
    argv = [str(EXECUTABLE), "run", "-q", "--no-bisect", str(notebook), "--limits", limits]
    subprocess.run(argv, check=True, capture_output=True, env=os.environ)
    return time.perf_counter() - begun


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.walls", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    folder = Path(tempfile.mkdtemp(prefix="bench-walls-"))
    try:
        node = nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_code_cell(source) for source in CELLS]
        )
        (folder / "nb").mkdir()
        notebook = folder / "nb" / "nb.ipynb"
        nbformat.write(node, notebook)
        for profile in PROFILES:
            alone = str(limits_alone(profile, folder))
            seconds(notebook, alone), seconds(notebook, profile)
            pairs = [(seconds(notebook, profile), seconds(notebook, alone)) for _ in range(rounds)]
            walled, bare = (statistics.median(times) for times in zip(*pairs, strict=True))
            ratio = statistics.median(with_walls / without for with_walls, without in pairs)
            print(
                f"{profile:10} {walled:.2f} s with walls, {bare:.2f} s with limits alone: {ratio:.2f} (at most {MOST})"
            )
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
