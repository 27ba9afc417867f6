"""Print the last part of the output of ``batch`` and ``merge``."""

from __future__ import annotations

from typing import TextIO

import click

from safe_exec.files import one_line
from safe_exec.reports.batch.progress import line_of
from safe_exec.reports.batch.results import NOT_RUN, UNCHANGED, BatchResult, NotebookResult
from safe_exec.reports.terminal import Style

# Starts of warnings (``safe_exec.notebook.parameters`` and ``selection``).
INPUT_WARNINGS = ("unknown parameter ", "--skip-tag ", "--only-tag ")


def show(batch: BatchResult, stream: TextIO, *, quiet: bool) -> None:
    """Print the failed notebooks, the output directory, and the line for scripts."""
    from safe_exec.batch.outcome import summary_line

    style = Style.of(stream)
    if not quiet:
        for result in batch.results:
            # The terminal shows the notebooks that need attention; the reports list all.
            if result.status not in ("passed", UNCHANGED, NOT_RUN) or result.flaky:
                click.echo(
                    style.paint(
                        "warn" if result.flaky else "bad",
                        style.fit(line_of(result, _headline(result))),
                    ),
                    file=stream,
                )
        click.echo(style.fit(f"wrote {one_line(batch.out)}"), file=stream)
        if batch.cancelled or any(result.status == NOT_RUN for result in batch.results):
            click.echo("continue with --resume", file=stream)
    # The last line, even with --quiet: scripts read it.
    click.echo(summary_line(batch), file=stream)


def _headline(result: NotebookResult) -> str:
    from safe_exec.reports.text.common import headline
    from safe_exec.reports.verdict_json import from_document

    document = result.document()
    try:
        return headline(from_document(document)) if document is not None else ""
    # Another program may have overwritten the verdict.
    except (ValueError, KeyError):
        return ""


def unused_inputs(batch: BatchResult) -> list[str]:
    """Return a note for each parameter and tag that no notebook of the batch has.

    Some notebooks of a batch may lack a tag, so a warning from one of them means little. If all of
    them warn, the name is misspelt, and the batch may still pass.
    """
    documents = [document for result in batch.results if (document := result.document())]
    warnings = [
        {_subject(text): str(text) for text in document.get("warnings", ()) if _subject(text)}
        for document in documents
    ]
    if not warnings:
        return []
    # The hint at a similar name may differ between notebooks.
    return [text for name, text in warnings[0].items() if all(name in other for other in warnings)]


def _subject(warning: object) -> str:
    """Return the start of a warning about a parameter or tag, ``""`` for other warnings."""
    text = str(warning)
    return text.partition(":")[0] if text.startswith(INPUT_WARNINGS) else ""
