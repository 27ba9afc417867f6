"""What is measured: each section makes its notebooks, lets the tools take turns, and gives rows. See ``benchmarks/README.md``."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import (
    MIB,
    Row,
    Spread,
    demand,
    execute,
    in_turns,
    notebook,
    rows,
    timed,
    write_notebook,
)
from benchmarks.peers import (
    BIN,
    EXECUTE,
    NBCLIENT,
    OURS,
    PROFILE,
    loop_of,
    nbclient,
    nbmake,
    ours,
    papermill,
    tools,
)

WATCHED_LIMIT = 500 * MIB
MANY = 40
RAISED = ("--output", "500M")
"""The cap on output, high enough for all that a notebook here puts out."""

LAST_WORD = (
    "import os, time\nwith open('moment', 'w') as file:\n    file.write(str(time.monotonic_ns()))\n"
)
DEATHS = {
    "SIGKILL": LAST_WORD + "os.kill(os.getpid(), 9)",
    "segfault": "import ctypes\n" + LAST_WORD + "ctypes.string_at(0)",
    "os._exit": LAST_WORD + "os._exit(1)",
}

VOLUMES = {
    "lines of 1 KB": "for i in range(200_000):\n    print('x' * 1023)",
    "lines of 1 MB": "for i in range(200):\n    print('x' * 1048575)",
    "displays of 1 MB": "from IPython.display import display\nfor i in range(200):\n    display({'text/plain': 'x' * 1_000_000}, raw=True)",
}

TOOK = "with open('took', 'w') as file:\n    file.write(str(time.perf_counter() - begun))"
LOOP = f"import time\nx = 0\nbegun = time.perf_counter()\nfor i in range(5_000_000):\n    x += i\n{TOOK}"
PRINTS = f"import time\nbegun = time.perf_counter()\nfor i in range(200_000):\n    print(i)\n{TOOK}"
FUNCTION = f"""import time
def work(n):
    x = 0
    for i in range(n):
        x += i % 7
    return x
begun = time.perf_counter()
for n in range(300):
    work(5_000)
{TOOK}"""
RECORDING = {
    "200 000 prints": PRINTS,
    "a loop of 5 million turns": LOOP,
    "calls of a function": FUNCTION,
}

# A piece is written to as it is taken: pages that are only reserved do not count. It ends by itself below 4 GiB.
GROW = """import time
pieces = []
for _ in range(380):
    begun = time.perf_counter()
    pieces.append(bytearray(b"x") * 10_000_000)
    while time.perf_counter() - begun < {pause}:
        pass
"""
GROWTH = {"about 1 GB/s": GROW.format(pause=0.01), "as fast as it can": GROW.format(pause=0)}


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the benchmark: what it is called, and what measures it in so many rounds of a whole and of a quick run."""

    name: str
    rounds: int
    quick: int
    measure: Callable[[Path, int], list[Row]]


def small(folder: Path, rounds: int) -> list[Row]:
    """One small notebook, whole process."""
    return _whole(folder, rounds, cells=5, what="one small notebook (5 cells)")


def large(folder: Path, rounds: int) -> list[Row]:
    """200 trivial cells, whole process."""
    return _whole(folder, rounds, cells=200, what="200 trivial cells")


def _whole(folder: Path, rounds: int, *, cells: int, what: str) -> list[Row]:
    path = notebook(folder, *(f"x{n} = {n}\nprint(x{n})" for n in range(cells)))

    def taker(name: str, command: list[str]) -> Callable[[], Sequence[float]]:
        return lambda: [demand(execute(command, folder), 0, name).seconds]

    takers = {
        tool.name: taker(tool.name, tool.command(path, folder / "out.ipynb")) for tool in tools()
    }
    return rows(
        what,
        "s",
        {
            name: [seconds for (seconds,) in taken]
            for name, taken in in_turns(rounds, takers).items()
        },
    )


LONG = (1000, 3000)
KINDS = {"silent": "x = {n}", "printing": "x{n} = {n}\nprint(x{n})"}


def long_cells(count: int, kind: str) -> list[str]:
    """The sources of a long notebook of trivial cells, ``silent`` or ``printing``."""
    return [KINDS[kind].format(n=n) for n in range(count)]


