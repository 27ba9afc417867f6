"""Text that arrives for a cell after it was done, which nbclient leaves out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safe_exec.kernel.client import TrialClient

MOST_CHARACTERS = 16384


class LateText:
    """The end of the stderr that came late, by the cell's index.

    That of the threads which a cell had started. Evidence, no output.
    """

    def __init__(self, client: TrialClient) -> None:
        self._client = client
        self.by_cell: dict[int, str] = {}

    def take(self, message: dict[str, Any]) -> None:
        """Process one message, for whichever cell."""
        requests, running = self._client.cells_by_request, self._client.running
        parent, text = str(message["parent_header"].get("msg_id")), message["content"].get("text")
        is_late = running is None or parent != running[0]
        if (
            is_late
            and parent in requests
            and message["content"].get("name") == "stderr"
            and isinstance(text, str)
        ):
            index = requests[parent]
            self.by_cell[index] = (self.by_cell.get(index, "") + text)[-MOST_CHARACTERS:]
