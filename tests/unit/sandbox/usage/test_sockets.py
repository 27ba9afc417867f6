"""Ports for kernels that listen on TCP."""

from __future__ import annotations

import os
import random
import socket
from pathlib import Path

import pytest

from safe_exec.sandbox.usage import sockets

RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def test_ports_are_free_and_out_of_the_reach_of_outgoing_connections() -> None:
    first = int(RANGE.read_text().split()[0])
    found = sockets.quiet_ports(5)
    assert len(set(found)) == 5
    assert all(sockets.LOWEST_PORT <= port < first for port in found)
    for port in found:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", port))


def test_a_port_that_somebody_listens_on_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        free = sockets.quiet_ports(2)
        monkeypatch.setattr(random, "sample", lambda *_: [port, *free])
        assert sockets.quiet_ports(2) == free


def test_where_there_is_no_such_range_the_choice_is_left_to_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "range").write_text("1024\t65535\n")
    monkeypatch.setattr(sockets, "RANGE", tmp_path / "range")
    assert sockets.quiet_ports(5) == []
    monkeypatch.setattr(sockets, "RANGE", tmp_path / "none")
    assert sockets.quiet_ports(5) == []


@pytest.mark.parametrize(
    ("family", "host", "shown"),
    [(socket.AF_INET, "127.0.0.1", "127.0.0.1:{}"), (socket.AF_INET6, "::1", "[::1]:{}")],
)
def test_sockets_that_listen(family: socket.AddressFamily, host: str, shown: str) -> None:
    with socket.socket(family) as server, socket.socket(family) as other:
        server.bind((host, 0))
        server.listen()
        port = server.getsockname()[1]
        targets = [os.readlink(f"/proc/self/fd/{sock.fileno()}") for sock in (server, other)]
        assert sockets.listening(os.getpid(), targets) == (shown.format(port),)
        assert sockets.listening(os.getpid(), [targets[1], "pipe:[1]"]) == ()
        assert sockets.listens(port)
    assert not sockets.listens(port)