def long(folder: Path, rounds: int) -> list[Row]:
    """Notebooks of 1,000 and 3,000 trivial cells, beside nbclient alone."""
    result: list[Row] = []
    for count in LONG:
        for kind in KINDS:
            path = notebook(folder / f"{count}-{kind}", *long_cells(count, kind))
            out = path.with_name("out.ipynb")
            commands = {OURS: ours(path, out), NBCLIENT: nbclient(path, out)}
            takers = {
                name: lambda name=name, command=command: [timed(command, folder, name)]
                for name, command in commands.items()
            }
            taken = in_turns(rounds, takers)
            result += rows(
                f"{count:,} cells, {kind}",
                "s",
                {name: [seconds for (seconds,) in figures] for name, figures in taken.items()},
            )
    return result


def many(folder: Path, rounds: int) -> list[Row]:
    """40 small notebooks, two at a time where the tool can."""
    folder.mkdir()
    paths = [
        write_notebook(
            folder / f"n{n:02}.ipynb", *(f"x{m} = {m * n}\nprint(x{m})" for m in range(5))
        )
        for n in range(MANY)
    ]
    outs = folder.parent / "many-out"
    outs.mkdir()
    commands = {
        OURS: [
            str(BIN / "safe-exec"),
            "batch",
            "-q",
            *PROFILE,
            "-j",
            "2",
            "--out",
            str(outs / "ours"),
            str(folder),
        ],
        "nbmake -n 2": nbmake("-n", "2", str(folder)),
        "papermill, a loop": loop_of([papermill(path, outs / path.name) for path in paths]),
    }

    def taker(name: str, command: list[str]) -> Callable[[], Sequence[float]]:
        # Of some hundred kernels of nbmake's one does not start, after a minute.
        return lambda: [timed(command, folder, name, tries=1 if name == OURS else 2)]

    taken = in_turns(rounds, {name: taker(name, command) for name, command in commands.items()})
    return rows(
        f"{MANY} small notebooks",
        "s",
        {name: [seconds for (seconds,) in figures] for name, figures in taken.items()},
    )


def volume(folder: Path, rounds: int) -> list[Row]:
    """200 MB of output: time, and the memory of the runner alone; all of it written, and cut at the profile's cap."""
    result: list[Row] = []
    capped: dict[str, list[float]] = {}
    for name, source in VOLUMES.items():
        path = notebook(folder / name.replace(" ", "-"), source)
        out = path.with_name("out.ipynb")
        commands = {OURS: ours(path, out, *RAISED), NBCLIENT: nbclient(path, out)}

        def taker(tool: str, command: list[str], out: Path = out) -> Callable[[], Sequence[float]]:
            def take() -> Sequence[float]:
                ended = demand(execute(command, out.parent), 0, tool)
                if out.stat().st_size < 200_000_000:
                    raise SystemExit(f"{tool}: not all of the output was written")
                return ended.seconds, ended.peak / MIB

            return take

        taken = in_turns(rounds, {tool: taker(tool, command) for tool, command in commands.items()})
        result += rows(
            f"200 MB of output, {name}",
            "s",
            {tool: [f[0] for f in figures] for tool, figures in taken.items()},
        )
        result += rows(
            f"200 MB of output, {name}, memory",
            "MiB",
            {tool: [f[1] for f in figures] for tool, figures in taken.items()},
        )
        capped[name] = [
            execute(ours(path, out, "--no-bisect"), path.parent).peak / MIB for _ in range(rounds)
        ]
    what = "200 MB of output cut at the cap of ci, memory"
    return result + [
        Row(what=what, tool=f"{OURS}, {name}", unit="MiB", spread=Spread.of(peaks))
        for name, peaks in capped.items()
    ]


def death(folder: Path, rounds: int) -> list[Row]:
    """From the kernel's last word to the written verdict; there to the end of the command, which writes nothing."""
    result = []
    for name, source in DEATHS.items():
        path = notebook(folder / name, "print('before')", source, "print('after')")
        out = path.with_name("out.ipynb")
        takers = {
            OURS: _dying(
                path,
                ours(path, out, "--no-bisect"),
                verdict=path.with_name("notebook.verdict.json"),
            ),
            NBCLIENT: _dying(path, nbclient(path, out), verdict=None),
        }
        taken = in_turns(rounds, takers)
        result += rows(
            f"from death ({name}) to the verdict",
            "ms",
            {tool: [f for (f,) in figures] for tool, figures in taken.items()},
        )
    return result


