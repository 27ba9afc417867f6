"""List the reports of a batch, and write them. A new report is added to ``BATCH_REPORTS``.

Reports for one CI system are listed in ``batch.ci``.
"""

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
    """A report file and the function that writes it.

    ``file`` is relative to the output directory. ``writer`` is ``module:function``, called with the
    batch and the path; it may raise OSError.
    """

    file: str
    writer: str

    def function(self) -> Callable[[BatchResult, Path], None]:
        """Import and return the function."""
        # Imported here, not at the top: a report that is not written costs no import.
        module, _, name = self.writer.partition(":")
        writer: Callable[[BatchResult, Path], None] = getattr(import_module(module), name)
        return writer


BATCH_REPORTS = (
    BatchReport(file="summary.json", writer="safe_exec.reports.batch.summary_json:write"),
    BatchReport(file="junit.xml", writer="safe_exec.reports.batch.junit:write"),
    BatchReport(file="report.html", writer="safe_exec.reports.batch.html.page:write"),
)


def write_all(batch: BatchResult, more: Iterable[BatchReport] = ()) -> int:
    """Write every report and return the exit code of the batch.

    The code is 7 if a report could not be written and no notebook ended worse.
    """
    code = batch.exit_code
    for report in (*BATCH_REPORTS, *more):
        try:
            report.function()(batch, batch.out / report.file)
        except OSError as error:
            # One report that cannot be written must not cost the others.
            log.error(  # noqa: TRY400
                "%s: could not be written: %s", one_line(batch.out / report.file), one_line(error)
            )
            code = worst((code, Status.INTERNAL_ERROR.exit_code))
    return code
