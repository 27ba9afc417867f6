"""The options for notebooks that fail only sometimes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
from msgspec import Struct

from safe_exec.cli.options.group import option_group

if TYPE_CHECKING:
    from safe_exec.workflows.retry import RetryPolicy


class RetryOptions(Struct, frozen=True, kw_only=True):
    """The options for repeated runs; ``retries`` is ``None`` if the user gave no number."""

    repeat: int = 1
    retries: int | None = None
    retry_on: str | None = None


retry_options = option_group(
    "retry",
    RetryOptions,
    (
        click.option(
            "--repeat",
            type=click.IntRange(1, 1000),
            default=1,
            metavar="N",
            help="Run N times, and name cells that differ [1].",
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
            help="Run again after these errors too ('HTTP 5..').",
        ),
    ),
)


def retry_of(options: RetryOptions, prefix: str = "--") -> RetryPolicy:
    """Return the policy that the options describe. Raises UsageError."""
    # Imported late: the module imports all of a run, which the kernel's start must not wait for.
    from safe_exec.workflows.retry import retry_policy

    return retry_policy(options.retries, options.retry_on, f"{prefix}retry-on")
