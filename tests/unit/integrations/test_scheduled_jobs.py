"""A scheduled job's own timeout and retries."""

from __future__ import annotations

from typing import Any

import pytest

from safe_exec.integrations.scheduled_jobs import (
    UNSET_TIMEOUT_SECONDS,
    JobOptions,
    message_of,
    options_of,
)
from safe_exec.model.verdict import Status
from tests.unit.builders import every_verdict, make_verdict

DEFAULTS = {"timeout_seconds": UNSET_TIMEOUT_SECONDS, "max_retries": 0, "retry_on_timeout": False}


@pytest.mark.parametrize(
    ("columns", "parameters", "options"),
    [
        (DEFAULTS, None, JobOptions()),
        (DEFAULTS, {"timeout_seconds": UNSET_TIMEOUT_SECONDS}, JobOptions(timeout_seconds=600)),
        (
            {**DEFAULTS, "timeout_seconds": 60},
            {"max_retries": "2"},
            JobOptions(timeout_seconds=60, max_retries=2),
        ),
        (DEFAULTS, {"retry_on_timeout": True, "other": 1}, JobOptions(retry_on_timeout=True)),
        (DEFAULTS, {"retry_on_timeout": "false"}, JobOptions()),
        ({}, {"min_retry_interval_millis": 5}, JobOptions(min_retry_interval_millis=5)),
    ],
)
def test_the_options_of_a_job(
    columns: dict[str, Any], parameters: dict[str, Any] | None, options: JobOptions
) -> None:
    assert options_of(columns, parameters) == options


def test_which_failures_are_tried_again() -> None:
    once = JobOptions(max_retries=1)
    assert once.tries_again(make_verdict(Status.KERNEL_DIED), 1)
    assert not once.tries_again(make_verdict(Status.KERNEL_DIED), 2)
    assert not once.tries_again(make_verdict(Status.PASSED), 1)
    assert not once.tries_again(make_verdict(Status.CANCELLED), 1)
    assert not once.tries_again(make_verdict(Status.TIMEOUT), 1)
    assert JobOptions(max_retries=1, retry_on_timeout=True).tries_again(
        make_verdict(Status.TIMEOUT), 1
    )


def test_every_message_fits_the_column() -> None:
    for verdict in every_verdict():
        assert 0 < len(message_of(verdict, 2)) <= 1024
