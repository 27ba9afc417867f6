"""The options for notebooks that fail now and then."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from safe_exec.workflows.retry import RetryPolicy

RETRY_OPTIONS = (
    click.option(
        "--repeat",
        type=click.IntRange(1, 1000),
        default=1,
        metavar="N",
        help="Run N times, and name the cells whose results differ [1].",
    ),
    click.option(
        "--retries",
        type=click.IntRange(0, 10),
        metavar="N",
        help="Run again after failures that may pass [0].",
    ),
    click.option(
        "--retry-on",
        metavar="REGEX",
        help="Run again after these errors too ('HTTP 5..') [2 retries].",
    ),
)


def retry_options(function: Any) -> Any:
    """Add the options to a command."""
    # Decorators apply from the inside out, so the last option is added first.
    for option in reversed(RETRY_OPTIONS):
        function = option(function)
    return function


def retry_of(options: Mapping[str, Any], prefix: str = "--") -> RetryPolicy:
    """Return the policy that the options describe. Raises UsageError."""
    # Imported late: the module imports all of a run, which the kernel's start must not wait for.
    from safe_exec.workflows.retry import retry_policy

    return retry_policy(options["retries"], options["retry_on"], f"{prefix}retry-on")
