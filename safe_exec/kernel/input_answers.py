"""Answers ``input()`` of a notebook from a list of lines (``--stdin``)."""

from __future__ import annotations

from collections.abc import Sequence

from safe_exec.kernel.channel import Channel

# ipykernel raises EOFError for this answer, as Python does at the end of a file.
END_OF_INPUT = "\x04"


class InputAnswers:
    """Hands out the lines in order. ``requests`` counts the kernel's requests so far."""

    def __init__(self, lines: Sequence[str]) -> None:
        self._lines = tuple(lines)
        self.requests = 0

    @property
    def missing(self) -> int:
        """The number of requests for which no line was left."""
        return max(0, self.requests - len(self._lines))

    def next_answer(self) -> str:
        """Return the next line, or the character for the end of the input if none is left."""
        number, self.requests = self.requests, self.requests + 1
        return self._lines[number] if number < len(self._lines) else END_OF_INPUT

    async def serve(self, channel: Channel) -> None:
        """Answer each request on the stdin channel, until cancelled."""
        while True:
            message = await channel.get_msg()
            if message["msg_type"] == "input_request":
                content = {"value": self.next_answer()}
                channel.send(channel.session.msg("input_reply", content, parent=message))
