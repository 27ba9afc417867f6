"""Measures safe-exec beside its peers: ``python -m benchmarks.bench [--quick] [--json FILE]``.

What is measured, and how, is told in ``benchmarks/README.md``. Peers take turns within every round, so that a machine
that is slower for a while is slower for all of them; figures are medians, with the smallest and the largest beside.
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nbformat

BIN = Path(sys.executable).parent
OURS, PEER, PLAIN = "safe-exec run", "jupyter execute", "nbclient"
PACKAGES = ("safe-exec", "nbclient", "jupyter_client", "ipykernel", "papermill", "nbmake")
POLL_SECONDS = 0.0005
MIB = 2**20
WATCHED_LIMIT = 500 * MIB
PATIENCE_SECONDS = 120

_NBCLIENT = """
import sys, nbformat
from nbclient import NotebookClient
node = nbformat.read(sys.argv[1], as_version=4)
NotebookClient(node, timeout=600, kernel_name="python3").execute()
nbformat.write(node, sys.argv[2])
"""

LAST_WORD = "import os, time\nwith open('moment', 'w') as file:\n    file.write(str(time.monotonic_ns()))\n"
DEATHS = {
    "SIGKILL": LAST_WORD + "os.kill(os.getpid(), 9)",
    "segfault": "import ctypes\n" + LAST_WORD + "ctypes.string_at(0)",
    "os._exit": LAST_WORD + "os._exit(1)",
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
    "loop at top level, 5 million turns": LOOP,
    "calls of a function, 1.5 million turns": FUNCTION,
    "200 000 prints": PRINTS,
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
class Tool:
    """A way to execute a notebook: its name and its command for (notebook, output)."""

    name: str
    command: Callable[[Path, Path], list[str]]


@dataclass(frozen=True, kw_only=True)
class Ended:
    """One process that was run to its end. ``seconds`` are of wall time, ``largest`` the ru_maxrss of its tree in bytes.

    ``exited`` and ``written`` are the moments (``time.monotonic``) at which it was over and at which its verdict stood.
    """

    code: int
    seconds: float
    exited: float
    written: float | None
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
        return cls(median=statistics.median(values), least=min(values), most=max(values), runs=len(values))


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table. ``ratio`` is to the first row of the same ``what``."""

    what: str
    tool: str
    unit: str
    spread: Spread
    ratio: float | None = None


# --- running ----------------------------------------------------------------------------------------------------


def tools() -> list[Tool]:
    """safe-exec, ``jupyter execute``, and those of the optional peers that are installed."""
    found = [
        Tool(name=OURS, command=lambda nb, out: [str(BIN / "safe-exec"), "run", "-q", str(nb), "-o", str(out)]),
        Tool(name=PEER, command=lambda nb, out: [str(BIN / "jupyter-execute"), str(nb), f"--output={out}"]),
    ]
    if find_spec("papermill"):
        quiet = ["--no-progress-bar", "--log-level", "ERROR"]
        found.append(Tool(name="papermill", command=lambda nb, out: [str(BIN / "papermill"), *quiet, str(nb), str(out)]))
    if find_spec("nbmake"):
        flags = ["-q", "-p", "no:cacheprovider", "--nbmake"]
        found.append(Tool(name="nbmake", command=lambda nb, out: [sys.executable, "-m", "pytest", *flags, str(nb)]))  # noqa: ARG005
    return found


def environment() -> dict[str, str]:
    """Ours without what keeps byte code from being stored: all start with warm caches."""
    dropped = ("PYTHONDONTWRITEBYTECODE", "PYTEST_CURRENT_TEST")
    return {name: value for name, value in os.environ.items() if name not in dropped}


