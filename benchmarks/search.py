"""Measures the search for culprits beside plain ddmin: ``python -m benchmarks.search [--quick] [--minutes M] [--json FILE]``.

What is measured, and how, is told in ``benchmarks/README.md``. Each notebook is run once as a user would. Then, from the same folder and by
the same trials, ddmin looks for the same cells; what the search has tried before it is not run again but counted with the seconds it took.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import safe_exec
from benchmarks.measure import notebook
from safe_exec.experiments.culprits import finder
from safe_exec.experiments.culprits.oracle import oracle
from safe_exec.experiments.culprits.protocol import Outcome, Query
from tests.unit.ddmin import ddmin

MINUTES = 5.0
OWN_SECONDS = 300.0
"""The budget of each search."""
RESERVE_SECONDS = 15.0
"""What a first run and its search take, as long as none has shown it."""

# --- notebooks --------------------------------------------------------------------------------------------------

FIRST = (
    "import numpy as np\nimport pandas as pd",
    """rng = np.random.default_rng(7)
frame_0 = pd.DataFrame({
    'group': rng.integers(0, 20, 20_000),
    'x': rng.normal(size=20_000),
    'value': rng.gamma(2.0, size=20_000),
})
frame_0.head()""",
)
FRAMES = (
    "{new} = {old}.assign(value=({old}['value'] - {old}['value'].mean()) / {old}['value'].std())",
    "# outliers\n{new} = {old}[{old}['value'] < {old}['value'].quantile(0.99)].copy()",
    "def clean_{n}(frame):\n    return frame.dropna().reset_index(drop=True)\n\n{new} = clean_{n}({old})",
    "{new} = {old}.sort_values(['group', 'x']).reset_index(drop=True)\nprint(len({new}))",
)
"""Cells that make a new frame of an old one."""
LEAVES = (
    "{old}.describe()",
    "summary_{n} = {old}.groupby('group')['value'].agg(['mean', 'std', 'count'])\nsummary_{n}.head()",
    "counts_{n}, edges_{n} = np.histogram({old}['value'], bins=40)\nprint(counts_{n}.max())",
    "model_{n} = np.polyfit({old}['x'], {old}['value'], 2)\nprint('fit', model_{n})",
    "THRESHOLD_{n} = 0.{n}\nCOLUMNS_{n} = ['group', 'value']",
    "rows_{n} = []\nfor name, part in {old}.groupby('group'):\n    rows_{n}.append((name, part['value'].median()))\npd.DataFrame(rows_{n}).head()",
    "def score_{n}(frame, weight=1.0):\n    return (frame['value'] * weight).sum() / len(frame)\n\nprint(score_{n}({old}))",
    "correlation_{n} = {old}[['x', 'value']].corr()\ncorrelation_{n}",
    "print('rows', len({old}), 'groups', {old}['group'].nunique())",
)
"""Cells of which nothing else is made."""


@dataclass(frozen=True, kw_only=True)
class Death:
    """How a notebook dies: cells that are put into it at such a part of its length, the crash cell, limits.

    ``needs``: which of ``FIRST`` it takes as well. ``outside``: some of the culprits are not in the crash cell's backward slice.
    """

    name: str
    outside: bool
    planted: tuple[tuple[float, str], ...]
    crash: str
    options: Mapping[str, object] = field(default_factory=dict)
    needs: tuple[int, ...] = ()


SEGFAULT = Death(
    name="segfault in a helper",
    outside=False,
    planted=(
        (
            0.2,
            "import ctypes\n\ndef read_header(address):\n    return ctypes.string_at(address, 8)",
        ),
        (0.6, "settings = {'offset': 64}"),
    ),
    crash="header = read_header(settings['offset'])\nprint(header)",
)
MEMORY_KEPT = Death(
    name="memory kept before",
    outside=True,
    planted=(
        (0.3, "archive_a = np.ones(24_000_000)\narchive_a[:5]"),
        (0.7, "archive_b = np.ones(24_000_000)\narchive_b.mean()"),
    ),
    crash="work = np.ones(28_000_000)\nwork.sort()\nprint(work[-10:])",
    options={"memory": "600M"},
    needs=(0,),
)
MEMORY_MERGE = Death(
    name="memory, a merge explodes",
    outside=False,
    planted=((0.5, "wide = pd.concat([frame_0] * 3)\nwide.shape"),),
    crash="joined = wide.merge(wide, on='group')\nprint(len(joined))",
    options={"memory": "600M"},
    needs=(0, 1),
)
CUT_FILE = Death(
    name="bus error, file cut",
    outside=True,
    planted=(
        (0.1, "np.arange(200_000.0).tofile('signal.bin')"),
        (0.3, "signal = np.memmap('signal.bin', dtype='float64', mode='r')\nsignal.shape"),
        (0.7, "with open('signal.bin', 'r+b') as file:\n    file.truncate(4096)"),
    ),
    crash="print(signal[150_000:].sum())",
    needs=(0,),
)
DEADLOCK = Death(
    name="deadlock",
    outside=False,
    planted=(
        (0.2, "import threading\nlock = threading.Lock()"),
        (0.5, "lock.acquire()\nprint('locked')"),
    ),
    crash="with lock:\n    print('inside')",
    options={"cell_timeout": "3s"},
)
EXIT_BY_SETTING = Death(
    name="exit, by a setting",
    outside=True,
    planted=(
        (0.1, "import os\nos.environ['PIPELINE_MODE'] = 'strict'"),
        (
            0.6,
            "import os\n\ndef finish(frame):\n    if os.environ.get('PIPELINE_MODE') == 'strict':\n        os._exit(3)\n    return frame",
        ),
    ),
    crash="result = finish(frame_0)\nresult.head()",
    needs=(0, 1),
)
OPEN_FILES = Death(
    name="open files leaked",
    outside=True,
    planted=(
        (0.3, "readers = [open('/dev/null') for _ in range(80)]\nprint(len(readers))"),
        (0.6, "writers = [open('/dev/null', 'w') for _ in range(80)]\nprint(len(writers))"),
    ),
    crash="parts = [open('/dev/null') for _ in range(80)]\nprint(len(parts))",
    options={"open_files": 256},
)
TABLE: tuple[tuple[int, Death], ...] = (
    (10, SEGFAULT),
    (15, MEMORY_KEPT),
    (20, CUT_FILE),
    (25, DEADLOCK),
    (30, EXIT_BY_SETTING),
    (40, OPEN_FILES),
    (50, MEMORY_MERGE),
    (60, MEMORY_KEPT),
)


def make(cells: int, death: Death) -> tuple[list[str], tuple[int, ...]]:
    """Sources of a notebook of so many cells that dies in its last, and which of them it takes."""
    chance = random.Random(cells)
    places = {max(len(FIRST), int(part * cells)): source for part, source in death.planted}
    assert len(places) == len(death.planted)
    sources, frames = list(FIRST), ["frame_0"]
    for n in range(len(FIRST), cells - 1):
        if n in places:
            sources.append(places[n])
            continue
        old, new = chance.choice(frames), f"frame_{n}"
        if chance.random() < 0.3:
            sources.append(chance.choice(FRAMES).format(n=n, old=old, new=new))
            frames.append(new)
        else:
            sources.append(chance.choice(LEAVES).format(n=n, old=old))
    return [*sources, death.crash], (*death.needs, *sorted(places), cells - 1)


# --- measuring --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Effort:
    """What it took to find some cells: trials, and their seconds. ``done`` is false where it was stopped before the end."""

    cells: tuple[int, ...]
    trials: int
    seconds: float
    done: bool


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One notebook. ``run_seconds`` is the wall time of its first run, ``right`` whether the search found just what was put in."""

    cells: int
    death: str
    outside: bool
    run_seconds: float
    right: bool
    ours: Effort
    plain: Effort


