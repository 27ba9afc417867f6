"""Copies that a kernel leaves behind, as the runner receives them: the newest is kept."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any, ClassVar, Self

import pytest

from safe_exec.kernel.agent_facts import AgentFacts
from safe_exec.kernel.cell_code import IDENTITY, Source
from safe_exec.kernel.snapshots import KernelSnapshots


class Agent:
    """The agent's end of the channel."""

    def __init__(self, facts: socket.socket) -> None:
        _, (descriptor,), _, _ = socket.recv_fds(facts, 100, 1)
        self.channel = socket.socket(fileno=descriptor)
        self.settings = json.loads(self.channel.recv(1000))
        self.copies: list[socket.socket] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for sock in (self.channel, *self.copies):
            sock.close()

    def leave(self, **fields: Any) -> socket.socket:
        """Announce a copy; return its end of its channel."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            socket.send_fds(self.channel, [json.dumps(fields).encode()], [theirs.fileno()])
        self.copies.append(ours)
        return ours


def begun(snapshots: KernelSnapshots, spared: list[int | None]) -> Agent:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        snapshots.begin(ours, spared.append)
        return Agent(theirs)


def has_ended(channel: socket.socket) -> bool:
    channel.settimeout(5)
    return channel.recv(10) == b""


def test_the_newest_copy_replaces_the_one_before() -> None:
    async def scenario() -> None:
        spared: list[int | None] = []
        snapshots = KernelSnapshots(["/folder"], ["/folder/nb.out.ipynb"])
        with begun(snapshots, spared) as agent:
            assert agent.settings == {"watch": ["/folder"], "except": ["/folder/nb.out.ipynb"]}
            first, second = agent.leave(snapshot="a", pid=11), agent.leave(snapshot="b", pid=12)
            snapshots.take()
            assert has_ended(first)
            newest = snapshots.hand_over()
            assert newest is not None
            assert (newest.request_id, newest.pid, spared) == ("b", 12, [11, 12])
            newest.channel.close()
            assert has_ended(second)

    asyncio.run(scenario())


def test_a_state_that_cannot_be_copied_keeps_the_copy_before_it() -> None:
    async def scenario() -> None:
        snapshots = KernelSnapshots([], [])
        with begun(snapshots, []) as agent:
            agent.leave(snapshot="a", pid=11)
            agent.channel.send(b'{"unbranchable": "threads"}')
            newest = snapshots.hand_over()
        assert newest is not None and newest.request_id == "a"
        assert snapshots.trouble == "threads"
        newest.channel.close()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "fields",
    [{"snapshot": "a"}, {"pid": 3}, {"snapshot": 1, "pid": 3}, {"snapshot": "a", "pid": "3"}],
)
def test_nonsense_is_no_copy(fields: dict[str, Any]) -> None:
    async def scenario() -> None:
        snapshots = KernelSnapshots([], [])
        with begun(snapshots, []) as agent:
            copy = agent.leave(**fields)
            snapshots.take()
            assert snapshots.newest is None and has_ended(copy)
            snapshots.close()

    asyncio.run(scenario())


def test_close_ends_the_copies() -> None:
    async def scenario() -> None:
        snapshots = KernelSnapshots([], [])
        with begun(snapshots, []) as agent:
            copy = agent.leave(snapshot="a", pid=11)
            snapshots.take()
            snapshots.close()
            assert has_ended(copy)
        assert snapshots.hand_over() is None

    asyncio.run(scenario())


class Client:
    cells_by_request: ClassVar = {"first": 0, "second": 2}


def test_a_copy_knows_the_cells_before_the_one_that_failed() -> None:
    earlier = AgentFacts()
    earlier.client = Client()  # type: ignore[assignment]
    for number, request in ((1, "first"), (2, "second")):
        earlier._note({"cell": number, "msg_id": request})
        earlier.code.add(f"cell-{number}.py", Source(cell=number, line_map=IDENTITY))
    copy = AgentFacts()
    copy.follow(earlier, 2)
    # The number of the failed cell belongs to the first cell that the copy runs.
    assert [copy.index_of(number) for number in (1, 2)] == [0, None]
    assert copy.code.locate("<module>", 1, "cell-1.py") == (0, 1)
    assert copy.code.locate("<module>", 1, "cell-2.py") == (None, 1)
