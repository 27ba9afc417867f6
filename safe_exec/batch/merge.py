"""Combine the output directories of shards into one, as if a single batch had written it.

Each shard contributes its summary, or, if it was killed before it wrote one, the finished notebooks
of its journal. Documents are copied under the names that a batch without shards would use, and the
combined journal makes ``--resume`` work.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath

import msgspec
from msgspec import Struct, field
from msgspec.structs import replace

from safe_exec._version import __version__
from safe_exec.batch import journal as journals
from safe_exec.batch.journal import Journal, JournalRecord, PreviousBatch
from safe_exec.batch.outcome import exit_code, worst
from safe_exec.batch.selection import document_stems
from safe_exec.errors import UsageError
from safe_exec.files import OutputDirectory, OutputRoot, one_line, read_regular
from safe_exec.model.verdict import Status
from safe_exec.reports.batch.results import NOT_RUN, BatchResult, NotebookResult
from safe_exec.reports.batch.summary_json import NotebookSummary, Summary
from safe_exec.reports.text.common import counted

SUMMARY = "summary.json"
_MOST_BYTES = 256 << 20
_PIECE = 1 << 20


class ShardOutput(Struct, frozen=True, kw_only=True):
    """The content of one output directory.

    ``results`` have absolute paths of documents. ``finished`` is false if the batch was killed
    before it wrote its summary. ``shard`` is (K, N). ``seconds`` is the wall time of the batch.
    """

    directory: Path
    results: tuple[NotebookResult, ...]
    records: Mapping[str, JournalRecord]
    root: Path
    finished: bool
    started: datetime
    seconds: float | None
    jobs: int | None
    limits: str | None
    shard: tuple[int, int] | None
    cancelled: bool = False


class MergedBatch(Struct, frozen=True, kw_only=True):
    """The combined batch. ``gaps`` are messages about shards that are missing or unfinished."""

    batch: BatchResult
    gaps: tuple[str, ...] = field(default=())


def merge(directories: Sequence[Path], out: Path, command: tuple[str, ...]) -> MergedBatch:
    """Combine shards into ``out``: copy the documents and write the journal, but no reports.

    The exit code is at least 7 if a shard is missing or unfinished. Raises UsageError if a
    directory holds no batch, if two of them ran the same notebook, or if ``out`` is one of them.
    """
    shards = [read_shard(directory) for directory in directories]
    for shard in shards:
        if os.path.realpath(shard.directory) == os.path.realpath(out):
            raise UsageError(
                f"{one_line(shard.directory)}: cannot be merged into itself; choose another --out"
            )
    results = _without_duplicates(shards)
    gaps = tuple(_gaps(shards))
    with OutputRoot(out) as tree, Journal(out, resume=False) as journal:
        # The root is the first shard's: every result also carries the path of its own notebook.
        root, cancelled = shards[0].root, any(shard.cancelled for shard in shards)
        journal.batch_started(
            version=__version__, command=command, root=str(root), notebooks=len(results)
        )
        stems = document_stems([result.path for _, result in results])
        merged = tuple(
            _copy(shard, result, stems[result.path], tree, journal) for shard, result in results
        )
        code = exit_code(merged, cancelled=cancelled)
        # Notebooks that no shard reports may have failed: a gap must not look like a success.
        code = worst((code, Status.INTERNAL_ERROR.exit_code)) if gaps else code
        if not gaps and not cancelled and all(result.status != NOT_RUN for result in merged):
            journal.batch_finished(exit_code=code)
    limits = {shard.limits for shard in shards}
    batch = BatchResult(
        results=merged,
        root=root,
        out=out,
        started=min(shard.started for shard in shards),
        # Shards run side by side, so the longest one determines the duration.
        seconds=max((shard.seconds for shard in shards if shard.seconds is not None), default=0.0),
        exit_code=code,
        command=command,
        safe_exec_version=__version__,
        limits=limits.pop() if len(limits) == 1 else None,
        jobs=max(1, sum(shard.jobs or 0 for shard in shards)),
        cancelled=cancelled,
    )
    return MergedBatch(batch=batch, gaps=gaps)


# --- reading ------------------------------------------------------------------------------------


def read_shard(directory: Path) -> ShardOutput:
    """Read the output directory of a batch. Raises UsageError if there is none."""
    past = journals.read(directory / journals.NAME)
    summary = _read_summary(directory)
    # A batch that runs again in the same directory replaces the summary only at its end.
    if summary is not None and not _is_older(summary, past):
        return _of_summary(directory, summary, past)
    if past.empty:
        raise UsageError(
            f"{one_line(directory)}: holds neither {SUMMARY} nor {journals.NAME}; "
            "name the --out directory of a batch"
        )
    return _of_journal(directory, past)


def _read_summary(directory: Path) -> Summary | None:
    path = directory / SUMMARY
    if not path.exists():
        return None
    data = read_regular(path, most=_MOST_BYTES, error=UsageError)
    try:
        return msgspec.json.decode(data, type=Summary)
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"{one_line(path)}: not a summary of this version of safe-exec: {one_line(error)}; "
            "run the shards with the version that merges them"
        ) from None


def _is_older(summary: Summary, past: PreviousBatch) -> bool:
    ended = _moment(summary).timestamp() + summary.seconds
    return past.started is not None and ended < past.started


def _moment(summary: Summary) -> datetime:
    return datetime.fromisoformat(summary.started)


def _of_summary(directory: Path, summary: Summary, past: PreviousBatch) -> ShardOutput:
    return ShardOutput(
        directory=directory,
        results=tuple(
            _result(row, directory, Path(summary.root) / row.path) for row in summary.notebooks
        ),
        records=past.finished,
        root=Path(summary.root),
        finished=True,
        started=_moment(summary),
        seconds=summary.seconds,
        jobs=summary.jobs,
        limits=summary.limits,
        shard=summary.shard,
        cancelled=summary.cancelled,
    )


def _of_journal(directory: Path, past: PreviousBatch) -> ShardOutput:
    root = Path(past.root)
    return ShardOutput(
        directory=directory,
        results=tuple(
            _result(record, directory, root / path) for path, record in past.finished.items()
        ),
        records=past.finished,
        root=root,
        finished=False,
        started=datetime.fromtimestamp(past.started or 0.0, UTC),
        seconds=None,
        jobs=None,
        limits=None,
        shard=past.shard,
    )


def _result(row: NotebookSummary | JournalRecord, directory: Path, source: Path) -> NotebookResult:
    return NotebookResult(
        path=row.path,
        status=row.status,
        exit_code=row.exit_code,
        seconds=row.seconds,
        attempts=row.attempts,
        flaky=row.flaky,
        error=row.error,
        source=source,
        verdict=_document(directory, row.verdict),
        notebook=_document(directory, row.notebook),
        repro=_document(directory, row.repro),
        losses=row.losses,
    )


_DOCUMENTS = {"verdict": ".verdict.json", "notebook": ".out.ipynb", "repro": ".repro.ipynb"}


def _document(directory: Path, name: str | None) -> Path | None:
    """Return the path of a document; ``None`` if it is missing or lies outside the directory."""
    if name is None:
        return None
    path = os.path.join(os.path.realpath(directory), name)
    # A notebook may have put a link in the place of a document: only the shard's own files count.
    is_own = os.path.realpath(path) == path and PurePosixPath(path).is_relative_to(
        os.path.realpath(directory)
    )
    return Path(path) if is_own and os.path.isfile(path) else None


# --- combining ----------------------------------------------------------------------------------


def _without_duplicates(
    shards: Sequence[ShardOutput],
) -> list[tuple[ShardOutput, NotebookResult]]:
    """Return the result of each notebook, in the order of the paths. Raises UsageError."""
    results: dict[str, tuple[ShardOutput, NotebookResult]] = {}
    for shard in shards:
        for result in shard.results:
            other = results.get(result.path)
            if other is not None and NOT_RUN not in (result.status, other[1].status):
                raise UsageError(
                    f"{one_line(result.path)}: ran in {one_line(other[0].directory)} and in "
                    f"{one_line(shard.directory)}; merge the parts of one batch only"
                )
            if other is None or other[1].status == NOT_RUN:
                results[result.path] = (shard, result)
    return [results[path] for path in sorted(results)]


def _gaps(shards: Sequence[ShardOutput]) -> Iterator[str]:
    """Yield a message for each shard that is missing or was killed."""
    for shard in shards:
        if not shard.finished:
            yield (
                f"{one_line(shard.directory)}: its batch was killed after "
                f"{counted(len(shard.results), 'notebook')}; "
                "continue it with --resume and merge again"
            )
    parts = {shard.shard for shard in shards if shard.shard is not None}
    for count in sorted({count for _, count in parts}):
        missing = [k for k in range(1, count + 1) if (k, count) not in parts]
        if missing:
            names = ", ".join(f"{k}/{count}" for k in missing)
            yield f"shard {names} is missing: the reports lack its notebooks"


def _copy(
    shard: ShardOutput, result: NotebookResult, stem: str, tree: OutputRoot, journal: Journal
) -> NotebookResult:
    """Copy the documents of a notebook, record it, and return its result."""
    names = {
        name: f"{stem}{suffix}"
        for name, suffix in _DOCUMENTS.items()
        if getattr(result, name) is not None
    }
    for name, target in names.items():
        folder = OutputDirectory(tree.top / target, tree)
        try:
            folder.write(_pieces(getattr(result, name)))
        finally:
            folder.close()
    record = shard.records.get(result.path)
    # A notebook that did not run to its end has no record, so --resume runs it.
    if record is not None and record.status == result.status:
        journal.finished(
            replace(record, **{name: names.get(name) for name in _DOCUMENTS}), time=record.time
        )
    copies = {name: tree.top / target for name, target in names.items()}
    return replace(result, **{name: copies.get(name) for name in _DOCUMENTS})


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            yield piece
