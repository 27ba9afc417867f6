"""The options that decide how the executed notebook is written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from msgspec import Struct

from safe_exec.cli.options.group import option_group
from safe_exec.errors import UsageError
from safe_exec.notebook.output_form import OnFailure, OutputForm

if TYPE_CHECKING:
    from safe_exec.workflows.library_coverage import CoverageRequest


class OutputOptions(Struct, frozen=True, kw_only=True):
    """The options for the executed notebook, as the user gave them."""

    in_place: bool = False
    on_failure: str | None = None
    clean_metadata: bool = False
    no_output: bool = False
    keep_files: Sequence[str] = ()
    coverage: bool = False


output_options = option_group(
    "output",
    OutputOptions,
    (
        click.option(
            "--in-place",
            is_flag=True,
            help="Write over the notebook itself, if it passes.",
        ),
        click.option(
            "--on-failure",
            type=click.Choice([choice.value for choice in OnFailure]),
            help="With --in-place: keep or write one that fails.",
        ),
        click.option(
            "--clean-metadata",
            is_flag=True,
            help="Write no times and figures into the notebook.",
        ),
        click.option(
            "--no-output", is_flag=True, help="Write the notebook without outputs of cells."
        ),
        click.option(
            "--keep-files",
            multiple=True,
            metavar="PATTERN",
            help="Keep these files of a private copy ('*.png').",
        ),
        click.option(
            "--coverage",
            is_flag=True,
            help="Record library code that ran (coverage combine).",
        ),
    ),
)

follow_option = click.option(
    "--follow", is_flag=True, help="Print the output of cells while they run."
)


def coverage_of(options: OutputOptions) -> CoverageRequest | None:
    """Return the request to measure coverage, or ``None`` if the user made none.

    Raises UsageError if the package coverage is not installed.
    """
    if not options.coverage:
        return None
    # Imported only here: few runs measure coverage.
    from safe_exec.workflows.library_coverage import CoverageRequest, demand_coverage

    demand_coverage()
    return CoverageRequest(folder=Path.cwd())


def form_of(options: OutputOptions, prefix: str = "--") -> OutputForm:
    """Return the form that the options describe. Raises UsageError."""
    if options.on_failure is not None and not options.in_place:
        raise UsageError(
            f"{prefix}on-failure: the notebook itself is not written; add {prefix}in-place"
        )
    return OutputForm(
        in_place=options.in_place,
        on_failure=OnFailure(options.on_failure or OnFailure.KEEP),
        clean_metadata=options.clean_metadata,
        no_output=options.no_output,
    )
