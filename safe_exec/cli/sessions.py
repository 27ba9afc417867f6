"""``safe-exec sessions``: the recordings of interactive kernels."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("sessions", short_help="List the recorded sessions of interactive kernels.")
@click.argument("session", required=False, metavar="[SESSION]")
@click.option(
    "-o",
    "--output-notebook",
    "out",
    type=click.Path(path_type=Path),
    help="Write the cells of SESSION to this notebook.",
)
def command(session: str | None, out: Path | None) -> int:
    """List the sessions that `safe-exec kernel` has recorded in the last week, the newest first.

    SESSION is an id from the list, or its beginning: its cells are printed, or written with -o. After a death
    `safe-exec bisect` takes the notebook in the list.
    """
    from safe_exec.errors import UsageError
    from safe_exec.interactive import recording

    if session is None:
        if out is not None:
            raise UsageError("-o: which session? Give its id")
        _list()
        return 0
    facts = recording.find(session)
    cells = recording.sources(facts.path)
    if out is None:
        # The output is a script: the numbers of cells are comments.
        click.echo("\n\n".join(f"# [{n}]\n{cell}" for n, cell in enumerate(cells, 1)))
    else:
        recording.write_cells(out, cells, facts.kernel)
    return 0


def _list() -> None:
    from safe_exec.interactive import recording
    from safe_exec.interactive.diagnosis import quoted
    from safe_exec.reports.text.common import single_line

    rows = list(recording.sessions())
    if not rows:
        click.echo("no session is recorded")
    for facts in rows:
        cells = f"{facts.cells} cell{'' if facts.cells == 1 else 's'}"
        click.echo(
            f"{facts.id}  {cells} · {facts.kernel} · {facts.limits} · {single_line(facts.cwd)}"
        )
        if facts.ended is not None:
            label = "cell ended" if facts.survived else "died of"
            click.echo(f"    {label:<10} {single_line(facts.ended)}")
        if facts.notebook is not None:
            click.echo(f"    culprits   safe-exec bisect {quoted(facts.notebook)}")
