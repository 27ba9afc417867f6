"""The options that decide how the executed notebook is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from safe_exec.errors import UsageError
from safe_exec.notebook.output_form import OnFailure, OutputForm

OUTPUT_OPTIONS = (
    click.option(
        "--in-place",
        is_flag=True,
        help="Write the result over the notebook itself, if it passes.",
    ),
    click.option(
        "--on-failure",
        type=click.Choice([choice.value for choice in OnFailure]),
        help="With --in-place: keep one that fails, or write it too.",
    ),
    click.option(
        "--clean-metadata",
        is_flag=True,
        help="Write no times and figures into the notebook.",
    ),
    click.option("--no-output", is_flag=True, help="Write the notebook without outputs of cells."),
    click.option(
        "--keep-files",
        multiple=True,
        metavar="PATTERN",
        help="Keep these files of a private copy of the folder ('*.png').",
    ),
)


follow_option = click.option(
    "--follow", is_flag=True, help="Print the output of cells while they run."
)


def output_options(function: Any) -> Any:
    """Add the options to a command."""
    # Decorators apply from the inside out, so the last option is added first.
    for option in reversed(OUTPUT_OPTIONS):
        function = option(function)
    return function


def form_of(options: Mapping[str, Any], prefix: str = "--") -> OutputForm:
    """Return the form that the options describe. Raises UsageError."""
    if options["on_failure"] is not None and not options["in_place"]:
        raise UsageError(
            f"{prefix}on-failure: the notebook itself is not written; add {prefix}in-place"
        )
    return OutputForm(
        in_place=options["in_place"],
        on_failure=OnFailure(options["on_failure"] or OnFailure.KEEP),
        clean_metadata=options["clean_metadata"],
        no_output=options["no_output"],
    )
