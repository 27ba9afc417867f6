"""A cell that was sent to the kernel, until its reply and the end of its output have arrived."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from nbclient.client import timestamp

FIRST_YEAR = 1000


class Execution:
    """The state of one request.

    ``is_accepted`` is true once its reply has been confirmed, ``is_idle`` once its output has
    ended. ``begins_until`` is the moment (``time.monotonic``) until which the kernel should have
    begun the cell.
    """

    def __init__(self, *, msg_id: str, cell: Any, index: int, count: int) -> None:
        self.msg_id, self.cell, self.index, self.count = msg_id, cell, index, count
        self._loop = asyncio.get_running_loop()
        self.future: asyncio.Future[None] = self._loop.create_future()
        self.reply: dict[str, Any] | None = None
        self.begins_until = 0.0
        self.is_accepted = False
        self.is_idle = False
        self._timer: asyncio.TimerHandle | None = None

    def call_later(self, seconds: float, call: Callable[[Execution], None]) -> None:
        """Call ``call`` with this execution after some seconds, unless ``stop_timer`` is called."""
        self._timer = self._loop.call_later(seconds, call, self)

    def stop_timer(self) -> None:
        """Cancel the last ``call_later``. Can be called again."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def sent_at(message: Mapping[str, Any]) -> str:
    """Return the moment at which a message was sent, in nbclient's form."""
    # isoformat gives what nbclient's strftime gives, in a tenth of the time; but strftime does not
    # pad a year before 1000.
    date = message["header"].get("date")
    if isinstance(date, datetime) and date.year >= FIRST_YEAR:
        return date.replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"
    return str(timestamp(message))
