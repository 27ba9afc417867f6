"""Text that arrives for a cell after the cell was done. nbclient ignores it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safe_exec.kernel.client import TrialClient

MOST_CHARACTERS = 16384


class LateText:
    """The last part of each cell's late stderr text, by cell index."""

    # A thread that a cell started can write after the cell, and its message may explain a later
    # death. It is evidence, but not output of the notebook.

    def __init__(self, client: TrialClient) -> None:
        self._client = client
        self.by_cell: dict[int, str] = {}

    def take(self, message: dict[str, Any]) -> None:
        """Process one message of any cell."""
        if message["content"].get("name") != "stderr":
            return
        requests = self._client.cells_by_request
        parent, text = str(message["parent_header"].get("msg_id")), message["content"].get("text")
        if not self._client.is_awaited(parent) and parent in requests and isinstance(text, str):
            index = requests[parent]
            self.by_cell[index] = (self.by_cell.get(index, "") + text)[-MOST_CHARACTERS:]
