"""Unix sockets in front of the TCP ports of a program that starts to listen later."""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import safe_exec.agent
from tests.support import wait_until

FORWARDER = Path(safe_exec.agent.__file__).parent / "tcp_forwarder.py"

# Echoes one connection until its end, sends a last word, and exits.
ECHO = """
import socket, sys, time
time.sleep(0.2)
server = socket.create_server(("127.0.0.1", int(sys.argv[1])))
peer = server.accept()[0]
while data := peer.recv(1 << 16):
    peer.sendall(data)
peer.sendall(b"end")
"""


@pytest.fixture
def prefix() -> Iterator[str]:
    # A short path: addresses of Unix sockets have at most 108 bytes.
    with tempfile.TemporaryDirectory(prefix="f-") as folder:
        yield f"{folder}/k"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def test_bytes_go_both_ways_and_the_end_too(prefix: str) -> None:
    port = free_port()
    argv = [sys.executable, "-I", str(FORWARDER), prefix, str(port), "--", sys.executable, "-c"]
    with subprocess.Popen([*argv, ECHO, str(port)]) as program:
        path = f"{prefix}-{port}"
        wait_until(lambda: Path(path).exists(), 20, "it listens")
        with socket.socket(socket.AF_UNIX) as sock:
            wait_until(lambda: sock.connect_ex(path) == 0, 20, "it accepts")
            data = bytes(range(256)) * 20_000  # more than all buffers hold

            def send() -> None:
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)

            sender = threading.Thread(target=send)
            sender.start()
            received = bytearray()
            while piece := sock.recv(1 << 16):
                received += piece
            sender.join()
        assert bytes(received) == data + b"end"
        assert program.wait(20) == 0


def test_the_program_has_no_child(prefix: str) -> None:
    code = "import os\ntry:\n    os.wait()\nexcept ChildProcessError:\n    print('none')"
    argv = [sys.executable, "-I", str(FORWARDER), prefix, str(free_port()), "--"]
    with subprocess.Popen([*argv, sys.executable, "-c", code], stdout=subprocess.PIPE) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == b"none\n"
