"""Prepares the end of a run while its kernel starts and its cells run: imports, patterns."""

from __future__ import annotations

import asyncio
from importlib import import_module

from safe_exec.model import events, patterns
from safe_exec.model.events import Event, EventSink

_NEEDED_LATER = (
    "safe_exec.diagnosis.verdict",
    "safe_exec.reports.annotated_notebook",
    "safe_exec.reports.verdict_json",
)
_SENT_SECONDS = 0.001
"""A delay by which the first cell has certainly been sent."""
# In a run that lasts longer than this, nobody notices the time to compile the patterns of rules.
_LONG_SECONDS = 1.0


async def warm_up() -> None:
    """Import the code for the end of the run while the kernel starts."""
    from nbformat import v4

    from safe_exec.diagnosis import verdict as _verdict  # noqa: F401
    from safe_exec.reports import annotated_notebook  # noqa: F401

    # Compiles the JSON schema of notebooks, which takes 30 ms.
    v4.new_output("stream", text="")


def read_ahead() -> EventSink:
    """Import the code for verdict and documents while the first cell runs."""
    # After a death the user waits for the diagnosis, so none of these imports may come then.
    scheduled = False

    def sink(event: Event) -> None:
        nonlocal scheduled
        if isinstance(event, events.CellStarted) and not scheduled:
            scheduled = True
            for number, name in enumerate(_NEEDED_LATER):
                # One module per tick: the messages of the running cell are handled in between.
                asyncio.get_running_loop().call_later(
                    _SENT_SECONDS * (1 + number), import_module, name
                )
            asyncio.get_running_loop().call_later(_LONG_SECONDS, _compile_ahead)

    return sink


def _compile_ahead() -> None:
    """Compile the rules' patterns, one at a time, in a run that has lasted for a while."""
    # A run that dies sooner compiles the few that its death needs.
    if patterns.compile_next():
        asyncio.get_running_loop().call_later(_SENT_SECONDS, _compile_ahead)
