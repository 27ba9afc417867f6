"""The command line: sub-commands, one-line errors, exit codes.

A sub-command is one file and one line in ``COMMANDS``.
"""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module

import click

from safe_exec._version import __version__
from safe_exec.errors import SafeExecError
from safe_exec.platforms import refuse_elsewhere

# With their short help, so that --help imports no sub-command.
COMMANDS = {
    "run": "Run a notebook inside limits, and explain why its kernel died.",
    "batch": "Run many notebooks, and report on all of them.",
    "merge": "Combine the output directories of shards into one.",
    "bisect": "Search for the cells that cause a failure.",
    "probe": "Measure how much of a limit a notebook needs.",
    "debug": "Open a console in the kernel just before a notebook fails.",
    "replay": "Run the notebook of a verdict again, and compare the outcomes.",
    "doctor": "Show what enforces each limit on this machine, and how to fix the rest.",
    "limits": "Show the limits that a profile or file gives.",
    "params": "List the parameters that a notebook declares.",
    "kernel": "Run a kernel inside limits for a Jupyter client, which starts this command.",
    "kernelspec": "Install a kernel that always runs inside limits, for JupyterLab, VS Code and others.",
    "sessions": "List the recorded sessions of these kernels.",
    "mcp": "Serve tools for agents: run notebooks and cells inside limits (MCP).",
}

# Commands that work on every system. The others are refused where no notebook can run.
ANYWHERE = ("doctor", "limits")
# 128 + SIGINT, as shells report it.
CANCELLED = 130


class Commands(click.Group):
    """Imports a sub-command when it is called, so that ``doctor`` does not import ``run``."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Return all sub-commands, in the order of ``--help``."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import and return a sub-command."""
        if cmd_name not in COMMANDS:
            return None
        # Refused before the import, which fails on other systems with a traceback.
        if cmd_name not in ANYWHERE:
            refuse_elsewhere()
        command: click.Command = import_module(f"safe_exec.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Write the list for ``--help`` without importing the sub-commands."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="safe-exec")
def cli() -> None:
    """Run notebooks inside hard limits, and explain why their kernels die."""


def call(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit code; every error is one line on stderr."""
    # jupyter_client asks IPython for a folder of kernels in the home, which may be read-only.
    warnings.filterwarnings("ignore", r"IPython (parent|dir) ", UserWarning)
    try:
        # standalone_mode=False: click would exit, and only __main__ may do that.
        code = cli.main(list(arguments), prog_name="safe-exec", standalone_mode=False)
    # click raises Abort for Ctrl-C at a prompt.
    except click.exceptions.Abort:
        return CANCELLED
    except click.ClickException as error:
        _show_usage_error(error, arguments)
        return 2
    except SafeExecError as error:
        click.echo(f"safe-exec: {error}", err=True)
        return error.exit_code
    except KeyboardInterrupt:
        return CANCELLED
    except BrokenPipeError:
        # The reader of the output has exited (`safe-exec ... | head`). Shells expect the status of
        # a program that SIGPIPE ended.
        sys.stderr.close()
        return 128 + signal.SIGPIPE
    return code if isinstance(code, int) else 0


def _show_usage_error(error: click.ClickException, arguments: Sequence[str]) -> None:
    # `safe-exec` alone shows the help.
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.show()
        return
    from safe_exec.cli.usage_errors import usage_line

    click.echo(f"safe-exec: {usage_line(error, COMMANDS, _context_of(error, arguments))}", err=True)


def _context_of(error: click.ClickException, arguments: Sequence[str]) -> click.Context | None:
    """Return the context of the sub-command that an error is about."""
    context = getattr(error, "ctx", None)
    # click's parser of options raises errors without one.
    if context is None and arguments and arguments[0] in COMMANDS:
        group = click.Context(cli, info_name="safe-exec")
        command = cli.get_command(group, arguments[0])
        assert command is not None
        context = click.Context(command, parent=group, info_name=arguments[0])
    return context
