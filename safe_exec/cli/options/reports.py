"""The options of ``batch`` and ``merge`` that choose and place the reports."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from msgspec import Struct

from safe_exec.cli.options.group import Decorator, option_group
from safe_exec.errors import OutputPathError
from safe_exec.files import one_line

if TYPE_CHECKING:
    from safe_exec.batch.report_registry import BatchReport
    from safe_exec.reports.batch.results import BatchResult

DEFAULT_OUT = Path("safe-exec-out")


class ReportOptions(Struct, frozen=True, kw_only=True):
    """The options for CI systems; ``None`` leaves the choice to the environment."""

    github: bool | None = None
    gitlab: bool | None = None

    def choose(self) -> ReportChoice:
        """Return the reports to write, by the options and by the environment."""
        from safe_exec.batch import ci

        github = ci.on_github() if self.github is None else self.github
        gitlab = ci.on_gitlab() if self.gitlab is None else self.gitlab
        return ReportChoice(github=github, files=ci.reports(github=github, gitlab=gitlab))


class ReportChoice(Struct, frozen=True, kw_only=True):
    """The reports to write: whether to print GitHub's annotations, and the CI system's files."""

    github: bool
    files: tuple[BatchReport, ...]

    def print_annotations(self, batch: BatchResult) -> None:
        """Print the annotations, if the batch is for GitHub."""
        from safe_exec.batch import ci

        for line in ci.github_lines(batch) if self.github else ():
            click.echo(line)


report_options = option_group(
    "reports",
    ReportOptions,
    (
        click.option(
            "--github/--no-github",
            default=None,
            help="Print annotations and a summary [if on GitHub].",
        ),
        click.option(
            "--gitlab/--no-gitlab",
            default=None,
            help="Write codequality.json [if on GitLab].",
        ),
    ),
)


def out_option(text: str) -> Decorator:
    """Return the option for the output directory; ``text`` begins its help."""
    return click.option(
        "--out",
        type=click.Path(path_type=Path),
        default=DEFAULT_OUT,
        help=f"{text} [{DEFAULT_OUT}].",
    )


def make_out(out: Path) -> Path:
    """Create the output directory and return its path without links. Raises OutputPathError."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise OutputPathError(f"--out {one_line(out)}: is a file; name a directory") from None
    except OSError as error:
        raise OutputPathError(f"--out {one_line(out)}: cannot be made: {error.strerror}") from None
    # The root of all documents must contain no link: see OutputRoot.
    return Path(out.resolve())
