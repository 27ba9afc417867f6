"""Messages between runner and keeper: what one end encodes the other decodes, and nothing else passes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from safe_exec.keeper import protocol
from safe_exec.keeper.child import KernelCommand, LandlockRules, Walls
from safe_exec.keeper.protocol import (
    BwrapSetup,
    CgroupSetup,
    Delegation,
    DiscardedGroup,
    DiscardedPlace,
    FaultingThread,
    LimitedDisk,
    ProcessAtFault,
    ProtocolError,
    Spawn,
)

PLACE = DiscardedPlace(name="~", kind="home", path="/home/me", skip=("venv",))
SPAWN = Spawn(
    command=KernelCommand(
        argv=("python", "{page}"),
        env={"A": "\udce9\n"},
        cwd="/srv",
        rlimits=((7, 64, 128),),
        open_files_soft=64,
        walls=Walls(
            uid=1000,
            drop_capabilities=True,
            landlock=LandlockRules(readable=("/",), writable=(), tcp=False),
            seccomp="AAAA",
        ),
    ),
    descriptor_names=("page",),
    dump_signal=40,
    stack_before=("memory",),
    cgroup=CgroupSetup(
        delegation=Delegation(group="/g", leaf="/g/leaf", controllers=("memory",)),
        dirs=("/g/run",),
        writes=(("/g/run/memory.max", "1"),),
        memory_limit=1,
    ),
    mounts=({"kind": "tmpfs", "target": "/tmp", "options": ""},),
    bwrap=BwrapSetup(
        argv=("/usr/bin/bwrap",),
        python="/usr/bin/python3",
        package_root="/srv",
        sockets="/run/x",
        disk=LimitedDisk("/run/x/disk", "/srv", 1 << 20, 1024, write_back=True, owner=None),
        discarded=(PLACE,),
        devices=("/dev/null",),
    ),
    discarded=(PLACE,),
    cleanup_if_runner_dies=("/tmp/x",),
)
EXITED = protocol.Exited(
    at=1.5,
    status=9,
    reason="memory",
    cpu_seconds=None,
    resident_peak=None,
    orphans_peak=5 << 20,
    counters={"/g/run/memory.events": None, "/g/run/memory.peak": "5"},
    fault_text="Fatal Python error",
    fault=ProcessAtFault(
        at=1.25,
        stack_bytes=None,
        stack_limit=8 << 20,
        thread=FaultingThread(
            task=12,
            main=True,
            faulted=True,
            divides=False,
            address=None,
            address_access=None,
            stack_pointer=5,
            stack=(1, 9),
            stack_is_main=True,
            instruction=7,
            library="/lib/x.so",
            library_offset=3,
        ),
    ),
    caught_signals=1 << 10,
    stderr="",
    bursts=((1.0, "killed"),),
    oomd_killed=None,
    disk_free=0,
)


@pytest.mark.parametrize(
    "message",
    [
        protocol.Note(path="/run/note"),
        protocol.SendSignal(number=2, group=True),
        protocol.Kill(reason="memory"),
        protocol.AddCleanup(cleanup_if_runner_dies=("/tmp/a",)),
        protocol.Finish(),
    ],
)
def test_what_the_runner_sends_the_keeper_reads(message: protocol.ToKeeper) -> None:
    line = protocol.encode(message)
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    assert protocol.decode(line, protocol.TO_KEEPER) == message


def test_a_spawn_arrives_with_all_its_parts() -> None:
    received = protocol.decode(protocol.encode(SPAWN), protocol.TO_KEEPER)
    assert isinstance(received, Spawn)
    assert received._replace(command=SPAWN.command) == SPAWN
    assert protocol.as_plain(received.command) == protocol.as_plain(SPAWN.command)
    assert received.command.walls is not None and received.command.walls.landlock is not None


@pytest.mark.parametrize(
    "message",
    [
        protocol.Ready(pid=1),
        protocol.Spawned(pid=2),
        protocol.Failed(message="no", command_failed=True),
        protocol.Fault(text="x", at=0.5),
        protocol.SignalReceived(number=15),
        protocol.Trouble(message="x"),
        EXITED,
        EXITED._replace(fault=None),
        protocol.Discarded(groups=(DiscardedGroup("~", "x", 1, 5),), files=1, is_complete=False),
        protocol.CleanupResult(surviving_pids=(5,), remaining_paths=("/x",)),
    ],
)
def test_what_the_keeper_sends_the_runner_reads(message: protocol.ToRunner) -> None:
    assert protocol.decode(protocol.encode(message), protocol.TO_RUNNER) == message


def test_a_message_of_the_other_direction_is_refused() -> None:
    with pytest.raises(ProtocolError, match="direction"):
        protocol.decode(protocol.encode(protocol.Ready(pid=1)), protocol.TO_KEEPER)


KILL: dict[str, Any] = {"type": "kill", "reason": "memory"}
SIGNAL: dict[str, Any] = {"type": "signal", "number": 2, "group": False}


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b"no json", "not JSON"),
        (b"\xff", "not JSON"),
        ([1], "direction"),
        ({}, "direction"),
        ({"type": "nonesuch"}, "direction"),
        ({"type": ["kill"]}, "direction"),
        ({**KILL, "reason": None}, r"kill\.reason: .*str"),
        ({**KILL, "more": 1}, "kill: unknown or missing fields: more"),
        ({"type": "kill"}, "kill: unknown or missing fields: reason"),
        ({**SIGNAL, "number": True}, r"signal\.number"),
        ({**SIGNAL, "number": 2.0}, r"signal\.number"),
        ({**SIGNAL, "group": 1}, r"signal\.group"),
        ({"type": "add_cleanup", "cleanup_if_runner_dies": "/x"}, "a list expected"),
        ({"type": "add_cleanup", "cleanup_if_runner_dies": ["/x", 1]}, r"\[1\]"),
    ],
)
def test_what_is_no_message_is_refused_by_its_field(line: Any, text: str) -> None:
    data = line if isinstance(line, bytes) else json.dumps(line).encode()
    with pytest.raises(ProtocolError, match=text):
        protocol.decode(data, protocol.TO_KEEPER)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"rlimits": [[1, 2]]}, r"spawn\.command\.rlimits\[0\]: 3 items"),
        ({"env": {"A": 1}}, r"spawn\.command\.env\.A"),
        ({"env": []}, r"spawn\.command\.env"),
        ({"walls": {"uid": 1}}, r"spawn\.command\.walls: unknown or missing"),
    ],
)
def test_a_field_deep_inside_is_named(change: dict[str, Any], text: str) -> None:
    message = json.loads(protocol.encode(SPAWN))
    message["command"].update(change)
    with pytest.raises(ProtocolError, match=text):
        protocol.decode(json.dumps(message).encode(), protocol.TO_KEEPER)


def test_lines_come_in_any_pieces() -> None:
    data = protocol.encode(protocol.Finish()) + protocol.encode(protocol.Kill(reason="disk"))
    for size in (1, 7, len(data)):
        lines = protocol.LineBuffer()
        pieces = [data[start : start + size] for start in range(0, len(data), size)]
        received = [
            protocol.decode(line, protocol.TO_KEEPER)
            for piece in pieces
            for line in lines.feed(piece)
        ]
        assert received == [protocol.Finish(), protocol.Kill(reason="disk")]