class OutOfTime(Exception):  # noqa: N818 - no error: ddmin is stopped
    pass


class Recorder(oracle.Oracle):
    """Notes what each set of cells answered, and how long the trial took."""

    known: dict[frozenset[int], tuple[bool, float]]
    seconds: float

    async def answer(self, query: Query, **more: Any) -> Any:
        if not hasattr(self, "known"):
            self.known, self.seconds = {}, 0.0
        reply = await super().answer(query, **more)
        self.seconds += reply.seconds
        # What a fork answered, ddmin has to find out by a trial.
        if more.get("node") is None and reply.from_scratch:
            self.known[frozenset(query.cells)] = (
                reply.answer is Outcome.FAIL,
                reply.seconds,
            )
        return reply


class Both(finder.Investigation):
    """A search, and after it ddmin by the same trials, until a moment at which it is stopped."""

    until = 0.0
    ours: Effort
    plain: Effort

    async def run(self) -> finder.InvestigationResult:
        began = time.monotonic()
        found = await super().run()
        cells = tuple(culprit.index for culprit in found.culprits.cells)
        type(self).ours = Effort(
            cells=cells,
            trials=self.oracle.trials,
            seconds=time.monotonic() - began,
            done=found.culprits.minimal,
        )
        type(self).plain = await asyncio.to_thread(self.by_ddmin, asyncio.get_running_loop())
        return found

    def by_ddmin(self, loop: asyncio.AbstractEventLoop) -> Effort:
        recorder = self.oracle
        assert isinstance(recorder, Recorder)
        tried: dict[frozenset[int], float] = {}

        def fails(cells: frozenset[int]) -> bool:
            if cells not in recorder.known:
                if time.monotonic() > self.until:
                    raise OutOfTime
                ask = Query(cells=tuple(sorted(cells)), time_budget=float("inf"), fresh=True)
                asyncio.run_coroutine_threadsafe(recorder.answer(ask), loop).result()
            failed, tried[cells] = recorder.known[cells]
            return failed

        try:
            left, _ = ddmin(self.order[:-1], fails, always=frozenset(self.order[-1:]))
        except OutOfTime:
            return Effort(cells=(), trials=len(tried), seconds=sum(tried.values()), done=False)
        return Effort(
            cells=tuple(sorted(left)), trials=len(tried), seconds=sum(tried.values()), done=True
        )


