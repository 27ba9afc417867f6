"""The runner's end of a keeper, with a keeper that the test plays itself."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import cast

import pytest

from safe_exec.errors import SandboxError
from safe_exec.keeper import protocol
from safe_exec.sandbox.keeper_process import KeeperProcess
from safe_exec.sandbox.sandbox import Sandbox


class PlayedKeeper:
    """Its end of the socket is ``end``; it notes what is done to its process."""

    def __init__(self) -> None:
        self.control, self.end = socket.socketpair()
        self.pid: int | None = None
        self.is_killed = False

    def attach_pid(self, pid: int) -> None:
        self.pid = pid

    def kill(self) -> None:
        self.is_killed = True

    def wait(self) -> None:
        self.end.close()


@pytest.fixture
def keeper() -> Iterator[PlayedKeeper]:
    played = PlayedKeeper()
    yield played
    played.end.close()
    played.control.close()


def sandbox_of(keeper: PlayedKeeper) -> Sandbox:
    return Sandbox("0" * 12, keeper=cast("KeeperProcess", keeper))


def test_messages_set_the_state(keeper: PlayedKeeper) -> None:
    sandbox = sandbox_of(keeper)
    for message in (
        protocol.Ready(pid=11),
        protocol.Spawned(pid=12),
        protocol.Fault(text="a", at=1.0),
        protocol.Fault(text="b", at=2.0),
        protocol.SignalReceived(number=15),
    ):
        keeper.end.sendall(protocol.encode(message))
    sandbox.process_messages()
    assert (sandbox.keeper_pid, keeper.pid, sandbox.kernel_pid) == (11, 11, 12)
    assert (sandbox.fault_text, sandbox.fault_at, sandbox.signals_to_keeper) == ("ab", 2.0, [15])


@pytest.mark.parametrize("line", [b"rubbish\n", b'{"type": "exited"}\n', b'{"type": "finish"}\n'])
def test_a_keeper_that_cannot_be_understood_is_killed(keeper: PlayedKeeper, line: bytes) -> None:
    sandbox = sandbox_of(keeper)
    keeper.end.sendall(protocol.encode(protocol.Spawned(pid=12)) + line)
    sandbox.process_messages()
    assert keeper.is_killed and "cannot be read" in sandbox.troubles[0]
    assert sandbox.exit is not None and sandbox.exit.status is None
    with pytest.raises(SandboxError, match="did not start"):
        sandbox.wait_ready()


def test_a_kernel_that_was_not_started_ends_the_sandbox(keeper: PlayedKeeper) -> None:
    sandbox = sandbox_of(keeper)
    keeper.end.sendall(protocol.encode(protocol.Failed(message="no group", command_failed=False)))
    keeper.end.sendall(protocol.encode(protocol.CleanupResult()))
    with pytest.raises(SandboxError, match="cannot be built: no group"):
        sandbox.await_kernel()
    assert sandbox.cleanup == protocol.CleanupResult() and not keeper.is_killed
