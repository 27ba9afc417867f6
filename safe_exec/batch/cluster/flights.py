"""The two states of a notebook on a cluster: waiting for a worker, and submitted to dask."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct

from safe_exec.batch.cluster.messages import Reply, SourceFiles
from safe_exec.batch.cluster.placement import NotebookNeeds
from safe_exec.batch.worker import NotebookTask
from safe_exec.model.events import EventSink

if TYPE_CHECKING:
    from distributed import Future


class WaitingNotebook(Struct, frozen=True, kw_only=True):
    """A notebook that waits for a worker.

    ``cwd`` is where it runs, ``key`` the fingerprint of the run, ``inputs`` the hashes of the files
    that it declares. ``losses`` has the machine of each worker that was lost while running it.
    """

    task: NotebookTask
    cwd: Path
    kernel: str
    needs: NotebookNeeds
    source: SourceFiles
    key: str
    inputs: Mapping[str, str | None]
    attempt: int = 1
    losses: tuple[str, ...] = ()


class Flight:
    """A notebook that was submitted to dask."""

    def __init__(self, waiting: WaitingNotebook) -> None:
        self.waiting = waiting
        self.name = f"safe-exec-{uuid.uuid4().hex}"
        self.losses = list(waiting.losses)
        self.future: Future[Reply] | None = None
        # The worker that runs the notebook.
        self.address: str | None = None
        self.machine: str | None = None
        self.sink: EventSink | None = None
        # The notebook was taken back before it started: dask's task is cancelled, and the notebook
        # waits again.
        self.withdrawn = False
        # The reply has arrived: whatever dask does with the task, it must not start again.
        self.settled = False