def execute(argv: Sequence[str], cwd: Path, verdict: Path | None = None) -> Ended:
    """Run a command to its end and look twice a millisecond for that and for its verdict, which appears whole."""
    begun = time.monotonic()
    process = subprocess.Popen(
        argv, cwd=cwd, env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    written: float | None = None
    while True:
        if written is None and verdict is not None and verdict.exists():
            written = time.monotonic()
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        if time.monotonic() - begun > PATIENCE_SECONDS:
            process.kill()
        time.sleep(POLL_SECONDS)
    exited = time.monotonic()
    process.returncode = os.waitstatus_to_exitcode(status)
    return Ended(code=process.returncode, seconds=exited - begun, exited=exited, written=written, largest=usage.ru_maxrss * 1024)


def notebook(folder: Path, *sources: str) -> Path:
    """A notebook in a folder of its own."""
    folder.mkdir(parents=True)
    cells = [nbformat.v4.new_code_cell(source, id=f"cell-{n}") for n, source in enumerate(sources)]
    kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path = folder / "notebook.ipynb"
    path.write_text(nbformat.writes(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernelspec})))
    return path


def demand(ended: Ended, code: int | None, what: str) -> None:
    """A run that did not do what is measured would be measured wrongly."""
    if code is not None and ended.code != code:
        raise SystemExit(f"{what}: exit code {ended.code}, expected {code}")


def warm_up(folder: Path) -> None:
    """Store byte code of all that is used, and have every file in the page cache."""
    ours = str(Path(__file__).parents[1] / "safe_exec")
    for directory in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), ours}:
        compileall.compile_dir(directory, quiet=2, workers=0)
    path = notebook(folder / "warm", "print(1)")
    for tool in tools():
        execute(tool.command(path, path.with_suffix(".o.ipynb")), path.parent)


def rows(what: str, unit: str, times: Mapping[str, Sequence[float]]) -> list[Row]:
    """A row for each tool; the ratio is its median over that of the first."""
    first = statistics.median(next(iter(times.values())))
    return [
        Row(what=what, tool=tool, unit=unit, spread=Spread.of(values), ratio=statistics.median(values) / first)
        for tool, values in times.items()
    ]


# --- what is measured -------------------------------------------------------------------------------------------


def whole_process(folder: Path, *, cells: int, rounds: int) -> list[Row]:
    """From the start of the command to its end."""
    path = notebook(folder, *(f"x{n} = {n}\nprint(x{n})" for n in range(cells)))
    times: dict[str, list[float]] = {tool.name: [] for tool in tools()}
    for _ in range(rounds):
        for tool in tools():
            ended = execute(tool.command(path, folder / "out.ipynb"), folder)
            demand(ended, 0, tool.name)
            times[tool.name].append(ended.seconds)
    return rows(f"whole process, {cells} trivial cells", "s", times)


def death(folder: Path, *, rounds: int) -> list[Row]:
    """From the kernel's last word to the end of the command, and of ours to the verdict."""
    result = []
    for name, source in DEATHS.items():
        path = notebook(folder / name, "print('before')", source, "print('after')")
        times: dict[str, list[float]] = {f"{OURS}, verdict": [], f"{OURS}, exit": [], f"{PEER}, exit": []}
        for _ in range(rounds):
            for tool in tools()[:2]:
                ended, moment = _die(tool, path)
                times[f"{tool.name}, exit"].append((ended.exited - moment) * 1000)
                if ended.written is not None:
                    times[f"{tool.name}, verdict"].append((ended.written - moment) * 1000)
        result += rows(f"from death by {name}", "ms", times)
    return result


def _die(tool: Tool, path: Path) -> tuple[Ended, float]:
    verdict, moment = path.with_name("notebook.verdict.json"), path.with_name("moment")
    for old in (verdict, moment):
        old.unlink(missing_ok=True)
    ours = tool.name == OURS
    ended = execute(tool.command(path, path.with_name("out.ipynb")), path.parent, verdict if ours else None)
    demand(ended, 3 if ours else None, tool.name)
    return ended, int(moment.read_text()) / 1e9


def overshoot(folder: Path, *, rounds: int) -> list[Row]:
    """How far a kernel gets past 500 MiB where only the watchdog holds the limit."""
    result = []
    for name, source in GROWTH.items():
        path = notebook(folder / name.replace(" ", "-").replace("/", "-"), source)
        command = [str(BIN / "safe-exec"), "run", "-q", "--mechanisms", "watchdog", "--memory", str(WATCHED_LIMIT), str(path)]
        largest, seen = [], []
        for _ in range(rounds):
            ended = execute(command, path.parent)
            demand(ended, 3, f"watchdog, {name}")
            document = json.loads(path.with_name("notebook.verdict.json").read_text())
            largest.append((ended.largest - WATCHED_LIMIT) / MIB)
            seen.append(((document["usage"].get("memory_peak") or 0) - WATCHED_LIMIT) / MIB)
        result += rows(f"watchdog, past the limit, {name}", "MiB", {"ru_maxrss": largest, "verdict": seen})
    return [Row(what=row.what, tool=row.tool, unit=row.unit, spread=row.spread) for row in result]