def _dying(
    path: Path, command: list[str], *, verdict: Path | None
) -> Callable[[], Sequence[float]]:
    """Milliseconds from the moment that the notebook notes to the verdict, or to the command's end where there is none."""
    moment = path.with_name("moment")

    def take() -> Sequence[float]:
        for old in (moment, *([verdict] if verdict else [])):
            old.unlink(missing_ok=True)
        ended = demand(execute(command, path.parent, verdict), 3 if verdict else None, command[0])
        seen = ended.appeared if verdict else ended.exited
        if seen is None:
            raise SystemExit(f"{command[0]}: no verdict was written")
        return [(seen - int(moment.read_text()) / 1e9) * 1000]

    return take


def recording(folder: Path, rounds: int) -> list[Row]:
    """What the record inside the kernel costs: the time that the work itself takes, told by the cell."""
    result = []
    for name, source in RECORDING.items():
        path = notebook(folder / name.replace(" ", "-"), source)
        out = path.with_name("out.ipynb")

        def taker(
            tool: str, command: list[str], path: Path = path
        ) -> Callable[[], Sequence[float]]:
            def take() -> Sequence[float]:
                demand(execute(command, path.parent), 0, tool)
                return [float(path.with_name("took").read_text())]

            return take

        taken = in_turns(
            rounds,
            {OURS: taker(OURS, ours(path, out)), NBCLIENT: taker(NBCLIENT, nbclient(path, out))},
        )
        result += rows(
            f"in the cell: {name}",
            "s",
            {tool: [f for (f,) in figures] for tool, figures in taken.items()},
        )
    return result


def overshoot(folder: Path, rounds: int) -> list[Row]:
    """How far a kernel gets past 500 MiB where only the watchdog holds the limit; what the system noted, and what we saw."""
    result = []
    for name, source in GROWTH.items():
        path = notebook(folder / name.replace(" ", "-").replace("/", "-"), source)
        options = ("--no-bisect", "--mechanisms", "watchdog", "--memory", str(WATCHED_LIMIT))
        command = [str(BIN / "safe-exec"), "run", "-q", *options, str(path)]
        largest, seen = [], []
        for _ in range(rounds):
            ended = demand(execute(command, path.parent), 3, f"watchdog, {name}")
            document = json.loads(path.with_name("notebook.verdict.json").read_text())
            largest.append((ended.largest - WATCHED_LIMIT) / MIB)
            seen.append(((document["usage"].get("memory_peak") or 0) - WATCHED_LIMIT) / MIB)
        what = f"watchdog, past the limit, {name}"
        result += [
            Row(what=what, tool=tool, unit="MiB", spread=Spread.of(f))
            for tool, f in (("ru_maxrss", largest), ("verdict", seen))
        ]
    return result


SECTIONS = (
    Section(name="small", rounds=9, quick=2, measure=small),
    Section(name="cells", rounds=7, quick=1, measure=large),
    Section(name="long", rounds=3, quick=1, measure=long),
    Section(name="many", rounds=4, quick=1, measure=many),
    Section(name="volume", rounds=3, quick=1, measure=volume),
    Section(name="death", rounds=7, quick=1, measure=death),
    Section(name="recording", rounds=5, quick=1, measure=recording),
    Section(name="watchdog", rounds=3, quick=1, measure=overshoot),
)
"""In this order; the culprit search comes last (``benchmarks/search.py``)."""

SHOWN = (
    ("one small notebook (5 cells)", EXECUTE, 0.5),
    ("200 trivial cells", NBCLIENT, 0.8),
    *((f"{count:,} cells, {kind}", NBCLIENT, 0.65) for count in LONG for kind in KINDS),
    (f"{MANY} small notebooks", "nbmake -n 2", 0.33),
    (f"{MANY} small notebooks", "papermill, a loop", 0.25),
    *((f"200 MB of output, {name}", NBCLIENT, 1.0) for name in VOLUMES),
    *((f"200 MB of output, {name}, memory", NBCLIENT, 0.5) for name in VOLUMES),
    *((f"from death ({name}) to the verdict", NBCLIENT, 0.05) for name in DEATHS),
    ("in the cell: 200 000 prints", NBCLIENT, 1.1),
)
"""What the table in docs/performance.md shows: what is measured, beside whom, and the ratio that is aimed at."""
