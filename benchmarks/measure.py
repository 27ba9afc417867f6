"""Running commands and keeping what they took: wall time, the memory of the process itself, rounds in turns, medians and paired ratios.

Paired: what is compared runs one after the other within a round, so a machine that is slow for a while is slow for both; a ratio is taken in each
round, and the median of those is the figure. It moves far less than a ratio of medians on a machine that others use too.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import nbformat

POLL_SECONDS = 0.0005
PATIENCE_SECONDS = 300
MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Ended:
    """One process that was run to its end. ``seconds`` are of wall time, ``cpu_seconds`` of all its children too.

    ``peak`` is the most memory in bytes that the process itself held (VmHWM, without children), ``largest`` the ru_maxrss of the tree.
    ``exited`` and ``appeared`` are the moments (``time.monotonic``) at which it was over, and at which a file that was waited for stood.
    """

    code: int
    seconds: float
    cpu_seconds: float
    exited: float
    appeared: float | None
    peak: int
    largest: int


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Several measurements of one thing."""

    median: float
    least: float
    most: float
    runs: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(
            median=statistics.median(values), least=min(values), most=max(values), runs=len(values)
        )


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table. ``ratio`` is what ours took over what this tool took, round by round; ``None`` for our own line."""

    what: str
    tool: str
    unit: str
    spread: Spread
    ratio: Spread | None = None


def environment() -> dict[str, str]:
    """Ours without what keeps byte code from being stored: all start with warm caches."""
    dropped = ("PYTHONDONTWRITEBYTECODE", "PYTEST_CURRENT_TEST")
    return {name: value for name, value in os.environ.items() if name not in dropped}


def execute(argv: Sequence[str], cwd: Path, awaited: Path | None = None) -> Ended:
    """Run a command to its end; look twice a millisecond for that, for its memory and for a file, which appears whole."""
    begun = time.monotonic()
    process = subprocess.Popen(
        argv,
        cwd=cwd,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    appeared: float | None = None
    peak = 0
    with open(f"/proc/{process.pid}/status", "rb", buffering=0) as status_file:
        while True:
            if appeared is None and awaited is not None and awaited.exists():
                appeared = time.monotonic()
            peak = max(peak, _high_water(status_file.fileno()))
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() - begun > PATIENCE_SECONDS:
                process.kill()
            time.sleep(POLL_SECONDS)
    exited = time.monotonic()
    process.returncode = os.waitstatus_to_exitcode(status)
    return Ended(
        code=process.returncode,
        seconds=exited - begun,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        exited=exited,
        appeared=appeared,
        peak=peak,
        largest=usage.ru_maxrss * 1024,
    )


def _high_water(fd: int) -> int:
    """VmHWM in bytes, 0 for a process that is gone."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        text = os.pread(fd, 4096, 0)
        return int(text.split(b"VmHWM:")[1].split()[0]) * 1024
    return 0


def timed(argv: Sequence[str], cwd: Path, what: str, tries: int = 1) -> float:
    """Wait for a command to end well and do nothing else, in seconds: to look twice a millisecond takes a share of a processor.

    One that fails is run again while there are ``tries`` left: its time is not that of what is measured.
    """
    for left in reversed(range(tries)):
        begun = time.monotonic()
        done = subprocess.run(
            argv,
            cwd=cwd,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=PATIENCE_SECONDS,
            check=False,
        )
        if not done.returncode:
            return time.monotonic() - begun
        print(f"{what}: exit code {done.returncode}, {left} more tries", file=sys.stderr)
    raise SystemExit(f"{what}: does not end well")


def demand(ended: Ended, code: int | None, what: str) -> Ended:
    """A run that did not do what is measured would be measured wrongly."""
    if code is not None and ended.code != code:
        raise SystemExit(f"{what}: exit code {ended.code}, expected {code}")
    return ended


def notebook(folder: Path, *sources: str) -> Path:
    """A notebook in a folder of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    return write_notebook(folder / "notebook.ipynb", *sources)


def write_notebook(path: Path, *sources: str) -> Path:
    """A notebook of code cells."""
    cells = [nbformat.v4.new_code_cell(source, id=f"cell-{n}") for n, source in enumerate(sources)]
    kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path.write_text(
        nbformat.writes(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernelspec}))
    )
    return path


def in_turns(
    rounds: int, takers: Mapping[str, Callable[[], Sequence[float]]]
) -> dict[str, list[tuple[float, ...]]]:
    """Let each take its turn in every round; every second round goes backwards, so that none always follows the same one."""
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in takers}
    for number in range(rounds):
        names = list(takers) if number % 2 == 0 else list(takers)[::-1]
        for name in names:
            found[name].append(tuple(takers[name]()))
    return found


def rows(what: str, unit: str, values: Mapping[str, Sequence[float]]) -> list[Row]:
    """A row for each tool, ours first; the ratios are paired."""
    ours = next(iter(values.values()))
    made = []
    for number, (tool, taken) in enumerate(values.items()):
        ratio = (
            Spread.of([mine / theirs for mine, theirs in zip(ours, taken, strict=True)])
            if number
            else None
        )
        made.append(Row(what=what, tool=tool, unit=unit, spread=Spread.of(taken), ratio=ratio))
    return made
