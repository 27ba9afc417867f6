"""Measures safe-exec beside its peers: ``python -m benchmarks.bench [--quick] [--only NAME,...] [--json FILE] [--readme]``.

What is measured, and how, is told in ``benchmarks/README.md``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

from benchmarks import report, search
from benchmarks.measure import Row, rows
from benchmarks.peers import OURS, demand_peers, warm_up
from benchmarks.sections import SECTIONS

ROOT = Path(__file__).parents[1]
SEARCH = "search"
SEARCH_MINUTES = 2.5


def measure(folder: Path, names: Sequence[str], *, quick: bool) -> list[Row]:
    """All that is named; what takes long says so while it does."""
    found: list[Row] = []
    for section in SECTIONS:
        if section.name in names:
            print(f"measuring: {section.name}", file=sys.stderr, flush=True)
            found += section.measure(
                folder / section.name, section.quick if quick else section.rounds
            )
    return found


def searches(folder: Path, *, quick: bool) -> tuple[list[Row], str]:
    """The culprit search beside ddmin: rows, and its own table."""
    print(f"measuring: {SEARCH}", file=sys.stderr, flush=True)
    # A cache of its own: nothing that an earlier run has tried is known.
    with patch.dict("os.environ", XDG_CACHE_HOME=str(folder / "cache")):
        found = search.measure_all(
            folder / SEARCH,
            search.TABLE[: 1 if quick else None],
            30 if quick else 60 * SEARCH_MINUTES,
        )
    ended = [m for m in found if m.plain.done]
    trials = {
        OURS: [float(m.ours.trials) for m in ended],
        "ddmin": [float(m.plain.trials) for m in ended],
    }
    result = rows("culprit search, trials", "trials", trials) if ended else []
    return result + rows(
        "culprit search, time", "s", {OURS: [m.ours.seconds for m in found]}
    ), search.table_of(found)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, write what is asked for."""
    known = [section.name for section in SECTIONS] + [SEARCH]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="a round or two of each: does it run at all?"
    )
    parser.add_argument("--only", metavar="NAME,...", help=f"only these: {', '.join(known)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    parser.add_argument(
        "--table",
        action="store_true",
        help="write the table and the picture in docs",
    )
    options = parser.parse_args(arguments)
    names = options.only.split(",") if options.only else known
    if unknown := [name for name in names if name not in known]:
        parser.error(f"--only: {unknown[0]}: choose from {', '.join(known)}")
    if options.table and (options.quick or options.only):
        parser.error("--table: the table shows whole runs only")
    demand_peers()
    begun, folder, details = time.monotonic(), Path(tempfile.mkdtemp(prefix="bench-")), ""
    try:
        warm_up(folder)
        found = measure(folder, names, quick=options.quick)
        if SEARCH in names:
            more, details = searches(folder, quick=options.quick)
            found += more
    finally:
        shutil.rmtree(folder)
    seconds = time.monotonic() - begun
    print(report.table(found) + (f"\n\n{details}" if details else "") + f"\n\n{seconds:.0f} s")
    if options.json:
        figures = report.document(found, quick=options.quick, seconds=seconds)
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    if options.table:
        report.put_between(ROOT / "docs" / "performance.md", report.markdown(found))
        (ROOT / "docs" / "performance.svg").write_text(report.picture(found))


if __name__ == "__main__":
    main()
