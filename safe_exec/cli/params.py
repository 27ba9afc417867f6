"""``safe-exec params``: the parameters that a notebook declares."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from safe_exec.cli import tables
from safe_exec.notebook import notebook
from safe_exec.notebook.parameters import DEFAULTS_TAG, declared_parameters
from safe_exec.reports.terminal import Style
from safe_exec.reports.text.common import single_line


@click.command("params", short_help="List the parameters that a notebook declares.")
@click.argument("path", metavar="NOTEBOOK", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print them as JSON.")
def command(path: Path, as_json: bool) -> int:
    """List the variables that the cell with the tag "parameters" sets: name, type, default, comment.

    Give other values with `safe-exec run -p NAME VALUE NOTEBOOK`.
    """
    read = notebook.read(path)
    parameters = declared_parameters(read.node, read.language)
    if as_json:
        click.echo(json.dumps([parameter._asdict() for parameter in parameters], indent=2))
        return 0
    # Texts of the notebook are escaped below: they may contain control characters.
    style = Style.of(sys.stdout)
    if not parameters:
        lines = [
            f"{single_line(str(path))}: no parameters (no code cell with the tag {DEFAULTS_TAG!r})"
        ]
    else:
        rows = [tuple(map(single_line, parameter)) for parameter in parameters]
        lines = list(tables.table([("name", "type", "default", "comment"), *rows], style, ""))
    tables.write(lines, style)
    return 0
