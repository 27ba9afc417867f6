"""Whether anything has become slower or larger beside nbclient: ``python -m benchmarks.check [--record]``, what CI runs.

No seconds are compared, only ratios of what followed each other on the same machine: processor time of the whole tree of processes, which hardly
depends on what else runs there; peak memory; the time from a death to the verdict, and that of many notebooks. A ratio has become worse if its
median is beyond the recorded one by more than its noise, if all rounds but one are beyond it, and if both are so again in as many rounds more.
``recorded.json`` holds the ratios; ``--record`` writes it anew, after a change that is meant.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.census import CENSUS, growing_cells
from benchmarks.measure import demand, execute, in_turns, notebook, timed, write_notebook
from benchmarks.peers import BIN, NBCLIENT, OURS, PROFILE, loop_of, nbclient, ours, warm_up
from benchmarks.sections import PRINTS, RAISED, death, long_cells

RECORDED = Path(__file__).with_name("recorded.json")
FEW = 12
FLOOD = "for i in range(50_000):\n    print('x' * 1023)"


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """One ratio: how many rounds it takes, how much of itself it may move without a reason, and what measures it in a folder, by round."""

    name: str
    rounds: int
    noise: float
    measure: Callable[[Path, int], list[float]]


def _paired(
    folder: Path,
    rounds: int,
    sources: Sequence[str],
    take: Callable[[Path, list[str]], float],
    *options: str,
) -> list[float]:
    path = notebook(folder, *sources)
    out = path.with_name("out.ipynb")
    commands = {OURS: ours(path, out, *options), NBCLIENT: nbclient(path, out)}
    takers = {
        name: lambda command=command: [take(path, command)] for name, command in commands.items()
    }
    taken = in_turns(rounds, takers)
    return [mine / theirs for (mine,), (theirs,) in zip(taken[OURS], taken[NBCLIENT], strict=True)]


def _processor(path: Path, command: list[str]) -> float:
    return demand(execute(command, path.parent), 0, command[0]).cpu_seconds


def _memory(path: Path, command: list[str]) -> float:
    return float(demand(execute(command, path.parent), 0, command[0]).peak)


def _told(path: Path, command: list[str]) -> float:
    demand(execute(command, path.parent), 0, command[0])
    return float(path.with_name("took").read_text())


def _many(folder: Path, rounds: int) -> list[float]:
    """Wall time, of a few notebooks at a time and one after the other: a processor that has nothing to do is seen in nothing else."""
    folder.mkdir()
    paths = [write_notebook(folder / f"n{n:02}.ipynb", *_cells(5)) for n in range(FEW)]
    batch = [
        str(BIN / "safe-exec"),
        "batch",
        "-q",
        *PROFILE,
        "-j",
        "2",
        "--out",
        str(folder / "out"),
        *map(str, paths),
    ]
    commands = {
        OURS: batch,
        NBCLIENT: loop_of([nbclient(path, folder / "theirs.ipynb") for path in paths]),
    }
    takers = {
        name: lambda name=name, command=command: [timed(command, folder, name)]
        for name, command in commands.items()
    }
    taken = in_turns(rounds, takers)
    return [mine / theirs for (mine,), (theirs,) in zip(taken[OURS], taken[NBCLIENT], strict=True)]


def _cells(count: int) -> list[str]:
    return [f"x{n} = {n}\nprint(x{n})" for n in range(count)]


def _deaths(folder: Path, rounds: int) -> list[float]:
    """The median of all kinds of death."""
    found = [row.ratio.median for row in death(folder, rounds) if row.ratio is not None]
    return [statistics.median(found)]


def _census(folder: Path, rounds: int) -> list[float]:
    """Processor time of the censuses of a kernel whose memory grows, as a share of its time.

    Only what the kernel uses between cells is compared with a run without censuses: in a cell, the
    noise of the machine is many times larger than a census.
    """
    path = notebook(folder, *growing_cells())
    out = path.with_name("out.ipynb")
    options = (*PROFILE, "--memory", "2G", "-q", str(path), "-o", str(out))

    def take(mode: str) -> list[float]:
        demand(execute([sys.executable, str(CENSUS), mode, "run", *options], folder), 0, "census")
        return list(map(float, path.with_name("took").read_text().split()))

    taken = in_turns(rounds, {mode: partial(take, mode) for mode in ("on", "off")})
    return [
        1 + (between_on - between_off) / whole
        for (between_on, _), (between_off, whole) in zip(taken["on"], taken["off"], strict=True)
    ]


# Processor time in a cell, not wall time: a print costs what it costs on a busy machine too.
_PRINTS = PRINTS.replace("perf_counter", "thread_time")

RATIOS = (
    Ratio(
        name="processor time, 5 cells",
        rounds=5,
        noise=0.25,
        measure=lambda f, n: _paired(f, n, _cells(5), _processor),
    ),
    Ratio(
        name="processor time, 1,000 cells",
        rounds=3,
        noise=0.3,
        measure=lambda f, n: _paired(
            f, n, long_cells(500, "silent") + long_cells(500, "printing"), _processor
        ),
    ),
    Ratio(name=f"{FEW} notebooks at -j 2, wall time", rounds=3, noise=0.4, measure=_many),
    Ratio(
        name="a print, in the cell",
        rounds=5,
        noise=0.3,
        measure=lambda f, n: _paired(f, n, [_PRINTS], _told),
    ),
    Ratio(
        name="50 MB of output, memory",
        rounds=3,
        noise=0.25,
        measure=lambda f, n: _paired(f, n, [FLOOD], _memory, *RAISED),
    ),
    Ratio(
        name="50 MB of output, processor time",
        rounds=3,
        noise=0.35,
        measure=lambda f, n: _paired(f, n, [FLOOD], _processor, *RAISED),
    ),
    # Recorded is a run without censuses: they may add 2 %.
    Ratio(name="censuses, share of the time", rounds=3, noise=0.02, measure=_census),
    Ratio(name="from a death to the verdict", rounds=3, noise=2.0, measure=_deaths),
)


def worse(ratios: Sequence[float], recorded: float, noise: float) -> bool:
    """Whether ratios are beyond the recorded one by more than its noise: their median, and each but one at least beyond it at all."""
    beyond = sum(ratio > recorded for ratio in ratios)
    return statistics.median(ratios) > recorded * (1 + noise) and beyond >= len(ratios) - 1


def compare(folder: Path, recorded: Mapping[str, float]) -> tuple[list[str], dict[str, float]]:
    """What has become worse, in words, and all medians. What looks worse is measured once more."""
    complaints: list[str] = []
    medians: dict[str, float] = {}
    for number, ratio in enumerate(RATIOS):
        was = recorded.get(ratio.name)
        for attempt in range(2):
            found = ratio.measure(folder / f"{number}-{attempt}", ratio.rounds)
            medians[ratio.name] = round(statistics.median(found), 3)
            bad = was is not None and worse(found, was, ratio.noise)
            print(_line(ratio, found, was, bad=bad), flush=True)
            if not bad:
                break
        else:
            complaints.append(f"{ratio.name}: ratio {medians[ratio.name]}, was {was}")
    return complaints, medians


def _line(ratio: Ratio, found: Sequence[float], was: float | None, *, bad: bool) -> str:
    limit = (
        "" if was is None else f"   recorded {was:.3f}, worse from {was * (1 + ratio.noise):.3f}"
    )
    spread = f"{statistics.median(found):.3f} ({min(found):.3f} to {max(found):.3f})"
    return f"{ratio.name:<34}{spread:<26}{limit}{'   worse' if bad else ''}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and compare; 1 where something has become worse."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.check", description=__doc__)
    parser.add_argument(
        "--record", action="store_true", help="write what is measured to recorded.json"
    )
    options = parser.parse_args(arguments)
    recorded: dict[str, float] = {} if options.record else json.loads(RECORDED.read_text())
    if not options.record and (unknown := {ratio.name for ratio in RATIOS} ^ recorded.keys()):
        print(
            f"{RECORDED.name} does not know, or knows too much: {sorted(unknown)}; write it with --record",
            file=sys.stderr,
        )
        return 2
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    try:
        warm_up(folder, OURS, NBCLIENT)
        complaints, medians = compare(folder, recorded)
    finally:
        shutil.rmtree(folder)
    if options.record:
        RECORDED.write_text(json.dumps(medians, indent=1) + "\n")
    for complaint in complaints:
        print(f"worse: {complaint}", file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
