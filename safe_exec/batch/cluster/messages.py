"""The messages between the runner, the tasks on dask workers, and the processes of notebooks.

All of them are pickled: by dask between machines, by safe-exec between a worker and its processes.
Both ends run the same version of safe-exec (``WorkerFacts.version``).
"""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

from safe_exec.batch.journal import JournalRecord
from safe_exec.model import events
from safe_exec.workflows.job import Job

# The events that the progress display shows; a worker sends no others.
ShownEvent = (
    events.RunStarted
    | events.KernelReady
    | events.CellStarted
    | events.UsageSampled
    | events.Killed
    | events.SearchStarted
    | events.SearchTrialStarted
    | events.SearchTrialFinished
    | events.SearchFinished
)


class SourceFiles(Struct, frozen=True, kw_only=True):
    """The notebook's file on the runner, and the archive of its surroundings.

    ``sha256`` and ``modified`` (nanoseconds since 1970) identify the notebook's file. ``archive`` is
    the digest of the packed folder ``base``, ``None`` if it was not packed yet. ``is_repository``
    is true if ``base`` is the top of a git repository.
    """

    path: str
    sha256: str
    modified: int
    base: str
    archive: str | None = None
    is_repository: bool = False


class NotebookRequest(Struct, frozen=True, kw_only=True):
    """A notebook to run on a worker.

    ``flight`` identifies the request, ``batch`` the batch and its topic of events. ``job`` has the
    resolved limits and neither capabilities nor open directories. ``variables`` are set on top of
    the worker's environment. ``cwd`` and ``out`` are the runner's working directory and output
    directory; ``documents`` is the stem of the documents below ``out``. ``last_attempt`` is true if
    a failure will not be retried.
    """

    flight: str
    batch: str
    job: Job
    variables: Mapping[str, str]
    cwd: str
    out: str
    documents: str
    path: str
    source: SourceFiles
    key: str
    attempt: int = 1
    last_attempt: bool = True


class Grant(Struct, frozen=True, kw_only=True):
    """The runner's answer to a task that asks to start.

    ``losses`` has the machine of each worker that was lost while running this notebook.
    ``neighbours`` is the number of notebooks that may run on this machine at a time.
    """

    allowed: bool
    losses: tuple[str, ...] = ()
    neighbours: int = 1


class FinishedNotebook(Struct, frozen=True, kw_only=True):
    """A notebook that ran to its end, with its documents by their name in the record.

    ``transient`` is true if another attempt may succeed.
    """

    record: JournalRecord
    documents: Mapping[str, bytes]
    transient: bool = False


class RefusedNotebook(Struct, frozen=True, kw_only=True):
    """A notebook without a verdict.

    Either it is invalid (``usage``), or safe-exec failed on the worker.
    """

    message: str
    usage: bool


class MissingFiles(Struct, frozen=True, kw_only=True):
    """The worker at ``address`` has neither the notebook's file nor its archive."""

    address: str


class NotStarted(Struct, frozen=True, kw_only=True):
    """The runner did not let the notebook start, or it was cancelled."""


Reply = FinishedNotebook | RefusedNotebook | MissingFiles | NotStarted


class WorkerFacts(Struct, frozen=True, kw_only=True):
    """One dask worker.

    ``machine`` is its host name. ``memory`` (bytes) and ``cpus`` are the totals that its notebooks
    may request, and ``threads`` is the number of notebooks at a time. ``enforced`` are the limits
    and walls that Linux enforces there. ``version`` is that of safe-exec.
    """

    address: str
    name: str
    machine: str
    threads: int
    memory: int
    cpus: float
    enforced: frozenset[str]
    version: str
    python: str
