"""The notebooks of a batch as reports see them: where each one's documents lie, and what came of it in a word.

Imports files, errors, records. Verdicts stay on disk: those of five hundred notebooks, each with its timeline, do not belong into memory at once.
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
"""No verdict is as long."""
REFUSED = "refused"
"""The input cannot be read, or its limits cannot be: no verdict; exit code 2."""
UNCHANGED = "unchanged"
"""Not run: it passed before with the same content, limits, kernel and inputs."""
NOT_RUN = "not_run"
"""Not run: the batch ended before its turn came."""


class NotebookResult(Struct, frozen=True, kw_only=True):
    """One notebook of a batch.

    ``path`` is the one shown: relative to the batch's root, with ``/``. ``status`` is the verdict's, or ``refused``, ``unchanged``,
    ``not_run``. ``seconds`` is the wall time of the last attempt; ``None`` where nothing ran. ``attempts`` counts its runs: 0 where nothing
    ran, 1 without a retry. ``flaky``: it passed after an attempt that did not. ``error`` is one line, where it was refused. ``verdict``,
    ``notebook`` (annotated) and ``repro`` are files that were written, ``None`` where none was; ``source`` is the notebook itself.
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

    def document(self) -> Mapping[str, Any] | None:
        """The verdict, read from its file now and not kept; ``None`` where there is none that can be read."""
        if self.verdict is None or self.verdict.is_symlink():  # we write none
            return None
        try:
            # Somebody may have put anything there since: what can be written where verdicts lie are notebooks, too.
            data = read_regular(self.verdict, most=MOST_BYTES, error=UsageError)
            return msgspec.json.decode(data, type=dict[str, Any])
        except (UsageError, ValueError, RecursionError):  # a report says less, and is written
            return None


class BatchResult(Struct, frozen=True, kw_only=True):
    """A batch that is over. ``entries`` are in the order of their paths.

    ``root`` is the directory that paths are relative to, ``out`` the one that everything was written to. ``seconds`` is the wall time
    of this call. ``limits`` is the profile or file that ``--limits`` named. ``shard`` is (K, N), K from 1. ``jobs`` is how many
    notebooks could run at a time. ``cancelled``: somebody stopped it; ``resumed``: it went on from the journal of an earlier call.
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
        """How many notebooks there are of each status, the most frequent first."""
        return dict(Counter(entry.status for entry in self.results).most_common())
