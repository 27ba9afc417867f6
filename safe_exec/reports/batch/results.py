"""The result of a batch, as its reports read it.

Verdicts stay on disk: those of five hundred notebooks, each with its timeline, would fill the
memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from safe_exec.errors import UsageError
from safe_exec.files import read_regular

MOST_BYTES = 64 << 20
"""The most bytes of a verdict that are read; no real verdict is as large."""
REFUSED = "refused"
"""Status: the notebook or its limits cannot be read. There is no verdict; the exit code is 2."""
UNCHANGED = "unchanged"
"""Status: skipped, because it passed before with the same content, limits, kernel and inputs."""
NOT_RUN = "not_run"
"""Status: the batch ended before the notebook's turn."""


class NotebookResult(Struct, frozen=True, kw_only=True):
    """The result of one notebook.

    ``path`` is the displayed path: relative to the root of the batch, with ``/``. ``status`` is the
    verdict's, or ``refused``, ``unchanged``, ``not_run``. ``seconds`` is the wall time of the last
    attempt, ``None`` if nothing ran. ``attempts`` is 0 if nothing ran and 1 without a retry.
    ``flaky`` is true if it passed after a failed attempt. ``error`` is one line about a refused
    notebook. ``verdict``, ``notebook`` (annotated) and ``repro`` are the written files, or
    ``None``; ``source`` is the notebook itself. ``losses`` has the machine of each cluster worker
    that was lost while running it.
    """

    path: str
    status: str
    exit_code: int | None
    seconds: float | None
    attempts: int
    flaky: bool
    error: str | None
    verdict: Path | None
    notebook: Path | None
    repro: Path | None
    source: Path
    losses: tuple[str, ...] = ()

    def document(self) -> Mapping[str, Any] | None:
        """Read the verdict's document; ``None`` if there is none or it is unreadable."""
        # safe-exec writes no symlinks, so somebody else put it there.
        if self.verdict is None or self.verdict.is_symlink():
            return None
        try:
            # Somebody may have put anything there since: what can be written where verdicts lie are notebooks, too.
            # Notebooks can write to this folder too, so the file may have any type and size by now.
            # read_regular never follows a FIFO or a device, and stops at the size limit.
            data = read_regular(self.verdict, most=MOST_BYTES, error=UsageError)
            return msgspec.json.decode(data, type=dict[str, Any])
        # A report without a verdict is better than no report.
        except (UsageError, ValueError, RecursionError):  # a report says less, and is written
            return None


class BatchResult(Struct, frozen=True, kw_only=True):
    """The result of a batch; ``results`` are in the order of their paths.

    ``root`` is the directory that paths are relative to, ``out`` the output directory. ``seconds``
    is the wall time of this call. ``limits`` is the value of ``--limits``. ``shard`` is (K, N), K
    from 1. ``jobs`` is the number of notebooks at a time. ``cancelled`` is true if the user stopped
    the batch, ``resumed`` if it continued an earlier one.
    """

    results: tuple[NotebookResult, ...]
    root: Path
    out: Path
    started: datetime
    seconds: float
    exit_code: int
    command: tuple[str, ...]
    safe_exec_version: str
    limits: str | None = None
    shard: tuple[int, int] | None = None
    jobs: int = 1
    cancelled: bool = False
    resumed: bool = False

    def counts(self) -> dict[str, int]:
        """Count the notebooks of each status, the most frequent first."""
        return dict(Counter(entry.status for entry in self.results).most_common())
