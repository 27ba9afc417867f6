"""The command line: sub-commands, errors as one line, exit codes. A sub-command is one file and one line in ``COMMANDS``."""

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

COMMANDS = {
    "run": "Run a notebook inside limits and say why its kernel died.",
    "batch": "Run many notebooks and report on all of them.",
    "bisect": "Search for the culprits of a failure, with more time or where `run` did not.",
    "probe": "Find by trial how much of a limit a notebook needs, and what it dies of with less.",
    "replay": "Run what a verdict says again, and say whether this machine agrees.",
    "doctor": "Say, limit by limit, what this machine can enforce, and how to fix what it cannot.",
    "limits": "Show the limits that a profile or file gives.",
    "params": "List the parameters that a notebook declares.",
    "kernel": "Be a kernel inside limits; Jupyter clients start it.",
    "kernelspec": "Install a kernel that always runs inside limits, for JupyterLab, VS Code and others.",
    "sessions": "List the recorded sessions of such kernels.",
}
ANYWHERE = ("doctor", "limits")
"""What runs no notebook; the other commands import what other systems than Linux lack."""
CANCELLED = 130


class Commands(click.Group):
    """Imports a sub-command when it is called: ``doctor`` does not pay for ``run``."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """All sub-commands, in the order a user meets them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import and return one."""
        if cmd_name not in COMMANDS:
            return None
        if cmd_name not in ANYWHERE:
            refuse_elsewhere()
        command: click.Command = import_module(f"safe_exec.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """The list for ``--help``, without importing any of them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="safe-exec")
def cli() -> None:
    """Run notebooks inside hard limits, see the kernel die, and say why."""


def call(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit code; every error is one line on stderr."""
    # jupyter_client asks IPython for a folder of kernels in the home, even where a home cannot be written.
    warnings.filterwarnings("ignore", r"IPython (parent|dir) ", UserWarning)
    try:
        code = cli.main(list(arguments), standalone_mode=False)
    except click.exceptions.Abort:
        return CANCELLED
    except click.ClickException as error:
        click.echo(f"safe-exec: {error.format_message()}", err=True)
        return 2
    except SafeExecError as error:
        click.echo(f"safe-exec: {error}", err=True)
        return error.exit_code
    except KeyboardInterrupt:
        return CANCELLED
    except BrokenPipeError:
        # Whoever read our output is gone (`safe-exec ... | head`): end as a program that SIGPIPE ended.
        sys.stderr.close()
        return 128 + signal.SIGPIPE
    return code if isinstance(code, int) else 0