def recording(folder: Path, *, rounds: int) -> list[Row]:
    """What the record inside the kernel costs: the time that the work itself takes, told by the cell."""
    result = []
    for name, source in RECORDING.items():
        path = notebook(folder / name.split(",")[0].replace(" ", "-"), source)
        commands = {
            OURS: [str(BIN / "safe-exec"), "run", "-q", str(path)],
            PLAIN: [sys.executable, "-c", _NBCLIENT, str(path), str(path.with_name("out.ipynb"))],
        }
        times: dict[str, list[float]] = {tool: [] for tool in commands}
        walls: dict[str, list[float]] = {tool: [] for tool in commands}
        for _ in range(rounds):
            for tool, command in commands.items():
                ended = execute(command, path.parent)
                demand(ended, 0, tool)
                times[tool].append(float(path.with_name("took").read_text()))
                walls[tool].append(ended.seconds)
        result += rows(f"{name}, in the cell", "s", times) + rows(f"{name}, whole process", "s", walls)
    return result


# --- what is shown ----------------------------------------------------------------------------------------------


def table(found: Sequence[Row]) -> str:
    """The rows as text, those of one measurement together."""
    lines = [f"{'':<26}{'median':>10}{'least':>10}{'most':>10}  {'runs':>4}{'ratio':>8}"]
    what = ""
    for row in found:
        if row.what != what:
            what = row.what
            lines.append(f"{what} [{row.unit}]")
        figures = "".join(f"{value:>10.3f}" if row.unit == "s" else f"{value:>10.1f}" for value in _figures(row.spread))
        ratio = "" if row.ratio is None else f"{row.ratio:>8.2f}"
        lines.append(f"  {row.tool:<24}{figures}  {row.spread.runs:>4}{ratio}")
    return "\n".join(lines)


def _figures(spread: Spread) -> tuple[float, float, float]:
    return spread.median, spread.least, spread.most


def document(found: Sequence[Row], *, quick: bool, seconds: float) -> dict[str, Any]:
    """The same as JSON, with what it was measured on."""
    return {
        "schema": "safe-exec/benchmark/1",
        "quick": quick,
        "seconds": seconds,
        "machine": {"processors": os.cpu_count(), "platform": platform.platform(), "load": os.getloadavg()},
        "python": platform.python_version(),
        "packages": {name: found_version for name in PACKAGES if (found_version := _version(name))},
        "rows": [{"what": r.what, "tool": r.tool, "unit": r.unit, "ratio": r.ratio, **vars(r.spread)} for r in found],
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def measure(folder: Path, *, quick: bool) -> list[Row]:
    """All of it; what takes long says so while it does."""
    parts: list[tuple[str, Callable[[], list[Row]]]] = [
        ("small", lambda: whole_process(folder / "small", cells=5, rounds=2 if quick else 11)),
        ("200 cells", lambda: whole_process(folder / "large", cells=200, rounds=1 if quick else 7)),
        ("death", lambda: death(folder / "death", rounds=1 if quick else 7)),
        ("watchdog", lambda: overshoot(folder / "watchdog", rounds=1 if quick else 7)),
        ("recording", lambda: recording(folder / "recording", rounds=1 if quick else 5)),
    ]
    warm_up(folder)
    found: list[Row] = []
    for name, part in parts:
        print(f"measuring: {name}", file=sys.stderr, flush=True)
        found += part()
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one or two rounds of each: does it run at all?")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    options = parser.parse_args(arguments)
    begun, folder = time.monotonic(), Path(tempfile.mkdtemp(prefix="bench-"))
    try:
        found = measure(folder, quick=options.quick)
    finally:
        shutil.rmtree(folder)
    print(table(found))
    if options.json:
        figures = document(found, quick=options.quick, seconds=time.monotonic() - begun)
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
