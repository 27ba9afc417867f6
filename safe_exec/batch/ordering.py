"""Order the notebooks of a batch and divide them into shards.

The longest notebooks start first, because a long one that starts last would prolong the batch.
Shards are divided by timings that all machines share (``--timings``), never by the history of one
machine, because every shard has to compute the same division by itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from safe_exec.errors import UsageError
from safe_exec.files import one_line, read_regular
from safe_exec.reports.batch.summary_json import SUMMARY_SCHEMA

_MOST_BYTES = 256 << 20


def longest_first(
    paths: Sequence[str], seconds: Mapping[str, float], sizes: Mapping[str, int]
) -> list[str]:
    """Return the paths in the order of their starts.

    A notebook without a known duration may be the longest, so it starts before all others.
    """
    # Among those of unknown duration the larger file goes first: it is the only hint there is.
    return sorted(
        paths,
        key=lambda path: (path in seconds, -seconds.get(path, 0.0), -sizes.get(path, 0), path),
    )


def parse_shard(text: str) -> tuple[int, int]:
    """Parse ``--shard K/N``, with K from 1. Raises UsageError."""
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UsageError(
            f"--shard: expected K/N such as 1/4, with K from 1 to N, found {text[:40]!r}"
        )
    return int(match[1]), int(match[2])


def cut(paths: Sequence[str], seconds: Mapping[str, float], shards: int) -> list[list[str]]:
    """Return the notebooks of each shard, by the LPT rule (Graham 1969).

    Each notebook, the longest first, goes to the shard with the smallest total so far. A notebook
    that is missing in ``seconds`` counts as the median of the others.
    """
    # The median, not the mean: one very long notebook must not make every unknown one look long.
    durations = [seconds[path] for path in paths if path in seconds]
    usual = median(durations) if durations else 1.0
    loads = [0.0] * shards
    shard_paths: list[list[str]] = [[] for _ in range(shards)]
    for path in sorted(paths, key=lambda path: (-seconds.get(path, usual), path)):
        # Ties go to the shard with fewer notebooks, then to the lower number, so that every machine
        # computes the same shards.
        least = min(
            range(shards), key=lambda number: (loads[number], len(shard_paths[number]), number)
        )
        loads[least] += seconds.get(path, usual)
        shard_paths[least].append(path)
    return shard_paths


def read_timings(files: Sequence[Path]) -> dict[str, float]:
    """Read seconds by path from ``summary.json`` files; the last file wins. Raises UsageError."""
    timings: dict[str, float] = {}
    for file in files:
        timings |= _timings_of(file, read_regular(file, most=_MOST_BYTES, error=UsageError))
    return timings


def _timings_of(file: Path, data: bytes) -> dict[str, float]:
    wrong = UsageError(f"--timings {one_line(file)}: expected the summary.json of an earlier batch")
    try:
        document: Any = json.loads(data)
        rows = [(str(row["path"]), row["seconds"]) for row in document["notebooks"]]
        timings = {path: float(seconds) for path, seconds in rows if seconds is not None}
        schema = document["schema"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise wrong from None
    # Any other JSON with a list called "notebooks" would silently give wrong shards.
    if schema != SUMMARY_SCHEMA:
        raise wrong
    return timings
