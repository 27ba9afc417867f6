"""The runner's side of snapshots: which one is the latest, and why there is none."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Callable, Coroutine
from typing import Any, Self

import pytest

from safe_exec.keeper import takeover
from safe_exec.kernel.restore_points import (
    ENDED,
    NEVER_TAKEN,
    OUTDATED,
    STARTING,
    RestorePoints,
    Snapshot,
)
from safe_exec.model.limits import LimitName

SO_PASSCRED = 16
ASLEEP = json.dumps({"asleep": 1}).encode()


class Sandbox:
    """Records what the keeper is told; ``sleep`` stands in for an agent's snapshot."""

    def __init__(self) -> None:
        self.told: list[int] = []
        self.lost = 0
        self.ends: list[socket.socket] = []
        self.suspended: list[str] = []
        self.snapshots = RestorePoints(self.told.append, self._lose)
        self.snapshots.on_suspended = self.suspended.append

    def _lose(self) -> None:
        self.lost += 1

    def sleep(self, before: int) -> socket.socket:
        """A sleeping snapshot from before a cell, which this process plays."""
        theirs = self.fork(before)
        theirs.send(ASLEEP)
        return theirs

    def fork(self, before: int) -> socket.socket:
        """A snapshot that does not sleep yet."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setsockopt(socket.SOL_SOCKET, SO_PASSCRED, 1)
        self.snapshots.take({"restore_point": True, "before": before}, [ours.fileno()])
        ours.close()
        self.ends.append(theirs)
        return theirs

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.snapshots.close()
        for end in self.ends:
            end.close()


@pytest.fixture
def run() -> Callable[[Coroutine[Any, Any, None]], None]:
    return asyncio.run


def test_the_system_names_the_process(run: Any) -> None:
    async def main() -> None:
        with Sandbox() as box:
            theirs = box.sleep(3)
            latest = box.snapshots.latest(3)
            assert isinstance(latest, Snapshot) and latest.pid == os.getpid()
            assert box.told == [os.getpid()]
            assert box.snapshots.latest(4) == OUTDATED
            box.snapshots.close()
            assert box.told == [os.getpid(), 0] and box.lost == 0
            assert theirs.recv(1) == b""
            theirs.close()

    run(main())


def test_only_the_latest_is_kept(run: Any) -> None:
    async def main() -> None:
        with Sandbox() as box:
            first, second = box.sleep(1), box.sleep(2)
            assert isinstance(box.snapshots.latest(2), Snapshot)
            with pytest.raises(ConnectionResetError):
                # Its own message was not read yet.
                first.recv(1)
            first.close()
            second.close()
            box.snapshots.look()
            assert box.snapshots.latest(2) == ENDED
            assert box.lost == 1 and box.told[-1] == 0

    run(main())


def test_a_snapshot_that_does_not_sleep_yet_is_waited_for(run: Any) -> None:
    async def main() -> None:
        with Sandbox() as box:
            theirs = box.fork(2)
            assert box.snapshots.latest(2) == STARTING
            waiting = asyncio.ensure_future(box.snapshots.asleep(2))
            await asyncio.sleep(0)
            assert not waiting.done()
            theirs.send(ASLEEP)
            assert isinstance(await waiting, Snapshot)

    run(main())


def test_a_snapshot_that_ends_before_it_sleeps_is_not_waited_for(run: Any) -> None:
    async def main() -> None:
        with Sandbox() as box:
            box.fork(2).close()
            assert await box.snapshots.asleep(2) == ENDED

    run(main())


def test_why_there_is_none(run: Any) -> None:
    async def main() -> None:
        with Sandbox() as box:
            assert box.snapshots.latest(1) == NEVER_TAKEN
            theirs = box.sleep(1)
            box.snapshots.take({"restore_point": None, "why": "threads", "before": 2}, [])
            assert box.snapshots.latest(2) == "threads"
            assert box.snapshots.latest(3) == OUTDATED
            theirs.close()
            for _ in range(2):
                fact = {"restore_point": None, "why": "too dear", "before": 3, "suspended": True}
                box.snapshots.take(fact, [])
            assert box.suspended == ["too dear"]
            assert box.snapshots.latest(9) == "too dear"

    run(main())


def test_a_forged_descriptor_is_refused(run: Any) -> None:
    async def main() -> None:
        with Sandbox() as box:
            reading, writing = os.pipe()
            with pytest.raises(OSError, match="socket"):
                box.snapshots.take({"restore_point": True, "before": 1}, [reading])
            os.close(reading)
            os.close(writing)

    run(main())


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ({"restored": True}, ""),
        ({"failed": "TypeError: no"}, "TypeError: no"),
        (None, "the snapshot ended when it was woken"),
    ],
)
def test_waking(run: Any, answer: dict[str, Any] | None, expected: str) -> None:
    async def main() -> None:
        with Sandbox() as box:
            theirs = box.sleep(1)
            latest = box.snapshots.latest(1)
            assert isinstance(latest, Snapshot)
            woken = asyncio.ensure_future(box.snapshots.wake(latest, tracer=5))
            await asyncio.sleep(0)
            assert json.loads(theirs.recv(4096)) == {"wake": True, "tracer": 5}
            if answer is not None:
                theirs.send(json.dumps(answer).encode())
            theirs.close()
            assert await woken == expected

    run(main())


@pytest.mark.parametrize(
    ("limit", "own", "expected"),
    [
        (LimitName.MEMORY, 1 << 10, False),
        (LimitName.MEMORY, 1 << 29, True),
        (LimitName.MEMORY, None, True),
        (LimitName.PROCESSES, 0, True),
        (LimitName.CPU_TIME, 0, False),
    ],
)
def test_it_ends_for_a_limit_that_it_may_have_exceeded(
    run: Any, monkeypatch: pytest.MonkeyPatch, limit: LimitName, own: int | None, expected: bool
) -> None:
    async def main() -> None:
        with Sandbox() as box:
            box.snapshots.memory_limit = 1 << 30
            theirs = box.sleep(1)
            box.snapshots.look()
            monkeypatch.setattr(takeover, "own_bytes", lambda _pid: own)
            assert box.snapshots.makes_room(limit) is expected
            # Once: the next look finds the limit exceeded by the kernel itself.
            assert not box.snapshots.makes_room(limit) or not expected
            assert (box.snapshots.latest(1) == ENDED) is expected
            theirs.close()

    run(main())
