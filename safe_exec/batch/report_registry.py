"""What is written of a batch once it is over. The list here is where a report is added."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path

from msgspec import Struct

from safe_exec.batch.outcome import worst
from safe_exec.files import one_line
from safe_exec.model.verdict import Status
from safe_exec.reports.batch.results import BatchResult

log = logging.getLogger("safe_exec")


class BatchReport(Struct, frozen=True, kw_only=True):
    """A file, and ``module:function`` that writes it: called with the batch and the path; may raise OSError.

    ``file`` is seen from the output directory.
    """

    file: str
    writer: str

    def function(self) -> Callable[[BatchResult, Path], None]:
        """The function, imported now: a report costs nothing until it is written."""
        module, _, name = self.writer.partition(":")
        writer: Callable[[BatchResult, Path], None] = getattr(import_module(module), name)
        return writer


BATCH_REPORTS = (
    BatchReport(file="summary.json", writer="safe_exec.reports.batch.summary_json:write"),
    BatchReport(file="junit.xml", writer="safe_exec.reports.batch.junit:write"),
    BatchReport(file="report.html", writer="safe_exec.reports.batch.html.page:write"),
)


def write_all(batch: BatchResult, more: Iterable[BatchReport] = ()) -> int:
    """Write every report, and ``more``; the exit code of the batch, or 7 where that is worse and one could not be written."""
    code = batch.exit_code
    for report in (*BATCH_REPORTS, *more):
        try:
            report.function()(batch, batch.out / report.file)
        except OSError as error:
            log.error(  # noqa: TRY400
                "%s: could not be written: %s", one_line(batch.out / report.file), one_line(error)
            )
            code = worst((code, Status.INTERNAL_ERROR.exit_code))
    return code
