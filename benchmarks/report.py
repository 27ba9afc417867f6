"""What was measured as a table on the terminal, as JSON, as the table in docs and as a picture."""

from __future__ import annotations

import html
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.measure import Row
from benchmarks.peers import PACKAGES
from benchmarks.sections import SHOWN

BEGIN, END = "<!-- bench -->", "<!-- /bench -->"
DIGITS = {"s": 3, "ms": 1, "MiB": 1, "trials": 1}

# --- the terminal -----------------------------------------------------------------------------------------------


def table(found: Sequence[Row]) -> str:
    """The rows as text, those of one measurement together."""
    lines = [
        f"{'':<32}{'median':>10}{'least':>10}{'most':>10}  {'runs':>4}   {'ours / this, paired':<24}"
    ]
    what = ""
    for row in found:
        if row.what != what:
            what = row.what
            lines.append(f"{what} [{row.unit}]")
        figures = "".join(
            f"{value:>10.{DIGITS[row.unit]}f}"
            for value in (row.spread.median, row.spread.least, row.spread.most)
        )
        ratio = (
            ""
            if row.ratio is None
            else f"{row.ratio.median:.2f}  ({row.ratio.least:.2f} to {row.ratio.most:.2f})"
        )
        lines.append(f"  {row.tool:<30}{figures}  {row.spread.runs:>4}   {ratio}".rstrip())
    return "\n".join(lines)


# --- JSON -------------------------------------------------------------------------------------------------------


def document(found: Sequence[Row], *, quick: bool, seconds: float) -> dict[str, Any]:
    """The same as JSON, with what it was measured on."""
    return {
        "schema": "safe-exec/benchmark/2",
        "quick": quick,
        "seconds": round(seconds, 1),
        "machine": {
            "processors": os.cpu_count(),
            "system": platform.release(),
            "load": os.getloadavg(),
        },
        "python": platform.python_version(),
        "packages": {name: found_version for name in PACKAGES if (found_version := _version(name))},
        "rows": [asdict(row) for row in found],
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


# --- docs/performance.md -------------------------------------------------------------------------------------------------


def shown(found: Sequence[Row]) -> list[tuple[Row, Row, float]]:
    """What the table shows: our row, the peer's, and the ratio that is aimed at."""
    by_name = {(row.what, row.tool): row for row in found}
    ours = {row.what: row for row in reversed(found)}  # the first of each
    return [
        (ours[what], by_name[what, peer], aim)
        for what, peer, aim in SHOWN
        if (what, peer) in by_name
    ]


def markdown(found: Sequence[Row]) -> str:
    """The table of docs/performance.md."""
    lines = [
        f"Medians of one run of `make bench` on {os.cpu_count()} processors, all limits on and isolation as in the profile `ci`. A ratio is the median",
        "of the ratios of runs that followed each other, with the least and the most: below 1 is less than the other takes.",
        "",
        "| | safe-exec | beside | | ratio | aim |",
        "|---|---|---|---|---|---|",
    ]
    for mine, theirs, aim in shown(found):
        assert theirs.ratio is not None
        ratio = f"**{_short(theirs.ratio.median)}** ({_short(theirs.ratio.least)} to {_short(theirs.ratio.most)})"
        lines.append(
            f"| {mine.what} | {_figure(mine)} | {theirs.tool} | {_figure(theirs)} | {ratio} | {_short(aim)} |"
        )
    peaks = [row.spread.most for row in found if "cut at the cap" in row.what]
    if peaks:
        lines += [
            "",
            f"200 MB of output cut at the cap of `ci` (4 MiB a cell) take at most {max(peaks):.0f} MiB of memory.",
        ]
    trials = [row for row in found if row.what.startswith("culprit search")]
    if trials:
        said = "; ".join(
            f"{row.what.removeprefix('culprit search, ')}, {row.tool}: {_figure(row)}"
            for row in trials
        )
        lines += [
            "",
            f"The culprit search, medians of the notebooks of [benchmarks](../benchmarks/README.md): {said}.",
        ]
    lines += ["", "![The same as bars](performance.svg)"]
    return "\n".join(lines)


def _figure(row: Row) -> str:
    value, unit = row.spread.median, row.unit
    if unit == "trials":
        return f"{value:g}"
    if unit == "s":
        return f"{value:.2f} s" if value < 10 else f"{value:.1f} s"
    return f"{value:.0f} {unit}"


def _short(ratio: float) -> str:
    return f"{ratio:.3f}" if ratio < 0.095 else f"{ratio:.2f}"


def put_between(path: Path, words: str) -> None:
    """Put words between the marks of a file."""
    before, rest = path.read_text().split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    path.write_text(f"{before}{BEGIN}\n{words}\n{END}{after}")


# --- the picture ------------------------------------------------------------------------------------------------

WIDTH, LEFT, FULL, STEP, TOP = 860, 330, 330, 30, 64


def picture(found: Sequence[Row]) -> str:
    """A bar for each line of the table: what ours takes of what the other takes, which is the whole width; a mark at the aim."""
    entries = shown(found)
    height = TOP + STEP * len(entries) + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        '<text x="12" y="24" font-size="16" font-weight="bold" fill="#1f2328">What safe-exec takes of what others take</text>',
        '<text x="12" y="44" fill="#59636e">dark: safe-exec, in limits and walls; light: the other, without; line: least to most; mark: aim</text>',
    ]
    for number, (mine, theirs, aim) in enumerate(entries):
        assert theirs.ratio is not None
        parts += _bar(TOP + STEP * number, mine, theirs, aim)
    return "\n".join([*parts, "</svg>\n"])


def _bar(y: int, mine: Row, theirs: Row, aim: float) -> list[str]:
    assert theirs.ratio is not None
    ratio = theirs.ratio
    middle = y + 11
    said = f"{_short(ratio.median)}   {_figure(mine)} / {_figure(theirs)}, {theirs.tool}"
    return [
        f'<text x="{LEFT - 8}" y="{middle + 4}" text-anchor="end" fill="#1f2328">{html.escape(mine.what)}</text>',
        f'<rect x="{LEFT}" y="{y}" width="{FULL}" height="22" fill="#d8dee4"/>',
        f'<rect x="{LEFT}" y="{y}" width="{_x(ratio.median) - LEFT:.1f}" height="22" fill="#0a3069"/>',
        f'<path d="M{_x(ratio.least):.1f} {middle}H{_x(ratio.most):.1f}" stroke="#bc4c00" stroke-width="2"/>',
        f'<path d="M{_x(aim):.1f} {y - 2}v26" stroke="#1a7f37" stroke-width="2"/>',
        f'<text x="{LEFT + FULL * 1.1 + 8:.0f}" y="{middle + 4}" fill="#1f2328" font-size="11">{html.escape(said)}</text>',
    ]


def _x(ratio: float) -> float:
    return LEFT + FULL * min(ratio, 1.1)
