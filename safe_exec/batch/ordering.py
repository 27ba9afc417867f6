"""Which notebook comes first, and which shard it belongs to. Pure but for reading the summaries that timings come from.

The longest first: a long one that starts last is what everybody waits for. Shards are cut from timings that are the same everywhere
(``--timings``), never from what one machine remembers: each of them must come to the same cut by itself.
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
    """The order of starts. One whose time is not known may be the longest and comes before all others, a large file before a small."""
    return sorted(
        paths,
        key=lambda path: (path in seconds, -seconds.get(path, 0.0), -sizes.get(path, 0), path),
    )


def parse_shard(text: str) -> tuple[int, int]:
    """``--shard K/N``, K from 1. Raises UsageError."""
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UsageError(
            f"--shard: expected K/N such as 1/4, with K from 1 to N, found {text[:40]!r}"
        )
    return int(match[1]), int(match[2])


def cut(paths: Sequence[str], seconds: Mapping[str, float], shards: int) -> list[list[str]]:
    """The notebooks of each shard: the longest to the shard that has the least so far (Graham 1969, LPT).

    A notebook that ``seconds`` does not know counts as long as the median of those it knows.
    """
    durations = [seconds[path] for path in paths if path in seconds]
    usual = median(durations) if durations else 1.0
    loads = [0.0] * shards
    shard_paths: list[list[str]] = [[] for _ in range(shards)]
    for path in sorted(paths, key=lambda path: (-seconds.get(path, usual), path)):
        least = min(
            range(shards), key=lambda number: (loads[number], len(shard_paths[number]), number)
        )
        loads[least] += seconds.get(path, usual)
        shard_paths[least].append(path)
    return shard_paths


def read_timings(files: Sequence[Path]) -> dict[str, float]:
    """Seconds by path, from the ``summary.json`` of earlier batches; the last file that knows a notebook counts. Raises UsageError."""
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
    if schema != SUMMARY_SCHEMA:
        raise wrong
    return timings
