"""A scheduled job's own timeout and retries, and the message of its failure. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import Struct

from safe_exec.model.verdict import Status, Verdict
from safe_exec.reports.text import common, culprits

# The column of the database that is filled in for each job, asked for or not. The scheduler's own
# manager has no timeout, so this value must not end a job.
UNSET_TIMEOUT_SECONDS = 600

# The column of the message holds 1024 characters.
MOST_CHARACTERS = 1000


class JobFailedError(Exception):
    """A failed job; the scheduler stores ``str(error)`` as the job's status message."""


class JobOptions(Struct, frozen=True, kw_only=True):
    """A job's own timeout and retries; ``None`` as timeout leaves the profile's."""

    timeout_seconds: float | None = None
    retry_on_timeout: bool = False
    max_retries: int = 0
    min_retry_interval_millis: float = 0

    def tries_again(self, verdict: Verdict, tries: int) -> bool:
        """Whether a failed job runs again after this many tries."""
        if verdict.status in (Status.PASSED, Status.CANCELLED) or tries > self.max_retries:
            return False
        return self.retry_on_timeout or verdict.status is not Status.TIMEOUT


def options_of(columns: Mapping[str, Any], parameters: Mapping[str, Any] | None) -> JobOptions:
    """Read a job's options: its environment parameters, else the columns of its row.

    Raises ValueError for a parameter that is no number.
    """
    # The release of today has these columns, but its API sets none of them. Environment parameters
    # reach us through the API.
    names = JobOptions.__struct_fields__
    values = {name: columns.get(name) for name in names} | {
        name: value for name, value in (parameters or {}).items() if name in names
    }
    given_timeout = (parameters or {}).get("timeout_seconds")
    if given_timeout is None and values["timeout_seconds"] == UNSET_TIMEOUT_SECONDS:
        values["timeout_seconds"] = None
    timeout = values["timeout_seconds"]
    return JobOptions(
        timeout_seconds=float(timeout) if timeout else None,
        retry_on_timeout=str(values["retry_on_timeout"]).lower() in ("true", "1"),
        max_retries=int(values["max_retries"] or 0),
        min_retry_interval_millis=float(values["min_retry_interval_millis"] or 0),
    )


def message_of(verdict: Verdict, tries: int) -> str:
    """Return the status message of a failed job: outcome, cause, culprits, advice."""
    cause = verdict.cause
    lines = [common.headline(verdict)]
    if cause is not None and not common.headline_has_summary(verdict):
        lines.append(common.single_line(cause.summary))
    crash = verdict.crash_cell
    if crash is not None and crash.source_line:
        lines.append(f"{common.moment(verdict)}: {common.code_line(crash.source_line)}")
    if verdict.culprits is not None and verdict.culprits.cells:
        lines.append(f"caused by {culprits.names(verdict.culprits)}")
    if cause is not None and cause.advice:
        lines.append(common.single_line(cause.advice))
    if tries > 1:
        lines.append(f"{tries} tries")
    return common.clip("\n".join(lines), MOST_CHARACTERS)
