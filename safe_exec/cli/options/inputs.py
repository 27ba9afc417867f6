"""The options that change a notebook before it runs: parameters, environment, cells."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from msgspec import Struct

from safe_exec.cli.options.group import option_group
from safe_exec.errors import UsageError
from safe_exec.files import one_line, read_regular
from safe_exec.notebook.inputs import (
    CellSelection,
    ExitMeaning,
    NotebookInputs,
    StdinFile,
    read_stdin,
)

if TYPE_CHECKING:
    from safe_exec.notebook.comparison import ComparisonRules
    from safe_exec.notebook.literals import Value

# A larger .env file is a mistake.
_MOST_BYTES = 1 << 20


class InputOptions(Struct, frozen=True, kw_only=True):
    """The options that change a notebook, as the user gave them."""

    parameters: Sequence[tuple[str, str]] = ()
    raw_parameters: Sequence[tuple[str, str]] = ()
    parameter_files: Sequence[Path] = ()
    set_env: Sequence[str] = ()
    env_files: Sequence[Path] = ()
    skip_tags: Sequence[str] = ()
    only_tags: Sequence[str] = ()
    until: str | None = None
    compare: bool = False
    compare_lax: bool = False
    sanitizers: Sequence[Path] = ()
    tolerance: float | None = None
    image_distance: int | None = None
    exit_is: str = ExitMeaning.SUCCESS.value
    strict_shell: bool = False
    stdin: Path | None = None


input_options = option_group(
    "inputs",
    InputOptions,
    (
        click.option(
            "-p",
            "--parameter",
            "parameters",
            nargs=2,
            multiple=True,
            metavar="NAME VALUE",
            help="Set a parameter: a number, True, None or a text.",
        ),
        click.option(
            "-r",
            "--raw-parameter",
            "raw_parameters",
            nargs=2,
            multiple=True,
            metavar="NAME TEXT",
            help="Set a parameter to a text, even if it is 007.",
        ),
        click.option(
            "--parameters",
            "parameter_files",
            multiple=True,
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="Set the parameters in a YAML or JSON file.",
        ),
        click.option(
            "--set-env",
            multiple=True,
            metavar="NAME=VALUE",
            help="Set a variable in the notebook's environment.",
        ),
        click.option(
            "--env-file",
            "env_files",
            multiple=True,
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="Set the variables in a .env file.",
        ),
        click.option(
            "--skip-tag",
            "skip_tags",
            multiple=True,
            metavar="TAG",
            help="Skip cells with this tag.",
        ),
        click.option(
            "--only-tag",
            "only_tags",
            multiple=True,
            metavar="TAG",
            help="Run only cells with this tag.",
        ),
        click.option(
            "--until",
            metavar="CELL",
            help="Stop after this code cell (number, id or tag).",
        ),
        click.option(
            "--compare",
            is_flag=True,
            help="Fail if outputs differ from the stored ones.",
        ),
        click.option(
            "--compare-lax",
            is_flag=True,
            help="Compare only cells marked NBVAL_CHECK_OUTPUT.",
        ),
        click.option(
            "--sanitize-with",
            "sanitizers",
            multiple=True,
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="Replace text before comparing (nbval's format).",
        ),
        click.option(
            "--compare-tolerance",
            "tolerance",
            type=click.FloatRange(min=0),
            metavar="X",
            help="Accept numbers that differ by up to X (1e-6).",
        ),
        click.option(
            "--compare-images",
            "image_distance",
            type=click.IntRange(0, 64),
            metavar="N",
            help="Accept images that differ in up to N of 64 bits.",
        ),
        click.option(
            "--exit-is",
            type=click.Choice([meaning.value for meaning in ExitMeaning]),
            default=ExitMeaning.SUCCESS.value,
            help="What sys.exit(0) in a cell means [success].",
        ),
        click.option(
            "--strict-shell",
            is_flag=True,
            help="Make a failing !command an error.",
        ),
        click.option(
            "--stdin",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="Answer input() with the lines of this file.",
        ),
    ),
)


def inputs_of(options: InputOptions, *, lenient: bool = False) -> NotebookInputs:
    """Return the inputs that the options describe. Raises UsageError."""
    parameters = _parameters_of(options)
    selection = CellSelection(
        skip_tags=tuple(options.skip_tags),
        only_tags=tuple(options.only_tags),
        until=options.until,
        lenient=lenient,
    )
    return NotebookInputs(
        parameters=parameters,
        selection=selection,
        exit_is=ExitMeaning(options.exit_is),
        strict_shell=options.strict_shell,
        stdin=None if options.stdin is None else _read_stdin(options.stdin),
    )


def _read_stdin(path: Path) -> StdinFile:
    with _naming("--stdin"):
        return read_stdin(path)


@contextlib.contextmanager
def _naming(option: str) -> Iterator[None]:
    """Put the name of the option in front of an error about its file."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{option} {error}") from None