def measure(folder: Path, cells: int, death: Death, until: float) -> Measured:
    """One notebook: first run, search, and ddmin until a moment."""
    sources, planted = make(cells, death)
    path = notebook(folder / f"{cells}", *sources)
    Both.until = until
    # In the place of those that a run uses: the first run and all that goes before the search are a user's.
    with patch.object(finder, "Investigation", Both), patch.object(oracle, "Oracle", Recorder):
        verdict = safe_exec.run(
            path, options=death.options, bisect="always", bisect_budget=OWN_SECONDS
        )
    if verdict.culprits is None:
        raise SystemExit(
            f"{death.name}, {cells} cells: no search was made: {verdict.status} {verdict.cause} {verdict.warnings}"
        )
    ours = Both.ours
    return Measured(
        cells=cells,
        death=death.name,
        outside=death.outside,
        run_seconds=verdict.usage.wall_seconds or 0.0,
        right=ours.cells == planted,
        ours=ours,
        plain=Both.plain,
    )


def measure_all(folder: Path, table: Sequence[tuple[int, Death]], seconds: float) -> list[Measured]:
    """All of them. For ddmin there is what the first runs and searches that are to come leave of the time: it ends on small notebooks first."""
    found: list[Measured] = []
    until = time.monotonic() + seconds
    for number, (cells, death) in enumerate(table):
        print(f"measuring: {cells} cells, {death.name}", file=sys.stderr, flush=True)
        each = max((m.run_seconds + m.ours.seconds for m in found), default=RESERVE_SECONDS)
        found.append(measure(folder, cells, death, until - each * (len(table) - number)))
    return found


# --- what is shown ----------------------------------------------------------------------------------------------

FIGURES: tuple[tuple[str, bool, Callable[[Measured], float]], ...] = (
    ("search: trials", False, lambda m: m.ours.trials),
    ("search: seconds", False, lambda m: m.ours.seconds),
    ("search: first runs", False, lambda m: m.ours.seconds / m.run_seconds),
    ("ddmin: trials", True, lambda m: m.plain.trials),
    ("ddmin: first runs", True, lambda m: m.plain.seconds / m.run_seconds),
    ("ddmin / search, trials", True, lambda m: m.plain.trials / m.ours.trials),
)
"""Those of ddmin are of the notebooks on which it came to its end."""


def table_of(found: Sequence[Measured]) -> str:
    """A line for each notebook, then medians and the most."""
    head = f"{'cells':>5}  {'death':<26}{'slice':<8}{'run':>7}  {'search':>22}  {'ddmin':>18}"
    lines = [
        head,
        f"{'':>5}  {'':<26}{'':<8}{'[s]':>7}  {'trials':>6}{'[s]':>8}{'[runs]':>8}  {'trials':>8}{'[runs]':>10}",
    ]
    for m in found:
        where = "outside" if m.outside else "inside"
        ours = f"{m.ours.trials:>6}{m.ours.seconds:>8.1f}{m.ours.seconds / m.run_seconds:>8.1f}"
        more = "" if m.plain.done else ">"
        figures = (
            (f"{more}{m.plain.trials}", f"{more}{m.plain.seconds / m.run_seconds:.1f}")
            if m.plain.trials
            else ("-", "-")
        )
        plain = f"{figures[0]:>8}{figures[1]:>10}"
        same = "" if not m.plain.done or m.plain.cells == m.ours.cells else "  ddmin: another set"
        lines.append(
            f"{m.cells:>5}  {m.death:<26}{where:<8}{m.run_seconds:>7.2f}  {ours}  {plain}{'' if m.right else '  not what was put in'}{same}"
        )
    for name, ended, figure in FIGURES:
        values = [figure(m) for m in found if m.plain.done or not ended]
        if values:
            lines.append(
                f"{name:<24}median {statistics.median(values):>7.1f}   most {max(values):>7.1f}   of {len(values)}"
            )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="the two smallest notebooks: does it run at all?"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=MINUTES,
        metavar="M",
        help="how long all may take; ddmin is stopped [5]",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    options = parser.parse_args(arguments)
    # A cache of its own: nothing that an earlier run has tried is known.
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as name,
        patch.dict("os.environ", XDG_CACHE_HOME=f"{name}/cache"),
    ):
        found = measure_all(Path(name), TABLE[:2] if options.quick else TABLE, 60 * options.minutes)
    print(table_of(found))
    if options.json:
        options.json.write_text(
            json.dumps([asdict(measured) for measured in found], indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
