"""Describe each usage error of the command line in one line that says how to fix it."""

from __future__ import annotations

import difflib
import os
import shlex
from collections.abc import Collection
from importlib import import_module

import click

from safe_exec.files import one_line

NOTEBOOK_ENDS = (".ipynb", ".py", ".md", ".Rmd", ".qmd", ".R", ".jl")

# Options of papermill, nbmake, nbval, nbconvert and pytest by what they are here.
OF_OTHER_TOOLS = {
    **dict.fromkeys(
        ("-f", "--parameters_file", "-y", "--parameters_yaml", "-b", "--parameters_base64"),
        "for a file of parameters use --parameters FILE",
    ),
    "--parameters_raw": "use -r NAME TEXT",
    "--help-notebook": "use safe-exec params NOTEBOOK",
    "-k": "use --kernel NAME",
    "--log-output": "use --follow",
    **dict.fromkeys(
        ("--execution-timeout", "--nbmake-timeout", "--nbval-cell-timeout"),
        "use --cell-timeout, with a unit: 90s",
    ),
    "--start_timeout": "use --start-timeout, with a unit: 60s",
    **dict.fromkeys(("--inplace", "--overwrite"), "use --in-place"),
    "--nbval": "use --compare",
    "--nbval-lax": "use --compare-lax",
    "--nbval-sanitize-with": "use --sanitize-with",
    **dict.fromkeys(
        ("--nbmake-kernel", "--nbval-kernel-name", "--kernel_name"), "use --kernel NAME"
    ),
    **dict.fromkeys(
        ("--junitxml", "--junit-xml"), "safe-exec batch always writes junit.xml to --out"
    ),
}


def usage_line(
    error: click.ClickException, commands: Collection[str], ctx: click.Context | None
) -> str:
    """Return the line for an error.

    ``commands`` are the names of all sub-commands, ``ctx`` is that of the one that was called.
    """
    match error:
        case click.exceptions.NoSuchOption():
            return _no_such_option(error)
        case click.exceptions.BadOptionUsage() if ctx is not None:
            return _value_missing(error, ctx)
        case click.exceptions.MissingParameter() if ctx is not None:
            return _argument_missing(ctx)
        case click.exceptions.BadParameter():
            return _bad_value(error)
        case click.exceptions.UsageError() if ctx is not None:
            return _other(error, ctx, commands)
    return one_line(error.format_message())


def _no_such_option(error: click.exceptions.NoSuchOption) -> str:
    command = "safe-exec" if error.ctx is None else error.ctx.command_path
    name = one_line(error.option_name)
    if name in OF_OTHER_TOOLS:
        return f"there is no option {name}; {OF_OTHER_TOOLS[name]}"
    other_command = _other_command(name, command)
    if other_command is not None:
        return f"{name} is no option of {command}, but of safe-exec {other_command}"
    near = sorted(error.possibilities or (), key=lambda other: _unlikeness(name, other))
    if near:
        return f"there is no option {name}; did you mean {near[0]}?"
    return f"there is no option {name}; `{command} --help` lists all"


def _other_command(option: str, command: str) -> str | None:
    """Return ``run`` or ``batch``, if that is another command and has this option."""
    for name in ("run", "batch"):
        parameters = import_module(f"safe_exec.cli.{name}").command.params
        if not command.endswith(f" {name}") and any(option in p.opts for p in parameters):
            return name
    return None


def _unlikeness(one: str, other: str) -> float:
    # An option that contains the word is nearer than one of similar letters.
    contains = one.lstrip("-") in other
    return -difflib.SequenceMatcher(None, one, other).ratio() - contains


def _value_missing(error: click.exceptions.BadOptionUsage, ctx: click.Context) -> str:
    """Say which value an option lacks, or that it takes no value."""
    for parameter in ctx.command.params:
        if isinstance(parameter, click.Option) and error.option_name in parameter.opts:
            if parameter.is_flag:
                return f"{error.option_name} takes no value; write {error.option_name} alone"
            return (
                f"{error.option_name}: expected {error.option_name} {_placeholder(parameter, ctx)}"
            )
    return one_line(error.format_message())


def _placeholder(parameter: click.Option, ctx: click.Context) -> str:
    if isinstance(parameter.type, click.Choice):
        return "|".join(map(str, parameter.type.choices))
    return parameter.make_metavar(ctx)


def _argument_missing(ctx: click.Context) -> str:
    pieces = ctx.command.collect_usage_pieces(ctx)
    usage = " ".join(piece for piece in pieces if piece != "[OPTIONS]")
    return f"nothing to run on; expected {ctx.command_path} {usage}"


def _bad_value(error: click.exceptions.BadParameter) -> str:
    name = ""
    if error.param is not None:
        name = error.param.opts[-1] if isinstance(error.param, click.Option) else ""
    kind = error.param.type if error.param is not None else None
    message = one_line(error.message).rstrip(".")
    # As in "'x' is not a valid integer range".
    value = message.partition(" is not ")[0]
    if isinstance(kind, click.types.IntRange | click.types.FloatRange):
        bounds = f"from {kind.min}" if kind.max is None else f"from {kind.min} to {kind.max}"
        number = "a whole number" if isinstance(kind, click.types.IntRange) else "a number"
        message = f"expected {number} {bounds}, found {value}"
    elif isinstance(kind, click.Choice):
        choices = ", ".join(map(str, kind.choices))
        message = f"expected one of {choices}, found {value}"
    return f"{name}: {message}" if name else message


def _other(
    error: click.exceptions.UsageError, ctx: click.Context, commands: Collection[str]
) -> str:
    message = one_line(error.format_message()).rstrip(".")
    if message.startswith("No such command"):
        name = message.partition("'")[2].rpartition("'")[0]
        if name.endswith(NOTEBOOK_ENDS) or os.path.exists(name):
            verb = "batch" if os.path.isdir(name) else "run"
            return f"{one_line(name)} is no command; did you mean safe-exec {verb} {shlex.quote(name)}?"
        near = difflib.get_close_matches(name, commands, n=1)
        hint = f"did you mean {near[0]}?" if near else "`safe-exec --help` lists all"
        return f"there is no command {name}; {hint}"
    if message.startswith("Got unexpected extra argument"):
        extra = message.partition("(")[2].rpartition(")")[0]
        hint = (
            f"run takes one notebook; for its output write -o {extra}, for several notebooks use safe-exec batch"
            if ctx.command.name == "run"
            else f"see `{ctx.command_path} --help`"
        )
        return f"unexpected {extra}: {hint}"
    return message