def comparison_of(options: InputOptions, prefix: str = "--") -> ComparisonRules | None:
    """Return the rules for comparing outputs; ``None`` without --compare. Raises UsageError."""
    details = {
        "sanitize-with": options.sanitizers,
        "compare-tolerance": options.tolerance is not None,
        "compare-images": options.image_distance is not None,
    }
    if not (options.compare or options.compare_lax):
        # A detail without --compare is most likely a mistake, and would pass unnoticed.
        for name, given_value in details.items():
            if given_value:
                raise UsageError(f"{prefix}{name}: nothing is compared; add {prefix}compare")
        return None
    from safe_exec.notebook.comparison import ComparisonRules, demand_pillow, read_sanitizers

    if options.image_distance is not None:
        # A missing library must be an error now, and not after the notebook has run.
        demand_pillow()
    with _naming(f"{prefix}sanitize-with"):
        sanitizers = tuple(pair for path in options.sanitizers for pair in read_sanitizers(path))
    return ComparisonRules(
        lax=options.compare_lax,
        sanitizers=sanitizers,
        tolerance=options.tolerance,
        image_distance=options.image_distance,
    )


def _parameters_of(options: InputOptions) -> dict[str, Value]:
    if not (options.parameter_files or options.parameters or options.raw_parameters):
        return {}
    # Most runs set no parameters, and do not pay for importing PyYAML.
    from safe_exec.notebook.parameters import read_file, typed

    parameters: dict[str, Value] = {}
    # Files come first, since options on the command line override them.
    for path in options.parameter_files:
        with _naming("--parameters"):
            parameters |= read_file(path)
    parameters |= {name: typed(text) for name, text in options.parameters}
    parameters |= dict(options.raw_parameters)
    return parameters


def variables_of(options: InputOptions) -> dict[str, str]:
    """Return the variables that the options set. Raises UsageError."""
    variables: dict[str, str] = {}
    # ``--set-env`` overrides files.
    for path in options.env_files:
        variables |= read_env_file(path)
    for text in options.set_env:
        # Only the first = separates; a value may contain more.
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise UsageError(
                f"--set-env {one_line(text)}: expected NAME=VALUE;"
                f" to pass on a variable that is set here, use --env {one_line(text or 'NAME')}"
            )
        variables[name.strip()] = value
    # execve(2) ends a variable at a NUL.
    if any("\0" in name + value for name, value in variables.items()):
        raise UsageError("--set-env: a variable of the environment holds no zero byte")
    return variables


def read_env_file(path: Path) -> dict[str, str]:
    """Read the variables of a .env file. Raises UsageError with file and line."""
    import dotenv
    from dotenv.parser import parse_stream

    with _naming("--env-file"):
        text = read_regular(path, most=_MOST_BYTES, error=UsageError).decode(errors="replace")
    for binding in parse_stream(io.StringIO(text)):
        # python-dotenv silently skips invalid lines, and lines without "=".
        if binding.error or (binding.key is not None and binding.value is None):
            raise UsageError(
                f"--env-file {one_line(path)}:{binding.original.line}: expected NAME=VALUE, found"
                f" {one_line(binding.original.string.strip())[:60]!r}"
            )
    # interpolate: replaces ${NAME}, as the shell and other readers of .env files do.
    values = dotenv.dotenv_values(stream=io.StringIO(text), interpolate=True)
    return {name: value for name, value in values.items() if value is not None}


def walls_with(walls: Mapping[str, Any], variables: Mapping[str, str]) -> dict[str, Any]:
    """Return the changes to isolation, extended so that the kernel sees the variables."""
    # Isolation would remove variables that are not on its list.
    names = (*walls.get("env", ()), *variables)
    return {**walls, "env": names} if names else dict(walls)


def environment_with(variables: Mapping[str, str]) -> dict[str, str] | None:
    """Return our environment with the variables added; ``None`` if there are none to add."""
    return {**os.environ, **variables} if variables else None
